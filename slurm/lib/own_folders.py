"""Which folders in a place that everybody may write (/tmp) are ours to remove? Real ones of our own user, no others.

Another user may make a folder of any name there, with a link in it that leads into our home. Only what this user owns,
and is no link itself, was made by a process of this user, privately (0700), so that nobody else put anything into it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import time
from pathlib import Path

HALF_MADE_FOR_S = 3600.0  # a folder gets its name, or is gone again, within a minute


def is_own(path: Path) -> bool:
    """Whether ``path`` is a folder of this user's, and not a link to one."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()


def own_folders(place: Path, pattern: str) -> list[Path]:
    """This user's folders in ``place`` whose names fit the pattern."""
    return [path for path in sorted(place.glob(pattern)) if is_own(path)]


def remove_half_made(place: Path, pattern: str) -> None:
    """Remove what was being made under a temporary name by a process that did not live to name it.

    By age: the files lie on a disk of this host, whose clock has set their times.
    """
    for path in own_folders(place, pattern):
        with contextlib.suppress(OSError):  # it may get its name, or be gone, meanwhile
            if time.time() - path.lstat().st_mtime > HALF_MADE_FOR_S:
                shutil.rmtree(path, ignore_errors=True)
