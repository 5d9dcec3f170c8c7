"""Makes what VERL trains where there is no model and no data: a random model of a few thousand weights, its
tokenizer, and prompts.

Runs under the Python of VERL's environment: ``python -m local_verl.tiny FOLDER``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from local_verl.tasks import HIGHEST, SPECIAL_WORDS, WORDS, expected_output, question

SEED = 0
ROWS = 16
CHAT_TEMPLATE = (
    "{% for message in messages %}<user> {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def model_folder(folder: Path) -> Path:
    """Where the model and its tokenizer are."""
    return folder / "model"


def rows_file(folder: Path) -> Path:
    """Where the prompts are, in VERL's columns; the same ones train and validate."""
    return folder / "rows.parquet"


def rows() -> list[dict[str, object]]:
    """The prompts with what VERL's reward manager hands on, in the form of VERL's data sets."""
    return [
        {
            "data_source": "count",
            "prompt": [{"role": "user", "content": question(number)}],
            "ability": "code",
            "reward_model": {"style": "rule", "ground_truth": expected_output(number)},
            "extra_info": {"index": index},
        }
        for index, number in enumerate(row % (HIGHEST - 1) + 2 for row in range(ROWS))
    ]


def make_tokenizer(folder: Path) -> None:
    """A tokenizer with a token for each word of ``tasks.WORDS``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(WORDS)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL_WORDS[2:4]),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def make_model(folder: Path) -> int:
    """A Qwen2 with random weights, the same ones each time; returns how many."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(SEED)
    config = Qwen2Config(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=WORDS.index("<eos>"),
        pad_token_id=WORDS.index("<pad>"),
    )
    model = Qwen2ForCausalLM(config).to(torch.float32)
    model.save_pretrained(folder)
    return sum(weights.numel() for weights in model.parameters())


def make(folder: Path) -> None:
    """Make all of it below ``folder``."""
    import pandas

    model_folder(folder).mkdir(parents=True, exist_ok=True)
    make_tokenizer(model_folder(folder))
    weights = make_model(model_folder(folder))
    pandas.DataFrame(rows()).to_parquet(rows_file(folder))
    print(f"made a Qwen2 with {weights} random weights and {ROWS} prompts in {folder}", flush=True)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
