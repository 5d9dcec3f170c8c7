"""Which launcher submitted a job, and does it still live? The ``--comment`` of each job says it.

So a job whose id was never heard can be found, and one whose launcher died before it was released is known as such.
"""

from __future__ import annotations

import enum
import itertools
import os
from collections.abc import Callable
from pathlib import Path

from slurm.lib.coordination import host_name
from slurm.lib.processes import start_ticks

PREFIX = "skyrl:"
_numbers = itertools.count()


class Launcher(enum.Enum):
    """What is known of the process that a mark names."""

    LIVES = "lives"
    IS_DEAD = "is dead"
    IS_ELSEWHERE = "is elsewhere"  # under another kernel, or in other process numbers: not to be looked up from here


def own_launcher() -> str:
    """A word that names this process among all of this host, past ones included."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    return f"{host_name()}/{boot}/{namespace}/{os.getpid()}/{start_ticks(os.getpid())}"


def new_mark() -> str:
    """What names one submission of this process."""
    return f"{own_launcher()}/{next(_numbers)}"


def launcher_of(comment: str) -> str | None:
    """The launcher that a job's comment names; None for a comment that is not ours."""
    mark = comment.removeprefix(PREFIX)
    parts = mark.split("/")
    return "/".join(parts[:5]) if mark != comment and len(parts) == 6 else None


def host_of(launcher: str) -> str:
    return launcher.partition("/")[0]


def state_of(launcher: str, own: str, ticks: Callable[[int], int | None] = start_ticks) -> Launcher:
    """What is known here of a launcher.

    One of another boot may have died with this host's earlier one, or live on another host that has the same name.
    """
    theirs, ours = launcher.split("/"), own.split("/")
    if len(theirs) != 5 or theirs[:3] != ours[:3] or not theirs[3].isdigit():
        return Launcher.IS_ELSEWHERE
    return Launcher.LIVES if str(ticks(int(theirs[3]))) == theirs[4] else Launcher.IS_DEAD
