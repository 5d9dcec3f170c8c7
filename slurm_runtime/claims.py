"""Which node fetches an image for all? Claims in a shared folder: one owner at a time, who gives signs of life.

The folder may lie on NFS, whose clients cache what they saw. So a claim appears whole, by a link, which the file server
allows to one; it is opened before its time is looked at, which has the server asked anew; and a clock of another host
is never compared with ours: an owner is silent if its claim has not changed for so long by our own clock, and times of
files are compared with each other alone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from slurm_runtime.references import archive_name

CLAIM, FAILED = ".claim-", ".failed-"
MOST_WORDS = 1000
# What a file system says that knows no links between files.
NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


@dataclass(frozen=True)
class Owner:
    """Who fetches an image: a process of a host in one of its boots. ``token`` tells this claim from every other."""

    token: str
    image: str = ""
    host: str = "another node"
    boot: str = ""
    pids: str = ""
    pid: int = 0
    time: str = ""

    @staticmethod
    def here(image: str, host: str) -> Owner:
        """This process, with a new token."""
        boot, pids = this_boot()
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return Owner(secrets.token_hex(8), image, host, boot, pids, os.getpid(), now)

    def is_dead(self) -> bool:
        """Whether it is a process of this boot and this PID namespace that has ended; of others that is not known."""
        boot, pids = this_boot()
        return bool(boot) and (self.boot, self.pids) == (boot, pids) and not _runs(self.pid)


def _runs(pid: int) -> bool:
    """Whether there is such a process, which is more than what its parent has not yet heard the end of."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in {"Z", "X"}


def this_boot() -> tuple[str, str]:
    """What tells this boot of this host from every other, and its PID namespace; empty where that is not told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return boot, str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return "", ""


@dataclass(frozen=True)
class Failure:
    """What an owner heard of the registry; ``noted_at`` by the clock of the file server."""

    token: str
    host: str
    time: str
    words: str
    noted_at: float = 0.0


def parse_owner(text: str) -> Owner:
    """The owner in a claim's text; of one that cannot be read no more is known than that it is another."""
    data = _object(text)
    texts = {name: data[name] for name in ("token", "image", "host", "boot", "pids", "time") if _is_text(data, name)}
    pid = data.get("pid")
    return Owner(**texts, pid=pid if isinstance(pid, int) else 0) if texts.get("token") else Owner(text[:200])


def parse_failure(text: str, noted_at: float) -> Failure | None:
    data = _object(text)
    if not all(_is_text(data, name) for name in ("token", "host", "time", "words")):
        return None
    return Failure(data["token"], data["host"], data["time"], data["words"], noted_at)


def _object(text: str) -> Mapping[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, Mapping) else {}


def _is_text(data: Mapping[str, Any], name: str) -> bool:
    return isinstance(data.get(name), str)


@dataclass(frozen=True)
class Seen:
    """A claim as it was just now: whose, and what changes with every sign of life."""

    owner: Owner
    changed_ns: int


@dataclass(frozen=True)
class Claim:
    """A claim that this process holds, until it is released or, after a long silence, taken over by another node."""

    path: Path
    owner: Owner
    taken_at: float

    def beat(self) -> bool:
        """Give a sign of life; False if the claim is ours no more."""
        if not self._is_ours():
            return False
        os.utime(self.path)  # by the file server's clock
        return True

    def release(self) -> None:
        """Let others fetch it; nothing to do where another node has taken it over."""
        with contextlib.suppress(OSError):
            if self._is_ours():
                self.path.unlink()

    def _is_ours(self) -> bool:
        seen = _seen(self.path)
        return seen is not None and seen.owner.token == self.owner.token


class Claims:
    """The claims on images in one folder; ``OSError`` where it can be neither read nor written."""

    def __init__(self, folder: Path, host: str) -> None:
        self.folder = folder
        self.host = host
        self._number = itertools.count()

    def take(self, image: str) -> Claim | None:
        """The claim on an image, if nobody has it."""
        path, owner = self._path(CLAIM, image), Owner.here(image, self.host)
        beside = self._beside(path, json.dumps(asdict(owner)))
        try:
            if not _link(beside, path):
                return None
            return Claim(path, owner, path.stat().st_mtime)
        finally:
            beside.unlink(missing_ok=True)

    def seen(self, image: str) -> Seen | None:
        """The claim on an image, whoever has it; None where nobody has."""
        return _seen(self._path(CLAIM, image))

    def clear(self, image: str, dead: Owner) -> None:
        """Remove the claim of an owner that is gone; where another has taken it meanwhile, that one keeps it."""
        path = self._path(CLAIM, image)
        aside = path.with_name(f"{path.name}.{self._own_suffix()}")
        try:
            path.rename(aside)
        except FileNotFoundError:
            return
        moved = _seen(aside)
        if moved is not None and moved.owner.token != dead.token:
            _link(aside, path)
        aside.unlink(missing_ok=True)

    def note_failure(self, claim: Claim, words: str) -> None:
        """Leave word, for those who wait, why an image is not to be had."""
        failure = Failure(claim.owner.token, self.host, claim.owner.time, words[:MOST_WORDS])
        path = self._path(FAILED, claim.owner.image)
        self._beside(path, json.dumps(asdict(failure))).replace(path)

    def failure(self, image: str) -> Failure | None:
        """What the last owner that failed left."""
        path = self._path(FAILED, image)
        read = _read(path)
        return None if read is None else parse_failure(read[0], read[1] / 1e9)

    def forget_failure(self, image: str) -> None:
        """The image could be had after all."""
        with contextlib.suppress(OSError):
            self._path(FAILED, image).unlink(missing_ok=True)

    def _path(self, kind: str, image: str) -> Path:
        """By a digest: with more than itself an archive's name would be too long for a file."""
        return self.folder / (kind + hashlib.sha256(archive_name(image).encode()).hexdigest()[:32])

    def _beside(self, path: Path, text: str) -> Path:
        beside = path.with_name(f"{path.name}.{self._own_suffix()}")
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            beside.unlink(missing_ok=True)
            raise
        return beside

    def _own_suffix(self) -> str:
        return f"{self.host}-{os.getpid()}-{next(self._number)}"


def _link(beside: Path, path: Path) -> bool:
    """Whether ``path`` is now another name of ``beside``; False where it is there already."""
    try:
        os.link(beside, path)
    except FileExistsError:
        return beside.stat().st_nlink == 2  # the answer to our own first try, which was lost
    except OSError as problem:
        if problem.errno not in NO_LINKS:
            raise
        return _made(path, beside.read_text(encoding="utf-8"))
    return True


def _made(path: Path, text: str) -> bool:
    """The same on a file system without links: it may be seen empty for a moment."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    return True


def _seen(path: Path) -> Seen | None:
    read = _read(path)
    return None if read is None else Seen(parse_owner(read[0]), read[1])


def _read(path: Path) -> tuple[str, int] | None:
    """Text and time of a file; opened first, so that an NFS client asks for both anew."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
