"""What the head was asked to be: one frozen object."""

from __future__ import annotations

from dataclasses import dataclass, field

from slurm_runtime.config import ServerConfig
from slurm_runtime.node_models import BEAT_S, PATIENCE_S


@dataclass(frozen=True)
class HeadConfig:
    """Times are seconds. ``string_patience_s`` and ``list_patience_s`` are those of the nodes.

    ``gather_s`` is how long the first requests wait for nodes that a head before this one knew; ``silence_s`` how long
    a node may say nothing.
    """

    api_key: str = field(repr=False)
    string_patience_s: float = ServerConfig.string_patience_s
    list_patience_s: float = ServerConfig.list_patience_s
    gather_s: float = 2 * BEAT_S
    silence_s: float = PATIENCE_S
