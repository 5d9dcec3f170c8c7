"""The table of overrides: no key is missing, nothing of the bash suite is lost, and Hydra reads it."""

from __future__ import annotations

import inspect
import re
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from slurm.lib import settings as settings_module
from slurm.lib.config import load_config
from slurm.lib.settings import KEYS, Settings, hydra_overrides
from slurm.lib.verl_command import ELSEWHERE, ROWS, overrides
from slurm.lib.verl_versions import VerlVersion
from tests.test_hydra_grammar import PARSER, read_by_hydra

CONFIGS = Path(__file__).resolve().parent.parent / "slurm" / "config"


def settings_of(*words: str) -> Settings:
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/home/me"}
    now = datetime(2026, 3, 4, 5, 6, 7)
    return load_config(None, words, environment, CONFIGS, now, Path("/project"), cwd=Path("/here")).settings


# --- the table --------------------------------------------------------------------------------------------------------


def keys_of_section(title: str) -> set[str]:
    source = inspect.getsource(settings_module.Settings)
    section = source.partition(f"    # {title}\n")[2].partition("\n    # ")[0]
    return set(re.findall(r'setting\(\s*"([A-Z0-9_]+)"', section))


@pytest.mark.parametrize(("title", "example"), [("What VERL trains", "MODEL"), ("Data and results", "TRAIN_DATA")])
def test_every_key_of_verl_has_a_row_or_another_place(title: str, example: str) -> None:
    found = keys_of_section(title)
    assert example in found
    assert found - {key for row in ROWS for key in row.keys} - ELSEWHERE.keys() == set()


def test_rows_name_keys_that_exist_and_each_override_once() -> None:
    assert {key for row in ROWS for key in row.keys} | ELSEWHERE.keys() <= KEYS.keys()
    names = [row.name.lstrip("+") for row in ROWS]
    assert len(names) == len(set(names))
    assert all(row.source for row in ROWS)


# --- nothing of the bash suite is lost --------------------------------------------------------------------------------

# What its training job said for the default configuration with 8 GPUs, DATA_DIR=/d, CHECKPOINT_DIR=/c, ROLLOUT_DIR=/r.
BASH_SUITE = """
algorithm.adv_estimator=loop
data.train_files=/d/train.parquet
data.val_files=/d/validation.parquet
data.dataloader_num_workers=0
data.train_batch_size=64
data.max_prompt_length=8000
data.max_response_length=32768
data.filter_overlong_prompts=True
data.truncation=error
data.return_raw_chat=true
actor_rollout_ref.model.path=Qwen/Qwen3-8B
actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum
actor_rollout_ref.actor.optim.lr=1e-6
actor_rollout_ref.model.use_remove_padding=True
actor_rollout_ref.actor.ppo_mini_batch_size=64
actor_rollout_ref.actor.use_dynamic_bsz=False
actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1
actor_rollout_ref.actor.use_kl_loss=False
actor_rollout_ref.actor.kl_loss_coef=0.001
actor_rollout_ref.actor.kl_loss_type=low_var_kl
actor_rollout_ref.actor.entropy_coeff=0
actor_rollout_ref.actor.clip_ratio_high=0.28
actor_rollout_ref.model.enable_gradient_checkpointing=True
actor_rollout_ref.actor.fsdp_config.param_offload=True
actor_rollout_ref.actor.fsdp_config.optimizer_offload=True
actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=False
actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1
actor_rollout_ref.actor.ulysses_sequence_parallel_size=2
actor_rollout_ref.rollout.tensor_model_parallel_size=2
actor_rollout_ref.rollout.enforce_eager=True
actor_rollout_ref.rollout.free_cache_engine=True
actor_rollout_ref.rollout.name=vllm
actor_rollout_ref.rollout.mode=async
actor_rollout_ref.rollout.gpu_memory_utilization=0.8
actor_rollout_ref.rollout.max_model_len=32768
actor_rollout_ref.rollout.n=8
actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=1
actor_rollout_ref.ref.fsdp_config.param_offload=True
algorithm.use_kl_in_reward=False
algorithm.norm_adv_by_std_in_grpo=False
trainer.val_before_train=False
trainer.critic_warmup=0
trainer.logger=["console","wandb"]
trainer.project_name=p
trainer.experiment_name=e
trainer.n_gpus_per_node=8
trainer.nnodes=1
trainer.max_actor_ckpt_to_keep=10
trainer.save_freq=1
trainer.default_local_dir=/c/e
trainer.test_freq=20
trainer.total_epochs=15
trainer.rollout_data_dir=/r/train
trainer.validation_data_dir=/r/val
+skyrl_agent.task_yaml=./examples/run_verl/verl_oh.yaml
+skyrl_agent.num_trajectories=8
"""

# Where the bash suite was wrong: what is said in its place, and why.
DIFFERENT = {
    # Prompts and responses of the default lengths were cut: their sum is 40768.
    "actor_rollout_ref.rollout.max_model_len": 40768,
    # Ray's workers have another current folder than the trainer.
    "+skyrl_agent.task_yaml": "/project/SkyRL/skyrl-agent/examples/run_verl/verl_oh.yaml",
    # A validation of all rows at once wanted more sandboxes than there are slots.
    "data.val_batch_size": 512,
}


def test_the_defaults_are_those_of_the_bash_suite() -> None:
    given_ones = ("DATA_DIR=/d", "CHECKPOINT_DIR=/c", "ROLLOUT_DIR=/r", "GPUS_PER_NODE=8", "WANDB_PROJECT=p")
    settings = settings_of(*given_ones, "WANDB_EXPERIMENT=e")
    task = Path("/project/SkyRL/skyrl-agent/examples/run_verl/verl_oh.yaml")
    ours = dict(map(read_by_hydra, overrides(settings, Path("/c"), Path("/r"), task_yaml=task)))
    assert ours == {**dict(map(read_by_hydra, BASH_SUITE.split())), **DIFFERENT}


def test_what_a_known_verl_is_told_besides() -> None:
    def told(version: str, *words: str) -> set[str]:
        settings = settings_of(*words)
        plain = overrides(settings, Path("/c"), Path("/r"))
        found = overrides(settings, Path("/c"), Path("/r"), version=VerlVersion(version, "", Path("uv.lock")))
        return set(found) - set(plain)

    assert told("0.5.0") == {"ray_init.num_cpus=48"}
    assert told("0.6.1") == {"ray_kwargs.ray_init.num_cpus=48"}
    assert told("0.9.1") == {"ray_kwargs.ray_init.num_cpus=48", "trainer.use_v1=False"}
    assert told("0.5.0", "GPU_NODES=2") == set()  # VERL joins a Ray that has been told
    assert told("0.5.0", "RAY_CLUSTER=on") == set()
    assert told("7.0") == set()


# --- the user's own ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("", ()),
        ("a=1 +b.c=2 ++d=3 ~e", ("a=1", "+b.c=2", "++d=3", "~e")),
        ("a=1 '+b=[1, 2]'", ("a=1", "+b=[1, 2]")),
        ("\n a=1 b=2 \n", ("a=1", "b=2")),
        ("a=1\nb=2", ("a=1", "b=2")),
        ("a=1\n\n  # why\n  +b=[1, 2]\n~c\n", ("a=1", "+b=[1, 2]", "~c")),
        ("a=1\nb=two words", ("a=1", "b=two words")),
        ("a=1\nb='x, y=z'", ("a=1", "b='x, y=z'")),
        ("a=1\n'+b=[1, 2]'\n\"c='d e'\"", ("a=1", "+b=[1, 2]", "c='d e'")),
        (("a=1", "+b=[1, 2]", "c='d e'"), ("a=1", "+b=[1, 2]", "c='d e'")),
        ("hydra/launcher=x", ("hydra/launcher=x",)),
        ("a=", ("a=",)),
    ],
)
def test_overrides_of_the_user(raw: str | tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert hydra_overrides(raw) == expected
    for override in expected:
        PARSER.parse_override(override)


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ("+b=[1, 2]", r"2\] is no override"),
        ("trainer.nnodes", "trainer.nnodes is no override"),
        ("a=1\nb=2 c=3", "b=2 c=3 holds several overrides; write one in each line"),
        (("a=1\nb=2",), "must be one line"),
        ("a='", "cannot be split like a command line"),
        (("=1",), "=1 is no override"),
    ],
)
def test_what_is_no_override_is_said_at_once(raw: str | tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        hydra_overrides(raw)


NAME = st.from_regex(r"\+{0,2}[a-z]{1,5}(\.[a-z]{1,5}){0,2}", fullmatch=True)
LINE = st.text(st.characters(exclude_characters="\0\n", exclude_categories=["Cs"]))


@given(st.lists(st.builds(lambda name, value: f"{name}={value}", NAME, LINE), max_size=4))
def test_what_a_job_reads_back_is_what_was_launched(words: list[str]) -> None:
    try:
        hydra_overrides(tuple(words))
    except ValueError:  # a comma, which no launch takes
        reject()
    launched = Settings(verl_overrides=tuple(words))
    said = launched.as_environment().get("VERL_OVERRIDES", "")
    assert hydra_overrides(said) == tuple(words)


# --- folders are absolute ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("/models/a/", "/models/a"),
        ("./a", "/here/a"),
        ("../a", "/a"),
        ("~/a", "/home/me/a"),
        (".hidden/a", ".hidden/a"),
    ],
)
def test_a_model_that_is_a_folder(model: str, expected: str) -> None:
    assert settings_of(f"MODEL={model}").model == expected


@pytest.mark.parametrize("key", ["TRAIN_DATA", "VAL_DATA", "CHECKPOINT_DIR", "ROLLOUT_DIR"])
def test_data_and_results(key: str) -> None:
    settings = settings_of(f"{key}=x/y")
    assert getattr(settings, KEYS[key].attribute) == Path("/here/x/y")
