"""A shared folder as one node may see it under faults: every call slow, new files there only later, root refused.

A FUSE pass-through, started as a program of its own under the system's Python, in the mount namespace of the node that
is to suffer: ``faulty_fs.py FOLDER CONTROL [SOURCE]`` mounts over ``FOLDER`` what was there before, or ``SOURCE``.
``CONTROL`` is a JSON file that may be rewritten meanwhile: ``delay_s`` for each call that a client's caches do not
answer; ``late_s`` during which a file whose name matches one of ``late`` is not there, counted from this node's first
look at it (what the node itself has made is there at once); ``root_squash``: root is nobody, as on NFS by default, and
here that means to be refused. As there, the file-system user id of the calling thread counts, which is root's in a
set-uid program, the user's in slurmstepd once it has dropped its privileges, and the user's for root in the user's own
user namespace; and what is done with an open file is its opener's.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fusepy  # type: ignore[import-not-found]  # Debian's, of the system's Python

# What a client of a shared file system does from its caches: attributes of what it has seen, and what a sync completes;
# and what NFS has no call for: whether a file is a terminal, capabilities that a write would take from it.
AT_ONCE = frozenset({"getattr", "access", "write", "flush", "release", "releasedir", "ioctl", "getxattr"})


BY_HANDLE = frozenset({"read", "write", "flush", "fsync", "release", "releasedir"})  # whoever opened it, did it
NOBODYS = frozenset({"init", "destroy"})  # the kernel's


class Conditions:
    """What the control file says now."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp, self._said = 0, dict[str, Any]()

    def now(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            stamp = self.path.stat().st_mtime_ns
            if stamp != self._stamp:
                self._said, self._stamp = json.loads(self.path.read_text()), stamp
        return self._said


class FaultyFolder(fusepy.Operations):  # type: ignore[misc]  # untyped
    """The calls of the folder that ``root``, an open descriptor, stands for."""

    def __init__(self, root: int, conditions: Conditions) -> None:
        self.root, self.conditions = root, conditions
        self._own: set[int] = set()
        self._first_look: dict[int, float] = {}

    def __call__(self, operation: str, *arguments: Any) -> Any:
        if operation not in AT_ONCE:
            time.sleep(float(self.conditions.now().get("delay_s", 0)))
        if self.conditions.now().get("root_squash") and self._is_refused(operation, *arguments):
            raise fusepy.FuseOSError(errno.EACCES)
        return super().__call__(operation, *arguments)

    def _is_refused(self, operation: str, *arguments: Any) -> bool:
        """Root may know of the folder itself, whose parent is another file system, and of nothing in it."""
        known = operation in BY_HANDLE | NOBODYS or (operation == "getattr" and arguments[0] == "/")
        return not known and fusepy.fuse_get_context()[0] == 0

    def _real(self, path: str) -> str:
        return f"/proc/self/fd/{self.root}/{path.lstrip('/')}"

    def _hidden(self, path: str) -> bool:
        said = self.conditions.now()
        if not any(fnmatch.fnmatch(os.path.basename(path), name) for name in said.get("late", ())):
            return False
        try:
            inode = os.lstat(self._real(path)).st_ino
        except OSError:
            return False
        since = self._first_look.setdefault(inode, time.monotonic())
        return inode not in self._own and time.monotonic() - since < said["late_s"]

    def _there(self, path: str) -> str:
        if self._hidden(path):
            raise fusepy.FuseOSError(errno.ENOENT)
        return self._real(path)

    def _made(self, path: str) -> None:
        """Give what a call has made to its caller, and show it at once."""
        uid, gid, _pid = fusepy.fuse_get_context()
        os.lchown(self._real(path), uid, gid)
        self._own.add(os.lstat(self._real(path)).st_ino)

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        status = os.fstat(fh) if fh is not None else os.lstat(self._there(path))
        names = ("st_atime", "st_ctime", "st_gid", "st_mode", "st_mtime", "st_nlink", "st_size", "st_uid")
        return {name: getattr(status, name) for name in names}

    def readdir(self, path: str, _fh: int) -> Iterator[str]:
        yield from (".", "..")
        for name in os.listdir(self._there(path)):
            if not self._hidden(f"{path.rstrip('/')}/{name}"):
                yield name

    def statfs(self, _path: str) -> dict[str, Any]:
        status = os.fstatvfs(self.root)
        names = ("bavail", "bfree", "blocks", "bsize", "favail", "ffree", "files", "frsize", "namemax")
        return {f"f_{name}": getattr(status, f"f_{name}") for name in names}

    def readlink(self, path: str) -> str:
        return os.readlink(self._there(path))

    def open(self, path: str, flags: int) -> int:
        return os.open(self._there(path), flags)

    def create(self, path: str, mode: int, _fi: object = None) -> int:
        descriptor = os.open(self._real(path), os.O_RDWR | os.O_CREAT, mode)
        self._made(path)
        return descriptor

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self._real(path), mode)
        self._made(path)

    def symlink(self, target: str, source: str) -> None:
        os.symlink(source, self._real(target))
        self._made(target)

    def rename(self, old: str, new: str) -> None:
        os.rename(self._there(old), self._real(new))

    def link(self, target: str, source: str) -> None:
        os.link(self._there(source), self._real(target))

    def unlink(self, path: str) -> None:
        os.unlink(self._there(path))

    def rmdir(self, path: str) -> None:
        os.rmdir(self._there(path))

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self._there(path), mode)

    def chown(self, path: str, uid: int, gid: int) -> None:
        os.lchown(self._there(path), uid, gid)

    def utimens(self, path: str, times: tuple[float, float] | None = None) -> None:
        os.utime(self._there(path), times)

    def truncate(self, path: str, length: int, fh: int | None = None) -> None:
        os.truncate(self._there(path) if fh is None else fh, length)

    def read(self, _path: str, size: int, offset: int, fh: int) -> bytes:
        return os.pread(fh, size, offset)

    def write(self, _path: str, data: bytes, offset: int, fh: int) -> int:
        return os.pwrite(fh, data, offset)

    def fsync(self, _path: str, _datasync: bool, fh: int) -> None:
        os.fsync(fh)

    def release(self, _path: str, fh: int) -> None:
        os.close(fh)


def main(folder: str, control: str, source: str = "") -> None:
    """Mount over the folder, and serve until it is unmounted."""
    root = os.open(source or folder, os.O_RDONLY | os.O_DIRECTORY)
    conditions = Conditions(Path(control))
    # Nothing is cached by the kernel, so that each look of the node's is a call here. Where users are told apart, names
    # and attributes are, for a second: of what the user has just looked at root may learn so much, but not open it.
    remembered_s = 1 if conditions.now().get("root_squash") else 0
    caches = dict.fromkeys(("attr_timeout", "entry_timeout", "negative_timeout"), remembered_s)
    fusepy.FUSE(
        FaultyFolder(root, conditions),
        folder,
        foreground=True,
        allow_other=True,
        default_permissions=True,
        nonempty=True,
        **caches,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
