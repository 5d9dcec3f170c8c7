"""SNAPSHOT=1 on a real Slurm and without one: what runs is the code of the launch, whatever becomes of the original."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import OrdinaryUser
from tests.runs import Run, launch_argv, parse_report, squeue

pytestmark = [pytest.mark.slurm, pytest.mark.podman]

# Stands in for uv: says which code it was started with, in which environment.
UV = """#!/bin/sh
echo "code: $(cat skyrl_agent/words.py) in $PWD"
echo "task: $(cat mine.yaml)"
echo "environment: $UV_PROJECT_ENVIRONMENT sync $UV_NO_SYNC"
echo "from .env: $OF_THE_DOT_ENV"
echo "untracked: $(ls forgotten.py 2>/dev/null)"
"""
TASK = "generator:\n  num_trajectories: 8\n"
VERL = ("GPUS_PER_NODE=1", "TP_SIZE=1", "SP_SIZE=1", "TASK_YAML=./mine.yaml", "LOGGERS=console", "TEST_FREQ=-1")
SMALL = ("CPUS_FOR_RUNTIME=2", "RUNTIME_MEMORY=2G", "SNAPSHOT=1")


@pytest.fixture(autouse=True)
def clean(user: OrdinaryUser, nothing_left: Callable[[], None]) -> None:
    """Every test here ends with nothing left on any node (the fixture checks at its end)."""


@pytest.fixture
def agent(user: OrdinaryUser, jobs_base: Path) -> Path:
    """A user's skyrl-agent: a repository with changes, a file that nobody added, and a .env that is ignored."""
    folder = jobs_base / "root" / "SkyRL" / "skyrl-agent"
    said = {
        "pyproject.toml": "",
        "uv.lock": "",
        "mine.yaml": TASK,
        "skyrl_agent/words.py": "committed",
        ".gitignore": ".env\n.venv\n",
        ".env": "OF_THE_DOT_ENV=its value\n",
        ".venv/bin/python": "",
        "train.parquet": "",
    }
    script = ["set -e", f"mkdir -p {folder}/skyrl_agent {folder}/.venv/bin {jobs_base}/bin", f"cd {folder}"]
    script += [f"printf '%s' '{text}' > {name}" for name, text in said.items()]
    script += ["git init -qb trying", "git add .", "git -c user.name=t -c user.email=t@t commit -qm x"]
    script += [
        "printf launched > skyrl_agent/words.py",
        "touch forgotten.py",
        f"cat > {jobs_base}/bin/uv <<'EOF'\n{UV}EOF",
    ]
    script += [f"chmod +x {jobs_base}/bin/uv"]
    done = user.run(["bash", "-c", "\n".join(script)])
    assert done.returncode == 0, done.stderr
    return folder


def begin(
    user: OrdinaryUser,
    checkout: Path,
    base: Path,
    *settings: str,
    options: tuple[str, ...] = (),
    env: dict[str, str] | None = None,
) -> Run:
    root = f"SKYRL_PROJECT_ROOT={base / 'root'}"
    data = f"TRAIN_DATA={base / 'root/SkyRL/skyrl-agent/train.parquet'}"
    argv = launch_argv(checkout, f"SKYRL_JOBS_BASE={base}", root, data, *SMALL, *settings, options=options)
    done = user.run(argv, {"PATH": f"{base}/bin:{user.environment['PATH']}", **(env or {})}, timeout=60)
    assert done.returncode == 0, done.stderr
    return parse_report(user, done.stdout)


def edit(user: OrdinaryUser, agent: Path) -> None:
    """What a researcher does while a run waits in the queue: another branch, other code."""
    done = user.run(["bash", "-c", f"cd {agent} && printf edited > skyrl_agent/words.py && rm mine.yaml uv.lock"])
    assert done.returncode == 0, done.stderr


def test_a_queued_run_uses_the_code_of_its_launch(
    user: OrdinaryUser, checkout: Path, jobs_base: Path, agent: Path
) -> None:
    options = ("--no-check=model,memory,data,environment,dotenv,verl,space,slots,lengths,task,batch,parallel",)
    run = begin(user, checkout, jobs_base, *VERL, "GPU_SBATCH_ARGS=--begin=now+600", options=options)
    edit(user, agent)
    run.start_now("training")
    run.wait_over(seconds=120)
    log = run.log("training")
    assert run.exit_code("training") == "0", log + run.log("training", "err")
    assert f"code: launched in {run.directory}/agent" in log, "the change that was not committed is in the copy"
    assert f"task: {TASK.splitlines()[0]}" in log
    assert f"environment: {agent}/.venv sync 1" in log
    assert "from .env: its value" in log
    assert "untracked: \n" in log
    assert not (run.directory / "agent" / ".env").exists()
    assert stat.S_IMODE((run.directory / "agent").stat().st_mode) == 0o700

    record = json.loads(run.text("run.json"))
    assert (record["agent_git"]["branch"], record["agent_git"]["dirty"]) == ("trying", True)
    diff = run.directory / record["agent_git"]["diff"]
    assert "+launched" in diff.read_text()
    assert stat.S_IMODE(diff.stat().st_mode) == 0o600


def test_another_trainer_finds_the_copy_too(user: OrdinaryUser, checkout: Path, jobs_base: Path, agent: Path) -> None:
    command = 'TRAINING_COMMAND=cat "$SKYRL_AGENT_DIR/skyrl_agent/words.py"; echo " is what ran"'
    run = begin(user, checkout, jobs_base, command, "GPUS_PER_NODE=0", "GPU_SBATCH_ARGS=--begin=now+600")
    edit(user, agent)
    run.start_now("training")
    run.wait_over(seconds=120)
    assert "launched is what ran" in run.log("training")


def test_a_training_that_joins_has_the_code_of_its_own_launch(
    user: OrdinaryUser, checkout: Path, jobs_base: Path, agent: Path
) -> None:
    """And leaves the copy alone that the first training is using."""
    code = 'cat "$SKYRL_AGENT_DIR/skyrl_agent/words.py"; echo " is what ran in $SKYRL_AGENT_DIR"'
    waits = f"TRAINING_COMMAND=echo trainer started; until [ -e go ]; do sleep 0.1; done; {code}"
    first = begin(user, checkout, jobs_base, waits, "GPUS_PER_NODE=0")
    first.wait_for_text("training", "trainer started", 90)
    edit(user, agent)
    told = {"SKYRL_COORD_DIR": str(first.directory)}
    stays = f"TRAINING_COMMAND={code}; exec sleep 300"
    joined = begin(user, checkout, jobs_base, stays, "GPUS_PER_NODE=0", options=("--skip-runtime",), env=told)
    own = first.directory / f"agent_{joined.jobs['training']}"
    joined.wait_for_text("training", f"edited is what ran in {own}\n", 90)
    assert user.run(["touch", str(first.directory / "go")]).returncode == 0
    first.wait_over(seconds=120)
    joined.wait_over("training", seconds=60)
    assert f"launched is what ran in {first.directory}/agent\n" in first.log("training"), first.log("training", "err")
    assert first.exit_code("training") == "0"


def test_a_job_given_to_sbatch_says_what_only_a_launch_can_do(
    user: OrdinaryUser, checkout: Path, jobs_base: Path, agent: Path
) -> None:
    """Take the copy, and ask Slurm for mails."""
    script = checkout / "slurm" / "jobs" / "verl_training.py"
    words = [f"--set=SKYRL_JOBS_BASE={jobs_base}", f"--set=SKYRL_PROJECT_ROOT={jobs_base / 'root'}"]
    words += ["--set=TRAINING_COMMAND=true", "--set=NOTIFY=me@lab.example", "--set=SNAPSHOT=1"]
    logs = [f"--output={jobs_base}/%x.out", f"--error={jobs_base}/%x.err"]

    def said(name: str, *options: str) -> str:
        argv = ["sbatch", "--wait", "-p", "gpu_test", f"--job-name={name}", *logs, *options, str(script), *words]
        done = user.run(argv, cwd=jobs_base, timeout=120)
        assert done.returncode == 2, done.stderr
        return (jobs_base / f"{name}.err").read_text()

    text = said("plain")
    assert "SNAPSHOT=1: launch.py takes the copy, and this job was given to sbatch directly; use launch.py" in text
    assert text.count("no mail goes to me@lab.example") == 1
    assert "sbatch --mail-type=END,FAIL --mail-user=me@lab.example" in text
    assert "no mail goes" not in said("mails", "--mail-type=END,FAIL", "--mail-user=me@lab.example")


def test_outside_of_git_nothing_is_queued(user: OrdinaryUser, checkout: Path, jobs_base: Path, agent: Path) -> None:
    assert user.run(["rm", "-rf", str(agent / ".git")]).returncode == 0
    root = f"SKYRL_PROJECT_ROOT={jobs_base / 'root'}"
    words = ("TRAINING_COMMAND=true", "GPUS_PER_NODE=0", *SMALL, root, f"SKYRL_JOBS_BASE={jobs_base}/none")
    done = user.run(launch_argv(checkout, *words))
    assert done.returncode == 2
    assert f"snapshot: SNAPSHOT=1 copies what git tracks, and git tracks nothing in {agent}" in done.stderr
    assert not (jobs_base / "none").exists()
    assert not squeue(user, "--me", "-t", "all", "-n", "skyrl-train", "-o", "%T").count("PENDING")
