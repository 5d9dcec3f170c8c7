"""Where does Ray keep its session? In a short folder on each node's own disk, at one path, gone with its owner.

Ray's nodes all use the head's path. The owner on a node holds a lock in the folder. What an owner left behind that
could not remove it (node without power, every process of the step killed at once) is removed by the user's next run
on that node.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from slurm.lib.errors import EnvironmentProblem
from slurm.lib.locked_folder import Announce, dead_owners_lock, locked_folder, remove, tell_nobody
from slurm.lib.logs import log
from slurm.lib.own_folders import is_own, own_folders, remove_half_made
from slurm.lib.podman_storage import NETWORK_FILE_SYSTEMS, file_system_of

PREFIX = "skyray"  # another than Podman storage's, whose sweep looks for its own
# A unix socket's path ends at 107 bytes (unix(7)); Ray puts up to 64 below its temporary folder.
LONGEST = 43


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
def ray_folder(root: Path, *, shared: bool = False, announce: Announce = tell_nobody) -> Iterator[bool]:
    """The folder ``root``, private and empty, and gone afterwards; yields whether it is this process's.

    ``shared`` allows that it is another node's of the same run, where the nodes share that disk; then it stays.
    ``announce`` is told of it before it is made, so that a guardian knows of it whenever this process is killed.
    """
    sweep(root.parent)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked_folder(root, announce))
        except OSError as problem:
            if not (shared and is_own(root)):
                raise EnvironmentProblem(f"cannot make {root} for Ray: {problem.strerror}; see LOCAL_SCRATCH") from None
            yield False
            return
        try:
            yield True
        finally:
            remove(root)


def sweep(scratch: Path) -> None:
    """Remove what dead runs of this user left below ``scratch``."""
    for pattern in (f".{PREFIX}.*", f".{PREFIX}-{os.getuid()}-*"):  # the former of an older version
        remove_half_made(scratch, pattern)
    for root in own_folders(scratch, f"{PREFIX}-{os.getuid()}-*"):
        with dead_owners_lock(root) as dead:
            if dead:
                log.info("removing %s, which a dead run left", root)
                remove(root)
