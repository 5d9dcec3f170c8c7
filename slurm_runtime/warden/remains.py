"""Ends what is left of a container that Podman does not know any more, by its monitor (conmon).

Its processes go, and what its runtime has noted of it. The forwarders of its port end by themselves: the monitor holds
the pipe whose end they wait for. A network namespace that a mount keeps bears no container's name: ``Networks`` takes
away those in which nothing has lived for long.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from slurm_runtime.warden.proc import all_pids, namespace_of, stat_of
from slurm_runtime.warden.syscalls import MNT_DETACH, umount

DEADLINE_S = 5.0
PAUSE_S = 0.01


def end_stray(monitor: int, started: int, container: str, runtime: str) -> None:
    """End the container with this monitor, if that is still the process that ``started`` then.

    ``OSError`` if its processes do not end.
    """
    end = time.monotonic() + DEADLINE_S
    tree = _stopped_tree(monitor, started)
    if not tree:
        return
    environment = environment_of(monitor)
    for pid in tree:
        _signal(pid, signal.SIGKILL)
    while any(_lives(pid, ticks) for pid, ticks in tree.items()):
        _pause_before(end, f"the processes of container {container[:12]} did not end")
    _have_runtime_forget(runtime, container, environment)


def _stopped_tree(root: int, started: int) -> dict[int, int]:
    """The process and all that descends from it, with their starts; stopped, so that none is born meanwhile."""
    tree: dict[int, int] = {}
    while more := {pid: ticks for pid, ticks in _tree(root, started).items() if pid not in tree}:
        for pid in more:
            _signal(pid, signal.SIGSTOP)
        tree |= more
    return tree


def _tree(root: int, started: int) -> dict[int, int]:
    rows = {pid: fields for pid in all_pids() if (fields := stat_of(pid)) and fields[0] != "Z"}
    if root not in rows or int(rows[root][19]) != started:
        return {}
    found = {root}
    while more := {pid for pid, fields in rows.items() if int(fields[1]) in found} - found:
        found |= more
    return {pid: int(rows[pid][19]) for pid in found}


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _lives(pid: int, started: int) -> bool:
    fields = stat_of(pid)
    return bool(fields) and fields[0] not in "ZX" and int(fields[19]) == started


def _pause_before(end: float, complaint: str) -> None:
    if time.monotonic() > end:
        raise TimeoutError(f"{complaint} within {DEADLINE_S:g} s")
    time.sleep(PAUSE_S)


def environment_of(pid: int) -> dict[str, str]:
    """What a process was started with, if it is there: where Podman and its runtime keep their notes depends on it."""
    text = b""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/environ").read_bytes()
    pairs = (entry.partition("=") for entry in text.decode(errors="surrogateescape").split("\0"))
    return {name: value for name, _, value in pairs if name and not name.startswith("_OCI_")}


def _have_runtime_forget(runtime: str, container: str, environment: dict[str, str]) -> None:
    """One that has noted nothing yet has nothing to forget."""
    words = [runtime, "delete", "--force", container]
    quiet = subprocess.DEVNULL
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(words, env=environment, stdin=quiet, stdout=quiet, stderr=quiet, timeout=DEADLINE_S, check=False)


class Networks:
    """The network namespaces that mounts in ``folder`` keep, as Podman makes them for containers.

    One that is being made has no process yet, or no mount: only what is empty at every look for longer than a start can
    take is taken away.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._empty_since: dict[str, float] = {}

    def tidy(self, empty_for_s: float) -> int:
        """Look once, and take away those that have been empty for so long; how many."""
        if self.folder is None:
            return 0
        mounted = networks_in(self.folder, Path("/proc/self/mountinfo").read_text(errors="surrogateescape"))
        places = list(map(str, self.folder.iterdir())) if self.folder.is_dir() else []
        lived_in = {namespace_of(pid, "net") for pid in all_pids()} if places else set()
        now = time.monotonic()
        empty = [place for place in places if mounted.get(place) not in lived_in]
        self._empty_since = {place: self._empty_since.get(place, now) for place in empty}
        old = [place for place, since in self._empty_since.items() if now - since >= empty_for_s]
        for place in old:
            if place in mounted:
                umount(place, MNT_DETACH)
            os.unlink(place)
        return len(old)


def networks_in(folder: Path, mountinfo: str) -> dict[str, int]:
    """The network namespaces that are mounted in a folder: place → inode. Pure."""
    rows = [line.split() for line in mountinfo.splitlines()]
    found = {row[4].replace("\\040", " "): row[3] for row in rows if row[3].startswith("net:[")}
    return {place: int(root[5:-1]) for place, root in found.items() if Path(place).parent == folder}
