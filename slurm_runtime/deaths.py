"""When does a container, or a server forked into it, end? The kernel tells at once, so that Podman is not asked."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable


class Deaths:
    """Processes, each watched through a file descriptor (pidfd, from Linux 5.3 on)."""

    def __init__(self) -> None:
        self._watched: dict[int, int] = {}  # process id → descriptor

    def watch(self, pid: int, on_end: Callable[[], object]) -> bool:
        """Call ``on_end`` once when process ``pid`` has ended; False where that cannot be told."""
        if not pid or not hasattr(os, "pidfd_open"):
            return False
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            asyncio.get_running_loop().call_soon(on_end)
            return True
        except OSError:  # an older kernel, or no descriptors left
            return False
        self.forget(pid)
        self._watched[pid] = descriptor
        asyncio.get_running_loop().add_reader(descriptor, self._ended, pid, on_end)
        return True

    def forget(self, pid: int) -> None:
        """Watch it no more; fine for one that is not watched."""
        descriptor = self._watched.pop(pid, None)
        if descriptor is not None:
            asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)

    def close(self) -> None:
        for pid in list(self._watched):
            self.forget(pid)

    def _ended(self, pid: int, on_end: Callable[[], object]) -> None:
        self.forget(pid)
        on_end()
