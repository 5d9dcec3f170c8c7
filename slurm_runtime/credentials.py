"""Where the API key comes from, and where a generated one is kept."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from slurm_runtime.logs import log


def read_key_file(path: Path) -> str:
    """The key in a file, without surrounding space; ``ValueError`` if it cannot be used."""
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"--api-key-file {path} cannot be read: {problem}") from None
    if not key:
        raise ValueError(f"--api-key-file {path} is empty")
    if not key.isascii() or not key.isprintable():
        raise ValueError(f"--api-key-file {path} holds characters that an HTTP header cannot carry")
    if path.stat().st_mode & 0o077:
        log.warning("%s can be read by others; make it private with 'chmod 600 %s'", path, path)
    return key


def key_folder(environment: Mapping[str, str], uid: int) -> Path:
    """A folder of this user alone: the run-time directory, else one below the temporary directory."""
    runtime_dir = environment.get("XDG_RUNTIME_DIR")
    if runtime_dir and Path(runtime_dir).is_dir():
        return Path(runtime_dir)
    folder = Path(tempfile.gettempdir()) / f"slurm-runtime-{uid}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != uid or found.st_mode & 0o077:
        raise ValueError(f"{folder} is not a folder of yours alone; remove it, or use --api-key-file")
    return folder


@contextlib.contextmanager
def generated_key(folder: Path, port: int) -> Iterator[tuple[str, Path]]:
    """A new key and its 0600 file, named by the port; the file is removed at the end.

    After ``kill -9`` it stays until the next server on this port writes its own.
    """
    key, path = secrets.token_urlsafe(32), folder / f"api-key-{port}"
    beside = folder / f".api-key-{port}-{os.getpid()}"
    beside.unlink(missing_ok=True)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(key + "\n")
    beside.replace(path)
    try:
        yield key, path
    finally:
        with contextlib.suppress(OSError):
            if path.read_text(encoding="ascii").strip() == key:  # not the file of a successor
                path.unlink()
