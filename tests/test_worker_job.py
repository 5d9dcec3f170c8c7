"""A worker by itself: who it is, what ends it, and that nobody takes its end for the run's."""

from __future__ import annotations

from pathlib import Path

import pytest

from slurm.lib.coordination import CoordinationDir, Flag
from slurm.lib.job_context import JobContext, own_job_id, tell_partner
from slurm.lib.plan import WORKER_STEP
from slurm.lib.scheduler import JobState
from slurm.lib.settings import Settings
from slurm.lib.signals import SignalNotes
from slurm.lib.supervisor import Outcome, RuntimeGone, Stop, Supervisor, TellTraining, TrainingComplete, Withdraw
from slurm.lib.worker_job import RuntimeWatcher, WorkerJob, node_name, number_of, runtime_of
from tests.test_partner import FakeScheduler

ROOT = Path(__file__).resolve().parent.parent
IN_ARRAY = {"SLURM_JOB_ID": "126", "SLURM_ARRAY_JOB_ID": "124", "SLURM_ARRAY_TASK_ID": "2", "SLURMD_NODENAME": "cpu-b"}
IN_STEP = {"SLURM_JOB_ID": "123", "SKYRL_JOB_ID": "123_1", WORKER_STEP: "123", "SLURMD_NODENAME": "cpu-b"}


def worker(folder: Path, environment: dict[str, str]) -> JobContext:
    job_id = own_job_id(environment, "worker")
    return JobContext(job_id, CoordinationDir(folder), Settings(), environment, FakeScheduler(), ROOT, own_dir=True)


def test_a_task_and_a_step_have_names_that_no_other_node_has(tmp_path: Path) -> None:
    task, step = worker(tmp_path, IN_ARRAY), worker(tmp_path, IN_STEP)
    assert (task.job_id, number_of(task), node_name(task)) == ("124_2", 2, "cpu-b.124_2"), "of two on one host"
    assert (step.job_id, number_of(step), node_name(step)) == ("123_1", 1, "cpu-b")
    assert own_job_id(IN_ARRAY, "runtime") == "126"


def test_what_the_flags_of_its_own_run_say(tmp_path: Path) -> None:
    job = worker(tmp_path, IN_ARRAY)
    watcher = RuntimeWatcher(job, "123")
    assert watcher.flags() is None
    job.directory.publish(job.directory.training_complete, Flag("90", "80", exit_code=0))
    job.directory.publish(job.directory.runtime_failed, Flag("80", "80", reason="of another attempt"))
    assert watcher.flags() is None
    job.directory.publish(job.directory.runtime_failed, Flag("123", "123", reason="ended by SIGTERM"))
    assert watcher.flags() == RuntimeGone("the runtime job 123 has ended: ended by SIGTERM", as_planned=False)
    complete = Flag("125", "123", exit_code=0)
    job.directory.publish(job.directory.training_complete, complete)
    assert watcher.flags() == TrainingComplete(complete)


@pytest.mark.parametrize(("state", "as_planned"), [(JobState.ENDED_WELL, True), (JobState.ENDED_BADLY, False)])
def test_slurms_word_about_the_runtime_job(tmp_path: Path, state: JobState, as_planned: bool) -> None:
    job = worker(tmp_path, IN_ARRAY)
    watcher = RuntimeWatcher(job, "123")
    watcher.partner.flag_late_s = 0.0
    assert isinstance(job.scheduler, FakeScheduler)
    assert watcher.gone() is None
    watcher.partner.clock = lambda: 1e6
    job.scheduler.state = state
    gone = watcher.gone()
    assert isinstance(gone, RuntimeGone)
    assert gone.as_planned is as_planned


def test_a_workers_end_is_told_to_nobody(tmp_path: Path) -> None:
    job = worker(tmp_path, IN_ARRAY)
    body = WorkerJob(job, SignalNotes(), Supervisor(), runtime_job_id="123")
    outcome = Outcome(71, "no Podman on cpu-b")
    for action in (Stop(outcome), TellTraining(outcome), Withdraw(outcome)):
        body.do(action)
    tell_partner("worker", str(tmp_path), IN_ARRAY, "no Podman on cpu-b", 71)
    assert list(tmp_path.iterdir()) == []


def test_one_that_nobody_launched_joins_the_head_that_answers(tmp_path: Path) -> None:
    """The next attempt's runtime job is recorded long before it begins."""
    job = worker(tmp_path, IN_ARRAY)
    (tmp_path / "run.json").write_text('{"jobs": {"runtime": {"id": "123"}}}')
    (tmp_path / "run_130.json").write_text('{"jobs": {"runtime": {"id": "130"}}}')
    assert runtime_of(job) == "130"
    job.directory.publish_head("http://cpu-a:1", "key", Flag("123", "123"))
    assert runtime_of(job) == "123"
