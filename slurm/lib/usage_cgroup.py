"""What has a job used, as the kernel counts it for the cgroup that Slurm made for the job? Ended processes included.

Slurm has one for each job and node where it constrains CPUs or memory by cgroups, or gathers accounts by them.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

NO_LIMIT = 1 << 60  # of version 1, which writes a huge number for none


@dataclass(frozen=True)
class JobCgroup:
    """The folders of a job's cgroup, None where there is none with that controller; ``v2`` is one for all."""

    cpuacct: Path | None = None
    memory: Path | None = None
    v2: Path | None = None


def own_cgroup() -> JobCgroup:
    """That of the job which this process belongs to."""
    try:
        return job_cgroup(Path("/proc/self/cgroup").read_text(), Path("/proc/self/mountinfo").read_text())
    except OSError:
        return JobCgroup()


def job_cgroup(cgroup: str, mountinfo: str) -> JobCgroup:
    """The same from the texts of these two files in /proc. Pure."""
    found = dict[str, Path]()
    for line in cgroup.splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        job = re.match(r"(/.*)?/job_\d+(?=/|$)", path, re.ASCII)
        for controller in controllers.split(",") if job else []:
            place = _mounted(controller, job[0], mountinfo) if job else None
            found |= {controller: place} if place else {}
    return JobCgroup(found.get("cpuacct"), found.get("memory"), found.get(""))


def _mounted(controller: str, path: str, mountinfo: str) -> Path | None:
    """Where a cgroup lies in the file system; ``controller`` is empty for version 2."""
    for line in mountinfo.splitlines():
        mount, _, kind = line.partition(" - ")
        fields, (fs, _source, options) = mount.split(), [*kind.split(), "", "", ""][:3]
        wanted = fs == "cgroup2" if not controller else fs == "cgroup" and controller in options.split(",")
        root = fields[3].rstrip("/")
        if wanted and path.startswith(f"{root}/"):
            return Path(fields[4] + path[len(root) :])
    return None


def cpu_s(cgroup: JobCgroup) -> float | None:
    """CPU seconds of all its processes, ended ones included; None where the kernel does not count them."""
    if cgroup.cpuacct and (used := _number(cgroup.cpuacct / "cpuacct.usage")) is not None:
        return used / 1e9
    used = _entry(cgroup.v2 / "cpu.stat", "usage_usec") if cgroup.v2 else None
    return None if used is None else used / 1e6


def memory_bytes(cgroup: JobCgroup) -> int | None:
    """What it holds now, less the cache of files that nobody has looked at lately, which the kernel drops first."""
    for folder, used, inactive in (
        (cgroup.memory, "memory.usage_in_bytes", "total_inactive_file"),
        (cgroup.v2, "memory.current", "inactive_file"),
    ):
        if folder and (whole := _number(folder / used)) is not None:
            return max(0, whole - (_entry(folder / "memory.stat", inactive) or 0))
    return None


def memory_limit_bytes(cgroup: JobCgroup) -> int | None:
    """What it may hold; None without a limit."""
    limits = [
        _number(folder / name)
        for folder, name in ((cgroup.memory, "memory.limit_in_bytes"), (cgroup.v2, "memory.max"))
        if folder
    ]
    return next((limit for limit in limits if limit is not None and limit < NO_LIMIT), None)


def _number(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):  # "max" is none
        return int(path.read_text())
    return None


def _entry(path: Path, name: str) -> int | None:
    with contextlib.suppress(OSError):
        match = re.search(rf"^{name} (\d+)$", path.read_text(), re.MULTILINE | re.ASCII)
        return int(match[1]) if match else None
    return None
