"""Which server process owns a container, and does that process still live?"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

SERVER_LABEL = "skyrl.server"


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])


def process_mark(pid: int | None = None) -> str:
    """A word that names this process among all of this host, past ones included."""
    pid = os.getpid() if pid is None else pid
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    return f"{socket.gethostname()}/{boot}/{namespace}/{pid}/{start_ticks(pid)}"


def is_orphan(mark: str, own: str, ticks: Callable[[int], int | None] = start_ticks) -> bool:
    """Whether the server behind ``mark`` is surely dead: same host, and no process with its number and start time.

    A mark of another host, process namespace or form is left alone; one of an earlier boot of this host is dead.
    """
    parts, ours = mark.split("/"), own.split("/")
    if len(parts) != 5 or parts[0] != ours[0] or not parts[3].isdigit():
        return False
    if parts[1] != ours[1]:
        return True
    return parts[2] == ours[2] and str(ticks(int(parts[3]))) != parts[4]
