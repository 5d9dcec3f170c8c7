"""What does a start leave that the death of Podman's service cut off? Found here; the warden ends it.

The monitor of a container (conmon) outlives the service that started it, and with it the container's processes and
the forwarders of its port. Of a start that was cut off Podman does not know them: it takes the container for one that
never ran, and removes only that. ``suspects`` and ``strays`` are pure: a monitor of a sandbox that is not in Podman's
books, asked after the monitor was seen, is nobody's. One that is being started is in them before it has a monitor.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm_runtime.control import Control, ControlError
from slurm_runtime.launcher import Launcher
from slurm_runtime.logs import log
from slurm_runtime.podman import EngineFacts
from slurm_runtime.register import Register
from slurm_runtime.sandbox import CONTAINER_PREFIX
from slurm_runtime.warden.proc import command_line, living, name_of
from slurm_runtime.warden.remains import CONTAINER_ID, is_monitor

LOOK_FOR_S = 30.0  # after Podman's service, or this server, was started again
EMPTY_NETWORK_S = 120.0  # as long as a start may take: one that is being made for a container is empty too


@dataclass(frozen=True)
class Monitor:
    """A process that watches a container: the container's id and name.

    ``started``, in ticks since boot, makes the number mean one process for ever. ``has_program``: it has more to wait
    for than the command that tells Podman of the container's end, after which it ends by itself.
    """

    pid: int
    started: int
    container: str
    name: str
    has_program: bool


def monitor_of(words: Sequence[str], graph_root: str) -> tuple[str, str, str] | None:
    """Container, its name and exit command of a monitor's command line, if it is of this store. Pure."""

    def after(flag: str) -> str:
        return words[words.index(flag) + 1] if flag in words[:-1] else ""

    if not graph_root or not after("-b").startswith(f"{graph_root}/") or not CONTAINER_ID.fullmatch(after("-c")):
        return None
    return after("-c"), after("-n"), after("--exit-command")


def monitors(facts: EngineFacts) -> list[Monitor]:
    """The monitors of all containers in the store of this Podman; a pass over /proc."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    processes = living()
    for pid, fields in processes.items():
        children[int(fields[1])].append(pid)
    found = []
    for pid, fields in processes.items():
        told = _told_by(pid, facts)
        if told is not None:
            container, name, exit_command = told
            others = {name_of(child) for child in children[pid]} - {Path(exit_command).name, ""}
            found.append(Monitor(pid, int(fields[19]), container, name, bool(others)))
    return found


def _told_by(pid: int, facts: EngineFacts) -> tuple[str, str, str] | None:
    """What a process says of its container, if it is a monitor. Its name, which it can give itself, only saves time."""
    if name_of(pid) != Path(facts.monitor).name[:15] or not is_monitor(pid, facts.uid, facts.monitor):
        return None
    return monitor_of(command_line(pid), facts.graph_root)


def suspects(found: Iterable[Monitor], held: Collection[str]) -> list[Monitor]:
    """Monitors of sandboxes that may be nobody's: none of the containers ``held`` has that name, or two have. Pure.

    Of any other Podman need not be asked.
    """
    ours = [one for one in found if one.name.startswith(CONTAINER_PREFIX) and one.has_program]
    named: defaultdict[str, set[str]] = defaultdict(set)
    for one in ours:
        named[one.name].add(one.container)
    return [one for one in ours if one.name not in held or len(named[one.name]) > 1]


def strays(suspected: Iterable[Monitor], known: Collection[str]) -> list[Monitor]:
    """Those whose container is not among the ``known`` ones; these are asked for after the look. Pure."""
    return [one for one in suspected if one.container not in known]


class Remains:
    """Ends what is left of cut-off starts: looked for a while after ``look_again``, and whenever ``end`` is called."""

    def __init__(self, launcher: Launcher, register: Register) -> None:
        self.engine = launcher.engine
        self.launcher = launcher
        self.register = register
        self._until = 0.0

    def look_again(self) -> None:
        """Podman's service is another one, or this server is: starts may have been cut off."""
        self._until = time.monotonic() + LOOK_FOR_S

    @property
    def is_due(self) -> bool:
        return time.monotonic() < self._until

    async def end(self, facts: EngineFacts) -> None:
        """Look once. ``EngineError`` if Podman cannot be asked; what the warden cannot end is found again."""
        control = self.launcher.control
        if control is None:
            return
        found = await asyncio.to_thread(monitors, facts)
        held = {entry.name for entry in self.register.entries() if entry.has_container}
        suspected = suspects(found, held)
        asked = {one.container for one in suspected}
        known = [container for container in asked if await self.engine.exists(container)]
        await asyncio.gather(*(self._end(one, control, facts) for one in strays(suspected, known)))
        with contextlib.suppress(ControlError):
            await control.tidy_networks(EMPTY_NETWORK_S)

    @staticmethod
    async def _end(one: Monitor, control: Control, facts: EngineFacts) -> None:
        """One whose container was removed since the look is gone by itself, and nothing to speak of."""
        try:
            if await control.end_stray(one.pid, one.started, one.container, facts.monitor, facts.runtime):
                log.warning("ended what was left of a start of %s that was cut off", one.name)
        except ControlError as problem:
            log.warning("what is left of a start of %s that was cut off is not ended yet: %s", one.name, problem)
