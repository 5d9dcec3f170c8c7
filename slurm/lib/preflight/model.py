"""Which model is it: its size, heads and context, from the config.json at hand? Nothing is downloaded."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slurm.lib.gpu_environment import changed, hugging_face
from slurm.lib.node_facts import look_at_caches
from slurm.lib.preflight.finding import Finding, error, estimate, warning
from slurm.lib.settings import Settings
from slurm.lib.trainer import agent_folder

ANSWERS = frozenset({"1", "true", "yes", "on"})


@dataclass(frozen=True)
class Model:
    """What config.json says. Numbers that it lacks are 0; ``parameters`` is counted from the layers' shapes."""

    parameters: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    hidden: int

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in bfloat16, over all layers."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Hugging Face's cache of models (huggingface_hub, "Environment variables")."""
    home = environment.get("HOME") or "/nonexistent"
    base = environment.get("HF_HOME") or f"{environment.get('XDG_CACHE_HOME') or f'{home}/.cache'}/huggingface"
    return Path(environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE") or f"{base}/hub")


def is_folder(name: str) -> bool:
    """Whether MODEL means a folder, as transformers decides: one that is there, or what can be no id of the hub."""
    return Path(name).is_dir() or name.startswith(("/", ".", "~")) or name.count("/") > 1


def config_file(name: str, environment: Mapping[str, str]) -> Path | None:
    """The config.json of a model: in its folder, else in the cache; None where there is none."""
    if is_folder(name):
        path = Path(name) / "config.json"
        return path if path.is_file() else None
    snapshots = cache_folder(environment) / f"models--{name.replace('/', '--')}"
    main = snapshots / "refs" / "main"
    commits = [main.read_text().strip()] if main.is_file() else []
    folders = [snapshots / "snapshots" / commit for commit in commits] or sorted(snapshots.glob("snapshots/*"))
    return next((folder / "config.json" for folder in folders if (folder / "config.json").is_file()), None)


def read_model(path: Path) -> Model:
    """``ValueError`` for what is no config.json."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError("not an object")
    return model_of({**config, **config.get("text_config", {})})


def model_of(config: Mapping[str, Any]) -> Model:
    """The model that a config.json of a decoder (Llama, Qwen, Mistral and their mixtures of experts) describes."""
    heads = int(config.get("num_attention_heads", 0))
    hidden, layers = int(config.get("hidden_size", 0)), int(config.get("num_hidden_layers", 0))
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or (hidden // heads if heads else 0))
    attention = 2 * hidden * head_dim * (heads + kv_heads)
    layer = attention + _feed_forward(config, hidden)
    embeddings = int(config.get("vocab_size", 0)) * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return Model(layers * layer + embeddings, layers, heads, kv_heads, head_dim, _context(config), hidden)


def _feed_forward(config: Mapping[str, Any], hidden: int) -> int:
    experts = int(config.get("num_experts") or config.get("num_local_experts") or 0)
    if experts:
        return 3 * hidden * int(config.get("moe_intermediate_size") or config.get("intermediate_size", 0)) * experts
    return 3 * hidden * int(config.get("intermediate_size", 0))


def _context(config: Mapping[str, Any]) -> int:
    """Positions, times the factor of a rope scaling that stretches them; vLLM derives its limit so."""
    positions = int(config.get("max_position_embeddings", 0))
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind in {"default", "llama3", "longrope", "mrope"}:
        return positions
    if kind == "yarn":
        positions = int(scaling.get("original_max_position_embeddings") or positions)
    return int(positions * float(scaling.get("factor") or 1))


def parameters_by_name(name: str) -> int:
    """The number that a name such as Qwen/Qwen3-1.7B or Mixtral-8x7B tells; 0 for a name that tells none."""
    match = re.search(r"(?:(\d+)x)?(\d+(?:\.\d+)?)B(?![a-z])", name.rpartition("/")[2], re.IGNORECASE)
    return int(int(match[1] or 1) * float(match[2]) * 1e9) if match else 0


@dataclass(frozen=True)
class ModelFacts:
    """What is known about MODEL here: its description, or why there is none.

    ``unread`` says what is wrong with the config.json that there is; ``offline`` that nothing can be downloaded.
    ``moved`` is the HF_HOME that the suite sets on the node, None where it leaves that alone. ``here_alone`` says that
    MODEL is a folder only as seen from where the launch is started.
    """

    model: Model | None
    folder: bool
    unread: str = ""
    offline: bool = False
    moved: Path | None = None
    here_alone: bool = False


def look_at_model(settings: Settings, environment: Mapping[str, str]) -> ModelFacts:
    """Read the config.json at hand, from the cache that the node will use."""
    changes = hugging_face(settings, look_at_caches(settings, environment), environment) if settings.cache_dir else {}
    environment, home = changed(environment, changes), changes.get("HF_HOME")
    offline = any(environment.get(name, "").lower() in ANSWERS for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    folder = is_folder(settings.model)
    facts = ModelFacts(None, folder, "", offline, Path(home) if home else None, _here_alone(settings))
    named = os.path.expanduser(settings.model) if folder else settings.model  # noqa: PTH111  Path's raises for no user
    path = config_file(named, environment)
    if path is None:
        return facts
    try:
        return replace(facts, model=read_model(path))
    except (ValueError, TypeError, AttributeError) as problem:
        return replace(facts, unread=f"{path}: {problem}")


def _here_alone(settings: Settings) -> bool:
    """Not absolute, since it does not begin like a path, and not below skyrl-agent, where the trainer starts."""
    name = Path(settings.model)
    return not re.match(r"[/.~]", settings.model) and name.is_dir() and not (agent_folder(settings) / name).is_dir()


def model_findings(settings: Settings, facts: ModelFacts) -> list[Finding]:
    """Heads and context against TP_SIZE, SP_SIZE and lengths, or why they cannot be compared."""
    if facts.here_alone:
        sentence = f"MODEL={settings.model} is a folder here, but VERL would take it for a name of the hub"
        return [error("model", sentence, f"write ./{settings.model}")]
    if facts.model is None:
        return [_unknown(settings, facts)]
    return [*_head_findings(settings, facts.model), *_context_findings(settings, facts.model)]


def _unknown(settings: Settings, facts: ModelFacts) -> Finding:
    name = f"MODEL={settings.model}"
    if settings.model.startswith(("https://", "http://")):
        address = settings.model.partition("://")[2].partition("/")[2]
        return error("model", f"{name} is no name of a model", f"write {'/'.join(address.split('/')[:2])}")
    if facts.unread:
        return warning("model", f"{name}: cannot read {facts.unread}", "look at that file; download the model anew")
    if facts.folder:
        return error("model", f"{name}: no config.json in this folder", "name the folder that holds config.json")
    home = f"HF_HOME={shlex.quote(str(facts.moved))} " if facts.moved else ""
    fix = f"have it before the GPUs are waiting: {home}hf download {settings.model}"
    if facts.offline:
        return error("model", f"{name} is not in the cache, and HF_HUB_OFFLINE forbids to download it", fix)
    return estimate("model", f"{name} is not in the cache here, so heads and context are not compared", fix)


def _head_findings(settings: Settings, model: Model) -> list[Finding]:
    found = []
    tp, sp = settings.tp_size, settings.sp_size
    shape = f"MODEL={settings.model} has {model.heads} attention heads and {model.kv_heads} of keys and values"
    for name, number in (("TP_SIZE", tp), ("SP_SIZE", sp)):
        spread = model.kv_heads and (model.kv_heads % number == 0 or number % model.kv_heads == 0)
        if model.heads and (model.heads % number or not spread):
            found.append(error("model", f"{shape}, which {name}={number} does not divide", f"choose another {name}"))
    return found


def _context_findings(settings: Settings, model: Model) -> list[Finding]:
    longest = settings.max_prompt_length + settings.max_response_length
    asked = max((longest, "MAX_PROMPT_LENGTH + MAX_RESPONSE_LENGTH"), (settings.max_model_len, "MAX_MODEL_LEN"))
    if not model.context or asked[0] <= model.context:
        return []
    sentence = f"{asked[1]} = {asked[0]} tokens; MODEL={settings.model} was made for {model.context}"
    fix = "lower the lengths, or give the model a rope scaling in its config.json"
    return [error("model", sentence, fix)]
