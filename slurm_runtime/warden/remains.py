"""Ends what is left of a container that Podman does not know any more, by its monitor (conmon).

Its processes, what its runtime has noted of it, and its network namespace, which is kept by a mount. The forwarders of
its port end by themselves: the monitor holds the pipe whose end they wait for.
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
    """End the container with this monitor, if that is still the process that ``started`` then; ``OSError`` if not."""
    end = time.monotonic() + DEADLINE_S
    tree = _stopped_tree(monitor, started)
    if not tree:
        return
    environment = _environment(monitor)
    networks = {namespace_of(pid, "net") for pid in tree} - {namespace_of(os.getpid(), "net"), 0}
    for pid in tree:
        _signal(pid, signal.SIGKILL)
    while any(_lives(pid, ticks) for pid, ticks in tree.items()):
        _pause_before(end, f"the processes of container {container[:12]} did not end")
    _have_runtime_forget(runtime, container, environment)
    for network in networks:
        _forget_network(network, end)


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


def _environment(pid: int) -> dict[str, str]:
    """Where its runtime keeps its notes depends on the environment of whoever calls it."""
    text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="surrogateescape")
    pairs = (entry.partition("=") for entry in text.split("\0"))
    return {name: value for name, _, value in pairs if name and not name.startswith("_OCI_")}


def _have_runtime_forget(runtime: str, container: str, environment: dict[str, str]) -> None:
    """One that has noted nothing yet has nothing to forget."""
    words = [runtime, "delete", "--force", container]
    quiet = subprocess.DEVNULL
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(words, env=environment, stdin=quiet, stdout=quiet, stderr=quiet, timeout=DEADLINE_S, check=False)


def _forget_network(network: int, end: float) -> None:
    """Take away the mount that keeps a network namespace, once nothing lives in it."""
    while any(namespace_of(pid, "net") == network for pid in all_pids()):
        _pause_before(end, f"the forwarders of network namespace {network} did not end")
    for place in places_of(network, Path("/proc/self/mountinfo").read_text(errors="surrogateescape")):
        umount(place, MNT_DETACH)
        os.unlink(place)


def places_of(network: int, mountinfo: str) -> list[str]:
    """Where a network namespace is mounted. Pure."""
    rows = [line.split() for line in mountinfo.splitlines()]
    return [row[4].replace("\\040", " ") for row in rows if row[3] == f"net:[{network}]"]
