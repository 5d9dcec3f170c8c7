"""Which sandbox takes more than it may? Samples all of them and says who has to be stopped.

For machines where limits do not bite: rootless containers without a cgroup of their own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from slurm_runtime.warden.disk import Folders, Reserve, Writer
from slurm_runtime.warden.node import Pulse, pulse
from slurm_runtime.warden.proc import Scanner, Usage, namespace_of, private_bytes, proportional_bytes, written_bytes

BEAT_S = 0.05  # between looks at the node as a whole
LEAST_PERIOD_S, LONGEST_PERIOD_S = 0.5, 1.5  # between scans of all processes while nothing leaps
SHARE_OF_A_CORE = 0.05  # that those take, where the longest period allows
SHARE_IN_NEED = 0.5  # that scans take while processes or memory leap
LEAP = 0.25  # of the smallest limit
SAMPLE = 200  # processes that are looked at where a scan of all would take too long
BEYOND_DOUBT = 1.2  # times the limit, for an estimate from a sample
LEAST_WRITTEN = 1 << 20
Offender = tuple[str, "Watched", str]


def amount(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


@dataclass
class Watched:
    """One sandbox: its limits (0 is none) and what was last seen of it."""

    holder: int
    namespace: int
    memory_bytes: int = 0
    processes: int = 0
    disk_bytes: int = 0
    folders: Folders = field(default_factory=Folders)
    server: int = 0
    usage: Usage = field(default_factory=Usage)
    memory_seen: int = 0
    stopped: bool = False
    leaves_no_room: bool = False
    program: int | None = None

    @property
    def commands(self) -> int:
        """Processes beyond the container's first one, the program that an init started, and a forked server."""
        return len({*self.usage.pids} - {self.holder, self.server, self.program or 0})

    @property
    def written(self) -> int:
        """Bytes that its processes have written, to whatever."""
        return sum(written_bytes(pid) for pid in self.usage.pids)

    def saw(self, usage: Usage) -> None:
        """A sample. At the first one no command runs yet: what the first process has as a child is its program."""
        self.usage = usage
        if self.program is None and usage.pids:
            children = [pid for pid in usage.pids if usage.parents[pid] == self.holder]
            self.program = min(children, default=0)


class Watchdog:
    """All watched sandboxes by name.

    A scan of all processes takes the longer the more there are, and a fork bomb makes thousands in a tenth of a second.
    So two numbers of the whole node are read often: when one has leapt, the next scan does not wait, and when processes
    have, a sample of the new ones tells whose they are.
    """

    def __init__(self) -> None:
        self.watched: dict[str, Watched] = {}
        self._scanner = Scanner()
        self._reserve = Reserve()
        self._next_beat = self._next_scan = self._earliest_scan = 0.0
        self._pulse = Pulse()

    def add(self, name: str, holder: int, limits: Mapping[str, int], disk_paths: tuple[str, ...]) -> None:
        """Sample it from now on; ``ProcessLookupError`` if it has ended."""
        namespace = namespace_of(holder)
        if not namespace:
            raise ProcessLookupError(f"process {holder} has ended")
        before = self.watched.get(name)
        server = before.server if before else 0
        self.watched[name] = Watched(
            holder,
            namespace,
            memory_bytes=limits["memory_bytes"],
            processes=limits["processes"],
            disk_bytes=limits["disk_bytes"],
            folders=Folders(disk_paths),
            server=server,
        )
        self._next_beat = self._next_scan = 0.0

    def wait_s(self) -> float | None:
        """Seconds until the next look; None while nothing is watched."""
        return max(0.0, self._next_beat - time.monotonic()) if self.watched else None

    def look(self) -> list[Offender]:
        """Look if it is time to; name, sandbox and reason of each that takes more than it may."""
        now = time.monotonic()
        if not self.watched or now < self._next_beat:
            return []
        self._next_beat = now + BEAT_S
        taken = pulse()
        found = [*self._multiplied(taken)]
        if not found and (now >= self._next_scan or (now >= self._earliest_scan and self._has_leapt(taken))):
            found = [*self._scanned()]
        return [*found, *self._filling(), *self._leaving_no_room()]

    def _multiplied(self, taken: Pulse) -> Iterator[Offender]:
        """Those with far more processes than at the last scan, told from a few of the new ones."""
        limits = [one.processes for one in self.watched.values() if one.processes]
        if not limits or taken.threads - self._pulse.threads <= min(limits):
            return
        new, is_exact = self._scanner.newcomers(SAMPLE)
        for name, one in self.watched.items():
            count = one.usage.processes + new.get(one.namespace, 0)
            if one.processes and count > one.processes * (1 if is_exact else BEYOND_DOUBT) and not one.stopped:
                yield self._stopped(name, f"it ran about {count:.0f} processes and may run {one.processes}")

    def _has_leapt(self, taken: Pulse) -> bool:
        """Whether so much was taken since the last scan that one sandbox may be beyond its limit by now."""
        limits = self.watched.values()
        processes = min((one.processes for one in limits if one.processes), default=math.inf)
        memory = min((one.memory_bytes for one in limits if one.memory_bytes), default=math.inf)
        return (
            taken.threads - self._pulse.threads > LEAP * processes
            or self._pulse.available_bytes - taken.available_bytes > LEAP * memory
        )

    def _scanned(self) -> Iterator[Offender]:
        """Sample all processes; those with too many, or too much memory."""
        began = time.thread_time()
        self._pulse = pulse()
        sampled = self._scanner.scan({one.namespace for one in self.watched.values()})
        for name, one in self.watched.items():
            one.saw(sampled[one.namespace])
            if reason := self._offence(one):
                yield self._stopped(name, reason)
        spent, now = time.thread_time() - began, time.monotonic()
        self._earliest_scan = now + spent / SHARE_IN_NEED
        self._next_scan = now + min(max(LEAST_PERIOD_S, spent / SHARE_OF_A_CORE), LONGEST_PERIOD_S)

    def _stopped(self, name: str, reason: str) -> Offender:
        self.watched[name].stopped = True
        return name, self.watched[name], reason

    def _offence(self, one: Watched) -> str | None:
        if one.stopped:
            return None
        if one.processes and one.usage.processes > one.processes:
            return f"it ran {one.usage.processes} processes and threads and may run {one.processes}"
        one.memory_seen = one.usage.memory_bytes
        if one.memory_bytes and one.memory_seen > one.memory_bytes:
            # A forked server shares most pages with the fork server, and they are not the sandbox's doing; what the
            # processes of a sandbox share among themselves counts once.
            one.memory_seen = sum(
                private_bytes(pid) if pid == one.server else proportional_bytes(pid) for pid in one.usage.pids
            )
            if one.memory_seen > one.memory_bytes:
                return (
                    f"it used {amount(one.memory_seen)} of memory and may use {amount(one.memory_bytes)} "
                    "(out of memory)"
                )
        self._count_if_worth_it(one)
        return None

    @staticmethod
    def _count_if_worth_it(one: Watched) -> None:
        """Count its files when it has written enough since the last count to matter."""
        if one.disk_bytes and one.folders.count is None:
            written = one.written
            if written - one.folders.written_then >= max(LEAST_WRITTEN, (one.disk_bytes - one.folders.seen) // 4):
                one.folders.begin(written)

    def _filling(self) -> Iterator[Offender]:
        """Those whose files fill more than they may."""
        for name, one in self.watched.items():
            one.folders.look()
            if one.disk_bytes and one.folders.seen > one.disk_bytes and not one.stopped:
                seen = amount(one.folders.seen)
                yield self._stopped(name, f"it filled {seen} of disk and may fill {amount(one.disk_bytes)}")

    def _leaving_no_room(self) -> Iterator[Offender]:
        """The one that fills most of a disk that is nearly full."""
        writers = [
            Writer(name, one.folders, lambda one=one: one.written)  # type: ignore[misc]
            for name, one in self.watched.items()
            if not one.stopped
        ]
        for name, seen, left in self._reserve.look(writers):
            words = f"it filled {amount(seen)} of the node's disk, more than any other, and {amount(left)} were left"
            self.watched[name].leaves_no_room = True
            yield self._stopped(name, words)

    def report(self) -> dict[str, dict[str, float]]:
        """The last sample of each sandbox."""
        return {
            name: {
                "memory_bytes": one.memory_seen,
                "processes": one.usage.processes,
                "cpu_s": round(one.usage.cpu_s, 2),
                "disk_bytes": one.folders.seen,
                "commands": one.commands,
            }
            for name, one in self.watched.items()
        }
