"""Which system calls may a container make? Podman's own profile, and a cheaper one for a container that only idles."""

from __future__ import annotations

import contextlib
import json
import os
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
    """The profile as a file for Podman, from ``write`` to ``remove``; ``path`` is empty where there is none."""

    def __init__(self) -> None:
        self.path = ""

    def write(self, profile: Mapping[str, Any] | None) -> None:
        """Make it; without one, or where the disk is full, containers keep Podman's own profile."""
        if profile is None:
            return
        with contextlib.suppress(OSError):
            descriptor, path = tempfile.mkstemp(prefix="skyrl-seccomp-", suffix=".json")
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                os.fchmod(descriptor, 0o644)  # Podman's service may be another user's
                json.dump(profile, file)
            self.path = path

    def remove(self) -> None:
        if self.path:
            Path(self.path).unlink(missing_ok=True)
            self.path = ""
