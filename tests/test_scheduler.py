"""Slurm's words and ours, on literal answers; the fake commands are executables on PATH."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from slurm.lib.errors import SubmissionError
from slurm.lib.processes import Completed, start_ticks
from slurm.lib.scheduler import (
    SLURM_STATES,
    JobFacts,
    JobState,
    LocalJobs,
    Slurm,
    parse_job_id,
    parse_status,
)


def answer(stdout: str = "", stderr: str = "", code: int = 0) -> Completed:
    return Completed(("squeue",), code, stdout, stderr)


@pytest.mark.parametrize(
    ("given", "state", "words"),
    [
        (answer("RUNNING|None|cpu1\n"), JobState.RUNNING, "RUNNING, on cpu1"),
        (answer("PENDING|Resources|\n"), JobState.PENDING, "PENDING, Resources"),
        (answer("COMPLETING|None|cpu1\n"), JobState.RUNNING, "COMPLETING, on cpu1"),
        (answer("COMPLETED|None|cpu1\n"), JobState.ENDED_WELL, "COMPLETED, on cpu1"),
        (answer("OUT_OF_MEMORY|OutOfMemory|cpu1\n"), JobState.ENDED_BADLY, "OUT_OF_MEMORY, OutOfMemory, on cpu1"),
        (answer("A_NEW_WORD|None|\n"), JobState.UNKNOWN, "A_NEW_WORD"),
        (answer("", "slurm_load_jobs error: Invalid job id specified", 1), JobState.PURGED, "no job of this number"),
        (answer("", "Unable to contact slurm controller", 1), JobState.UNKNOWN, "Unable to contact slurm controller"),
    ],
)
def test_status(given: Completed, state: JobState, words: str) -> None:
    status = parse_status(given)
    assert status.state is state
    assert status.words.startswith(words)


def test_only_an_end_is_final() -> None:
    finals = {state for state in JobState if state.is_final}
    assert finals == {JobState.ENDED_WELL, JobState.ENDED_BADLY, JobState.PURGED}
    assert all(SLURM_STATES[word].is_final for word in ("NODE_FAIL", "TIMEOUT", "PREEMPTED", "CANCELLED"))


@pytest.mark.parametrize(
    ("stdout", "expected"),
    [
        ("12\n", "12"),
        ("12;cluster\n", "12"),
        ("site banner\n12\n", "12"),
        ("Submitted batch job 12\n", None),
        ("", None),
    ],
)
def test_job_id(stdout: str, expected: str | None) -> None:
    assert parse_job_id(answer(stdout)) == expected


def fake(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm({"PATH": f"{tmp_path}:{os.environ['PATH']}"})


def path_of(slurm: Slurm) -> Path:
    assert slurm.environment
    return Path(slurm.environment["PATH"].split(":")[0])


def test_a_refused_submission_says_slurms_words(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{path_of(slurm)}:{os.environ['PATH']}")
    fake(path_of(slurm), "sbatch", "echo 'sbatch: error: invalid partition specified: gpuu' >&2; exit 1")
    with pytest.raises(SubmissionError, match="invalid partition specified: gpuu"):
        slurm.submit(["sbatch", "x"])


def test_a_silent_controller_is_unknown(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{path_of(slurm)}:{os.environ['PATH']}")
    fake(path_of(slurm), "squeue", "exit 1")
    assert slurm.status("1").state is JobState.UNKNOWN
    monkeypatch.setenv("PATH", "/nowhere")
    assert slurm.status("1").state is JobState.UNKNOWN


def test_kill_wait(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{path_of(slurm)}:{os.environ['PATH']}")
    fake(path_of(slurm), "scontrol", "echo 'KillOnBadExit = 0'; echo 'KillWait                = 5 sec'")
    assert slurm.kill_wait_s() == 5
    fake(path_of(slurm), "scontrol", "exit 1")
    assert slurm.kill_wait_s() == 30


def test_local_jobs_are_known_by_pid_and_start_time(tmp_path: Path) -> None:
    record = tmp_path / "local_jobs.txt"
    ticks = start_ticks(os.getpid())
    record.write_text(f"a {os.getpid()} {ticks}\nb {os.getpid()} 1\n")
    jobs = LocalJobs(record)
    assert jobs.status("a").state is JobState.RUNNING
    assert jobs.status("b").state is JobState.ENDED_BADLY, "another process of the same number"
    assert jobs.status("c").state is JobState.UNKNOWN


@pytest.mark.parametrize("line", ["a", "a x y", "a 1 2 3", "a -1 2", "\x00", "a 1"])
def test_a_record_of_local_jobs_that_is_none_says_nothing(tmp_path: Path, line: str) -> None:
    record = tmp_path / "local_jobs.txt"
    record.write_bytes(line.encode() + b"\n\xff\n")
    assert LocalJobs(record).status("a").state is JobState.UNKNOWN
    record.write_bytes(line.encode() + f"\na {os.getpid()} {start_ticks(os.getpid())}\n".encode())
    assert LocalJobs(record).status("a").state is JobState.RUNNING


@pytest.mark.parametrize("lead", [-300, 0, 300])
def test_times_are_told_by_this_hosts_clock(slurm: Slurm, monkeypatch: pytest.MonkeyPatch, lead: int) -> None:
    """The controller's clock is ``lead`` seconds ahead; a job has 1,000 s left."""
    monkeypatch.setenv("PATH", f"{path_of(slurm)}:{os.environ['PATH']}")
    theirs = int(time.time()) + lead
    job = f"JobId=8 JobState=RUNNING TimeLimit=00:20:00 StartTime={theirs - 200} EndTime={theirs + 1000}"
    config = f"Configuration data as of {theirs}\nKillWait = 5 sec"
    fake(path_of(slurm), "scontrol", f'case $2 in job) echo "{job}";; config) echo "{config}";; esac')
    fake(path_of(slurm), "squeue", f'echo "PENDING|Priority||{theirs + 500}|8"')
    ends_at, starts_at = slurm.facts("8").ends_at, slurm.status("8").starts_at
    assert ends_at is not None
    assert starts_at is not None
    assert abs(ends_at - time.time() - 1000) < 3
    assert abs(starts_at - time.time() - 500) < 3


def test_a_time_of_a_clock_that_is_not_known_is_none(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{path_of(slurm)}:{os.environ['PATH']}")
    job = "JobId=8 JobState=RUNNING TimeLimit=00:20:00 StartTime=100 EndTime=1300 PreemptTime=900"
    fake(path_of(slurm), "scontrol", f'[ $2 = job ] && echo "{job}"')
    assert slurm.facts("8") == JobFacts(None, preempted=True)


def test_a_persons_filters_for_squeue_hide_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, "squeue", '[ -z "$SQUEUE_PARTITION" ] && echo "RUNNING|None|cpu1"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SQUEUE_PARTITION", "gpu_test")
    assert Slurm().status("1").state is JobState.RUNNING


def test_an_sbatch_without_an_answer_may_have_queued_the_job(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{path_of(slurm)}:{os.environ['PATH']}")
    monkeypatch.setattr("slurm.lib.scheduler.SUBMIT_TIMEOUT_S", 0.1)
    fake(path_of(slurm), "sbatch", "sleep 5")
    with pytest.raises(SubmissionError, match="may have been queued all the same"):
        slurm.submit(["sbatch", "x"])


def test_an_sbatch_that_is_killed_may_have_queued_the_job(slurm: Slurm) -> None:
    fake(path_of(slurm), "sbatch", "kill -9 $$")
    with pytest.raises(SubmissionError, match="it may have been queued all the same") as caught:
        slurm.submit(["sbatch"])
    assert caught.value.leaves_jobs


@pytest.mark.parametrize(
    ("comment", "noted"),
    [("skyrl:host/boot/1/2/3/0", True), ("(null)", True), ("", True), ("project 7", False), ("(null) 7", False)],
)
def test_a_note_takes_the_place_of_our_mark_and_of_no_persons_comment(
    slurm: Slurm, monkeypatch: pytest.MonkeyPatch, comment: str, noted: bool
) -> None:
    folder = path_of(slurm)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    fake(folder, "squeue", f"echo '{comment}'")
    fake(folder, "scontrol", f'echo "$@" > {folder}/said')
    slurm.note("8", "skyrl: no room")
    assert (folder / "said").exists() == noted
    if noted:
        assert (folder / "said").read_text() == "update JobId=8 Comment=skyrl: no room\n"
