"""How full are the folders of sandboxes, and which one leaves the others no room on the node's disk?"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from slurm_runtime.warden.node import disk_room

COUNT_TIMEOUT_S = 60.0
RESERVE_SHARE, RESERVE_BYTES = 0.05, 2 << 30  # the smaller of both
COUNTS_AT_ONCE = 8
PATIENCE_S = 1.0  # for counts, when the disk is nearly full: a disk takes a GB a second
REMOVAL_S = 5.0  # until an offender's files are gone and the next one may be looked for
NOBODY_S = 30.0  # before sandboxes are counted again whose files are not what fills the disk


@dataclass
class Count:
    """A ``du`` under way."""

    process: subprocess.Popen[bytes]
    began: float
    written: int


@dataclass
class Folders:
    """Where one sandbox's own files lie.

    ``seen`` bytes of disk were filled at the last count that ended; that began at ``counted_at`` (monotonic), when the
    sandbox's processes had written ``written_then`` bytes since they started.
    """

    paths: tuple[str, ...] = ()
    seen: int = 0
    written_then: int = 0
    counted_at: float = -math.inf
    count: Count | None = None

    def begin(self, written: int) -> None:
        """Count them anew, which ``look`` ends; where none is known, nothing is: du would count the folder it is in."""
        if not self.paths:
            return
        command = ["du", "--summarize", "--total", "--one-file-system", "--block-size=1", *self.paths]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.count = Count(process, time.monotonic(), written)

    def empty(self) -> subprocess.Popen[bytes]:
        """Begin to remove what lies in them, of a sandbox that was killed: Podman removes nothing on a full disk."""
        assert self.paths, "find would remove the folder that it is in"
        command = ["find", *self.paths, "-xdev", "-mindepth", "1", "-delete"]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def look(self) -> None:
        """Take the result of a count that has ended; one that takes too long is ended."""
        if self.count is None:
            return
        if self.count.process.poll() is None:
            if time.monotonic() > self.count.began + COUNT_TIMEOUT_S:
                self.count.process.kill()
            return
        count, self.count = self.count, None
        self.written_then, self.counted_at = count.written, count.began
        assert count.process.stdout is not None
        with count.process.stdout as file:
            words = file.read().split()
        self.seen = int(words[-2]) if len(words) >= 2 and words[-2].isdigit() else self.seen


@dataclass(frozen=True)
class Writer:
    """A sandbox that may be what fills the disk; ``written`` asks how much its processes have written."""

    name: str
    folders: Folders
    written: Callable[[], int]


def reserve_of(size: int) -> int:
    """Bytes of a disk of this size that are kept free of sandboxes' files."""
    return min(int(size * RESERVE_SHARE), RESERVE_BYTES)


class Reserve:
    """Keeps some of the disk free for all: when less is left, the sandbox whose files fill most of it has to go."""

    def __init__(self) -> None:
        self._low_since: dict[int, float] = {}  # device → when its counts began to matter
        self._again_at: dict[int, float] = {}

    def look(self, writers: list[Writer]) -> Iterator[tuple[str, int, int]]:
        """Who has to be stopped: its name, the bytes that it fills, the bytes that the disk has left."""
        for device, (path, group) in by_device(writers).items():
            try:
                left, size = disk_room(path)
            except OSError:  # that sandbox has just been removed
                continue
            if left >= reserve_of(size):
                self._low_since.pop(device, None)
            elif time.monotonic() >= self._again_at.get(device, 0.0):
                found = self._biggest(device, group, reserve_of(size))
                if found:
                    yield found.name, found.folders.seen, left

    def _biggest(self, device: int, group: list[Writer], reserve: int) -> Writer | None:
        """The one that fills most, once enough is counted; None before, and where all fill little."""
        since = self._low_since.setdefault(device, time.monotonic())
        uncounted = [writer for writer in group if writer.folders.counted_at < since]
        counted = [writer for writer in group if writer.folders.counted_at >= since]
        biggest = max(counted, key=lambda writer: writer.folders.seen, default=None)
        found = biggest if biggest and biggest.folders.seen >= reserve // 4 else None
        if uncounted and not (found and time.monotonic() > since + PATIENCE_S):
            count_some(uncounted)
            return None
        self._low_since.pop(device)
        self._again_at[device] = time.monotonic() + (REMOVAL_S if found else NOBODY_S)
        if found is None:
            print("[WARN] the node's disk is nearly full, and not of sandboxes' files", file=sys.stderr, flush=True)
        return found


def by_device(writers: list[Writer]) -> Mapping[int, tuple[str, list[Writer]]]:
    """The file systems that sandboxes write to: a path on each, and the sandboxes there."""
    found: dict[int, tuple[str, list[Writer]]] = {}
    for writer in writers:
        with contextlib.suppress(OSError, IndexError):  # it is being removed, or has no folders
            path = writer.folders.paths[0]
            found.setdefault(os.stat(path).st_dev, (path, []))[1].append(writer)
    return found


def count_some(writers: list[Writer]) -> None:
    """Count a few more at a time, those first that have written most."""
    free = COUNTS_AT_ONCE - sum(writer.folders.count is not None for writer in writers)
    idle = [writer for writer in writers if writer.folders.count is None]
    for writer in sorted(idle, key=lambda writer: -writer.written())[: max(0, free)]:
        writer.folders.begin(writer.written())
