"""Which file systems are mounted in a folder, or below it? What removes a folder never goes into one."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

MOUNTINFO = Path("/proc/self/mountinfo")
_OCTAL = re.compile(r"\\([0-7]{3})")


def mount_in(folder: Path) -> str:
    """Where something is mounted in a folder, or below it, as this process sees it; empty where nothing is.

    Asks the kernel alone: a look at the place itself would hang with the server behind it. Bind mounts of the same file
    system are seen, too.
    """
    with contextlib.suppress(OSError):
        real = os.path.realpath(folder)
        text = MOUNTINFO.read_text(encoding="utf-8", errors="surrogateescape")
        return next((point for point in mount_points(text) if point == real or point.startswith(f"{real}/")), "")
    return ""


def mount_points(mountinfo: str) -> Iterator[str]:
    """The fifth field of each line, in which spaces and the like stand as octal numbers (proc_pid_mountinfo(5))."""
    for line in mountinfo.splitlines():
        fields = line.split(" ")
        if len(fields) > 4:
            yield _OCTAL.sub(lambda found: chr(int(found[1], 8)), fields[4])
