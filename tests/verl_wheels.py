"""VERL's own configuration, composed by the real Hydra: from wheels that are fetched once for a machine, not installed.

The wheels need no dependency for that, so that a release is 1 MB in place of 1.8 GB. Some files of the code are read.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

CACHE = Path(os.environ.get("SKYRL_TEST_CACHE", "/var/tmp/skyrl-tests")) / "verl-wheels-2"  # counts what is kept
ESTIMATORS, TRACKING = "verl/trainer/ppo/core_algos.py", "verl/utils/tracking.py"
KEPT = ("verl/trainer/config/", ESTIMATORS, TRACKING)
VERSIONS = ("0.5.0", "0.6.1", "0.7.1", "0.8.0", "0.9.1")  # 0.5.0 stands for SkyRL's fork, which is on no index
FETCH_TIMEOUT_S = 300


@dataclass(frozen=True)
class Ppo:
    """The ``ppo_trainer`` configuration of one release."""

    version: str

    def code(self, name: str) -> ast.Module:
        """One of the files of ``KEPT``."""
        return ast.parse((CACHE / self.version / name).read_text(encoding="utf-8"))

    def compose(self, overrides: Sequence[str] = ()) -> DictConfig:
        return compose(config_name="ppo_trainer", overrides=list(overrides))


@contextmanager
def ppo(version: str) -> Iterator[Ppo]:
    """The release's configuration, ready to be composed; skips where its wheel cannot be had."""
    with initialize_config_dir(config_dir=str(_config_folder(version)), version_base=None):
        yield Ppo(version)


def _config_folder(version: str) -> Path:
    folder = CACHE / version
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE, prefix=f".{version}-") as fetched:
            _fetch(version, Path(fetched))
    return folder / "verl" / "trainer" / "config"


def _fetch(version: str, work: Path) -> None:
    """Fetch and unpack beside, then rename: another test run may do the same."""
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", f"verl=={version}"]
    done = subprocess.run(argv, cwd=work, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S)
    if done.returncode:
        pytest.skip(f"the wheel of VERL {version} cannot be fetched: {done.stderr.strip()[-300:]}")
    (wheel,) = work.glob("verl-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.startswith(KEPT)]
        archive.extractall(work / "unpacked", members)
    try:
        (work / "unpacked").rename(CACHE / version)
    except OSError:
        if not (CACHE / version).is_dir():
            raise
        shutil.rmtree(work / "unpacked")
