"""Can VERL train on MIG slices? On one; several of one card are ranks that NCCL refuses before 2.30. Pure.

Sources: NCCL issue 1716 and the NCCL user guide, "Using MIG instances" (2.32; nothing of it in 2.29). Several ranks on
one card are refused ("Duplicate GPU detected") until NCCL_MULTI_RANK_GPU_ENABLE came, experimental, with 2.30.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from slurm.lib.preflight.finding import Finding, Level
from slurm.lib.settings import Settings

CHECK = "mig"
SEVERAL_RANKS_A_CARD = (2, 30)  # NCCL's first version that knows NCCL_MULTI_RANK_GPU_ENABLE
SMALL_MODEL = "Qwen/Qwen2.5-Coder-0.5B-Instruct"  # what one slice of 20 GB trains
FIX = (
    f"set GPUS_PER_NODE=1 (TP_SIZE=1, SP_SIZE=1) and a MODEL that one slice holds, such as {SMALL_MODEL} in 20 GB; or "
    "take whole GPUs"
)
_PROFILE = re.compile(r"(^|[_.-])(mig($|[_.-])|\d+g[._]\d+gb)", re.IGNORECASE)


def is_mig_type(gpu_type: str) -> bool:
    """Whether a GPU type of Slurm names a MIG profile: ``1g.20gb``, ``a100_1g.5gb``, ``nvidia_h100_3g.40gb``."""
    return bool(_PROFILE.search(gpu_type))


def slices(visible: str) -> tuple[str, ...]:
    """The MIG slices in CUDA_VISIBLE_DEVICES."""
    return tuple(name for entry in visible.split(",") if (name := entry.strip()).startswith("MIG-"))


def mig_findings(settings: Settings, there: Collection[str] = ()) -> list[Finding]:
    """What can be told before queueing; nothing for a trainer other than VERL.

    ``there``: the types of GPUs in GPU_PARTITION, which count where GPU_TYPE is not set and all are slices.
    """
    ranks = settings.gpu_nodes * settings.gpus_per_node
    kinds = [settings.gpu_type] if settings.gpu_type else sorted(there)
    if settings.training_command or ranks < 2 or not kinds or not all(map(is_mig_type, kinds)):
        return []
    shown = f"GPU_PARTITION={settings.gpu_partition} has MIG slices alone ({', '.join(kinds)})"
    sentence = (
        f"{f'GPU_TYPE={kinds[0]} is a MIG slice' if settings.gpu_type else shown}, and GPU_NODES × GPUS_PER_NODE = "
        f"{ranks} of them are as many ranks: NCCL before 2.30 refuses two on one card, later ones try it without "
        "direct transfers"
    )
    return [Finding(CHECK, Level.WARNING, sentence, FIX)]


def visible_findings(visible: str, cards: Mapping[str, str], nccl: tuple[int, ...] | None) -> list[Finding]:
    """What can be told on the node, from its CUDA_VISIBLE_DEVICES.

    ``cards``: slice → card, as far as it is known; ``nccl``: the version in skyrl-agent's environment. An error only
    where two slices are known to be of one card and NCCL is known to refuse that.
    """
    found = slices(visible)
    if len(found) < 2:
        return []
    known = [cards[name] for name in found if name in cards]
    if len(known) > len(set(known)) and nccl is not None and nccl < SEVERAL_RANKS_A_CARD:
        sentence = f"{len(found)} MIG slices, some of one card, which NCCL {_dotted(nccl)} refuses (2.30 is the first)"
        return [Finding(CHECK, Level.ERROR, sentence, FIX)]
    version = f"NCCL {_dotted(nccl)}" if nccl else "NCCL (version unknown)"
    sentence = f"{len(found)} MIG slices are as many ranks: {version} may refuse them, and has no direct transfers"
    return [Finding(CHECK, Level.WARNING, sentence, FIX)]


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))
