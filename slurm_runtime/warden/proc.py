"""Which processes are in which sandbox, and what do they use? One pass over /proc answers for all of them."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")
STAT_BYTES = 4096  # a line of some 300
LEAST_SEEN = 20  # processes of a sample that tell how many there are
TICKS = os.sysconf("SC_CLK_TCK")


def all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def namespace_of(pid: int, kind: str = "pid") -> int:
    """The inode of a process's namespace; 0 where the process has ended."""
    with contextlib.suppress(OSError, ValueError):
        return int(os.readlink(f"/proc/{pid}/ns/{kind}").partition("[")[2].rstrip("]"))
    return 0


def members(namespace: int) -> list[int]:
    """The processes of a pid namespace."""
    return [pid for pid in all_pids() if namespace and namespace_of(pid) == namespace]


def stat_of(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, from the state on; empty where the process has ended."""
    try:
        descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    except OSError:
        return []
    try:  # without a file object: it would double the cost of a scan
        return os.read(descriptor, STAT_BYTES).rpartition(b")")[2].decode("ascii").split()
    except OSError:
        return []
    finally:
        os.close(descriptor)


def living() -> dict[int, list[str]]:
    """What ``stat_of`` says of every process that has not ended."""
    return {pid: fields for pid in all_pids() if (fields := stat_of(pid)) and fields[0] != "Z"}


def name_of(pid: int) -> str:
    """The name of a process's program, its first 15 characters; empty where the process has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip("\n")
    except OSError:
        return ""


def command_line(pid: int) -> list[str]:
    """The arguments that a process was started with, or says that it was; empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def proportional_bytes(pid: int) -> int:
    """Memory of a process with shared pages divided among those who share them."""
    return _rolled_up(pid, ("Pss:",))


def private_bytes(pid: int) -> int:
    """Memory that only this process has."""
    return _rolled_up(pid, ("Private_Clean:", "Private_Dirty:"))


def _rolled_up(pid: int, rows: tuple[str, ...]) -> int:
    total = 0
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(rows):
                total += int(line.split()[1]) * 1024
    return total


def written_bytes(pid: int) -> int:
    """What a process and the children that it waited for have written."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        return max(int(fields["wchar"]), int(fields["write_bytes"]))
    return 0


@dataclass
class Usage:
    """What one sandbox uses now. ``processes`` counts threads too, as a cgroup does."""

    pids: list[int] = field(default_factory=list)
    memory_bytes: int = 0
    processes: int = 0
    cpu_s: float = 0.0
    parents: dict[int, int] = field(default_factory=dict)


class Scanner:
    """Remembers of each process which namespace it is in, since that costs most and cannot change."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[str, int]] = {}

    def scan(self, namespaces: Iterable[int]) -> dict[int, Usage]:
        """The usage of each of these pid namespaces; memory is resident memory, shared pages counted for each."""
        usage = {namespace: Usage() for namespace in namespaces}
        known: dict[int, tuple[str, int]] = {}
        for pid in all_pids():
            fields = stat_of(pid)
            if not fields or fields[0] == "Z":
                continue
            start = fields[19]
            before = self._known.get(pid)
            namespace = before[1] if before and before[0] == start else namespace_of(pid)
            known[pid] = (start, namespace)
            if namespace in usage:
                self._add(usage[namespace], pid, fields)
        self._known = known
        return usage

    def newcomers(self, at_most: int) -> tuple[dict[int, float], bool]:
        """How many processes each pid namespace has got since the last scan, and whether each of them was looked at.

        For a moment when there are so many that a scan would take seconds: of more than ``at_most`` only so many are
        looked at, evenly spread. Those of a fork bomb live for a moment only: who has ended before it was looked at is
        taken for one of those who have not. A namespace of which only few are seen has no estimate: a neighbour's
        process that happens to live would be taken for all of the bomb's.
        """
        new = [pid for pid in all_pids() if pid not in self._known]
        looked_at = [namespace_of(pid) for pid in new[:: math.ceil(len(new) / at_most) or 1]]
        found = Counter(filter(None, looked_at))
        is_exact = found.total() == len(new)
        each = len(new) / max(1, found.total())
        told = {namespace: count * each for namespace, count in found.items() if is_exact or count >= LEAST_SEEN}
        return told, is_exact

    @staticmethod
    def _add(usage: Usage, pid: int, fields: list[str]) -> None:
        usage.pids.append(pid)
        usage.parents[pid] = int(fields[1])
        usage.processes += int(fields[17])
        usage.memory_bytes += int(fields[21]) * PAGE
        usage.cpu_s += (int(fields[11]) + int(fields[12])) / TICKS


def state_of(pid: int) -> str:
    """The letter of a process's state; empty where it has ended."""
    fields = stat_of(pid)
    return fields[0] if fields else ""


def signal_all(namespace: int, number: int, settled: str, deadline_s: float = 5.0) -> bool:
    """Send a signal to every process of a namespace until all are in one of the states ``settled``.

    Again and again, because a process may fork between the look and the signal. False if the deadline passes.
    """
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        restless = [pid for pid in members(namespace) if state_of(pid) not in (*settled, "Z", "X", "")]
        if not restless:
            return True
        for pid in restless:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(0.002)
    return False
