"""Which system calls may a container make? Podman's own profile, and a cheaper one for a container that only idles."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slurm_runtime.warden.seccomp import NATIVE


def profile_in(oci_config: str) -> Mapping[str, Any] | None:
    """``linux.seccomp`` of a container's runtime configuration; None where it has none or cannot be read."""
    try:
        config = json.loads(Path(oci_config).read_text(encoding="utf-8"))
        profile = (config.get("linux") or {}).get("seccomp")
    except (OSError, ValueError, AttributeError):
        return None
    return profile if isinstance(profile, dict) else None


def native_only(profile: Mapping[str, Any], machine: str) -> Mapping[str, Any] | None:
    """The same profile for programs of this architecture alone; None where nothing is gained.

    The runtime compiles a profile for each container and each of its architectures: 12 of 120 ms of processor time.
    """
    native, _ = NATIVE.get(machine, ("", 0))
    listed = profile.get("architectures") or ()
    return {**profile, "architectures": [native]} if native in listed and len(listed) > 1 else None


class ProfileFile:
    """The profile as a file for Podman, from ``write`` to ``remove``.

    It is locked for as long as its process lives. So the next server on this host finds those of servers that were
    killed; where there are no locks, they stay.
    """

    def __init__(self) -> None:
        self._path = ""
        self._lock: int | None = None

    @property
    def path(self) -> str:
        """Where it is; empty where there is none, or none any more: a start with a path to nothing would fail."""
        return self._path if self._path and Path(self._path).exists() else ""

    def write(self, profile: Mapping[str, Any] | None) -> None:
        """Make it; without one, or where the disk is full, containers keep Podman's own profile."""
        if profile is None:
            return
        remove_left()
        with contextlib.suppress(OSError):
            self._make(json.dumps(profile))

    def _make(self, text: str) -> None:
        self._lock, self._path = tempfile.mkstemp(prefix=prefix(), suffix=".json")
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_SH)
            os.fchmod(self._lock, 0o644)  # Podman's service may be another user's
            with os.fdopen(os.dup(self._lock), "w", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            self.remove()

    def remove(self) -> None:
        if self._lock is not None:
            Path(self._path).unlink(missing_ok=True)
            os.close(self._lock)
            self._path, self._lock = "", None


def prefix() -> str:
    """Of the files' names, with this host's name: another one's locks may not be seen here."""
    return f"skyrl-seccomp-{socket.gethostname()}-"


def remove_left() -> None:
    """Remove the files of this user's servers that live no more."""
    for path in Path(tempfile.gettempdir()).glob(f"{glob.escape(prefix())}*.json"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)  # anybody may put anything there
            try:
                if os.fstat(descriptor).st_uid == os.getuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
            finally:
                os.close(descriptor)
