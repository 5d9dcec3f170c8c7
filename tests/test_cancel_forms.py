"""``launch.py cancel --all`` and ``--after-checkpoint``: which runs, what is waited for, when, and who is asked.

On a real Slurm they are used in test_slurm_cancel, with the real VERL in test_local_verl.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slurm.lib import after_checkpoint
from slurm.lib.after_checkpoint import Cause, CheckpointWait, cause_of
from slurm.lib.checkpoints import LOOP_FILE, RESTS_S, TRACKER
from slurm.lib.coordination import CoordinationDir
from slurm.lib.errors import UsageError
from slurm.lib.observe.run_view import JobView, RunState, Stage
from slurm.lib.observe.saving import SavesNever, Saving, recorded_settings, saving_by
from slurm.lib.observe.survey import Survey
from slurm.lib.processes import start_ticks
from slurm.lib.runs import FoundRun
from slurm.lib.scheduler import Slurm
from slurm.lib.signals import Interrupted, SignalNotes
from tests.fake_slurm import FakeSlurm
from tests.terminals import INTERRUPT, own_terminal

ROOT = Path(__file__).resolve().parent.parent
VERL = {"SKYRL_BACKEND": "slurm", "SAVE_FREQ": "5", "WANDB_EXPERIMENT": "exp"}
PATIENCE_S = 60.0
OWN = {**VERL, "TRAINING_COMMAND": "./train"}


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path / "fake")


def run_in(base: Path, number: int, **settings: str) -> Path:
    """The directory of a run with a runtime job of this number and a training job of the next."""
    folder = base / f"20260101_000000_{number}"
    folder.mkdir(parents=True)
    jobs = {"runtime": {"id": str(number)}, "training": {"id": str(number + 1)}}
    (folder / "run.json").write_text(json.dumps({"schema": 1, "jobs": jobs, "settings": {**VERL, **settings}}))
    return folder


def line(job: int, word: str = "RUNNING", name: str = "skyrl-train") -> str:
    """A job as squeue shows it."""
    return f"{job}|{word}|None|n1|test|me|N/A|0:09|1:00|{name}\n"


# --- how a run saves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "place", "every"),
    [
        (VERL, "RUN/checkpoints/exp", "SAVE_FREQ=5"),
        ({**VERL, "CHECKPOINT_DIR": "/data/c"}, "/data/c/exp", "SAVE_FREQ=5"),
        ({**VERL, "VERL_OVERRIDES": "trainer.save_freq=7 a.b=c"}, "RUN/checkpoints/exp", "SAVE_FREQ=7"),
        ({**VERL, "SAVE_FREQ": "-1", "VERL_OVERRIDES": "trainer.save_freq=7"}, "RUN/checkpoints/exp", "SAVE_FREQ=7"),
        ({**VERL, "VERL_OVERRIDES": "trainer.default_local_dir=/x/y/z"}, "/x/y/z", "SAVE_FREQ=5"),
        ({**OWN, "TRAINING_COMMAND_IS_VERL": "true"}, "RUN/checkpoints/exp", "SAVE_FREQ=5"),
        ({**OWN, "TRAINING_COMMAND": 'x --save "$CHECKPOINT_DIR"'}, "RUN/checkpoints", ""),
        ({**OWN, "RESTARTS": "2"}, "RUN/checkpoints", ""),
        ({**OWN, "TRAINING_COMMAND": '"$SKYRL_PYTHON" -m shell_rl.train', "SAVE_FREQ": "-1"}, "RUN/checkpoints", ""),
    ],
)
def test_where_a_run_saves(settings: Mapping[str, str], place: str, every: str, tmp_path: Path) -> None:
    saving = saving_by(settings, CoordinationDir(tmp_path))
    assert isinstance(saving, Saving)
    assert (str(saving.place), saving.every) == (place.replace("RUN", str(tmp_path)), every)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, "given to sbatch directly"),
        ({**VERL, "SAVE_FREQ": "-1"}, "it never saves: SAVE_FREQ=-1"),
        ({**VERL, "VERL_OVERRIDES": "trainer.save_freq=0"}, "it never saves: SAVE_FREQ=0"),
        ({**VERL, "VERL_OVERRIDES": "trainer.default_local_dir=ckpt"}, "where it saves is not known here"),
        ({**VERL, "VERL_OVERRIDES": "trainer.default_local_dir='${x}'"}, "where it saves is not known here"),
        (OWN, "its TRAINING_COMMAND has saved nothing in "),
        ({**OWN, "RESTARTS": "0"}, "its TRAINING_COMMAND has saved nothing in "),
    ],
)
def test_what_never_saves(settings: Mapping[str, str], why: str, tmp_path: Path) -> None:
    saving = saving_by(settings, CoordinationDir(tmp_path))
    assert isinstance(saving, SavesNever)
    assert why in saving.why


def test_a_command_that_has_saved_before_saves(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "weights").write_text("w")
    assert isinstance(saving_by(OWN, CoordinationDir(tmp_path)), Saving)


def test_the_settings_are_those_of_the_job_that_joined(tmp_path: Path) -> None:
    folder = run_in(tmp_path, 11)
    joined = {"jobs": {"training": {"id": "15"}}, "settings": {"SAVE_FREQ": "9"}}
    (folder / "run_15.json").write_text(json.dumps(joined))
    assert recorded_settings(CoordinationDir(folder), "15") == {"SAVE_FREQ": "9"}
    assert recorded_settings(CoordinationDir(folder), "12")["SAVE_FREQ"] == "5"
    (folder / "run_17.json").write_text(json.dumps({"jobs": {"training": {"id": "17"}}}))  # by the job itself
    assert recorded_settings(CoordinationDir(folder), "17")["SAVE_FREQ"] == "5"


# --- what is waited for -----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.sampled_from(RunState), st.sampled_from(Stage), st.sampled_from(["training", "runtime"]), st.booleans())
def test_when_a_run_is_waited_for_no_longer(state: RunState, stage: Stage, kind: str, saved: bool) -> None:
    cause = cause_of(state, JobView(kind, "12", stage), "step 5" if saved else None)
    if state.is_over or state is RunState.ENDING:
        assert cause is Cause.ENDED
    elif saved:
        assert cause is Cause.SAVED
    else:
        assert cause is (Cause.PENDING if (kind, stage) == ("training", Stage.PENDING) else None)


@pytest.fixture
def wait(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[CheckpointWait]:
    """A wait that looks often."""
    monkeypatch.setattr(after_checkpoint, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(after_checkpoint, "FIRST_PAUSE_S", 0.1)
    notes = SignalNotes()
    made = CheckpointWait(Survey(Slurm({"PATH": slurm.path}), notes), notes, PATIENCE_S, _pause_s=0.1)
    yield made


def found(folder: Path) -> FoundRun:
    return FoundRun(folder.name, CoordinationDir(folder))


def test_a_checkpoint_is_due_once_its_tracker_says_so(slurm: FakeSlurm, wait: CheckpointWait) -> None:
    folder = run_in(slurm.jobs, 11)
    place = folder / "checkpoints" / "exp"
    (place / "global_step_5").mkdir(parents=True)
    (place / TRACKER).write_text("5\n")
    slurm.answer("squeue", *[{"stdout": line(11) + line(12)}] * 1000)
    wait.start([found(folder)])
    (place / "global_step_10").mkdir()
    (place / "global_step_10" / "model.pt").write_text("half of it")
    wait.patience_s = RESTS_S + 1.0
    assert wait.next_due() == [], "half a checkpoint is none"
    assert [watch.run.name for watch in wait.left] == [folder.name]
    wait.patience_s = PATIENCE_S
    (place / TRACKER).write_text("10\n")
    (due,) = wait.next_due()
    assert (due.cause, due.checkpoint, wait.left) == (Cause.SAVED, "step 10", [])


def test_the_loops_checkpoint_is_one_file_and_its_metrics_are_none(slurm: FakeSlurm, wait: CheckpointWait) -> None:
    folder = run_in(slurm.jobs, 11, TRAINING_COMMAND="-m shell_rl.train")
    place = folder / "checkpoints"
    place.mkdir()
    (place / LOOP_FILE).write_text('{"step": 5}')
    slurm.answer("squeue", *[{"stdout": line(11) + line(12)}] * 1000)
    wait.start([found(folder)])
    (place / "metrics.jsonl").write_text("{}\n")
    wait.patience_s = 4.0
    assert wait.next_due() == []
    wait.patience_s = PATIENCE_S
    (place / LOOP_FILE).write_text('{"step": 10}')
    (due,) = wait.next_due()
    assert due.checkpoint == "step 10"


def test_one_that_ends_by_itself_one_that_is_pending_and_one_whose_directory_goes(
    slurm: FakeSlurm, wait: CheckpointWait, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slurm.lib.coordination.PRESENCE_PATIENCE_S", 0.2)
    ends, pends, goes = (run_in(slurm.jobs, number) for number in (11, 21, 31))
    alive = line(11) + line(12) + line(31) + line(32)
    slurm.answer("squeue", *[{"stdout": alive + line(21, "PENDING") + line(22, "PENDING")}] * 1000)
    wait.start([found(folder) for folder in (ends, pends, goes)])
    (due,) = wait.next_due()
    assert (due.run.name, due.cause, due.is_to_be_cancelled) == (pends.name, Cause.PENDING, True)
    flag = {"schema": 1, "job_id": "12", "runtime_job_id": "11", "exit_code": 3, "reason": "x", "ended": "failed"}
    (ends / "training_complete.flag").write_text(json.dumps(flag))
    (due,) = wait.next_due()
    assert (due.run.name, due.cause, due.is_to_be_cancelled) == (ends.name, Cause.ENDED, False)
    goes.rename(slurm.jobs / "elsewhere")
    (due,) = wait.next_due()
    assert (due.run.name, due.cause, due.is_to_be_cancelled) == (goes.name, Cause.LOST, False)


def test_a_silent_slurm_ends_no_wait_and_a_checkpoint_counts(slurm: FakeSlurm, wait: CheckpointWait) -> None:
    folder = run_in(slurm.jobs, 11)
    silent = {"code": 1, "stderr": "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"}
    slurm.answer("squeue", {"stdout": line(11) + line(12)}, *[silent] * 1000)
    wait.start([found(folder)])
    wait.patience_s = 0.6
    assert wait.next_due() == []
    assert not wait.survey.heard
    wait.patience_s = PATIENCE_S
    (folder / "checkpoints" / "exp").mkdir(parents=True)
    (folder / "checkpoints" / "exp" / TRACKER).write_text("5")
    (due,) = wait.next_due()
    assert due.cause is Cause.SAVED


def test_a_signal_ends_the_wait(slurm: FakeSlurm, wait: CheckpointWait) -> None:
    slurm.answer("squeue", *[{"stdout": line(11) + line(12)}] * 1000)
    wait.start([found(run_in(slurm.jobs, 11))])
    wait.notes.note(signal.SIGINT)
    with pytest.raises(Interrupted):
        wait.next_due()
    assert len(wait.left) == 1


def test_all_that_cannot_be_waited_for_are_named_together(slurm: FakeSlurm, wait: CheckpointWait) -> None:
    folders = [run_in(slurm.jobs, 11, SAVE_FREQ="-1"), run_in(slurm.jobs, 21), run_in(slurm.jobs, 31, SAVE_FREQ="-1")]
    slurm.answer("squeue", {"stdout": "".join(map(line, (11, 12, 21, 22, 31, 32)))})
    with pytest.raises(UsageError) as refused:
        wait.start([found(folder) for folder in folders])
    assert str(refused.value).count("cannot be waited for: it never saves") == 2
    assert "nothing was cancelled" in str(refused.value)


# --- the command ------------------------------------------------------------------------------------------------------


def cancel(slurm: FakeSlurm, *words: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(ROOT / "slurm" / "launch.py"), "cancel", *words]
    env = environment(slurm) | ({"PATH": path} if path else {})
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)


def environment(slurm: FakeSlurm) -> dict[str, str]:
    return {"PATH": slurm.path, "HOME": str(slurm.folder), "SKYRL_JOBS_BASE": str(slurm.jobs)}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name a RUN, or say --all"),
        (["--all", "latest"], "--all means all runs: name none"),
        (["latest", "--yes"], "--yes goes with --all"),
        (["latest", "--patience", "5"], "--patience goes with --after-checkpoint"),
        (["latest", "--after-checkpoint", "--patience", "soon"], "'soon' is no length of time"),
        (["latest", "--after-checkpoint", "--patience=-1"], "'-1' is no length of time"),
    ],
)
def test_a_wrong_command_line(slurm: FakeSlurm, words: list[str], said: str) -> None:
    done = cancel(slurm, *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.fixture
def local(slurm: FakeSlurm) -> Iterator[subprocess.Popen[bytes]]:
    """The process of a local run that lives."""
    folder = slurm.jobs / "20260101_000000_local5.0"
    folder.mkdir(parents=True)
    jobs = {"runtime": {"id": "local5.0"}, "training": {"id": "local5.1"}}
    (folder / "run.json").write_text(json.dumps({"jobs": jobs, "settings": {"SKYRL_BACKEND": "local"}}))
    with subprocess.Popen(["sleep", "60"]) as body:
        (folder / "local_jobs.txt").write_text(f"local5.0 {body.pid} 1\nlocal5.1 {body.pid} {start_ticks(body.pid)}\n")
        yield body
        body.kill()


def test_all_without_a_terminal_needs_a_yes(slurm: FakeSlurm, local: subprocess.Popen[bytes]) -> None:
    refused = cancel(slurm, "--all")
    assert refused.returncode == 2
    assert "1 of your runs live" in refused.stderr
    assert "20260101_000000_local5.0" in refused.stderr
    assert "add --yes to mean them; nothing was cancelled" in refused.stderr
    assert local.poll() is None
    done = cancel(slurm, "--all", "--yes")
    assert done.returncode == 0, done.stderr
    assert local.wait(5) == -signal.SIGTERM
    call = next(call for call in slurm.questions if call.name == "squeue --user")
    assert {f"--user={os.getuid()}", "--name=skyrl-runtime,skyrl-train,skyrl-worker"} <= set(call.argv)
    again = cancel(slurm, "--all", "--json")
    assert again.returncode == 0
    assert json.loads(again.stdout) == {"schema": 1, "runs": []}
    assert "no run of yours lives" in again.stderr


def test_all_without_slurms_commands_means_local_runs(slurm: FakeSlurm, local: subprocess.Popen[bytes]) -> None:
    run_in(slurm.jobs, 11)
    done = cancel(slurm, "--all", "--yes", path="/nowhere")
    assert done.returncode == 0, done.stderr
    assert local.wait(5) == -signal.SIGTERM
    assert "20260101_000000_11" not in done.stdout


@pytest.mark.parametrize(("typed", "code", "ends"), [("y\n", 0, True), ("no\n", 0, False), (INTERRUPT, 130, False)])
def test_a_person_is_asked_about_all(
    slurm: FakeSlurm, local: subprocess.Popen[bytes], typed: str, code: int, ends: bool
) -> None:
    argv = [sys.executable, str(ROOT / "slurm" / "launch.py"), "cancel", "--all"]
    with own_terminal(argv, environment(slurm)) as screen:
        screen.awaits(r"\[y/N\]")
        assert "20260101_000000_local5.0" in screen.text
        screen.type(typed)
        assert screen.process.wait(60) == code
    if ends:
        assert local.wait(5) == -signal.SIGTERM
    else:
        assert local.poll() is None


def test_what_is_none_of_its_own_or_on_another_host_is_left_alone(slurm: FakeSlurm) -> None:
    """Job 12 of an old record is another run's by now; a local run elsewhere is not known here."""
    old = run_in(slurm.jobs, 11)
    new = slurm.jobs / "20260102_000000_12"
    new.mkdir()
    (new / "run.json").write_text(json.dumps({"jobs": {"training": {"id": "12"}}}))
    away = slurm.jobs / "20260103_000000_local7.0"
    away.mkdir()
    record = {"jobs": {"training": {"id": "local7.0"}}, "host": "elsewhere", "settings": {"SKYRL_BACKEND": "local"}}
    (away / "run.json").write_text(json.dumps(record))
    slurm.answer("squeue", *[{"stdout": line(12)}] * 10)
    slurm.answer("squeue --user", {"stdout": "12\n"})
    shown = {"stdout": f"JobId=12 JobName=skyrl-train\n   JobState=RUNNING\n   StdOut={new}/training_12.out\n"}
    slurm.answer("scontrol", *[shown] * 10)
    refused = cancel(slurm, "--all")
    assert "1 of your runs live" in refused.stderr
    assert str(new) in refused.stderr
    assert str(old) not in refused.stderr
    assert f"{away.name} is a local run of another host, and is left alone" in refused.stderr


def test_jobs_that_were_given_to_sbatch_are_found_by_their_names(slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.jobs.mkdir()
    elsewhere = run_in(tmp_path / "other base", 41)
    slurm.answer("squeue --user", {"stdout": "42\n51\n41\n"})
    logs = {41: elsewhere / "runtime_41.out", 51: tmp_path / "slurm-51.out"}
    answers = [
        {"stdout": f"JobId={job} JobName=skyrl-runtime\n   JobState=PENDING\n   StdOut={log}\n"}
        for job, log in [(41, logs[41]), (51, logs[51]), (51, logs[51])]
    ]
    slurm.answer("scontrol", *answers)
    refused = cancel(slurm, "--all")
    assert refused.returncode == 2
    assert "2 of your runs live" in refused.stderr, refused.stderr
    assert f"{elsewhere}  (training 42, runtime 41)" in refused.stderr
    assert "given to sbatch directly, not begun  (runtime 51)" in refused.stderr
