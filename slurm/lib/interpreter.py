"""Is the interpreter still the one that a job was submitted with? Told by the versions of Python and our packages."""

from __future__ import annotations

import sys
from importlib import metadata

from slurm.lib.bootstrap import PACKAGES

MARK_NAME = "SKYRL_PYTHON_MARK"
# By the names under which they are installed, where these are others.
DISTRIBUTIONS = {"dotenv": "python-dotenv", "yaml": "PyYAML"}
ABSENT = "absent"


def mark() -> str:
    """This interpreter's versions, as ``python=3.11.2,fastapi=0.115.0,…``."""
    own = ".".join(map(str, sys.version_info[:3]))
    return ",".join([f"python={own}", *(f"{name}={_version(name)}" for name in PACKAGES)])


def _version(name: str) -> str:
    try:
        return metadata.version(DISTRIBUTIONS.get(name, name))
    except metadata.PackageNotFoundError:
        return ABSENT


def changes(then: str, now: str) -> list[str]:
    """What differs between two marks, as ``fastapi 0.115.0 → 0.116.0``; nothing where one is empty."""
    old, new = _versions(then), _versions(now)
    return [f"{name} {old[name]} → {new[name]}" for name in old if name in new and old[name] != new[name]]


def _versions(mark: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in mark.split(",") if "=" in part)
