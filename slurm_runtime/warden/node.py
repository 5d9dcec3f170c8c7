"""What does the node have left? Numbers that cost next to nothing to read, however much runs there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Pulse:
    """The threads of the whole node and its available memory in bytes; 0 where the kernel does not say."""

    threads: int = 0
    available_bytes: int = 0


def pulse() -> Pulse:
    return Pulse(_threads(), _available_bytes())


def _threads() -> int:
    """The fourth word of /proc/loadavg is ``runnable/all``."""
    try:
        return int(Path("/proc/loadavg").read_bytes().split()[3].partition(b"/")[2])
    except (OSError, ValueError, IndexError):
        return 0


def _available_bytes() -> int:
    try:
        _, _, rest = Path("/proc/meminfo").read_bytes().partition(b"MemAvailable:")
        return int(rest.split(maxsplit=1)[0]) * 1024
    except (OSError, ValueError, IndexError):
        return 0


def disk_room(path: str) -> tuple[int, int]:
    """Bytes that an ordinary user may still fill where ``path`` lies, and the size of it all."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
