"""The trainer's command line run by the real uv, in a small skyrl-agent with a lock file of its own; no network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from slurm.lib.config import load_config
from slurm.lib.coordination import CoordinationDir
from slurm.lib.settings import Settings
from slurm.lib.snapshot import take_snapshot
from slurm.lib.trainer import env_file_text, import_folders, snapshot_variables, trainer_of, verl_of
from slurm.lib.verl_versions import Origin

CONFIGS = Path(__file__).resolve().parent.parent / "slurm" / "config"
UV_TIMEOUT_S = 120
PYPROJECT = """
[project]
name = "skyrl-agent"
version = "0"
requires-python = ">=3.10"
[project.optional-dependencies]
verl = ["verl=={version}"]
[tool.uv]
package = false
no-index = true
find-links = ["wheels"]
"""
# In place of SkyRL-agent's entry point: says what it was given.
ENTRY_POINT = """
import importlib.metadata, json, os, sys
print(json.dumps({
    "argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd(), "verl": importlib.metadata.version("verl"),
}))
"""


def make_wheel(folder: Path, version: str) -> None:
    folder.mkdir(exist_ok=True)
    info = f"verl-{version}.dist-info"
    with zipfile.ZipFile(folder / f"verl-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("verl/__init__.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: verl\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@dataclass(frozen=True)
class Agent:
    """A skyrl-agent, and the environment in which uv finds all that it needs beside it."""

    root: Path
    environment: Mapping[str, str]

    @property
    def folder(self) -> Path:
        return self.root / "SkyRL" / "skyrl-agent"

    @property
    def run(self) -> CoordinationDir:
        return CoordinationDir(self.root / "run, 1\\ 2")

    def settings(self, *words: str) -> Settings:
        said = [f"SKYRL_PROJECT_ROOT={self.root}", "DATA_DIR=/data", "CHECKPOINT_DIR=/ckpt", "ROLLOUT_DIR=/r", *words]
        return load_config("dev", said, self.environment, CONFIGS, datetime(2026, 3, 4), self.root).settings

    def uv(self, *argv: str, environment: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            ["uv", *argv],
            cwd=self.folder,
            env={**self.environment, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=UV_TIMEOUT_S,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def train(self, settings: Settings, environment: Mapping[str, str], dot_env: Mapping[str, str]) -> Any:
        """Start the trainer as the training job does; what it says that it was given."""
        self.run.path.mkdir(exist_ok=True)
        self.run.training_env.write_text(env_file_text(dot_env))
        trainer = trainer_of(settings, self.run, verl_of(settings, environment))
        assert trainer.argv[0] == "uv" and trainer.cwd == self.folder
        return json.loads(self.uv(*trainer.argv[1:], environment=environment))


@pytest.fixture
def agent(tmp_path: Path) -> Agent:
    path = os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"])
    if not shutil.which("uv", path=path):
        pytest.skip("uv is not installed beside this Python (the dev extra has it)")
    environment = {
        "PATH": path,
        "HOME": str(tmp_path),
        "LANG": "C.UTF-8",
        "UV_CACHE_DIR": str(tmp_path / "uv-cache"),
        "UV_PYTHON": sys.executable,
        "UV_PYTHON_DOWNLOADS": "never",
        "UV_OFFLINE": "1",
    }
    made = Agent(tmp_path, environment)
    package = made.folder / "skyrl_agent" / "integrations" / "verl"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "verl_main_ppo.py").write_text(ENTRY_POINT)
    for version in ("0.5.0", "0.9.1"):
        make_wheel(made.folder / "wheels", version)
    lock(made, "0.5.0")
    return made


def lock(agent: Agent, version: str) -> None:
    (agent.folder / "pyproject.toml").write_text(PYPROJECT.replace("{version}", version))
    agent.uv("lock")


def test_every_argument_arrives_unchanged(agent: Agent) -> None:
    settings = agent.settings(
        "MODEL=/models/it's [a], {b}=c",
        'WANDB_PROJECT=ä \\ "x" ${HOME} $HOME `id`; #',
        "VERL_OVERRIDES=+a.b=[1,2]\n+c='two words, and more'",
    )
    said = agent.train(settings, {}, {})
    argv = trainer_of(settings, agent.run, verl_of(settings, {})).argv
    assert said["argv"] == list(argv[argv.index("-m") + 2 :])
    assert said["argv"][-2:] == ["+a.b=[1,2]", "+c='two words, and more'"]
    assert said["cwd"] == str(agent.folder)


def test_the_environment_and_its_precedence(agent: Agent) -> None:
    """A value of the env file counts where the job has none; the job's own URL and key are never an old one's."""
    dot_env = {"ONLY_IN_FILE": 'it\'s a "b" \\ #', "IN_BOTH": "file", "SANDBOX_REMOTE_RUNTIME_API_URL": "http://old:1"}
    own = {"SANDBOX_REMOTE_RUNTIME_API_URL": "http://new:2", "ALLHANDS_API_KEY": "new-key"}
    in_file = {**dot_env, **own}
    environment = {"IN_BOTH": "shell", "ONLY_IN_JOB": "x", **own}
    env = agent.train(agent.settings(), environment, in_file)["env"]
    names = (*dot_env, *own, "ONLY_IN_JOB")
    assert {name: env[name] for name in names} == {**in_file, "IN_BOTH": "shell", "ONLY_IN_JOB": "x"}


def test_the_file_alone_carries_the_runs_url(agent: Agent) -> None:
    """As it does to Ray's workers, which uv starts again with the same file and without the trainer's variables."""
    env = agent.train(agent.settings(), {}, {"ALLHANDS_API_KEY": "k-$1'"})["env"]
    assert env["ALLHANDS_API_KEY"] == "k-$1'"


def test_the_lock_decides_which_verl_runs(agent: Agent) -> None:
    """An environment that has another one is brought to the lock first, so that is the one that the command is for."""
    settings = agent.settings()
    first = agent.train(settings, {}, {})
    assert first["verl"] == "0.5.0" and "ray_init.num_cpus=16" in first["argv"]
    lock(agent, "0.9.1")
    unsynced = agent.train(settings, {"UV_NO_SYNC": "1"}, {})
    assert unsynced["verl"] == "0.5.0" and "ray_init.num_cpus=16" in unsynced["argv"]
    assert (agent.folder / ".venv").is_dir()
    second = agent.train(settings, {}, {})
    assert second["verl"] == "0.9.1" and "trainer.use_v1=False" in second["argv"]
    found = verl_of(settings, {})
    assert found and (found.text, found.origin) == ("0.9.1", Origin.STOCK)


def test_another_trainer_is_not_asked_for_its_verl(agent: Agent) -> None:
    assert verl_of(replace(agent.settings(), training_command="true"), {}) is None


WHICH_CODE = """
import json, os, skyrl_agent, skyrl_agent.words
print(json.dumps({"word": skyrl_agent.words.WORD, "file": skyrl_agent.__file__, "cwd": os.getcwd()}))
"""


def test_a_snapshots_code_runs_in_the_originals_environment(agent: Agent) -> None:
    """The original is installed there as editable, and has been edited since; nothing of it or of its environment
    changes, and no environment is made in the copy."""
    original = agent.folder
    (original / "skyrl_agent" / "integrations" / "verl" / "verl_main_ppo.py").write_text(WHICH_CODE)
    words = original / "skyrl_agent" / "words.py"
    words.write_text("WORD = 'as launched'\n")
    (original / ".gitignore").write_text(".venv\n__pycache__/\n")
    agent.uv("sync", "--frozen", "--extra", "verl")
    packages = next((original / ".venv" / "lib").glob("python3*/site-packages"))
    (packages / "_skyrl_agent.pth").write_text(f"{original}\n")  # what an editable installation is
    lock(agent, "0.9.1")  # which the environment is not brought to
    for git in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", "-C", str(original), *git], check=True)
    settings = replace(agent.settings(), snapshot=True)
    agent.run.path.mkdir()
    take_snapshot(original, agent.run.agent)
    words.write_text("WORD = 'edited since'\n")
    (original / "uv.lock").write_text("no lock at all")
    before = {str(path.relative_to(original)) for path in original.rglob("*")}

    agent.run.training_env.write_text("")
    trainer = trainer_of(settings, agent.run, verl_of(settings, agent.environment))
    path = os.pathsep.join(map(str, import_folders(settings, agent.run)))
    environment = {**agent.environment, **snapshot_variables(settings, {}), "PYTHONPATH": path}
    done = subprocess.run(
        trainer.argv, cwd=trainer.cwd, env=environment, capture_output=True, text=True, timeout=UV_TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["word"] == "as launched"
    assert Path(said["file"]).is_relative_to(agent.run.agent)
    assert said["cwd"] == str(agent.run.agent)
    assert not (agent.run.agent / ".venv").exists()
    assert (packages / "verl-0.5.0.dist-info").is_dir(), "uv would have installed the newer one"
    assert (packages / "_skyrl_agent.pth").read_text() == f"{original}\n"
    caches = {name for name in {str(p.relative_to(original)) for p in original.rglob("*")} if "__pycache__" in name}
    assert {str(path.relative_to(original)) for path in original.rglob("*")} - caches == before - caches

    # A worker elsewhere, whose folder is another one, imports the copy too.
    elsewhere = subprocess.run(
        ["uv", "run", "--frozen", "--project", str(agent.run.agent), "python", "-c", WHICH_CODE],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        timeout=UV_TIMEOUT_S,
    )
    assert json.loads(elsewhere.stdout)["word"] == "as launched", elsewhere.stderr
