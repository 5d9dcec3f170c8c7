"""How does an image's archive get into a folder: whole or not at all, whoever is killed meanwhile?"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import socket
from collections.abc import AsyncIterator
from pathlib import Path

from slurm_runtime.podman import Engine
from slurm_runtime.references import archive_name

UNFINISHED = re.compile(r"\.part-(?P<host>.+)-(?P<pid>\d+)-\d+")
_NUMBERS = itertools.count(1)  # of this process: it may write to a folder from several places
FORGOTTEN_S = 86400.0  # an unfinished file of another host that nobody has written to for so long


class ArchiveFolder:
    """A folder of image archives that is written to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self) -> None:
        """Make the folder and remove what killed writers left in it; ``OSError`` if it cannot be written to."""
        self.folder.mkdir(parents=True, exist_ok=True)
        probe = self._unfinished()
        probe.touch()
        now = probe.stat().st_mtime  # of the clock that stamps all files here, which on shared storage is not ours
        probe.unlink()
        for path in self.folder.glob(".part-*"):
            if is_abandoned(path.name, socket.gethostname(), age_s(path, now)):
                path.unlink(missing_ok=True)

    def path_of(self, image: str) -> Path:
        """Where the image's archive lies or will lie; ``ValueError`` for an image that can have none."""
        return self.folder / archive_name(image)

    def find(self, image: str) -> Path | None:
        """The image's archive, if the folder's own listing shows it: an NFS client believes in an absence for long."""
        path = self.path_of(image)
        try:
            with os.scandir(self.folder) as entries:
                return path if any(entry.name == path.name for entry in entries) else None
        except FileNotFoundError:
            return None

    async def write(self, engine: Engine, image: str) -> Path:
        """Write the archive of an image of the store; ``EngineError`` or ``OSError`` leave no trace of it."""
        target = self.path_of(image)
        async with self._beside() as unfinished:
            await engine.save(image, unfinished)
            await asyncio.to_thread(_sync, unfinished)
            unfinished.replace(target)
        return target

    @contextlib.asynccontextmanager
    async def _beside(self) -> AsyncIterator[Path]:
        path = self._unfinished()
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _unfinished(self) -> Path:
        return self.folder / f".part-{socket.gethostname()}-{os.getpid()}-{next(_NUMBERS)}"


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def age_s(path: Path, now: float) -> float:
    """Seconds since the file was last written to, 0 for one that is gone."""
    try:
        return now - path.stat().st_mtime
    except OSError:
        return 0.0


def is_abandoned(name: str, host: str, idle_s: float) -> bool:
    """Whether nobody writes to an unfinished file any more: its writer on this host is dead, or it idles for a day."""
    match = UNFINISHED.fullmatch(name)
    if match is None:
        return False
    if match["host"] == host:
        return not Path(f"/proc/{match['pid']}").exists()
    return idle_s > FORGOTTEN_S
