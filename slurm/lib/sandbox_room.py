"""How many sandboxes does a run open at once, and which share of the runtime node does each get? Pure.

SkyRL-agent starts batch × rollouts sandboxes before the first one runs, and none of them ends before (its dispatcher's
``max_parallel_agents`` bounds its workers, not the sandboxes that are alive; tried with the dispatcher itself). With
fewer slots the rest would wait for one until they are given up. So where only CPUs are short they are shared: each
sandbox gets less than CPUS_PER_WORKER, which is called overcommit and is said before the launch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from slurm.lib.settings import Settings, memory_bytes

SHARE_UNIT = 1_000_000  # shares are told to the server in millionths of a CPU


@dataclass(frozen=True)
class SandboxRoom:
    """The runtime's sandboxes: ``wanted`` at once by a step of VERL, 0 where a command of the user's decides.

    ``fitting`` have CPUS_PER_WORKER each, ``slots`` is what the server offers, with ``cpus_each`` CPUs.
    """

    wanted: int
    fitting: int
    slots: int
    cpus: int
    cpus_each: float

    @property
    def is_overcommitted(self) -> bool:
        """Whether a sandbox gets fewer CPUs than CPUS_PER_WORKER says."""
        return self.slots > self.fitting


def sandbox_room(settings: Settings, cpus: int | None = None) -> SandboxRoom:
    """The room on a node with ``cpus`` CPUs (default: CPUS_FOR_RUNTIME).

    MAX_PARALLEL_AGENTS bounds the slots, unless it only says over again what the CPUs allow: in the seed's dev
    configuration 4 stands beside 32 CPUs with 8 for each sandbox, and 8 sandboxes are wanted.
    """
    cpus = cpus or settings.cpus_for_runtime
    wanted = 0 if settings.training_command else settings.train_batch_size * settings.rollout_n
    fitting = max(1, math.floor(cpus / settings.cpus_per_worker + 1e-9))
    most = settings.max_parallel_agents
    slots = max(fitting, wanted)
    if most is not None and most != fitting:
        slots = min(slots, most)
    return SandboxRoom(wanted, fitting, slots, cpus, min(settings.cpus_per_worker, _share(cpus, slots)))


def _share(cpus: int, slots: int) -> float:
    """CPUs divided by slots, rounded down so that all slots fit."""
    return max(1, math.floor(cpus / slots * SHARE_UNIT)) / SHARE_UNIT


def memory_promised(settings: Settings, slots: int) -> int:
    """Bytes that all sandboxes together may take, by MEMORY_PER_WORKER."""
    return slots * memory_bytes(settings.memory_per_worker)
