"""What lies in a run's directory: how much, unchanged since when, a checkpoint, files that are none of ours?

Links are not followed, and no other file system is looked into that is mounted there.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from slurm.lib.checkpoints import TRACKER
from slurm.lib.coordination import OWN_FILES, SHARED_IMAGE
from slurm.lib.mounts import mount_in
from slurm.lib.reports import MARK

BLOCK = 512  # bytes of st_blocks (stat(2)), whatever the file system's are
CODE, ROLLOUTS, IMAGES = "code", "rollouts", "images"  # by CoordinationDir; code names its files as it likes
# A folder in which trainers keep checkpoints, and a file of one: VERL's, PyTorch's, Hugging Face's, and the RL loop's.
_FOLDER = re.compile(r"global_step_\d+|(checkpoints?|ckpts?)([-_.]\w*)?", re.IGNORECASE)
_FILE = re.compile(
    rf".*\.(pt|pth|ckpt|safetensors|distcp)|(pytorch_model|optimizer|model)\b.*\.bin|checkpoint\.\w+|{re.escape(TRACKER)}",
    re.IGNORECASE,
)
_OWN = re.compile("|".join(OWN_FILES))
_HALF_WRITTEN = re.compile(rf"\.({'|'.join(OWN_FILES)})\.[^/]+\.\d+")  # as coordination.write_atomically names it
# What Python, Hydra and wandb (online: it is on the server, too) leave in the folder in which VERL runs.
_BYPRODUCT = re.compile(
    r"(.*/)?__pycache__/[^/]+|outputs/[^/]+/[^/]+/(\.hydra/[^/]+|[^/]+\.log)|wandb/(run-.*|debug[^/]*\.log)", re.DOTALL
)
HEAD = 2048  # of a page, in which its mark stands


@dataclass(frozen=True)
class Known:
    """What a run's records say of the files in its directory.

    ``checkpoints``: the folders in there that it saves in; ``confs``: the names of the ``.conf`` files of which copies
    lie there; ``copies``: the folders of SNAPSHOT=1, and until when files in each are of the copy, by the file server's
    clock.
    """

    checkpoints: tuple[str, ...] = ()
    confs: tuple[str, ...] = ()
    copies: Mapping[str, float] = field(default_factory=dict)


NOTHING = Known()


@dataclass(frozen=True)
class Remains:
    """What was found: bytes on the disk, the last change, in epoch seconds, and the path of a checkpoint's file.

    ``foreign`` is the path of the first file that is none of ours, and ``foreign_count`` how many there are. Where
    ``mounted`` names a place at which another file system is mounted, or ``problem`` says what could not be looked
    into, nothing is known of the rest.
    """

    size: int = 0
    changed_at: float = -math.inf
    checkpoint: str = ""
    foreign: str = ""
    foreign_count: int = 0
    mounted: str = ""
    problem: str = ""


def is_of_checkpoint(path: str, known: Sequence[str] = ()) -> bool:
    """Whether a file belongs to a checkpoint, by its path in the directory.

    ``known`` are folders in there that the run's settings name for checkpoints.
    """
    parts = path.split("/")
    if any(path.startswith(f"{folder}/") for folder in known):
        return True
    return parts[0] != CODE and (bool(_FILE.fullmatch(parts[-1])) or any(map(_FOLDER.fullmatch, parts[:-1])))


def is_ours(path: str, confs: Sequence[str] = ()) -> bool:
    """Whether the suite writes a file, or says that it goes with the run, by its path in the directory."""
    first, _, below = path.partition("/")
    if below:
        return first in {CODE, ROLLOUTS} or (first == IMAGES and bool(re.fullmatch(SHARED_IMAGE, below)))
    return bool(_OWN.fullmatch(first) or _HALF_WRITTEN.fullmatch(first)) or any(
        re.fullmatch(rf"{re.escape(Path(conf).stem)}(\.\d+)?{re.escape(Path(conf).suffix)}", first) for conf in confs
    )


def remains_of(folder: Path, known: Known = NOTHING) -> Remains:
    """What lies in a folder and below it."""
    found = Remains(mounted=mount_in(folder))
    if found.mounted:
        return found
    try:
        for path, status in _entries(str(folder), "", os.lstat(folder).st_dev):
            size, changed_at = found.size + status.st_blocks * BLOCK, max(found.changed_at, status.st_mtime)
            found = replace(found, size=size, changed_at=changed_at)
            if stat.S_ISREG(status.st_mode):
                found = _with_file(found, folder, path, status, known)
    except _AnotherFileSystem as there:
        return replace(found, mounted=str(there))
    except OSError as problem:
        return replace(found, problem=f"{problem.filename}: {problem.strerror}")
    return found


def _with_file(found: Remains, folder: Path, path: str, status: os.stat_result, known: Known) -> Remains:
    if _is_of_snapshot(path, status, known):
        return found
    if is_of_checkpoint(path, known.checkpoints):
        return replace(found, checkpoint=found.checkpoint or path)
    if is_ours(path, known.confs) or _is_byproduct(path, known) or _is_report(folder, path):
        return found
    return replace(found, foreign=found.foreign or path, foreign_count=found.foreign_count + 1)


def _is_of_snapshot(path: str, status: os.stat_result, known: Known) -> bool:
    """Whether a file was copied by SNAPSHOT=1, and not changed since; a trainer that runs in there may save there."""
    return status.st_ctime <= known.copies.get(path.partition("/")[0], -math.inf)


def _is_byproduct(path: str, known: Known) -> bool:
    first, _, below = path.partition("/")
    return first in known.copies and bool(_BYPRODUCT.fullmatch(below))


def _is_report(folder: Path, path: str) -> bool:
    """Whether it is a page of ``launch.py report``, by the mark in it."""
    if "/" in path or not path.endswith(".html"):
        return False
    with (folder / path).open("rb") as file:
        return MARK.encode() in file.read(HEAD)


class _AnotherFileSystem(Exception):
    """Its text is the folder at which one is mounted."""


def _entries(folder: str, inside: str, device: int) -> Iterator[tuple[str, os.stat_result]]:
    """Every entry's path in the directory, and its status; the directory itself first.

    Files are not asked for their device: on an overlay it need not be their folder's.
    """
    status = os.lstat(folder)
    if status.st_dev != device:
        raise _AnotherFileSystem(folder)
    yield inside, status
    with os.scandir(folder) as listed:
        entries = list(listed)
    for entry in entries:
        path = f"{inside}/{entry.name}" if inside else entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _entries(entry.path, path, device)
        else:
            try:
                yield path, entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # a temporary file, renamed by now
                continue
