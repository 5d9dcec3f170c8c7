"""A folder on a node's disk that belongs to one process: who owns it, and who removes it once that one is dead?

The owner holds a lock in it, by which a sweep tells a living one's folder from a dead one's. It says the folder's path
and a token, of that one folder alone, before it makes it: whoever heard that removes the folder for it if it is killed,
at whatever moment. A folder of the same path without that token is another's.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from slurm.lib.coordination import parse_object, read_if_there, utc_now
from slurm.lib.logs import log
from slurm.lib.own_folders import is_own

LOCK_NAME = "owner.lock"
REMOVE_DEADLINE_S = 5.0
Announce = Callable[[Path, str], None]


def tell_nobody(root: Path, token: str) -> None:
    """For an owner without a guardian: what it leaves when it is killed is the next sweep's."""


@contextlib.contextmanager
def locked_folder(root: Path, announce: Announce = tell_nobody) -> Iterator[None]:
    """The folder ``root``, made privately (0700), and locked for the length of the block; ``OSError`` says why not.

    Made under another name and locked before it gets its own, so that no sweep takes it for a dead one's. A process
    that is forked in the block has the lock, too, until it begins another program.
    """
    token = secrets.token_hex(8)
    announce(root, token)
    making = _half_made(root, token)
    making.mkdir(mode=0o700)
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context((making / LOCK_NAME).open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            said = {"pid": os.getpid(), "host": socket.gethostname(), "time": utc_now(), "token": token}
            lock.write(json.dumps(said))
            lock.flush()
            os.fsync(lock.fileno())  # others know it by its text, and a node without power must not lose that
            making.rename(root)
        except OSError:
            shutil.rmtree(making, ignore_errors=True)
            raise
        yield


def _half_made(root: Path, token: str) -> Path:
    return root.parent / f".{root.name}.{token}"


def remove(root: Path) -> None:
    """Remove such a folder; a process that was just killed may still hold on to it for a moment."""
    end = time.monotonic() + REMOVE_DEADLINE_S
    while root.exists() and time.monotonic() < end:
        for entry in _contents(root):  # the lock last: without it nobody would know that a rest is a dead run's
            entry.unlink(missing_ok=True) if not entry.is_dir() or entry.is_symlink() else shutil.rmtree(entry, True)
        if not _contents(root):
            shutil.rmtree(root, ignore_errors=True)
        time.sleep(0.02)
    if root.exists():
        log.warning("could not remove all of %s; the next job of yours on this node will try again", root)


def _contents(root: Path) -> list[Path]:
    """What is in it beside the lock."""
    try:
        return [entry for entry in root.iterdir() if entry.name != LOCK_NAME]
    except OSError:  # gone meanwhile
        return []


@contextlib.contextmanager
def dead_owners_lock(root: Path) -> Iterator[bool]:
    """Whether the owner of a folder is dead, and was on this host; its lock is ours then for the length of the block.

    Some network file systems lock on each node by itself, so that one of another host, or of nobody known, counts as
    a living one's.
    """
    with contextlib.ExitStack() as stack:
        try:
            path = root / LOCK_NAME
            lock = stack.enter_context(path.open("r+", errors="replace"))
            is_of_here = parse_object(lock.read()).get("host") == socket.gethostname()
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_there = os.path.samestat(os.fstat(lock.fileno()), path.stat())  # it may be another's by now
        except OSError:
            is_of_here = is_there = False
        yield is_of_here and is_there


def remove_of_dead_owner(root: Path, token: str, remove: Callable[[Path], object], deadline_s: float = 10.0) -> None:
    """Remove the one folder with this token, made or half-made, whose owner is dead; any other is left alone.

    The kernel frees a dead owner's lock within moments, for which it waits.
    """
    half_made = _half_made(root, token)
    if is_own(half_made):
        shutil.rmtree(half_made, ignore_errors=True)
    end = time.monotonic() + deadline_s
    while _is_of(root, token) and time.monotonic() < end:
        with dead_owners_lock(root) as dead:
            if dead and _is_of(root, token):
                remove(root)
                return
        time.sleep(0.05)


def _is_of(root: Path, token: str) -> bool:
    return is_own(root) and parse_object(read_if_there(root / LOCK_NAME)).get("token") == token
