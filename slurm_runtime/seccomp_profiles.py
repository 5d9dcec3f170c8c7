"""Which system calls may a container make? Podman's own profile, and a cheaper one for a container that only idles."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slurm_runtime.warden.seccomp import NATIVE

PREFIX = "skyrl-seccomp-"


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
    """The profile as a file for Podman, from ``write`` to ``remove``; ``path`` is empty where there is none.

    It is locked for as long as its process lives. So the next server finds those of servers that were killed.
    """

    def __init__(self) -> None:
        self.path = ""
        self._lock: int | None = None

    def write(self, profile: Mapping[str, Any] | None) -> None:
        """Make it; without one, or where the disk is full, containers keep Podman's own profile."""
        if profile is None:
            return
        remove_left()
        with contextlib.suppress(OSError):
            self._lock, self.path = tempfile.mkstemp(prefix=PREFIX, suffix=".json")
            try:
                self._fill(self._lock, json.dumps(profile))
            except OSError:
                self.remove()

    @staticmethod
    def _fill(descriptor: int, text: str) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.fchmod(descriptor, 0o644)  # Podman's service may be another user's
        with os.fdopen(os.dup(descriptor), "w", encoding="utf-8") as file:
            file.write(text)
        if not os.fstat(descriptor).st_nlink:
            raise FileNotFoundError("another server took it for one that was left, before it was locked")

    def remove(self) -> None:
        if self._lock is not None:
            Path(self.path).unlink(missing_ok=True)
            os.close(self._lock)
            self.path, self._lock = "", None


def remove_left() -> None:
    """Remove the files of this user's servers that live no more."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*.json"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)  # anybody may put anything there
            try:
                if os.fstat(descriptor).st_uid == os.getuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
            finally:
                os.close(descriptor)
