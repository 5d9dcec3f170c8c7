"""Ray's folder of temporary files, short enough for its sockets, and gone with the trainer however that ends.

A shell that sees the trainer's end by a closed pipe removes the folder if the trainer was killed. If the shell was
killed too, the next run of the same user removes it: the name says whose it is.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from slurm.lib.own_folders import own_folders
from slurm.lib.processes import ignore_stops, start_ticks

BASE = Path("/tmp")  # node-local, and short: Ray's sockets leave room for 43 characters of their 107
REMOVE = 'cat >/dev/null; n=0; while [ -e "$1" ] && [ $n -lt 50 ]; do rm -rf -- "$1"; sleep 0.1; n=$((n+1)); done'


@contextlib.contextmanager
def ray_folder() -> Iterator[tuple[Path, int]]:
    """The folder for the length of the block, and the pid of the shell that watches over it."""
    remove_ownerless()
    folder = BASE / own_name(os.getuid(), os.getpid(), start_ticks(os.getpid()) or 0)
    folder.mkdir(mode=0o700)
    guard = subprocess.Popen(
        ["/bin/sh", "-c", REMOVE, "sh", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={"PATH": os.defpath},  # without the marks by which a job's guardian finds what it has to end
        start_new_session=True,
        preexec_fn=ignore_stops,
    )
    assert guard.stdin
    try:
        yield folder, guard.pid
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        guard.stdin.close()
        guard.wait()


def own_name(uid: int, pid: int, ticks: int) -> str:
    """The folder's name: of whom, and of which of their processes."""
    return f"skyrl-ray-{uid}-{pid}-{ticks}"


def owner(name: str) -> tuple[int, int, int] | None:
    """User id, pid and start time in a folder's name; None for a name that is none of ours."""
    match = re.fullmatch(r"skyrl-ray-(\d+)-(\d+)-(\d+)", name)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def remove_ownerless(base: Path = BASE) -> None:
    """Remove the folders of this user whose process has ended."""
    for folder in own_folders(base, f"skyrl-ray-{os.getuid()}-*"):
        found = owner(folder.name)
        if found and start_ticks(found[1]) != found[2]:
            shutil.rmtree(folder, ignore_errors=True)
