"""What have a job's processes used, where no cgroup counts it? From /proc, as a lower bound.

The time of a process that has ended is kept by its parent. Where that is none of the job's, as of a container's
monitor, ``Ledger`` adds what was seen last; what such a process did since then, or between two looks, is not known.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from slurm.lib.processes import pids

TICKS_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Process:
    """A process: who it is (a pid is used again), its parent, CPU seconds with those of children that it reaped."""

    pid: int
    started: int
    parent: int
    cpu_s: float
    memory_bytes: int


@dataclass(frozen=True)
class Ledger:
    """CPU seconds of all processes seen so far; ``ended_s`` of those whose time nobody else keeps."""

    seen: Mapping[tuple[int, int], Process] = field(default_factory=dict)
    ended_s: float = 0.0
    total_s: float = 0.0

    def after(self, living: Iterable[Process]) -> Ledger:
        """The ledger after a look that found these. Pure."""
        now = {(one.pid, one.started): one for one in living}
        lost = [one for who, one in self.seen.items() if who not in now and not self._is_kept(one, now)]
        ended_s = self.ended_s + sum(one.cpu_s for one in lost)
        return Ledger(now, ended_s, max(self.total_s, ended_s + sum(one.cpu_s for one in now.values())))

    def _is_kept(self, gone: Process, now: Mapping[tuple[int, int], Process]) -> bool:
        """Whether one of those above a process that is gone lives: it has reaped it, or what had."""
        before = {one.pid: one for one in self.seen.values()}
        above, steps = before.get(gone.parent), 0
        while above is not None and steps < len(before):
            if (above.pid, above.started) in now:
                return True
            above, steps = before.get(above.parent), steps + 1
        return False


def parse_stat(pid: int, text: str) -> Process | None:
    """A process from its /proc/PID/stat; a zombie's time counts until it is reaped."""
    try:
        fields = text.rpartition(")")[2].split()
        ticks = sum(int(fields[place]) for place in (11, 12, 13, 14))
        return Process(pid, int(fields[19]), int(fields[1]), ticks / TICKS_S, int(fields[21]) * PAGE_BYTES)
    except (ValueError, IndexError):
        return None


def all_processes() -> dict[int, Process]:
    """Every process of this host by its pid."""
    found = {}
    for pid in pids():
        with contextlib.suppress(OSError):
            if one := parse_stat(pid, Path(f"/proc/{pid}/stat").read_text(errors="replace")):
                found[pid] = one
    return found


def below(roots: Iterable[int], processes: Mapping[int, Process]) -> set[int]:
    """The roots that are there, with all that descends from them. Pure."""
    children: dict[int, list[int]] = {}
    for one in processes.values():
        children.setdefault(one.parent, []).append(one.pid)
    found, left = set[int](), [pid for pid in roots if pid in processes]
    while left:
        pid = left.pop()
        if pid not in found:
            found.add(pid)
            left += children.get(pid, [])
    return found


def of_job(job_id: str, others: Callable[[], Iterable[int]]) -> list[Process]:
    """This process and what descends from it; what Slurm started for the job; ``others``, with their descendants."""
    processes = all_processes()
    own = below({os.getpid()}, processes)
    mark = f"SLURM_JOB_ID={job_id}".encode()
    more = {pid for pid in processes if pid not in own and job_id.isdigit() and _was_started_with(pid, mark)}
    return [processes[pid] for pid in own | below({*more, *others()}, processes)]


def _was_started_with(pid: int, mark: bytes) -> bool:
    with contextlib.suppress(OSError):
        return mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return False
