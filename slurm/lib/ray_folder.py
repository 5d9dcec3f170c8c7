"""Where does Ray keep its session? In a short folder on each node's own disk, at one path, gone with its owner.

Ray's nodes all use the head's path. The owner on a node holds a lock in the folder. What an owner left behind that
could not remove it (node without power, every process of the step killed at once) is removed by the user's next run
on that node.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from slurm.lib.coordination import parse_object, read_if_there
from slurm.lib.errors import EnvironmentProblem
from slurm.lib.logs import log
from slurm.lib.own_folders import half_made_name, is_own, own_folders, remove_half_made
from slurm.lib.podman_storage import NETWORK_FILE_SYSTEMS, file_system_of

PREFIX = "skyray"  # another than Podman storage's, whose sweep looks for its own
# A unix socket's path ends at 107 bytes (unix(7)); Ray puts up to 64 below its temporary folder.
LONGEST = 43
LOCK_NAME = "owner.lock"
REMOVE_DEADLINE_S = 5.0


def folder_name(uid: int, job_id: str) -> str:
    """The name of a job's folder."""
    return f"{PREFIX}-{uid}-{job_id}"


def choose(candidates: Sequence[str], name: str) -> Path:
    """The first folder that can hold Ray's; ``EnvironmentProblem`` says what is wrong with each."""
    faults = []
    for candidate in candidates:
        fault = _fault(Path(candidate), name)
        if fault is None:
            return Path(candidate)
        faults.append(f"{candidate}: {fault}")
    raise EnvironmentProblem(
        f"no folder for Ray's session on {socket.gethostname()}: {'; '.join(faults)}. "
        "Set LOCAL_SCRATCH to a folder with a short path on this node's own disk"
    )


def _fault(folder: Path, name: str) -> str | None:
    if len(str(folder / name)) > LONGEST:
        return f"path too long for Ray's sockets ({LONGEST - len(name) - 1} characters are left beside the job's name)"
    if not folder.is_dir():
        return "does not exist"
    if not os.access(folder, os.W_OK | os.X_OK):
        return "not writable"
    kind = file_system_of(folder)
    return f"lies on {kind}, where sockets do not work" if kind in NETWORK_FILE_SYSTEMS else None


@contextlib.contextmanager
def ray_folder(
    root: Path, *, shared: bool = False, announce: Callable[[Path], None] = lambda root: None
) -> Iterator[bool]:
    """The folder ``root``, private and empty, and gone afterwards; yields whether it is this process's.

    ``shared`` allows that it is another node's of the same run, where the nodes share that disk; then it stays.
    ``announce`` is told its path before it is made, so that a guardian knows of it whenever this process is killed.
    """
    sweep(root.parent)
    announce(root)
    try:
        lock = _made(root)
    except OSError as problem:
        if not (shared and is_own(root)):
            raise EnvironmentProblem(f"cannot make {root} for Ray: {problem.strerror}; see LOCAL_SCRATCH") from None
        yield False
        return
    with lock:
        try:
            yield True
        finally:
            remove(root)


def _made(root: Path) -> IO[str]:
    """Make the folder; returns the lock that its owner holds, taken before the folder gets its name."""
    making = Path(tempfile.mkdtemp(prefix=half_made_name(root, os.getpid(), ""), dir=root.parent))
    lock = (making / LOCK_NAME).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        lock.flush()
        making.rename(root)
    except OSError:
        lock.close()
        shutil.rmtree(making, ignore_errors=True)
        raise
    return lock


def remove(root: Path) -> None:
    """Remove it; a process that was just killed may still hold on to it for a moment."""
    end = time.monotonic() + REMOVE_DEADLINE_S
    while root.exists() and time.monotonic() < end:
        for entry in _contents(root):  # the lock last: without it nobody would know that a rest is a dead run's
            entry.unlink(missing_ok=True) if not entry.is_dir() or entry.is_symlink() else shutil.rmtree(entry, True)
        if not _contents(root):
            shutil.rmtree(root, ignore_errors=True)
        time.sleep(0.02)
    if root.exists():
        log.warning("could not remove all of %s; the next run of yours on this node will try again", root)


def _contents(root: Path) -> list[Path]:
    """What is in it beside the lock."""
    try:
        return [entry for entry in root.iterdir() if entry.name != LOCK_NAME]
    except OSError:  # gone meanwhile
        return []


def remove_of_dead_owner(root: Path, owner: int, deadline_s: float = 10.0) -> None:
    """What the guardian does after the death of process ``owner``: remove the folder that it made, or was making.

    The kernel frees the dead one's lock within moments. A folder of that name that another process made stays.
    """
    for half_made in own_folders(root.parent, half_made_name(root, owner, "*")):
        shutil.rmtree(half_made, ignore_errors=True)
    end = time.monotonic() + deadline_s
    while is_own(root) and _said(root).get("pid") == owner and time.monotonic() < end:
        if _is_ownerless(root):
            remove(root)
            return
        time.sleep(0.05)


def _said(root: Path) -> dict[str, object]:
    """What the lock says of the owner; empty where there is none, or it cannot be read."""
    return parse_object(read_if_there(root / LOCK_NAME))


def sweep(scratch: Path) -> None:
    """Remove what dead runs of this user left below ``scratch``."""
    remove_half_made(scratch, f".{PREFIX}*")
    for root in own_folders(scratch, f"{PREFIX}-{os.getuid()}-*"):
        if _is_ownerless(root):
            log.info("removing %s, which a dead run left", root)
            remove(root)


def _is_ownerless(root: Path) -> bool:
    """Whether its lock is free, and was this host's: some network file systems lock on each node by itself."""
    try:
        with (root / LOCK_NAME).open("r+") as lock:
            if json.loads(lock.read())["host"] != socket.gethostname():
                return False
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, ValueError, KeyError):
        return False
    return True
