"""Which sandbox takes more than it may? Samples all of them and says who has to be stopped.

For machines where limits do not bite: rootless containers without a cgroup of their own.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from slurm_runtime.warden.proc import Scanner, Usage, namespace_of, private_bytes, proportional_bytes, written_bytes

LEAST_PERIOD_S = 0.5
SHARE_OF_A_CORE = 0.05  # that scanning takes at most
WALK_TIMEOUT_S = 60.0
LEAST_WRITTEN = 1 << 20


def amount(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


@dataclass
class Walk:
    """A ``du`` under way."""

    process: subprocess.Popen[bytes]
    written: int
    deadline: float


@dataclass
class Watched:
    """One sandbox: its limits (0 is none) and what was last seen of it."""

    holder: int
    namespace: int
    memory_bytes: int = 0
    processes: int = 0
    disk_bytes: int = 0
    disk_paths: tuple[str, ...] = ()
    server: int = 0
    usage: Usage = field(default_factory=Usage)
    memory_seen: int = 0
    disk_seen: int = 0
    written_at_walk: int = 0
    walk: Walk | None = None
    stopped: bool = False
    program: int | None = None

    @property
    def commands(self) -> int:
        """Processes beyond the container's first one, the program that an init started, and a forked server."""
        return len({*self.usage.pids} - {self.holder, self.server, self.program or 0})

    def saw(self, usage: Usage) -> None:
        """A sample. At the first one no command runs yet: what the first process has as a child is its program."""
        self.usage = usage
        if self.program is None and usage.pids:
            children = [pid for pid in usage.pids if usage.parents[pid] == self.holder]
            self.program = min(children, default=0)


class Watchdog:
    """All watched sandboxes by name."""

    def __init__(self) -> None:
        self.watched: dict[str, Watched] = {}
        self._scanner = Scanner()
        self._next = 0.0

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
            disk_paths=disk_paths,
            server=server,
        )
        self._next = 0.0

    def wait_s(self) -> float | None:
        """Seconds until the next look; None while nothing is watched."""
        return max(0.0, self._next - time.monotonic()) if self.watched else None

    def look(self) -> list[tuple[str, Watched, str]]:
        """Sample all if it is time to; name, sandbox and reason of each that takes more than it may."""
        if not self.watched or time.monotonic() < self._next:
            return []
        began = time.thread_time()
        sampled = self._scanner.scan({one.namespace for one in self.watched.values()})
        offenders = []
        for name, one in self.watched.items():
            one.saw(sampled[one.namespace])
            reason = None if one.stopped else self._offence(one)
            if reason:
                one.stopped = True
                offenders.append((name, one, reason))
        spent = time.thread_time() - began
        self._next = time.monotonic() + max(LEAST_PERIOD_S, spent / SHARE_OF_A_CORE)
        return offenders

    def _offence(self, one: Watched) -> str | None:
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
        return self._disk_offence(one) if one.disk_bytes else None

    def _disk_offence(self, one: Watched) -> str | None:
        """Walk its folders when it has written enough since the last walk to matter."""
        if one.walk:
            return self._walked(one, one.walk)
        written = sum(written_bytes(pid) for pid in one.usage.pids)
        room = max(LEAST_WRITTEN, (one.disk_bytes - one.disk_seen) // 4)
        if written - one.written_at_walk >= room:
            command = ["du", "--summarize", "--total", "--one-file-system", "--block-size=1", *one.disk_paths]
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            one.walk = Walk(process, written, time.monotonic() + WALK_TIMEOUT_S)
        return None

    def _walked(self, one: Watched, walk: Walk) -> str | None:
        if walk.process.poll() is None:
            if time.monotonic() > walk.deadline:
                walk.process.kill()
            return None
        one.walk, one.written_at_walk = None, walk.written
        assert walk.process.stdout is not None
        with walk.process.stdout as file:
            words = file.read().split()
        one.disk_seen = int(words[-2]) if len(words) >= 2 and words[-2].isdigit() else one.disk_seen
        if one.disk_seen > one.disk_bytes:
            return f"it filled {amount(one.disk_seen)} of disk and may fill {amount(one.disk_bytes)}"
        return None

    def report(self) -> dict[str, dict[str, float]]:
        """The last sample of each sandbox."""
        return {
            name: {
                "memory_bytes": one.memory_seen,
                "processes": one.usage.processes,
                "cpu_s": round(one.usage.cpu_s, 2),
                "disk_bytes": one.disk_seen,
                "commands": one.commands,
            }
            for name, one in self.watched.items()
        }


def kill(one: Watched) -> None:
    """End a sandbox: its first process takes all others with it, however fast they multiply."""
    os.kill(one.holder, 9)
