"""Has a training saved since? A mark of its checkpoints that is another one after each that is complete.

VERL writes the number of the step into a tracker file when everything else of a checkpoint is there (read and run in
0.5.0 to 0.9.1). The RL loop has one file, written whole, which names its step. Of any other trainer all files below its
folder are the mark, so that one must rest before it counts.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from slurm.lib.coordination import parse_object, read_if_there

TRACKER = "latest_checkpointed_iteration.txt"
LOOP_FILE = "checkpoint.json"  # of the RL loop (shell_rl)
RESTS_S = 3.0  # a listing that stays the same for so long is of whole files


@dataclass(frozen=True)
class Checkpoints:
    """Where a training saves: ``folder`` is CHECKPOINT_DIR, ``experiment`` the folder in it that VERL makes.

    ``tracked``: whether a checkpoint counts only once the tracker names it, as with VERL.
    """

    folder: Path
    experiment: str
    tracked: bool

    def mark(self) -> str:
        """The present mark, for people too: ``step 12``, ``37 files, 1f3a…``; empty where there is no checkpoint."""
        number = (read_if_there(self.folder / self.experiment / TRACKER) or "").strip()
        if number.isdigit():
            return f"step {number}"
        if self.tracked:
            return ""
        step = parse_object(read_if_there(self.folder / LOOP_FILE)).get("step")
        return f"step {step}" if type(step) is int else _listing_mark(self.folder)


def _listing_mark(folder: Path) -> str:
    """Names, times and sizes of all files below ``folder``, shortened to one word."""
    entries = sorted(_entries(folder))
    if not entries:
        return ""
    digest = hashlib.sha256("\n".join(entries).encode("utf-8", "surrogateescape")).hexdigest()
    return f"{len(entries)} file{'s'[: len(entries) > 1]}, {digest[:16]}"


def _entries(folder: Path) -> Iterator[str]:
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            try:
                status = path.lstat()
            except OSError:  # renamed or removed by the trainer just now
                continue
            yield f"{path.relative_to(folder)} {status.st_mtime_ns} {status.st_size}"


@dataclass
class NewCheckpoint:
    """Has a checkpoint been completed since this object was made?"""

    checkpoints: Checkpoints
    clock: Callable[[], float] = time.monotonic
    before: str = field(init=False)
    _seen: str = field(init=False)
    _seen_at: float = field(init=False)

    def __post_init__(self) -> None:
        self.before = self._seen = self.checkpoints.mark()
        self._seen_at = self.clock()

    def arrived(self) -> str | None:
        """The mark of the new checkpoint once it is complete, else None. To be asked about once a second."""
        mark = self.checkpoints.mark()
        if mark != self._seen:
            self._seen, self._seen_at = mark, self.clock()
        if mark in {self.before, ""}:
            return None
        tracked = mark.startswith("step ")
        return mark if tracked or self.clock() - self._seen_at >= RESTS_S else None
