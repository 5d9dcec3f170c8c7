"""A login node on which nothing is wrong: a project, data, a login for wandb, Slurm's commands as small programs."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]  # it brings no types
import pyarrow.parquet  # type: ignore[import-untyped]

from slurm.lib.config import load_config
from slurm.lib.coordination import CoordinationDir, Flag
from slurm.lib.job_environment import without_slurm
from slurm.lib.plan import LaunchPlan, Request, make_plan
from slurm.lib.preflight.asked import Asked
from slurm.lib.preflight.checks import run_checks
from slurm.lib.preflight.finding import Finding, Level
from slurm.lib.settings import Settings
from slurm.lib.task_yaml import EXAMPLE
from slurm.lib.trainer import verl_of
from slurm_runtime.agent.tree import MANIFEST, SHIM, AgentTree
from tests.fake_slurm import FakeSlurm

ROOT = Path(__file__).resolve().parent.parent.parent
NOW = datetime(2026, 3, 4, 5, 6, 7)
PACKAGES = ("verl-0.5.0", "ray-2.51.1", "torch-2.6.0", "vllm-0.8.5")
COLUMNS = ("prompt", "data_source", "instance")
GOOD = ("WANDB_EXPERIMENT=mine",)
LOCK = """\
[[package]]
name = "verl"
version = "0.5.0"
source = { git = "https://github.com/NovaSky-AI/verl-fork?rev=fc628e73#fc628e73" }
"""
TASK = "generator: {num_trajectories: 2, max_prompt_length: 8192}\ndispatcher: {max_parallel_agents: 96}\n"


def write_parquet(path: Path, rows: int, columns: tuple[str, ...] = COLUMNS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({name: ["x"] * rows for name in columns}), path)


def make_agent_tree(root: Path) -> None:
    """An agent tree of empty files."""
    tree = AgentTree(root, "1.0", "python", "bin/python", "ld.so", ("lib",), "sleep")
    for name in (tree.python, tree.loader, tree.holder, SHIM):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / MANIFEST).write_text(tree.manifest())


@dataclass
class World:
    """Everything below ``folder``; ``environment`` is the shell's."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.slurm = FakeSlurm(self.folder / "fake")
        self.example.parent.mkdir(parents=True)
        self.example.write_text(TASK)
        (self.agent / "pyproject.toml").touch()
        (self.agent / "uv.lock").write_text(LOCK)
        for package in PACKAGES:
            (self.site_packages / f"{package}.dist-info").mkdir(parents=True)
        (self.site_packages / "verl.py").touch()
        (self.venv / "bin").mkdir()
        (self.venv / "pyvenv.cfg").write_text(f"home = {Path(sys.executable).resolve().parent}\n")
        (self.venv / "bin" / "python").symlink_to(sys.executable)
        self.uv.write_text("#!/bin/sh\n")
        self.uv.chmod(0o755)
        self.agent_tree.mkdir(parents=True)
        make_agent_tree(self.agent_tree)
        (self.slurm.bin / "bash").symlink_to("/bin/bash")  # for a PATH of these alone
        write_parquet(self.data / "train.parquet", 100)
        write_parquet(self.data / "validation.parquet", 8)
        self.environment = {
            "PATH": self.slurm.path,
            "HOME": str(self.folder),
            "SKYRL_DATA": str(self.folder),
            "SKYRL_PROJECT_ROOT": str(self.folder / "project"),
            "SKYRL_JOBS_BASE": str(self.slurm.jobs),
            "SLURM_CONF": "/nowhere/slurm.conf",
            "WANDB_API_KEY": "a-key-of-wandb",
            **self.environment,
        }

    @property
    def agent(self) -> Path:
        return self.folder / "project" / "SkyRL" / "skyrl-agent"

    @property
    def agent_tree(self) -> Path:
        """The agent server for images that have none."""
        return self.folder / ".cache" / "skyrl" / "agent" / "1.0"

    @property
    def site_packages(self) -> Path:
        return self.venv / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"

    @property
    def example(self) -> Path:
        """The task file that comes with skyrl-agent."""
        return self.agent / EXAMPLE

    @property
    def venv(self) -> Path:
        return self.agent / ".venv"

    @property
    def uv(self) -> Path:
        return self.slurm.bin / "uv"

    @property
    def data(self) -> Path:
        return self.folder / "data" / "r2e-all"

    @property
    def checkpoints(self) -> Path:
        """Where a training called ``mine`` keeps its steps."""
        return self.folder / "ckpts" / "skyrl-dev" / "mine"

    def settings(self, *overrides: str, config: str = "dev") -> Settings:
        return self.plan(*overrides, config=config).settings

    def plan(self, *overrides: str, config: str = "dev", request: Request | None = None) -> LaunchPlan:
        words = [*GOOD, *overrides]
        seen = self.environment
        loaded = load_config(config, words, without_slurm(seen), ROOT / "slurm" / "config", NOW, ROOT.parent)
        verl = verl_of(loaded.settings, seen)
        return make_plan(loaded, request or Request(), seen, ROOT, sys.executable, NOW, verl)

    def check(self, *overrides: str, config: str = "dev", request: Request | None = None) -> list[Finding]:
        """The findings of all checks."""
        return run_checks(Asked(self.plan(*overrides, config=config, request=request), ROOT, at_leisure=True))


def join(world: World, job_id: str = "101", url: str = "", key: str = "") -> Request:
    """A training job that joins a runtime job which is ready, and runs by Slurm's word."""
    run = CoordinationDir(world.slurm.jobs / f"20260304_050607_{job_id}")
    run.path.mkdir(parents=True)
    run.run_record.write_text(json.dumps({"jobs": {"runtime": {"id": job_id}}}))
    run.publish(run.runtime_ready, Flag.of_this_host(job_id, job_id))
    if url:
        run.publish_url(url)
        run.publish_key(key)
    world.slurm.answer("squeue", *[{"stdout": "RUNNING|None|cpu-a\n"}] * 9)
    return Request(runtime=False, attach_dir=run.path, attach_id=job_id)


def of(found: list[Finding], check: str, level: Level | None = None) -> list[Finding]:
    return [finding for finding in found if finding.check == check and level in (None, finding.level)]


def worst(found: list[Finding]) -> Level | None:
    """The heaviest level among findings."""
    levels = {finding.level for finding in found}
    return next((level for level in (Level.ERROR, Level.WARNING, Level.ESTIMATE) if level in levels), None)
