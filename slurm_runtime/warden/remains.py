"""Ends what is left of a container that Podman does not know any more, by its monitor (conmon).

What a process says of itself, in its name, arguments and environment, is believed only once ``is_monitor`` holds, and
no program or environment is ever taken from it: sandboxes' processes are in /proc too.

Its processes go, and what its runtime has noted of it. The forwarders of its port end by themselves: the monitor holds
the pipe whose end they wait for. A network namespace that a mount keeps bears no container's name: ``Networks`` takes
away those in which nothing has lived for long.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from slurm_runtime.warden.proc import all_pids, command_line, living, namespace_of, stat_of
from slurm_runtime.warden.syscalls import MNT_DETACH, PR_SET_PDEATHSIG, prctl, umount

# Together less than the owner waits for the answer. What ends too slowly is found again; what the runtime has noted is
# not, once the monitor is gone.
DEADLINE_S = 5.0
RUNTIME_DEADLINE_S = 10.0
PAUSE_S = 0.01
CONTAINER_ID = re.compile(r"[0-9a-f]{64}")
NETWORK_PREFIX = "netns-"  # a container's; Podman's rootless-netns-HASH is there for all that are on a bridge
ENDED, NOTHING_THERE, STILL_THERE = 0, 1, 2


def is_monitor(pid: int, uid: int, program: str) -> bool:
    """Whether a process is a monitor of Podman's: of its user, beside us, and running its ``program``.

    Anybody can call himself one. A sandbox's processes are in a pid namespace of their own, though as its root they may
    be of the same user; those of the machine's other users are not; and who runs a program of another user's (su) does
    not choose which.
    """
    try:
        beside_us = namespace_of(pid) == namespace_of(os.getpid()) != 0
        is_users = os.stat(f"/proc/{pid}").st_uid == uid
        return beside_us and is_users and os.path.samestat(os.stat(f"/proc/{pid}/exe"), os.stat(program))
    except OSError:
        return False


@dataclass(frozen=True)
class Stray:
    """What is left of a container: its monitor, the process that ``started`` then and runs ``program``."""

    monitor: int
    started: int
    container: str
    program: str

    def is_there(self) -> bool:
        words = command_line(self.monitor)
        return (
            CONTAINER_ID.fullmatch(self.container) is not None
            and ("-c", self.container) in pairwise(words)
            and is_monitor(self.monitor, os.geteuid(), self.program)
        )


def end_stray(stray: Stray, runtime: str, environment: Mapping[str, str]) -> bool:
    """End it, and have the runtime forget the container; False if it is gone, or is none.

    ``OSError`` if its processes do not end.
    """
    end = time.monotonic() + DEADLINE_S
    tree = _stopped_tree(stray.monitor, stray.started) if stray.is_there() else {}
    for pid in tree:
        _signal(pid, signal.SIGKILL)
    while any(_lives(pid, ticks) for pid, ticks in tree.items()):
        _pause_before(end, f"the processes of container {stray.container[:12]} did not end")
    if tree and runtime:
        _have_runtime_forget(runtime, stray.container, environment)
    return bool(tree)


def in_a_child(work: Callable[[], bool]) -> int:
    """Start ``work`` in a process of its own; its id. It exits with what came of it, and ends with this process."""
    pid = os.fork()
    if pid:
        return pid
    code = STILL_THERE
    try:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _close_all()
        code = ENDED if work() else NOTHING_THERE
    finally:
        os._exit(code)  # also after an exception


def _close_all() -> None:
    """Others wait for the ends of the sockets that this process was born with."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            with contextlib.suppress(OSError):
                os.close(int(name))


def _stopped_tree(root: int, started: int) -> dict[int, int]:
    """The process and all that descends from it, with their starts; stopped, so that none is born meanwhile."""
    tree: dict[int, int] = {}
    while more := {pid: ticks for pid, ticks in _tree(root, started).items() if pid not in tree}:
        for pid in more:
            _signal(pid, signal.SIGSTOP)
        tree |= more
    return tree


def _tree(root: int, started: int) -> dict[int, int]:
    rows = living()
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
    return {name: value for name, _, value in pairs if name}


def _have_runtime_forget(runtime: str, container: str, environment: Mapping[str, str]) -> None:
    """One that has noted nothing yet has nothing to forget."""
    words = [runtime, "delete", "--force", container]
    quiet = subprocess.DEVNULL
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(
            words,
            env=environment,
            stdin=quiet,
            stdout=quiet,
            stderr=quiet,
            timeout=RUNTIME_DEADLINE_S,
            check=False,
        )


class Networks:
    """The network namespaces that mounts in ``folder`` keep, as Podman makes them for containers.

    One that is being made has no process yet: only what is empty at every look for longer than a start can take is
    taken away. What we see no mount of is left: sandboxes that another mount namespace's Podman started may live in it,
    and removing a place of mounts takes those away everywhere.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._empty_since: dict[str, float] = {}

    def tidy(self, empty_for_s: float) -> int:
        """Look once, and take away those that have been empty for so long; how many."""
        if self.folder is None:
            return 0
        mounted = networks_in(self.folder, Path("/proc/self/mountinfo").read_text(errors="surrogateescape"))
        lived_in = {namespace_of(pid, "net") for pid in all_pids()} if mounted else set()
        now = time.monotonic()
        empty = [place for place, network in mounted.items() if network not in lived_in]
        self._empty_since = {place: self._empty_since.get(place, now) for place in empty}
        old = [place for place, since in self._empty_since.items() if now - since >= empty_for_s]
        for place in old:
            umount(place, MNT_DETACH)
            os.unlink(place)
        return len(old)


def networks_in(folder: Path, mountinfo: str) -> dict[str, int]:
    """The network namespaces of containers that are mounted in a folder: place → inode. Pure."""
    rows = [line.split() for line in mountinfo.splitlines()]
    found = {row[4].replace("\\040", " "): row[3] for row in rows if row[3].startswith("net:[")}
    places = {Path(place): int(root[5:-1]) for place, root in found.items()}
    return {
        str(place): network
        for place, network in places.items()
        if place.parent == folder and place.name.startswith(NETWORK_PREFIX)
    }
