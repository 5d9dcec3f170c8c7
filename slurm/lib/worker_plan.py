"""Which further nodes has a run's runtime, and which of them does its training wait for? Pure.

With RUNTIME_MODE=array node 0 is the runtime job, and nodes 1 to RUNTIME_NODES - 1 are tasks of job arrays: the tasks
without which RUNTIME_MIN_SLOTS cannot be had are one array, whose start the training job waits for; the rest is a
second array, which a person can take out of the queue in one word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slurm.lib.run_record import MORE_WORKERS, WORKERS
from slurm.lib.sandbox_room import sandbox_room
from slurm.lib.settings import Settings


@dataclass(frozen=True)
class Fleet:
    """A runtime's further nodes: those that the training waits for, and the rest, by the numbers of their tasks."""

    needed: tuple[int, ...] = ()
    more: tuple[int, ...] = ()

    @property
    def by_kind(self) -> dict[str, tuple[int, ...]]:
        """The arrays that there are."""
        arrays = {WORKERS: self.needed, MORE_WORKERS: self.more}
        return {kind: tasks for kind, tasks in arrays.items() if tasks}


def has_head(settings: Settings) -> bool:
    """Whether the runtime is a head with several nodes."""
    return settings.runtime_nodes > 1 and settings.skyrl_backend == "slurm"


def has_arrays(settings: Settings) -> bool:
    """Whether its further nodes are tasks of job arrays."""
    return has_head(settings) and settings.runtime_mode == "array"


def slots_wanted(settings: Settings) -> int:
    """Slots that the nodes which have joined must have before the training begins: never more than all nodes have."""
    room = sandbox_room(settings)
    return min(room.min_slots, room.all_slots)


def fleet(settings: Settings) -> Fleet:
    """The tasks of a launch's worker arrays."""
    if not has_arrays(settings):
        return Fleet()
    first = sandbox_room(settings).nodes_for(slots_wanted(settings))  # with node 0, the runtime job's own
    return Fleet(tuple(range(1, first)), tuple(range(first, settings.runtime_nodes)))


def array_option(tasks: Sequence[int]) -> str:
    """sbatch's ``--array`` for tasks with consecutive numbers."""
    return f"--array={tasks[0]}-{tasks[-1]}" if tasks[1:] else f"--array={tasks[0]}"


def started(runtime: str, workers: str, tasks: Sequence[int]) -> str:
    """The dependency on the start of a runtime job and of single tasks of an array.

    A task by itself, since ``after:<array>`` waits for all of them, which may be more than those here.
    """
    return ":".join(["after", runtime, *(f"{workers}_{task}" for task in tasks)])
