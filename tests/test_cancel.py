"""``launch.py cancel``: which step is due, which runs are meant, and that a command line gets a sentence."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm.lib.cancel import (
    CANCEL_AFTER_S,
    END_S,
    KILL_AFTER_S,
    SLOWEST_START_S,
    SURE_AFTER_S,
    Act,
    Cancellation,
    LocalHand,
    Watched,
    due,
)
from slurm.lib.coordination import CoordinationDir
from slurm.lib.errors import UsageError
from slurm.lib.processes import start_ticks
from slurm.lib.runs import FoundRun, RunJob, find, stranger
from slurm.lib.scheduler import JobState, JobStatus, Slurm
from slurm.lib.signals import SignalNotes
from tests.fake_slurm import FakeSlurm

ROOT = Path(__file__).resolve().parent.parent
RUNNING, PENDING = JobStatus(JobState.RUNNING, "RUNNING, on gpu1"), JobStatus(JobState.PENDING, "PENDING, Priority")
COMPLETING = JobStatus(JobState.RUNNING, "COMPLETING, on gpu1")


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path / "fake")


@pytest.mark.parametrize(
    ("status", "done", "elapsed_s", "step"),
    [
        (PENDING, [], 0.0, Act.WITHDRAW),
        (PENDING, [Act.WITHDRAW], 1.0, None),
        (PENDING, [Act.WITHDRAW], KILL_AFTER_S, Act.WITHDRAW),
        (RUNNING, [Act.WITHDRAW], 1.0, Act.TELL),  # it started before the order came
        (RUNNING, [Act.TELL], 1.0, None),
        (RUNNING, [Act.TELL], KILL_AFTER_S, Act.KILL),
        (RUNNING, [Act.TELL, Act.KILL], KILL_AFTER_S + 1, None),
        (RUNNING, [Act.TELL, Act.KILL], CANCEL_AFTER_S, Act.CANCEL),
        (RUNNING, [Act.TELL, Act.KILL, Act.CANCEL], CANCEL_AFTER_S + 1, None),
        (COMPLETING, [Act.TELL], KILL_AFTER_S, None),
        (JobStatus(JobState.UNKNOWN, "silent"), [], 5.0, None),
        (JobStatus(JobState.ENDED_WELL, "COMPLETED"), [], 5.0, None),
    ],
)
def test_the_step_that_is_due(status: JobStatus, done: list[Act], elapsed_s: float, step: Act | None) -> None:
    assert due(status, done, elapsed_s) is step


@given(st.lists(st.sampled_from([RUNNING, PENDING, COMPLETING]), max_size=40))
def test_no_step_is_given_twice_and_they_only_get_harder(seen: list[JobStatus]) -> None:
    done: list[Act] = []
    for number, status in enumerate(seen):
        step = due(status, done, number * 0.5)
        done += [step] if step else []
    harder = [act for act in done if act is not Act.WITHDRAW]
    assert harder == sorted(harder, key=list(Act).index)
    assert len(harder) == len(set(harder))
    assert done.count(Act.WITHDRAW) <= 3


def test_every_step_is_reached_after_the_slowest_start_and_seconds_are_left_of_the_promise() -> None:
    assert KILL_AFTER_S < CANCEL_AFTER_S < END_S - SLOWEST_START_S
    assert END_S <= 15 - 3


# --- which run --------------------------------------------------------------------------------------------------------


def run_in(base: Path, name: str, training: str, runtime: str, **more: object) -> Path:
    """A run's directory with its record."""
    folder = base / name
    folder.mkdir(parents=True)
    jobs = {"runtime": {"id": runtime}, "training": {"id": training}}
    (folder / "run.json").write_text(json.dumps({"schema": 1, "jobs": jobs, **more}))
    return folder


def test_every_name_of_a_run(slurm: FakeSlurm, tmp_path: Path) -> None:
    base = tmp_path / "base"
    old = run_in(base, "20260101_000000_11", "12", "11")
    new = run_in(base, "20260102_000000_21", "22", "21")
    run_in(base, "20251231_000000_local5.0", "local5.1", "local5.0")
    (base / "20270101_000000_31").mkdir()  # nothing is recorded there
    door = Slurm({"PATH": slurm.path})
    for name in (str(old), old.name, "11", "12"):
        assert find(name, base, door, 1.0).directory == CoordinationDir(old), name
    assert find("latest", base, door, 1.0).directory == CoordinationDir(new)
    assert [job.job_id for job in find("local5.0", base, door, 1.0).jobs()] == ["local5.1", "local5.0"]
    assert all(job.is_local for job in find("local5.1", base, door, 1.0).jobs())
    for name in ("99", "20270101_000000_31", "", "~nobody/x", "/", "nonesuch\n"):
        with pytest.raises(UsageError, match="there is no run"):
            find(name, base, door, 1.0)
    with pytest.raises(UsageError, match="there are no runs below"):
        find("latest", tmp_path / "none", door, 1.0)


def test_all_attempts_and_joining_jobs_are_a_runs(slurm: FakeSlurm, tmp_path: Path) -> None:
    folder = run_in(tmp_path, "20260101_000000_11", "12", "11")
    attempt = {"jobs": {"training": "12", "runtime": "11"}, "successor": {"runtime": "13", "training": "14"}}
    (folder / "attempt_1.json").write_text(json.dumps(attempt))
    (folder / "attempt_2.json").write_text("half of")
    (folder / "run_15.json").write_text(json.dumps({"jobs": {"training": {"id": "15"}}}))
    found = find("15", tmp_path, Slurm({"PATH": slurm.path}), 1.0)
    assert {job.job_id for job in found.jobs()} == {"11", "12", "13", "14", "15"}
    assert found.jobs()[0].kind == "training"


def test_the_first_part_of_a_heterogeneous_job_acts_for_both(slurm: FakeSlurm, tmp_path: Path) -> None:
    folder = run_in(tmp_path, "20260101_000000_11", "11", "12", pairing="het")
    attempt = {"successor": {"training": "13", "runtime": "14"}}
    (folder / "attempt_1.json").write_text(json.dumps(attempt))
    found = find("12", tmp_path, Slurm({"PATH": slurm.path}), 1.0)
    assert found.jobs() == [
        RunJob("training", "11"),
        RunJob("runtime", "12", leader="11"),
        RunJob("training", "13"),
        RunJob("runtime", "14", leader="13"),
    ]


# --- whose a job is ---------------------------------------------------------------------------------------------------


@dataclass
class SlowHand:
    """A Slurm whose every answer takes ``slow_s``; of whose a job is it says, question by question, ``whose``."""

    slow_s: float = 0.0
    whose: dict[str, list[str | None]] = field(default_factory=dict)
    told: dict[str, float] = field(default_factory=dict)
    begin: float = field(default_factory=time.monotonic)

    def statuses(self, jobs: Sequence[Watched], timeout_s: float) -> Mapping[str, JobStatus]:
        time.sleep(self.slow_s)
        over = JobStatus(JobState.ENDED_BADLY, "CANCELLED")
        return {one.job.job_id: over if one.job.job_id in self.told else RUNNING for one in jobs}

    def stranger(self, one: Watched, timeout_s: float) -> str | None:
        time.sleep(self.slow_s)
        answers = self.whose.get(one.job.job_id, [""])
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def do(self, act: Act, jobs: Sequence[Watched], timeout_s: float) -> str | None:
        assert act is Act.TELL
        self.told |= {one.job.job_id: time.monotonic() - self.begin for one in jobs}
        return None


def ended_by(hand: SlowHand, directory: Path, end_s: float) -> dict[str, Watched]:
    """What becomes of the jobs 11 to 14 of a run."""
    folder = run_in(directory, "20260101_000000_11", "12", "11")
    attempt = {"jobs": {"training": "12", "runtime": "11"}, "successor": {"runtime": "13", "training": "14"}}
    (folder / "attempt_1.json").write_text(json.dumps(attempt))
    run = FoundRun("latest", CoordinationDir(folder))
    cancellation = Cancellation([run], {False: hand, True: LocalHand()}, SignalNotes(), time.monotonic(), end_s)
    return {one.job.job_id: one for one in cancellation.carry_out()}


@pytest.mark.parametrize("ahead", [0, 8])
def test_a_slow_controller_is_asked_whose_all_jobs_are_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    monkeypatch.setattr("slurm.lib.cancel.ASKED_AHEAD", ahead)
    hand = SlowHand(slow_s=1.0)
    ended_by(hand, tmp_path, 10.0)
    assert hand.told.keys() == {"11", "12", "13", "14"}
    assert max(hand.told.values()) < 4.0, "one after the other they would take 5 s"


def test_jobs_that_are_sure_do_not_wait_for_what_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm.lib.cancel.WAIT_FOR_UNSURE_S", 0.2)
    hand = SlowHand(whose={"12": [None], "13": [None, None, None, "is of the run X"]})
    jobs = ended_by(hand, tmp_path, 10.0)
    assert hand.told.keys() == {"11", "12", "14"}
    assert hand.told["12"] >= SURE_AFTER_S > max(hand.told["11"], hand.told["14"])
    assert jobs["13"].sentence == "runtime job 13: is of the run X; left alone"
    assert "told to end; ended after" in jobs["12"].sentence


def test_a_job_of_which_it_is_heard_late_is_not_called_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slurm.lib.cancel.SURE_AFTER_S", 0.0)
    hand = SlowHand(whose={job_id: [None] for job_id in ("11", "12", "13", "14")})
    one = Watched(FoundRun("latest", CoordinationDir(tmp_path)), RunJob("training", "12"))
    one.see(RUNNING, 0.0)
    assert one.may_be_ended(0.0)
    one.done.append(Act.TELL)
    one.stranger = "is of the run X"
    assert one.sentence == "training job 12: is of the run X; told to end before Slurm said so"
    assert ended_by(hand, tmp_path, 10.0)["12"].done == [Act.TELL]


def shown(job_id: str, log: Path, name: str) -> dict[str, object]:
    return {"stdout": f"JobId={job_id} JobName={name}\n   JobState=RUNNING\n   StdOut={log}\n"}


def test_whose_a_job_is(slurm: FakeSlurm, tmp_path: Path) -> None:
    mine, other = (run_in(tmp_path, f"20260101_000000_{n}1", f"{n}2", f"{n}1") for n in (1, 2))
    linked = tmp_path / "not-here" / "slurm-12.out"
    unheard = {"code": 1, "stderr": "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"}
    gone = {"code": 1, "stderr": "slurm_load_jobs error: Invalid job id specified"}
    answers = {
        "": [shown("12", mine / "training_12.out", "bert"), shown("12", linked, "skyrl-train"), gone],
        f"is of the run {other}": [shown("22", other / "training_22.out", "skyrl-train")],
        f"is another job, bert, with its log in {linked.parent}": [shown("12", linked, "bert")],
    }
    door, directory = Slurm({"PATH": slurm.path}), CoordinationDir(mine)
    slurm.answer("scontrol", unheard, *[answer for said in answers.values() for answer in said])
    assert stranger("12", directory, door, 5.0) is None
    for expected, said in answers.items():
        for _ in said:
            assert stranger("22" if "of the run" in expected else "12", directory, door, 5.0) == expected
    (mine / "training_12.out").symlink_to(linked)
    slurm.forget()
    slurm.answer("scontrol", shown("12", linked, "bert"), shown("13", linked, "bert"))
    assert stranger("12", directory, door, 5.0) == "", "a job under a name of one's own has linked its log"
    assert stranger("13", directory, door, 5.0)


# --- the command ------------------------------------------------------------------------------------------------------


def cancel(slurm: FakeSlurm, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": slurm.path, "HOME": str(slurm.folder), "SKYRL_JOBS_BASE": str(slurm.jobs)}
    argv = [sys.executable, str(ROOT / "slurm" / "launch.py"), "cancel", *words]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=30, check=False)


def test_a_wrong_command_line_is_a_sentence(slurm: FakeSlurm) -> None:
    for words in ([], ["--force", "latest"]):
        done = cancel(slurm, *words)
        assert done.returncode == 2
        assert "launch.py cancel --help lists the options" in done.stderr
    assert cancel(slurm, "--help").returncode == 0


def test_a_run_of_another_host_is_not_touched(slurm: FakeSlurm) -> None:
    folder = run_in(slurm.jobs, "20260101_000000_local5.0", "local5.1", "local5.0", host="elsewhere")
    done = cancel(slurm, str(folder))
    assert done.returncode == 71
    assert "is a local run on elsewhere" in done.stderr


def test_a_local_run_ends_and_a_foreign_process_with_its_number_does_not(slurm: FakeSlurm) -> None:
    folder = run_in(slurm.jobs, "20260101_000000_local5.0", "local5.1", "local5.0")
    with subprocess.Popen(["sleep", "60"]) as body, subprocess.Popen(["sleep", "60"]) as stranger:
        lines = [f"local5.0 {stranger.pid} 1", f"local5.1 {body.pid} {start_ticks(body.pid)}", "half a line", "x y z"]
        (folder / "local_jobs.txt").write_text("\n".join(lines))
        done = cancel(slurm, "latest")
        assert done.returncode == 0, done.stderr
        assert "training job local5.1: was pid" in done.stdout
        assert "runtime job local5.0: had ended" in done.stdout
        assert body.wait(5) == -15
        assert stranger.poll() is None
        stranger.kill()
