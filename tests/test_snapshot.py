"""SNAPSHOT=1: which files of skyrl-agent are copied for a run, what is said of the others, who uses the copy."""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import replace
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path

import pytest

from slurm.lib import local
from slurm.lib.config import load_config
from slurm.lib.coordination import AGENT_COPIES, CoordinationDir
from slurm.lib.errors import EnvironmentProblem, SubmissionError, SuiteError
from slurm.lib.git import GitState
from slurm.lib.job_context import JobContext
from slurm.lib.leftovers import Marker, _remove_files
from slurm.lib.plan import AGENT_COPY, LaunchPlan, Request, Restart, make_plan, shown
from slurm.lib.preflight import snapshot as findings
from slurm.lib.preflight.finding import Level
from slurm.lib.preflight.snapshot import Tree, look_at_tree, snapshot_findings
from slurm.lib.run_record import Provenance, copy_code
from slurm.lib.settings import Settings
from slurm.lib.signals import SignalNotes
from slurm.lib.snapshot import take_snapshot
from slurm.lib.submission import submit
from slurm.lib.trainer import dot_env_file, snapshot_variables, task_file, trainer_of
from slurm.lib.training_job import snapshot_of
from tests.fake_slurm import FakeSlurm
from tests.test_git import git, repository
from tests.test_partner import FakeScheduler

ROOT = Path(__file__).resolve().parent.parent
NOW = datetime(2026, 3, 4, 5, 6, 7)
GIT = Provenance(GitState("c0ffee", True))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A SKYRL_PROJECT_ROOT whose skyrl-agent is a repository."""
    made = tmp_path / "root"
    (made / "SkyRL").mkdir(parents=True)
    repository(made / "SkyRL" / "skyrl-agent")
    return made


@pytest.fixture
def agent(root: Path) -> Path:
    return root / "SkyRL" / "skyrl-agent"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or path.is_file()}


# --- the copy --------------------------------------------------------------------------------------------------------


def test_tracked_files_as_they_are_now_and_no_others(agent: Path, tmp_path: Path) -> None:
    (agent / "sub").mkdir()
    for name in ("staged.py", "gone.py", ".env", "sub/.env", ".envrc", ".env.local", ".env.example"):
        (agent / name).write_text("KEY=1\n")
    (agent / "run me.sh").write_text("#!/bin/sh\n")
    (agent / "run me.sh").chmod(0o750)
    git(agent, "add", "-f", ".")
    (agent / "a.py").write_text("changed, not committed\n")
    (agent / "gone.py").unlink()
    (agent / "untracked.py").touch()
    copy = tmp_path / "copy"
    take_snapshot(agent, copy)
    assert files(copy) == {"a.py", "staged.py", "run me.sh", ".env.example"}, "no .env, even one that is tracked"
    assert (copy / "a.py").read_text() == "changed, not committed\n"
    assert os.access(copy / "run me.sh", os.X_OK)
    assert stat.S_IMODE(copy.stat().st_mode) == 0o700


def test_submodules_are_copied_and_one_that_was_not_fetched_is_none(agent: Path, tmp_path: Path) -> None:
    part = repository(tmp_path / "part")
    for name in ("here", "absent"):
        git(agent, "submodule", "--quiet", "add", str(part), f"lib/{name}")
    git(agent, "submodule", "--quiet", "deinit", "-f", "lib/absent")
    copy = tmp_path / "copy"
    take_snapshot(agent, copy)
    assert files(copy) == {".gitmodules", "a.py", "lib/here/a.py"}


def test_links_lead_where_they_did(agent: Path, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("outside")
    (agent / "sub").mkdir()
    (agent / "sub" / "inside").symlink_to("../a.py")
    (agent / "sub" / "outside").symlink_to(os.path.relpath(tmp_path / "data", agent / "sub"))
    (agent / "dangling").symlink_to("/nowhere/at/all")
    git(agent, "add", ".")
    copy = tmp_path / "less" / "deep"
    copy.parent.mkdir(parents=True)
    take_snapshot(agent, copy)
    assert (copy / "sub" / "inside").resolve() == copy / "a.py", "not the original's"
    assert (copy / "sub" / "outside").read_text() == "outside"
    assert str((copy / "dangling").readlink()) == "/nowhere/at/all"


def test_what_is_there_already_stays(agent: Path, tmp_path: Path) -> None:
    """Another training may run in it, or a TRAINING_COMMAND have made it."""
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "mine.py").touch()
    with pytest.raises(EnvironmentProblem, match="is there already, and a run may be using it"):
        take_snapshot(agent, copy)
    assert files(copy) == {"mine.py"}


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_copy_that_fails_leaves_nothing(
    agent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    def fail(source: Path, target: Path) -> None:
        raise fault

    monkeypatch.setattr("slurm.lib.snapshot.shutil.copy2", fail)
    with pytest.raises((EnvironmentProblem, KeyboardInterrupt)):
        take_snapshot(agent, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_outside_of_git_there_is_no_copy(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="SNAPSHOT=1: git tracks no files in"):
        take_snapshot(tmp_path, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


# --- what is said before anything is queued --------------------------------------------------------------------------


def said(settings: Settings, tree: Tree) -> list[tuple[Level, str]]:
    return [(finding.level, str(finding)) for finding in snapshot_findings(settings, tree)]


def test_no_repository_is_an_error_with_what_to_do(tmp_path: Path) -> None:
    [(level, sentence)] = said(Settings(), look_at_tree(tmp_path))
    assert level is Level.ERROR
    assert f"git tracks nothing in {tmp_path}" in sentence
    assert "git init, git add" in sentence
    assert look_at_tree(tmp_path / "absent").copied is None


def test_untracked_files_are_counted_and_named(agent: Path) -> None:
    for number in range(7):
        (agent / f"new{number}.py").touch()
    found = said(Settings(training_command="true"), look_at_tree(agent))
    assert [level for level, _ in found] == [Level.WARNING, Level.ESTIMATE]
    assert f"leaves out 7 untracked files of {agent}: new0.py, new1.py, new2.py, new3.py, new4.py, …" in found[0][1]
    assert "1 file of" in found[1][1]


def test_tracked_files_with_keys_are_named(agent: Path) -> None:
    """But for the one that the trainer gets from the original."""
    (agent / "examples").mkdir()
    for name in (".env", "examples/.env"):
        (agent / name).touch()
    git(agent, "add", "-f", ".")
    for command, named in (("", "examples/.env"), ("true", ".env, examples/.env")):
        found = said(Settings(training_command=command, task_yaml="/else"), look_at_tree(agent))
        warned = [sentence for level, sentence in found if level is Level.WARNING]
        assert f"SNAPSHOT=1 leaves out {named} of {agent}, which may hold keys" in warned[0]


def test_names_of_any_bytes_stay_on_their_line(agent: Path) -> None:
    (agent / os.fsdecode(b"a\nb\xff")).touch()
    assert "untracked file of" in said(Settings(training_command="true"), look_at_tree(agent))[0][1]
    assert ": a?b?;" in said(Settings(training_command="true"), look_at_tree(agent))[0][1]


def test_what_verl_cannot_do_without_must_be_tracked(agent: Path) -> None:
    for name in ("pyproject.toml", "uv.lock", "mine.yaml"):
        (agent / name).touch()
    settings = Settings(task_yaml="./mine.yaml")
    errors = [sentence for level, sentence in said(settings, look_at_tree(agent)) if level is Level.ERROR]
    assert len(errors) == 3
    assert f"git does not track {agent}/mine.yaml (TASK_YAML)" in errors[2]
    assert f"git -C {agent} add mine.yaml" in errors[2]
    git(agent, "add", ".")
    for task, level in (("./mine.yaml", Level.ESTIMATE), ("auto", Level.ERROR), ("/else/task.yaml", Level.ESTIMATE)):
        found = said(replace(settings, task_yaml=task), look_at_tree(agent))
        assert found[0][0] is level, task


def test_packages_beside_skyrl_agent_are_no_part_of_the_copy(agent: Path) -> None:
    (agent / "uv.lock").write_text('[[package]]\nname = "gym"\nsource = { editable = "../skyrl-gym" }\n')
    git(agent, "add", ".")
    found = said(Settings(training_command="true"), look_at_tree(agent))
    assert found[0][0] is Level.WARNING
    assert "the packages ../skyrl-gym beside" in found[0][1]


@pytest.mark.parametrize(("total", "level"), [(1, Level.ESTIMATE), (findings.MUCH + 1, Level.WARNING)])
def test_a_large_copy_is_mentioned(tmp_path: Path, total: int, level: Level) -> None:
    tree = Tree(tmp_path, ["a"], total)
    assert [found for found, _ in said(Settings(training_command="true"), tree)] == [level]


def test_a_copy_of_everything_is_refused(tmp_path: Path) -> None:
    [(level, sentence)] = said(Settings(training_command="true"), Tree(tmp_path, ["a"], findings.MOST + 1))
    assert level is Level.ERROR
    assert "would copy 2G" in sentence and "git rm --cached" in sentence


# --- the run ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path / "fake")


def plan_for(slurm: FakeSlurm, root: Path, *words: str, request: Request | None = None) -> LaunchPlan:
    seen = {"PATH": slurm.path, "HOME": str(slurm.folder)}
    said = [f"SKYRL_JOBS_BASE={slurm.jobs}", f"SKYRL_PROJECT_ROOT={root}", "SNAPSHOT=1", "CHECKPOINT_DIR=", *words]
    config = load_config("dev", said, seen, ROOT / "slurm" / "config", NOW, ROOT.parent)
    return make_plan(config, request or Request(), seen, ROOT, sys.executable, NOW)


def test_the_run_has_its_copy_and_every_attempt_uses_it(slurm: FakeSlurm, root: Path, agent: Path) -> None:
    words = ("RESTARTS=1", "TASK_YAML=./x.yaml")
    plan = plan_for(slurm, root, *words)
    directory = submit(plan, SignalNotes(), lambda: GIT, ROOT).directory
    (agent / "a.py").write_text("edited while the run waits\n")
    assert (directory.agent / "a.py").read_text() == "one\n"
    again = plan_for(slurm, root, *words, request=Request(attach_dir=directory.path, restart=Restart(2, "102")))
    submit(again, SignalNotes(), lambda: GIT, ROOT)
    assert (directory.agent / "a.py").read_text() == "one\n"
    assert trainer_of(again.settings, directory).cwd == directory.agent


def test_a_runtime_alone_has_no_copy_and_a_training_that_joins_brings_its_own(
    slurm: FakeSlurm, root: Path, agent: Path
) -> None:
    slurm.answer("scontrol", {}, {"code": 1, "stderr": "no"}, {})
    alone = plan_for(slurm, root, request=Request(training=False))
    directory = submit(alone, SignalNotes(), lambda: GIT, ROOT).directory
    assert not directory.agent.exists()
    joins = plan_for(
        slurm, root, "TASK_YAML=./x.yaml", request=Request(runtime=False, attach_dir=directory.path, attach_id="101")
    )
    with pytest.raises(SubmissionError):
        submit(joins, SignalNotes(), lambda: GIT, ROOT)
    assert not list(directory.path.glob("agent*")), "taken back with the rest"
    done = submit(joins, SignalNotes(), lambda: GIT, ROOT)
    assert files(directory.path / f"agent_{done.jobs['training']}") == {"a.py"}


def test_a_training_that_joins_leaves_the_copy_of_the_living_one(slurm: FakeSlurm, root: Path, agent: Path) -> None:
    """Taken back or not; each finds its own by what its job is told."""
    slurm.answer("scontrol", {}, {}, {"code": 1, "stderr": "no"}, {})
    words = ("TASK_YAML=./x.yaml", "RESTARTS=1")
    first = submit(plan_for(slurm, root, *words), SignalNotes(), lambda: GIT, ROOT)
    directory, living = first.directory, (first.directory.agent.stat().st_ino, "one\n")
    (agent / "a.py").write_text("new\n")

    def of_the_first() -> tuple[int, str]:
        return directory.agent.stat().st_ino, (directory.agent / "a.py").read_text()

    joins = plan_for(
        slurm, root, *words, request=Request(runtime=False, attach_dir=directory.path, attach_id=first.jobs["runtime"])
    )
    with pytest.raises(SubmissionError):
        submit(joins, SignalNotes(), lambda: GIT, ROOT)
    assert of_the_first() == living
    assert [path.name for path in directory.path.glob("agent*")] == ["agent"]

    done = submit(joins, SignalNotes(), lambda: GIT, ROOT)
    own = f"agent_{done.jobs['training']}"
    assert of_the_first() == living
    assert (directory.path / own / "a.py").read_text() == "new\n"
    told = slurm.of("sbatch")[-1].environment
    assert told[AGENT_COPY].replace("%j", done.jobs["training"]) == own
    assert any(fnmatch(own, pattern) for pattern in AGENT_COPIES)
    assert "<training job id>" in shown(joins).split("# the trainer, in ")[1].splitlines()[0]
    again = plan_for(slurm, root, *words, request=Request(attach_dir=directory.path, restart=Restart(2, "102")))
    assert all(AGENT_COPY not in job.environment for job in again.jobs), "a further attempt is of the launch's code"


@pytest.mark.parametrize("fault", ["no copy", "no record"])
def test_a_join_that_fails_leaves_no_secret_and_no_copy(
    slurm: FakeSlurm, root: Path, agent: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    first = submit(plan_for(slurm, root, "TASK_YAML=./x.yaml"), SignalNotes(), lambda: GIT, ROOT)
    directory = first.directory
    before = {path.name for path in directory.path.iterdir()}
    request = Request(runtime=False, attach_dir=directory.path, attach_id=first.jobs["runtime"])
    joins = replace(plan_for(slurm, root, "TASK_YAML=./x.yaml", request=request), secrets={"WANDB_API_KEY": "wandb-1"})
    if fault == "no copy":
        (agent / ".git").rename(agent / ".no-git")
    else:  # after the last that furnish writes
        monkeypatch.setattr("slurm.lib.submission._publish_foreign_runtime", lambda *_: 1 / 0)
    with pytest.raises((SubmissionError, ZeroDivisionError)):
        submit(joins, SignalNotes(), lambda: GIT, ROOT)
    assert {path.name for path in directory.path.iterdir()} == before


def test_a_local_run_that_cannot_begin_leaves_no_directory(tmp_path: Path, slurm: FakeSlurm) -> None:
    plan = plan_for(slurm, tmp_path, "TASK_YAML=./x.yaml", "SKYRL_BACKEND=local")
    with pytest.raises(EnvironmentProblem, match="git tracks no files in"):
        local.run(replace(plan, secrets={"WANDB_API_KEY": "wandb-1"}), SignalNotes(), ROOT)
    assert not list(slurm.jobs.iterdir())


def test_a_code_that_is_copied_in_part_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next launch into this directory would take it for the whole."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("shutil.copy2", fail)
        with pytest.raises(EnvironmentProblem, match="cannot copy the code"):
            copy_code(ROOT, tmp_path / "code")
    assert not (tmp_path / "code").exists()
    assert copy_code(ROOT, tmp_path / "code")
    assert not copy_code(ROOT, tmp_path / "code"), "it stays as it is"


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        ({}, r"launch.py takes the copy, and this job was given to sbatch directly; use launch.py"),
        ({"SKYRL_CODE_DIR": "/x"}, r"agent_8, is not to be seen on .*; launch again"),
    ],
)
def test_a_training_without_its_copy_says_why(tmp_path: Path, environment: dict[str, str], complaint: str) -> None:
    directory = CoordinationDir(tmp_path, "agent_8")
    settings = Settings(snapshot=True, training_command="true")
    job = JobContext("8", directory, settings, environment, FakeScheduler(), ROOT, own_dir=True)
    with pytest.raises(SuiteError, match=complaint):
        snapshot_of(job)
    assert snapshot_of(replace(job, settings=replace(settings, snapshot=False))) is None
    directory.agent.mkdir()
    assert snapshot_of(replace(job, environment={"SKYRL_CODE_DIR": "/x"})) == tmp_path / "agent_8"


def test_what_a_killed_launch_copied_into_a_run_goes_with_its_secrets(tmp_path: Path) -> None:
    """And nothing else of that run."""
    run = tmp_path / "20260304_050607_1"
    for name in ("agent", "agent_7", "agent_8"):
        (run / name).mkdir(parents=True)
    marker = Marker(run / "submission_x.json", "x", ("7",), made=False)
    _remove_files(marker)
    assert {path.name for path in run.iterdir()} == {"agent", "agent_8"}


def test_without_a_repository_nothing_stays_queued(slurm: FakeSlurm, tmp_path: Path) -> None:
    """With --no-check, too."""
    with pytest.raises(SubmissionError, match=r"git tracks no files in .*; cancelled 101 102"):
        submit(plan_for(slurm, tmp_path, "TASK_YAML=./x.yaml"), SignalNotes(), lambda: GIT, ROOT)
    assert not [path for path in slurm.jobs.iterdir() if path.is_dir()]


def test_who_uses_the_copy_and_who_the_original(root: Path, agent: Path, slurm: FakeSlurm) -> None:
    """Code and task file are the copy's; the .env and uv's environment the original's; results are outside of both."""
    settings = plan_for(slurm, root, "TASK_YAML=./mine.yaml").settings
    directory = CoordinationDir(Path("/jobs/run"))
    trainer = trainer_of(settings, directory)
    assert trainer.cwd == directory.agent
    assert task_file(settings, directory) == directory.agent / "mine.yaml"
    assert not trainer.checkpoint_dir.is_relative_to(directory.agent)
    assert not trainer.rollout_dir.is_relative_to(directory.agent)
    assert dot_env_file(settings, trainer) == agent / ".env"
    told = {"UV_PROJECT_ENVIRONMENT": f"{agent}/.venv", "UV_NO_SYNC": "1"}
    assert snapshot_variables(settings, {}) == told
    own = snapshot_variables(settings, {"UV_PROJECT_ENVIRONMENT": "/envs/mine"})
    assert own["UV_PROJECT_ENVIRONMENT"] == "/envs/mine"
    assert snapshot_variables(replace(settings, snapshot=False), {}) == {}


def test_a_dry_run_shows_where_the_trainer_starts(slurm: FakeSlurm, root: Path, agent: Path) -> None:
    text = shown(plan_for(slurm, root))
    assert "# the trainer, in " in text
    assert "/agent\n" in text.split("# the trainer, in ")[1].splitlines(keepends=True)[0]
    assert f"export UV_PROJECT_ENVIRONMENT={agent}/.venv" in text
    assert "export UV_NO_SYNC=1" in text
