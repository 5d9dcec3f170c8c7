"""Which sandbox server do the trainer and Ray's workers see? Asked of the real `uv run --env-file` and the real Ray.

A stale address or key in skyrl-agent's .env never beats the run's own, and nobody's code is changed for that.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path

import pytest

from slurm.lib.config import load_config
from slurm.lib.dot_env import read_dot_env
from slurm.lib.gpu_environment import composed
from slurm.lib.node_facts import NodeFacts, base_python
from slurm.lib.trainer import KEY_NAME, URL_NAME, env_file_text, env_file_values, trainer_environment
from tests.ray_environment import ray_python

ROOT = Path(__file__).resolve().parent.parent
STALE = {URL_NAME: "http://stale:1", KEY_NAME: "stale-key"}
OWN = {URL_NAME: "http://cpu1:2", KEY_NAME: "key of 'this' run = \"1\" $HOME"}
PROJECT = (
    '[project]\nname = "agent"\nversion = "0"\nrequires-python = ">=3.10"\n[project.optional-dependencies]\nverl = []\n'
)
SHOW = "import json, os; print(json.dumps(dict(os.environ)))"
RUN_TIMEOUT_S = 300

# What VERL's entry point does as far as the environment goes: `ray.init` without an address, then a worker.
DRIVER = """
import json, os, ray
ray.init(num_cpus=1, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False)
@ray.remote
def seen():
    return dict(os.environ)
print("SEEN " + json.dumps([ray.get(seen.remote()), ray._private.worker._global_node.get_temp_dir_path()]))
"""


@pytest.fixture
def uv() -> str:
    """The real uv, of the development environment or of PATH."""
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.is_file() else shutil.which("uv")
    if not found:
        pytest.skip("uv is not installed; scripts/setup brings it")
    return found


@pytest.fixture
def ray_root() -> Iterator[Path]:
    """A folder that is short enough for Ray's sockets, as the training job has one."""
    root = Path(f"/tmp/skyray-test-{os.getpid()}")
    root.mkdir(mode=0o700)
    yield root
    shutil.rmtree(root)


def project(folder: Path, uv: str) -> Path:
    """A skyrl-agent as far as uv sees one, with the lock file that --frozen needs."""
    folder.mkdir()
    (folder / "pyproject.toml").write_text(PROJECT)
    lock = [uv, "lock", "--offline", "--no-config", "--python", sys.executable]
    subprocess.run(lock, cwd=folder, check=True, capture_output=True)
    return folder


def clean(home: Path) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": str(home), "UV_OFFLINE": "1", "UV_NO_CONFIG": "1"}


def uv_run(
    uv: str, folder: Path, environment: Mapping[str, str], *files: Path, words: tuple[str, ...] = ("-c", SHOW)
) -> str:
    """The stdout of a Python under `uv run --frozen --extra verl --env-file …`, as VERL is started."""
    options = [word for file in files for word in ("--env-file", str(file))]
    argv = [uv, "run", "--frozen", "--extra", "verl", "--no-sync", *options, "python", *words]
    done = subprocess.run(
        argv, cwd=folder, env=dict(environment), capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def prepared(folder: Path, base: Mapping[str, str], ray_root: Path) -> tuple[dict[str, str], Path]:
    """The trainer's environment and its training.env, as the training job makes them beside a stale .env."""
    lines = [f"{name}={value}\n" for name, value in {**STALE, "FI_PROVIDER": "efa", "OF_DOTENV": "yes"}.items()]
    (folder / ".env").write_text("".join(lines))
    settings = load_config(
        "dev", [], {"HOME": base["HOME"]}, ROOT / "slurm" / "config", datetime(2026, 3, 4), Path("/project")
    ).settings
    dot_env = read_dot_env(folder / ".env")
    environment, _ = composed(settings, NodeFacts(ray_root, "cpu1"), trainer_environment(base, dot_env, OWN))
    file = folder.parent / "training.env"
    file.write_text(env_file_text(env_file_values(environment, dot_env, OWN)))
    return environment, file


def test_what_uv_makes_of_env_files(tmp_path: Path, uv: str) -> None:
    """Facts that the suite relies on: in a file the first definition wins, of files the last; the shell beats all."""
    agent = project(tmp_path / "agent", uv)
    one, two = tmp_path / "one.env", tmp_path / "two.env"
    one.write_text("A=first\nA=second\nB=one\nC=one\n")
    two.write_text("B=two\nC=two\n")
    environment = {**clean(tmp_path), "UV_PYTHON": sys.executable, "C": "shell"}
    seen = json.loads(uv_run(uv, agent, environment, one, two))
    assert (seen["A"], seen["B"], seen["C"]) == ("first", "two", "shell")


@pytest.mark.parametrize("inherits", [True, False], ids=["the trainer", "a worker of a Ray that knows nothing"])
def test_uv_never_brings_a_stale_address_back(tmp_path: Path, uv: str, inherits: bool) -> None:
    agent = project(tmp_path / "agent", uv)
    base = {**clean(tmp_path), "UV_PYTHON": sys.executable, **STALE}
    environment, file = prepared(agent, base, tmp_path)
    shell = environment if inherits else {**clean(tmp_path), "UV_PYTHON": sys.executable}
    seen = json.loads(uv_run(uv, agent, shell, file))
    assert {name: seen[name] for name in OWN} == OWN
    assert seen["OF_DOTENV"] == "yes"
    assert seen["FI_PROVIDER"] == "tcp"  # of the configuration, not the efa of .env


@pytest.mark.ray
@pytest.mark.parametrize("under_uv", [False, True], ids=["python", "uv run"])
def test_rays_workers_see_the_runs_server(tmp_path: Path, uv: str, ray_root: Path, under_uv: bool) -> None:
    """The driver starts its own one-node cluster, beside the file of a dead one that Ray would try to join."""
    python = ray_python()
    agent = project(tmp_path / "agent", uv)
    environment, file = prepared(agent, {**clean(tmp_path), **STALE, "UV_CACHE_DIR": f"{tmp_path}/uv"}, ray_root)
    (ray_root / "ray").mkdir()
    (ray_root / "ray" / "ray_current_cluster").write_text("10.255.255.1:6379")
    (agent / "driver.py").write_text(DRIVER)
    if under_uv:
        environment["UV_PROJECT_ENVIRONMENT"] = str(python.parent.parent)
        out = uv_run(uv, agent, environment, file, words=("driver.py",))
    else:
        argv = [str(python), "driver.py"]
        done = subprocess.run(
            argv, cwd=agent, env=environment, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False
        )
        assert done.returncode == 0, done.stderr
        out = done.stdout
    seen, folder = json.loads(next(line for line in out.splitlines() if line.startswith("SEEN "))[5:])
    assert {name: seen[name] for name in OWN} == OWN
    assert seen["LITELLM_LOCAL_MODEL_COST_MAP"] == "True"
    assert seen["FI_PROVIDER"] == "tcp"
    assert seen["no_proxy"] == "cpu1"
    assert folder == str(ray_root / "ray")  # the 4 characters that the job's folder leaves room for


def test_the_python_that_is_found_does_not_make_uv_start_anew(tmp_path: Path, uv: str) -> None:
    """UV_PYTHON is the Python under skyrl-agent's environment; with another one uv would replace that environment."""
    agent = project(tmp_path / "agent", uv)
    subprocess.run([uv, "venv", "--offline", "--python", sys.executable, str(agent / ".venv")], check=True)
    (agent / ".venv" / "mine").touch()
    base, _ = base_python(agent / ".venv")
    environment = {**clean(tmp_path), "UV_PYTHON": str(base)}
    argv = [uv, "run", "--frozen", "--extra", "verl", "python", "-c", "import sys; print(sys.prefix)"]
    done = subprocess.run(argv, cwd=agent, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(agent / ".venv"), done.stderr
    assert (agent / ".venv" / "mine").exists()
