"""How much memory do training and inference need, on each GPU and each host? Lower bounds, pure.

With VERL's FSDP: parameters, gradients and two Adam moments in float32 are 16 bytes a parameter over all GPUs while the
optimizer steps, offloaded or not. The inference engine holds the weights in bfloat16 and keys and values of at least
one sequence of MAX_MODEL_LEN, over TP_SIZE GPUs, in its share of a GPU. Activations come on top.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from slurm.lib.preflight.finding import Finding, error, estimate, warning
from slurm.lib.preflight.mig import SMALL_MODEL, is_mig_type
from slurm.lib.preflight.model import ModelFacts, parameters_by_name
from slurm.lib.preflight.shape import world_size
from slurm.lib.preflight.words import size
from slurm.lib.settings import Settings, memory_bytes

G = 1024**3
UPDATE_BYTES, OFFLOADED_BYTES, WEIGHT_BYTES = 16, 12, 2  # a parameter
# Memory of GPUs by what Slurm calls them, in G, smallest and largest of the name (the vendor's data sheets).
GPUS = {
    "v100": (16, 32),
    "t4": (16, 16),
    "l4": (24, 24),
    "a10": (24, 24),
    "a30": (24, 24),
    "a40": (48, 48),
    "l40": (48, 48),
    "l40s": (48, 48),
    "a100": (40, 80),
    "h100": (80, 96),
    "gh200": (96, 144),
    "h200": (141, 141),
    "b200": (180, 192),
}


@dataclass(frozen=True)
class Need:
    """Bytes at least: on a GPU in updates, in a GPU's share for inference, on a host for what is offloaded."""

    update: float
    inference: float
    host: float
    resting: float


def gpu_memory(gpu_type: str) -> tuple[int, int] | None:
    """Smallest and largest memory in bytes of GPUs of this type; None for a type that is not known.

    A name that tells its gigabytes, as ``a100_3g.20gb`` does, is believed.
    """
    told = re.search(r"(\d+)gb", gpu_type.lower())
    if told:
        return int(told[1]) * G, int(told[1]) * G
    parts = re.split(r"[^a-z0-9]+", gpu_type.lower())
    known = next((GPUS[part] for part in parts if part in GPUS), None)
    return None if known is None else (known[0] * G, known[1] * G)


def parameters(settings: Settings, facts: ModelFacts) -> tuple[int, str]:
    """The model's parameters, and where the number is from; 0 where nothing tells."""
    if facts.model and facts.model.parameters:
        return facts.model.parameters, "config.json"
    return parameters_by_name(settings.model), "the model's name"


def needs(settings: Settings, facts: ModelFacts, count: int) -> Need:
    """What a model of so many parameters needs under these settings."""
    gpus = world_size(settings)
    cache = facts.model.kv_bytes_per_token * settings.max_model_len if facts.model else 0
    resting = (0 if settings.fsdp_param_offload else 4) + (0 if settings.fsdp_optimizer_offload else 8)
    offloaded = OFFLOADED_BYTES - resting
    return Need(
        update=UPDATE_BYTES * count / gpus,
        inference=(WEIGHT_BYTES * count + cache) / settings.tp_size,
        host=offloaded * count / settings.gpu_nodes,
        resting=resting * count / gpus,
    )


def memory_findings(settings: Settings, facts: ModelFacts) -> list[Finding]:
    """The needs against GPU_TYPE's and the hosts' memory."""
    count, source = parameters(settings, facts)
    if not count:
        sentence = f"MODEL={settings.model}: its number of parameters is not known here, so memory is not estimated"
        return [estimate("memory", sentence)]
    need = needs(settings, facts, count)
    return [*_host_findings(settings, need), *_gpu_findings(settings, need), _told(settings, need, count, source)]


def _told(settings: Settings, need: Need, count: int, source: str) -> Finding:
    share = settings.gpu_memory_utilization
    smallest = max(need.update, need.inference / share, need.resting / (1 - share))
    sentence = (
        f"{count / 1e9:.3g} billion parameters (from {source}): each GPU needs {size(need.update)} in updates and "
        f"{size(need.inference)} for inference, before activations; a GPU of less than {size(smallest)} cannot do"
    )
    assumed = "" if settings.gpu_type else " (compared with none: GPU_TYPE is not set)"
    return estimate("memory", sentence + assumed)


def _host_findings(settings: Settings, need: Need) -> list[Finding]:
    if settings.training_memory == "0" or need.host <= memory_bytes(settings.training_memory):
        return []
    sentence = (
        f"what is offloaded takes {size(need.host)} on each host, TRAINING_MEMORY={settings.training_memory} is less"
    )
    fix = f"raise TRAINING_MEMORY, or {_less(settings)}" if is_mig_type(settings.gpu_type) else ""
    return [error("memory", sentence, fix or "raise TRAINING_MEMORY or GPU_NODES, or choose a smaller MODEL")]


def _less(settings: Settings) -> str:
    """For MIG slices, of which more are no help: several are ranks that NCCL may refuse (``mig``)."""
    smaller = f"choose a smaller MODEL, such as {SMALL_MODEL}"
    return smaller if settings.model != SMALL_MODEL else "choose a smaller MODEL"


def _gpu_findings(settings: Settings, need: Need) -> list[Finding]:
    known = gpu_memory(settings.gpu_type)
    if known is None:
        return []
    return [*_update_findings(settings, need, known), *_inference_findings(settings, need, known)]


def _weighed(needed: float, known: tuple[int, int], sentence: str, fix: str) -> list[Finding]:
    """An error if no GPU of the type has so much, a warning if some have."""
    if needed > known[1]:
        return [error("memory", f"{sentence}, GPU_TYPE has {size(known[1])}", fix)]
    if needed > known[0]:
        return [warning("memory", f"{sentence}; some GPUs of this type have {size(known[0])}", fix)]
    return []


def _update_findings(settings: Settings, need: Need, known: tuple[int, int]) -> list[Finding]:
    fix = (
        f"{_less(settings)}, or larger slices"
        if is_mig_type(settings.gpu_type)
        else "use more GPUs, or a smaller MODEL"
    )
    sentence = f"an update takes {size(need.update)} on each GPU, without activations"
    share = settings.gpu_memory_utilization
    offload = "set FSDP_PARAM_OFFLOAD=true and FSDP_OPTIMIZER_OFFLOAD=true, or lower GPU_MEMORY_UTILIZATION"
    resting = f"{size(need.resting)} rest on each GPU beside GPU_MEMORY_UTILIZATION={share:g}"
    return _weighed(need.update, known, sentence, fix) or _weighed(need.resting / (1 - share), known, resting, offload)


def _inference_findings(settings: Settings, need: Need, known: tuple[int, int]) -> list[Finding]:
    share = settings.gpu_memory_utilization
    sentence = (
        f"weights and one sequence of MAX_MODEL_LEN={settings.max_model_len} take {size(need.inference)} on each GPU, "
        f"which GPU_MEMORY_UTILIZATION={share:g} makes {size(need.inference / share)}"
    )
    other = _less(settings) if is_mig_type(settings.gpu_type) else "raise TP_SIZE"
    return _weighed(need.inference / share, known, sentence, f"{other}, or lower MAX_MODEL_LEN")
