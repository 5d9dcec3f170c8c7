"""What stands in the files of a run's directory? Read in part where they are long, and never with an error.

The directory may be half empty, in the making, damaged, or another user's.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from slurm.lib.coordination import CoordinationDir, Flag, parse_flag
from slurm.lib.observe.unknown import Unknown

WINDOW = 1 << 16  # bytes of a log's beginning, and of its end; a step of VERL's is 4 KiB
SMALL = 1 << 20  # no record of ours is as long
# Escape sequences, control characters, marks that reverse a line, halves of characters (but not of a file's name).
_UNPRINTABLE = re.compile(
    r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]|[\u202a-\u202e\u2066-\u2069]|[\ud800-\udc7f\udd00-\udfff]"
)


@dataclass(frozen=True)
class LogEnds:
    """The beginning and the end of a log, both whole where it is short; ``size`` in bytes."""

    head: str = ""
    tail: str = ""
    size: int = 0


def printable(text: str) -> str:
    """The text without what would move a terminal's cursor or colour it."""
    return _UNPRINTABLE.sub("", text)


def names_in(folder: Path) -> frozenset[str] | Unknown:
    """The names in a folder, as its own listing shows them: an NFS client may believe in an absence."""
    try:
        return frozenset(os.listdir(folder))  # noqa: PTH208  names alone
    except OSError as problem:
        return Unknown(f"{folder}: {problem.strerror}")


def read_object(path: Path) -> dict[str, object] | Unknown:
    """The JSON object in a file."""
    text = read_small(path)
    if isinstance(text, Unknown):
        return text
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return Unknown(f"{path.name} holds no JSON")
    return data if isinstance(data, dict) else Unknown(f"{path.name} holds no JSON object")


def read_small(path: Path, most: int = SMALL) -> str | Unknown:
    """The text of a regular file of at most so many bytes."""
    try:
        with opened(path) as file:
            data = file.read(most + 1)
    except OSError as problem:
        return Unknown(f"{path.name}: {problem.strerror or 'it is no regular file'}")
    return data.decode("utf-8", "replace") if len(data) <= most else Unknown(f"{path.name} is too long")


def read_flag(path: Path) -> Flag | None:
    """The flag in a file; None where there is none, or what stands there is none."""
    text = read_small(path)
    return None if isinstance(text, Unknown) else parse_flag(text)


def log_ends(path: Path) -> LogEnds | Unknown:
    """The ends of a log; what lies between them is not read."""
    try:
        with opened(path) as file:
            head = file.read(WINDOW)
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - WINDOW))
            tail = file.read(WINDOW) if size > len(head) else head
    except OSError as problem:
        return Unknown(f"{path.name}: {problem.strerror or 'it is no regular file'}")
    return LogEnds(head.decode("utf-8", "replace"), tail.decode("utf-8", "replace"), size)


def opened(path: Path) -> BinaryIO:
    """A regular file, open for reading; ``OSError`` for anything else, such as a pipe, which would block."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not os.path.isfile(descriptor):  # noqa: PTH113  of the descriptor
        os.close(descriptor)
        raise OSError
    return os.fdopen(descriptor, "rb")


def key_of(directory: CoordinationDir) -> str | None:
    """The key of the run's API server; None where there is none, or it may not be read."""
    text = read_small(directory.runtime_api_key)
    return None if isinstance(text, Unknown) else text.strip() or None
