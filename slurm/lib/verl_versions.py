"""Which VERL would run in the user's skyrl-agent, and what differs between the releases that the suite knows.

``uv run --frozen`` brings the environment to what ``uv.lock`` says before it starts anything, so the lock is asked
first; with UV_NO_SYNC it leaves the environment alone, and what is installed counts.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from email.parser import HeaderParser
from enum import Enum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# The releases whose `ppo_trainer` configuration the suite's overrides were composed with, or that lie between two.
KNOWN = ("0.5.0", "0.6.0", "0.6.1", "0.7.0", "0.7.1", "0.8.0", "0.9.0", "0.9.1")
STOCK_PROJECTS = frozenset({"volcengine/verl", "verl-project/verl"})  # the same project under its old and new name
SKYRL_PROJECT = "novasky-ai/verl-fork"

Release = tuple[int, ...]


class Origin(Enum):
    """Whose VERL it is."""

    STOCK = "stock VERL"
    SKYRL = "SkyRL's fork of VERL"
    OTHER = "a VERL of another source"


@dataclass(frozen=True)
class VerlVersion:
    """A VERL as a lock file or an environment names it.

    ``text`` is its version, ``source`` the address that it comes from (empty for a package index), ``place`` the file
    that says so.
    """

    text: str
    source: str
    place: Path

    @property
    def release(self) -> Release:
        """The numbers of the version: (0, 6, 1) for 0.6.1, 0.6.1.post2 and 0.6.1+cu124."""
        match = re.match(r"\d+(\.\d+)*", self.text)
        return tuple(int(part) for part in match[0].split(".")) if match else ()

    @property
    def known(self) -> bool:
        """Whether the suite knows this release; a fork counts as the release that it calls itself."""
        return ".".join(map(str, self.release)) in KNOWN

    @property
    def origin(self) -> Origin:
        parts = urlsplit(self.source)
        project = re.sub(r"\.git$", "", parts.path.partition("@")[0].strip("/")).lower()
        if not self.source or (parts.hostname == "github.com" and project in STOCK_PROJECTS):
            return Origin.STOCK
        return Origin.SKYRL if project == SKYRL_PROJECT else Origin.OTHER

    def __str__(self) -> str:
        source = f" from {self.source}" if self.origin is Origin.OTHER else ""
        return f"{self.origin.value} {self.text}{source} ({self.place})"


def find_verl(agent_folder: Path, environment: Mapping[str, str]) -> VerlVersion | None:
    """The VERL that ``uv run --frozen`` would start in ``agent_folder``; None where no file names exactly one.

    ``environment`` is that of the command (UV_PROJECT_ENVIRONMENT, UV_NO_SYNC). Files that cannot be read are as good
    as absent: uv will say what is wrong with them.
    """
    lock = agent_folder / "uv.lock"
    venv = agent_folder / (environment.get("UV_PROJECT_ENVIRONMENT") or ".venv")
    locked, installed = _locked(lock), _installed(venv)
    unsynced = environment.get("UV_NO_SYNC", "").lower() in {"1", "true", "yes", "on", "t", "y"}
    return installed or locked if unsynced else locked or installed


def _locked(lock: Path) -> VerlVersion | None:
    try:
        return parse_lock(lock.read_text(encoding="utf-8"), lock)
    except (OSError, UnicodeDecodeError):
        return None


def parse_lock(text: str, place: Path) -> VerlVersion | None:
    """The VERL in the text of a ``uv.lock``; None for none, for several, and for text that is no such file."""
    toml: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        packages = toml.loads(text).get("package", [])
    except toml.TOMLDecodeError:
        return None
    if not isinstance(packages, list):
        return None
    found = [entry for entry in packages if isinstance(entry, dict) and entry.get("name") == "verl"]
    return _of_lock_entry(found[0], place) if len(found) == 1 else None


def _of_lock_entry(entry: Mapping[str, Any], place: Path) -> VerlVersion | None:
    source = entry.get("source")
    addresses = (
        {kind: value for kind, value in source.items() if kind != "registry"} if isinstance(source, dict) else {}
    )
    address = str(next(iter(addresses.values()), ""))
    version = entry.get("version")  # absent where it is dynamic, as for a folder
    return VerlVersion(str(version or "of no stated version"), address.partition("?")[0], place)


def _installed(venv: Path) -> VerlVersion | None:
    found = sorted(venv.glob("lib/python3.*/site-packages/verl-*.dist-info/METADATA"))
    if len(found) != 1:
        return None
    try:
        version = HeaderParser().parsestr(found[0].read_text(encoding="utf-8"))["Version"]
    except (OSError, UnicodeDecodeError):
        return None
    return VerlVersion(version, _address(found[0].with_name("direct_url.json")), found[0]) if version else None


def _address(path: Path) -> str:
    """Where a package was installed from, as PEP 610 records it; empty for an index, which leaves no record."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["url"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


# --- what differs between the releases --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Renamed:
    """A part of the configuration that has another name from ``since`` on."""

    old: str
    new: str
    since: Release


@dataclass(frozen=True)
class Added:
    """A part of the configuration that only exists from ``since`` on."""

    name: str
    since: Release


@dataclass(frozen=True)
class Refused:
    """A value that composes but that VERL cannot run with, from ``since`` on; ``instead`` is one that it can."""

    name: str
    value: str
    since: Release
    instead: str


# The names by composing with each release (tests/test_verl_compose.py), the values by running it or reading it.
RENAMED = (Renamed("ray_init.", "ray_kwargs.ray_init.", (0, 6)),)
ADDED = (
    Added("actor_rollout_ref.nccl_timeout", (0, 6)),
    Added("reward.custom_reward_function.", (0, 7)),
    Added("trainer.use_v1", (0, 9)),
)
REFUSED = (
    Refused("actor_rollout_ref.rollout.name", "hf", (0, 6), "vllm"),
    Refused("actor_rollout_ref.rollout.mode", "sync", (0, 7), "async"),
)
LOOP, LIKE_LOOP = "loop", "rloo"  # the estimator of SkyRL's fork, in no stock release, and the nearest stock one
# Values and the release that knows them first, from VERL's own code (tests/test_verl_compose.py): the members of
# AdvantageEstimator, and what Tracking takes as a logger.
ESTIMATORS: Mapping[str, Release] = {
    **dict.fromkeys(("gae", "grpo", "grpo_passk", "rloo", "opo", "remax", "gpg"), (0, 5)),
    **dict.fromkeys(("reinforce_plus_plus", "reinforce_plus_plus_baseline"), (0, 5)),
    **dict.fromkeys(("rloo_vectorized", "grpo_vectorized"), (0, 6)),
    **dict.fromkeys(("optimal_token_baseline", "tir_optimal_token_baseline", "gdpo"), (0, 7, 1)),
}
LOGGERS: Mapping[str, Release] = {
    **dict.fromkeys(("console", "wandb", "tensorboard", "mlflow", "swanlab", "vemlp_wandb", "clearml"), (0, 5)),
    "tracking": (0, 5),  # an older word for wandb
    **dict.fromkeys(("trackio", "file"), (0, 6)),
    "rl_insight": (0, 9),
}
FIRST_REGISTRY = (0, 6)  # from here on VERL runs with an estimator that other code has registered


def name_in(release: Release, name: str) -> str:
    """What a part of the configuration is called in a release, whichever of its names is given."""
    for row in RENAMED:
        if release < row.since and name.startswith(row.new):
            return row.old + name[len(row.new) :]
        if release >= row.since and name.startswith(row.old):
            return row.new + name[len(row.old) :]
    return name


def known_values(values: Mapping[str, Release], release: Release | None) -> tuple[str, ...]:
    """Those of ``ESTIMATORS`` or ``LOGGERS`` that a release knows; None: that any release knows."""
    return tuple(value for value, since in values.items() if release is None or release >= since)


def exists_in(release: Release, name: str) -> bool:
    """Whether a release has this part of the configuration; True for all that the table does not speak of."""
    return all(release >= row.since for row in ADDED if _is_or_in(name, row.name))


def _is_or_in(name: str, part: str) -> bool:
    return name.startswith(part) if part.endswith(".") else name == part
