"""What lies in a run's directory: how much, unchanged since when, and a checkpoint? Links are not followed."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm.lib.checkpoints import TRACKER

BLOCK = 512  # bytes of st_blocks (stat(2)), whatever the file system's are
CODE = "code"  # the suite's own copy in the directory, which names files as it likes
# A folder in which trainers keep checkpoints, and a file of one: VERL's, PyTorch's, Hugging Face's, and the RL loop's.
_FOLDER = re.compile(r"global_step_\d+|(checkpoints?|ckpts?)([-_.]\w*)?", re.IGNORECASE)
_FILE = re.compile(
    rf".*\.(pt|pth|ckpt|safetensors|distcp)|(pytorch_model|optimizer|model)\b.*\.bin|checkpoint\.\w+|{re.escape(TRACKER)}",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Remains:
    """What was found: bytes on the disk, the last change, in epoch seconds, and the path of a checkpoint's file.

    ``problem`` says what could not be looked into; then nothing is known of the rest.
    """

    size: int = 0
    changed_at: float = -math.inf
    checkpoint: str = ""
    problem: str = ""


def is_of_checkpoint(path: str, known: Sequence[str] = ()) -> bool:
    """Whether a file belongs to a checkpoint, by its path in the directory.

    ``known`` are folders in there that the run's settings name for checkpoints.
    """
    parts = path.split("/")
    if any(path.startswith(f"{folder}/") for folder in known):
        return True
    return parts[0] != CODE and (bool(_FILE.fullmatch(parts[-1])) or any(map(_FOLDER.fullmatch, parts[:-1])))


def remains_of(folder: Path, known: Sequence[str] = ()) -> Remains:
    """What lies in a folder and below it."""
    size, changed_at, checkpoint = 0, -math.inf, ""
    try:
        for path, status, is_folder in _entries(str(folder), ""):
            size += status.st_blocks * BLOCK
            changed_at = max(changed_at, status.st_mtime)
            if not is_folder and not checkpoint and is_of_checkpoint(path, known):
                checkpoint = path
    except OSError as problem:
        return Remains(size, changed_at, checkpoint, f"{problem.filename}: {problem.strerror}")
    return Remains(size, changed_at, checkpoint)


def _entries(folder: str, inside: str) -> Iterator[tuple[str, os.stat_result, bool]]:
    """Every entry's path in the directory, its status, and whether it is a folder; the directory itself first."""
    yield inside, os.lstat(folder), True
    with os.scandir(folder) as listed:
        entries = list(listed)
    for entry in entries:
        path = f"{inside}/{entry.name}" if inside else entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _entries(entry.path, path)
        else:
            try:
                yield path, entry.stat(follow_symlinks=False), False
            except FileNotFoundError:  # a temporary file, renamed by now
                continue
