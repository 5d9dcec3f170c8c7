"""How many sandboxes does a run open at once, on how many nodes, and which share of a node does each get? Pure.

SkyRL-agent starts batch × rollouts sandboxes before the first one runs, and none of them ends before (its dispatcher's
``max_parallel_agents`` bounds its workers, not the sandboxes that are alive; tried with the dispatcher itself). With
fewer slots the rest would wait for one until they are given up. So RUNTIME_NODES share them out, and where only CPUs
are short these are shared too: each sandbox gets less than CPUS_PER_WORKER, which is called overcommit and is said
before the launch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from slurm.lib.settings import Settings, memory_bytes

SHARE_UNIT = 1_000_000  # shares are told to the server in millionths of a CPU


@dataclass(frozen=True)
class SandboxRoom:
    """A run's sandboxes: ``wanted`` at once by a step of VERL, 0 where a command of the user's decides.

    On a node with ``cpus`` CPUs ``fitting`` have CPUS_PER_WORKER each, and ``slots`` is what its server offers, with
    ``cpus_each`` CPUs. ``in_full`` have their memory too. The run has ``nodes``, with ``slots_of_nodes``, the one that
    brings the head first. The training begins once nodes with ``min_slots`` have joined.
    """

    wanted: int
    fitting: int
    in_full: int
    slots: int
    cpus: int
    cpus_each: float
    slots_of_nodes: tuple[int, ...]
    min_slots: int

    @property
    def nodes(self) -> int:
        return len(self.slots_of_nodes)

    @property
    def all_slots(self) -> int:
        """Sandboxes that can exist at once, all nodes together."""
        return sum(self.slots_of_nodes)

    @property
    def is_overcommitted(self) -> bool:
        """Whether a sandbox gets fewer CPUs than CPUS_PER_WORKER says."""
        return self.slots > self.fitting

    @property
    def nodes_in_full(self) -> int:
        """The nodes on which each sandbox that is wanted has CPUS_PER_WORKER and MEMORY_PER_WORKER for itself."""
        return max(1, math.ceil(self.wanted / self.in_full))

    def nodes_for(self, slots: int) -> int:
        """The first nodes that have so many slots together; all of them where they have fewer."""
        return next((count for count in range(1, self.nodes) if self._of_first(count) >= slots), self.nodes)

    @property
    def first_slots(self) -> int:
        """The slots of the nodes that the training waits for."""
        return self._of_first(self.nodes_for(self.min_slots))

    def _of_first(self, count: int) -> int:
        return sum(self.slots_of_nodes[:count])


def sandbox_room(settings: Settings, cpus: int | None = None, node: int = 0) -> SandboxRoom:
    """The room of a run on nodes with ``cpus`` CPUs (default: CPUS_FOR_RUNTIME), as its node ``node`` sees it.

    MAX_PARALLEL_AGENTS bounds the slots of all nodes, unless it only says over again what a node's CPUs, or all nodes',
    allow: in the seed's dev configuration 4 stands beside 32 CPUs with 8 for each sandbox, and 8 sandboxes are wanted.
    """
    cpus = cpus or settings.cpus_for_runtime
    wanted = 0 if settings.training_command else settings.train_batch_size * settings.rollout_n
    fitting = max(1, math.floor(cpus / settings.cpus_per_worker + 1e-9))
    shares = _shared_out(settings, fitting, wanted)
    slots = shares[min(node, len(shares) - 1)]
    return SandboxRoom(
        wanted=wanted,
        fitting=fitting,
        in_full=min(fitting, _with_memory(settings) or fitting),
        slots=slots,
        cpus=cpus,
        cpus_each=min(settings.cpus_per_worker, _share(cpus, slots)),
        slots_of_nodes=shares,
        min_slots=settings.runtime_min_slots or wanted or slots,
    )


def _shared_out(settings: Settings, fitting: int, wanted: int) -> tuple[int, ...]:
    """The slots of each node: what fits, or its share of what is wanted; within the bound the first get one more."""
    nodes, most = settings.runtime_nodes, settings.max_parallel_agents
    each = max(fitting, math.ceil(wanted / nodes))
    if most is None or most in {fitting, nodes * fitting} or most >= nodes * each:
        return (each,) * nodes
    whole, rest = divmod(most, nodes)
    return tuple(max(1, whole + (node < rest)) for node in range(nodes))


def _with_memory(settings: Settings) -> int | None:
    """How many sandboxes have MEMORY_PER_WORKER for themselves on a node; None where the node's memory is not known."""
    if settings.runtime_memory == "0":
        return None
    return max(1, memory_bytes(settings.runtime_memory) // memory_bytes(settings.memory_per_worker))


def _share(cpus: int, slots: int) -> float:
    """CPUs divided by slots, rounded down so that all slots fit."""
    return max(1, math.floor(cpus / slots * SHARE_UNIT)) / SHARE_UNIT


def memory_promised(settings: Settings, slots: int) -> int:
    """Bytes that so many sandboxes together may take, by MEMORY_PER_WORKER."""
    return slots * memory_bytes(settings.memory_per_worker)
