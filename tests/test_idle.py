"""A runtime job whose training waits for GPUs: what it says, when it gives its node back, and what Slurm is asked."""

from __future__ import annotations

import json
import logging
import multiprocessing
import re
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest

from slurm.lib.coordination import CoordinationDir
from slurm.lib.idle import (
    BEFORE_GPUS_S,
    MOST_ABSENT_S,
    Conclusion,
    IdleWatch,
    Step,
    Wait,
    begin_in_s,
    decide,
    holdings,
)
from slurm.lib.job_context import JobContext
from slurm.lib.run_record import partner_of, read_jobs, recorded_with
from slurm.lib.scheduler import JobFacts, JobState, JobStatus
from slurm.lib.settings import Settings
from slurm.lib.signals import Interrupted, SignalNotes
from tests.fake_slurm import FakeSlurm
from tests.test_attempts import INSIDE, TOKEN, body, launched, slurm

__all__ = ["slurm"]  # a fixture

PENDING = JobStatus(JobState.PENDING, "PENDING, Resources")
HELD = JobStatus(JobState.PENDING, "PENDING, JobHeldUser")
BOOTING = JobStatus(JobState.PENDING, "CONFIGURING, on gpu1")
RUNNING = JobStatus(JobState.RUNNING, "RUNNING, on gpu1")
SILENT = JobStatus(JobState.UNKNOWN, "Unable to contact slurm controller")
CANCELLED = JobStatus(JobState.ENDED_BADLY, "CANCELLED")


@pytest.mark.parametrize(
    ("limit", "least", "wait", "step"),
    [
        (0, 0, Wait(PENDING, 1e6, 1e6), Step.GO_ON),
        (60, 0, Wait(PENDING, 59.0), Step.GO_ON),
        (60, 0, Wait(PENDING, 60.0), Step.GIVE_BACK),
        (60, 0, Wait(SILENT, 1e6), Step.GO_ON),
        (60, 0, Wait(RUNNING, 1e6), Step.GO_ON),
        (60, 0, Wait(BOOTING, 1e6), Step.GO_ON),
        (60, 0, Wait(CANCELLED, 1e6), Step.GO_ON),
        (60, 0, Wait(HELD, 1e6), Step.GO_ON),
        (60, 0, Wait(PENDING, 1.0, -5.0), Step.GO_ON),
        (9999, 100, Wait(PENDING, 1.0, 100.0), Step.GO_ON),
        (9999, 100, Wait(PENDING, 1.0, 99.0), Step.GIVE_BACK),
        (9999, 100, Wait(HELD, 1.0, 99.0), Step.END),
        (9999, 100, Wait(SILENT, 1.0, 99.0), Step.GO_ON),
        (0, 100, Wait(PENDING, 1.0, 99.0), Step.END),
        (0, 100, Wait(RUNNING, 1.0, 99.0), Step.GO_ON),
        (0, 100, Wait(PENDING, 1.0, None), Step.GO_ON),
    ],
)
def test_what_is_decided(limit: int, least: int, wait: Wait, step: Step) -> None:
    decision = decide(replace(Settings(), runtime_idle_limit=limit, min_run_time=least), wait)
    assert decision.step is step
    assert bool(decision.reason) is (step is not Step.GO_ON)


def test_when_the_next_runtime_job_begins() -> None:
    assert begin_in_s(None, 1000.0) == 0
    assert begin_in_s(990.0, 1000.0) == 0
    assert begin_in_s(1000.0 + BEFORE_GPUS_S, 1000.0) == 0
    assert begin_in_s(1000.0 + BEFORE_GPUS_S + 7.5, 1000.0) == 7
    assert begin_in_s(1000.0 + 30 * 86400, 1000.0) == MOST_ABSENT_S


def test_what_is_held_is_slurms_word_where_there_is_one() -> None:
    settings = replace(Settings(), cpus_for_runtime=16, runtime_memory="32G")
    assert holdings(settings, {}).startswith("16 CPUs and 32G of memory on ")
    told = {"SLURM_CPUS_ON_NODE": "8", "SLURM_MEM_PER_NODE": "4096"}
    assert holdings(settings, told).startswith("8 CPUs and 4G of memory on ")


# --- when Slurm is asked ---------------------------------------------------------------------------------------------


@dataclass
class Controller:
    """A scheduler under the test's control, and the clock."""

    said: JobStatus = PENDING
    ends_at: float | None = None
    now: float = 0.0
    asked_at: list[float] = field(default_factory=list)

    def status(self, job_id: str, timeout_s: float = 0.0) -> JobStatus:
        assert job_id == "102"
        self.asked_at.append(self.now)
        return self.said

    def cancel(self, job_ids: Sequence[str]) -> str | None:
        raise AssertionError(job_ids)

    def kill_wait_s(self) -> float:
        return 5

    def facts(self, job_id: str, timeout_s: float = 0.0) -> JobFacts:
        assert job_id == "101"
        return JobFacts(None if self.ends_at is None else time.time() + self.ends_at - self.now)


def runtime_of(slurm: FakeSlurm, directory: CoordinationDir) -> JobContext:
    """The first pair's runtime job."""
    more: Mapping[str, str] = INSIDE | {"SLURM_JOB_ID": "101", "SKYRL_COORD_DIR": str(directory.path)}
    return body(slurm, directory, "101", 0, more)


def watch_of(slurm: FakeSlurm, controller: Controller, *overrides: str) -> IdleWatch:
    job = runtime_of(slurm, launched(slurm, "RESTARTS=0", *overrides))
    return IdleWatch(replace(job, scheduler=controller), SignalNotes(), clock=lambda: controller.now)


def run_for(watch: IdleWatch, controller: Controller, seconds: int, heard: bool = False) -> Conclusion | None:
    for _ in range(seconds):
        controller.now += 1
        ending = watch.look(heard)
        if ending:
            return ending
    return None


@pytest.fixture
def text(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr("slurm.lib.logs.log.propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


def test_a_long_wait_is_told_at_growing_intervals(slurm: FakeSlurm, text: pytest.LogCaptureFixture) -> None:
    controller = Controller(replace(PENDING, starts_at=time.time() + 7290), ends_at=43230.0)
    watch = watch_of(slurm, controller)
    assert run_for(watch, controller, 20000) is None
    assert controller.asked_at == [300, 600, 1200, 2400, 4800, 8400, 12000, 15600, 19200]
    words = text.messages[0]
    assert words.startswith(
        "the training job 102 waits for GPUs (PENDING, Resources); Slurm expects it to start in 2 h"
    )
    assert re.search(r"this job holds 32 CPUs and 64G of memory on \S+, ready since \d\d:\d\d:\d\d \(5 min\)", words)
    assert words.endswith("and has 11 h 55 min left of its time limit")
    assert len(text.messages) == len(controller.asked_at)


def test_a_training_that_has_been_heard_of_is_never_asked_about(slurm: FakeSlurm) -> None:
    controller = Controller()
    watch = watch_of(slurm, controller, "RUNTIME_IDLE_LIMIT=400")
    run_for(watch, controller, 350)
    run_for(watch, controller, 1, heard=True)
    assert run_for(watch, controller, 9000) is None
    assert controller.asked_at == [300]


def test_one_that_runs_by_slurms_word_neither(slurm: FakeSlurm) -> None:
    controller = Controller(RUNNING)
    assert run_for(watch_of(slurm, controller, "RUNTIME_IDLE_LIMIT=400"), controller, 9000) is None
    assert controller.asked_at == [300]


def test_silence_gives_nothing_back_and_is_asked_about_once_a_minute(slurm: FakeSlurm) -> None:
    controller = Controller(SILENT)
    watch = watch_of(slurm, controller, "RUNTIME_IDLE_LIMIT=5")
    before = len(slurm.calls)
    assert run_for(watch, controller, 600) is None
    assert controller.asked_at == list(range(5, 601, 60))
    assert len(slurm.calls) == before


def test_a_held_training_is_not_queued_again_where_it_would_be_free(slurm: FakeSlurm) -> None:
    controller = Controller(HELD)
    before = len(slurm.calls)
    watch = watch_of(slurm, controller, "RUNTIME_IDLE_LIMIT=5")
    before = len(slurm.calls)
    assert run_for(watch, controller, 9000) is None
    assert len(slurm.calls) == before
    assert len(controller.asked_at) < 20


def test_too_little_time_ends_a_job_that_may_not_give_back(slurm: FakeSlurm) -> None:
    controller = Controller(ends_at=1000.0)
    ending = run_for(watch_of(slurm, controller, "MIN_RUN_TIME=400"), controller, 700)
    assert ending is not None
    assert (ending.exit_code, ending.goes_on) == (75, False)
    assert "less than MIN_RUN_TIME=400 s: the training could not begin any more" in ending.reason
    assert 600 <= controller.asked_at[-1] <= 605
    assert len(controller.asked_at) <= 3


def test_an_administrator_may_have_given_more_time(slurm: FakeSlurm) -> None:
    controller = Controller(ends_at=1000.0)
    watch = watch_of(slurm, controller, "MIN_RUN_TIME=400")
    controller.ends_at = 5000.0
    assert run_for(watch, controller, 4000) is None
    assert run_for(watch, controller, 700) is not None


def test_no_other_runtime_is_idle(slurm: FakeSlurm) -> None:
    """One that was launched alone waits for trainings that join it, however long that takes."""
    controller = Controller()
    watch = watch_of(slurm, controller, "RUNTIME_IDLE_LIMIT=5")
    record = json.loads(watch.job.directory.run_record.read_text())
    training = record["jobs"].pop("training")
    watch.job.directory.run_record.write_text(json.dumps(record))
    (watch.job.directory.path / "run_102.json").write_text(json.dumps({"jobs": {"training": training}}))
    assert partner_of(watch.job.directory, "runtime", "101") == "102"
    assert recorded_with(watch.job.directory, "runtime", "101") is None
    assert run_for(watch, controller, 600) is None
    assert not controller.asked_at


@dataclass
class Silence(Controller):
    """A controller that answers nothing for a time: ``question`` is the one that waits."""

    question: str = ""

    def status(self, job_id: str, timeout_s: float = 0.0) -> JobStatus:
        self._wait("status")
        return super().status(job_id)

    def facts(self, job_id: str, timeout_s: float = 0.0) -> JobFacts:
        self._wait("facts")
        return super().facts(job_id)

    def _wait(self, question: str) -> None:
        if question == self.question:
            time.sleep(3)


@pytest.mark.parametrize("question", ["status", "facts"])
def test_a_signal_ends_the_wait_for_a_silent_slurm(slurm: FakeSlurm, question: str) -> None:
    controller = Silence(question=question)
    watch = watch_of(slurm, controller, "RUNTIME_IDLE_LIMIT=5")
    threading.Timer(0.3, watch.notes.note, (signal.SIGTERM,)).start()
    begin = time.monotonic()
    with pytest.raises(Interrupted):
        run_for(watch, controller, 6)
    assert time.monotonic() - begin < 1.5


def test_and_before_the_watch_begins(slurm: FakeSlurm) -> None:
    job = runtime_of(slurm, launched(slurm, "RESTARTS=0", "MIN_RUN_TIME=400"))
    notes = SignalNotes()
    notes.note(signal.SIGTERM)
    begin = time.monotonic()
    with pytest.raises(Interrupted):
        IdleWatch(replace(job, scheduler=Silence(question="facts")), notes)
    assert time.monotonic() - begin < 1.5


# --- giving back -----------------------------------------------------------------------------------------------------

IN_QUEUE = {"stdout": "PENDING|Resources||\n"}
OUT = {"stdout": "CANCELLED|Resources||\n"}


def given_back(slurm: FakeSlurm, job: JobContext, notes: SignalNotes | None = None) -> Conclusion | None:
    """What becomes of the runtime job at its idle limit."""
    before = time.monotonic()
    watch = IdleWatch(job, notes or SignalNotes(), clock=lambda: before + 1e6 * (len(slurm.of("squeue")) + 1))
    watch._try_at = before
    return watch.look(heard=False)


def idle(slurm: FakeSlurm, *overrides: str) -> JobContext:
    return runtime_of(slurm, launched(slurm, "RUNTIME_IDLE_LIMIT=5", *overrides))


def test_in_this_order(slurm: FakeSlurm) -> None:
    job = idle(slurm, "RESTARTS=0")
    before = len(slurm.calls)
    silent, ending_yet = {"code": 1, "stderr": "Unable to contact"}, {"stdout": "COMPLETING|None|gpu1|\n"}
    slurm.answer("squeue", IN_QUEUE, IN_QUEUE, silent, ending_yet, OUT)
    ending = given_back(slurm, job)
    assert ending is not None
    assert (ending.exit_code, ending.goes_on) == (0, True)
    assert "(PENDING, Resources), and RUNTIME_IDLE_LIMIT=5 s allows no more" in ending.reason
    assert ending.reason.endswith("the run is queued again as the jobs 103, 104")
    ours = [" ".join(call.words[:2]) for call in slurm.calls[before:] if call.name != "squeue"]
    assert ours[0] == "scontrol show"
    assert [words.split()[0] for words in ours[1:]] == ["sbatch", "sbatch", "scontrol", "scancel", "scontrol"]
    assert slurm.of("scancel")[0].argv == ["--state=PENDING", "102"]
    assert slurm.of("scontrol")[-1].argv == ["release", "103"]
    names = [call.name for call in slurm.calls[before:]]
    assert names[-5:] == ["scancel", "squeue", "squeue", "squeue", "scontrol"], "only on Slurm's last word"
    recorded = slurm.of("scancel")[0].modes
    assert f"{job.directory.path.name}/run_103.json" in recorded, "before anything is cancelled"


@pytest.mark.parametrize(
    ("overrides", "more", "attempt"),
    [
        (["RESTARTS=0"], {}, {}),
        (["RESTARTS=2"], {}, {"SKYRL_ATTEMPT": "1"}),
        (
            ["RESTARTS=2"],
            {"SKYRL_ATTEMPT": "2", "SKYRL_AFTER_JOB_ID": "90"},
            {"SKYRL_ATTEMPT": "2", "SKYRL_AFTER_JOB_ID": "90"},
        ),
    ],
)
def test_the_same_attempt_is_queued_again(
    slurm: FakeSlurm, overrides: list[str], more: Mapping[str, str], attempt: Mapping[str, str]
) -> None:
    job = idle(slurm, *overrides)
    job = replace(job, environment={**job.environment, **more})
    slurm.answer("squeue", IN_QUEUE, IN_QUEUE, OUT)
    assert given_back(slurm, job)
    before_runtime, before_training, runtime, training = slurm.of("sbatch")
    assert {"--hold", "--dependency=afterany:101"} <= set(runtime.argv)
    assert not [word for word in runtime.argv if word.startswith("--begin")], "Slurm gave no time"
    assert {"--dependency=after:103", "--kill-on-invalid-dep=yes"} <= set(training.argv)
    run = str(job.directory.path)
    for call, before in ((runtime, before_runtime), (training, before_training)):
        assert call.argv[-1].startswith(f"{run}/code/slurm/jobs/")
        mine = dict(call.environment)
        assert {name: mine.pop(name) for name in ("SKYRL_ATTEMPT", "SKYRL_AFTER_JOB_ID") if name in mine} == attempt
        assert mine.pop("SLURM_CONF") == INSIDE["SLURM_CONF"]
        theirs = {**before.environment, "SKYRL_COORD_DIR": run, "SKYRL_CODE_DIR": f"{run}/code"}
        assert mine.pop("SKYRL_RUNTIME_JOB_ID", "103") == "103"
        assert mine == {k: v for k, v in theirs.items() if k not in {"SKYRL_ATTEMPT", "SKYRL_RUNTIME_JOB_ID"}}


def test_what_the_directory_says_then(slurm: FakeSlurm) -> None:
    job = idle(slurm)
    slurm.answer("squeue", IN_QUEUE, IN_QUEUE, OUT)
    before = {path.name for path in job.directory.path.iterdir()}
    assert given_back(slurm, job)
    assert {path.name for path in job.directory.path.iterdir()} - before == {"run_103.json"}
    assert read_jobs(job.directory) == {"runtime": "103", "training": "104"}
    assert recorded_with(job.directory, "runtime", "103") == "104"
    assert recorded_with(job.directory, "runtime", "101") == "102", "what the old job withdraws is its own training"
    for call in (*slurm.of("sbatch"), *slurm.of("scancel"), slurm.of("scontrol")[-1]):
        assert TOKEN not in json.dumps([call.argv, call.environment])


def test_it_comes_back_shortly_before_the_gpus(slurm: FakeSlurm) -> None:
    job = idle(slurm)
    starts = int(time.time()) + 2600
    slurm.answer("squeue", {"stdout": f"PENDING|Priority||{starts}\n"}, IN_QUEUE, OUT)
    assert given_back(slurm, job)
    begin = [word for word in slurm.of("sbatch")[2].argv if word.startswith("--begin=")]
    found = re.fullmatch(r"--begin=now\+(\d+)", begin[0])
    assert found
    assert 1980 <= int(found[1]) <= 2000
    assert not [word for word in slurm.of("sbatch")[3].argv if word.startswith("--begin=")]


@pytest.mark.parametrize(
    "answers",
    [
        [IN_QUEUE, {"stdout": "RUNNING|None|gpu1|\n"}],
        [IN_QUEUE, IN_QUEUE, {"stdout": "COMPLETING|None|gpu1|\n"}, {"stdout": "RUNNING|None|gpu1|\n"}],
        [IN_QUEUE, {"stdout": "CONFIGURING|None|gpu1|\n"}],
        [IN_QUEUE, {"stdout": "CANCELLED|None||\n"}],
        [IN_QUEUE, IN_QUEUE, {"stdout": "FAILED|NonZeroExitCode|gpu1|\n"}],
        [IN_QUEUE, {"code": 1, "stderr": "Unable to contact slurm controller"}],
    ],
    ids=["started", "started as it was cancelled", "its nodes boot", "cancelled by a person", "failed", "silent"],
)
def test_a_training_that_does_not_wait_keeps_its_runtime(slurm: FakeSlurm, answers: list[dict[str, object]]) -> None:
    job = idle(slurm)
    slurm.answer("squeue", *answers)
    before = {path.name for path in job.directory.path.iterdir()}
    assert given_back(slurm, job) is None
    assert [call.argv for call in slurm.of("scancel")[-2:]] == [["104"], ["103"]]
    assert not [call for call in slurm.of("scontrol") if call.argv == ["release", "103"]]
    assert {path.name for path in job.directory.path.iterdir()} == before


def test_a_refusal_is_told_once_and_tried_again_later(slurm: FakeSlurm, text: pytest.LogCaptureFixture) -> None:
    refusal = {"code": 1, "stdout": "", "stderr": "sbatch: error: Access/permission denied"}
    slurm.answer("sbatch", {}, {}, *[refusal] * 20)
    slurm.answer("squeue", *[IN_QUEUE] * 100)
    now = [0.0]
    watch = IdleWatch(idle(slurm), SignalNotes(), clock=lambda: now[0])
    tried = []
    while now[0] < 4000:
        count = len(slurm.of("sbatch"))
        assert watch.look(heard=False) is None
        tried += [now[0]] if len(slurm.of("sbatch")) > count else []
        now[0] = max(now[0] + 1, watch._next_question())
    assert tried == [5, 65, 185, 425, 905, 1865, 3785]
    warnings = [record.message for record in text.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "keeps its node: Slurm did not take the job: sbatch: error: Access/permission denied" in warnings[0]
    assert "trying again in 1 min" in warnings[0]


def test_a_refusal_when_it_is_too_late_is_the_end(slurm: FakeSlurm) -> None:
    job = idle(slurm, "MIN_RUN_TIME=400")
    slurm.answer("sbatch", {}, {}, {"code": 1, "stdout": "", "stderr": "sbatch: error: no"})
    slurm.answer("squeue", IN_QUEUE)
    end = f"JobState=RUNNING StartTime=1 EndTime={int(time.time()) + 300} TimeLimit=01:00:00\n"
    slurm.answer("scontrol", {}, {}, {"stdout": end}, {"stdout": end})
    ending = given_back(slurm, job)
    assert ending is not None
    assert (ending.exit_code, ending.goes_on) == (75, False)
    assert "it could not be queued again: Slurm did not take the job: sbatch: error: no" in ending.reason


def test_a_pair_that_cannot_be_released_stays_held(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old training is out of the queue by then: taking the new pair out too would lose the run."""
    monkeypatch.setattr("slurm.lib.idle.RELEASE_PAUSES_S", (0.0, 0.0))
    job = idle(slurm)
    slurm.answer("squeue", IN_QUEUE, IN_QUEUE, OUT)
    no = {"code": 1, "stderr": "slurm_update error: Unable to contact slurm controller"}
    slurm.answer("scontrol", {}, {}, {}, {}, no, no)
    ending = given_back(slurm, job)
    assert ending is not None
    assert (ending.exit_code, ending.goes_on) == (73, False)
    assert "as the jobs 103, 104, which are held" in ending.reason
    assert ending.reason.endswith("scontrol release 103")
    assert [call.argv for call in slurm.of("scancel")] == [["--state=PENDING", "102"]]


def test_a_silence_after_the_cancellation_keeps_the_new_pair(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm.lib.idle.CERTAIN_WITHIN_S", 0.0)
    job = idle(slurm)
    slurm.answer("squeue", IN_QUEUE, IN_QUEUE, *[{"code": 1, "stderr": "Unable to contact slurm controller"}] * 9)
    ending = given_back(slurm, job)
    assert ending is not None
    assert (ending.exit_code, ending.goes_on) == (73, False)
    assert "which are held (waited 0 s for Slurm to say what became of the training job 102" in ending.reason
    assert [call.argv for call in slurm.of("scancel")] == [["--state=PENDING", "102"]], "the new pair stays"


NO_ANSWER = {
    "code": 1,
    "stderr": "scancel: error: Kill job error on job id 102: Socket timed out on send/recv operation",
}


@pytest.mark.parametrize(
    ("later", "said"),
    [([OUT], 1), ([IN_QUEUE, OUT], 2), ([{"code": 1, "stderr": "Unable to contact"}, IN_QUEUE, IN_QUEUE, OUT], 3)],
    ids=["carried out", "said again", "said until it is carried out"],
)
def test_a_cancellation_without_an_answer_is_no_refusal(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, later: list[dict[str, object]], said: int
) -> None:
    """Slurm may carry it out when the new pair has been taken back, and then nothing is queued."""
    monkeypatch.setattr("slurm.lib.idle._growing", lambda waited_s: 0.0)
    job = idle(slurm)
    slurm.answer("scancel", NO_ANSWER)
    slurm.answer("squeue", IN_QUEUE, IN_QUEUE, *later)
    ending = given_back(slurm, job)
    assert ending is not None
    assert (ending.exit_code, ending.goes_on) == (0, True)
    assert [call.argv for call in slurm.of("scancel")] == [["--state=PENDING", "102"]] * said
    assert slurm.of("scontrol")[-1].argv == ["release", "103"]


def test_one_that_is_not_heard_of_again_keeps_the_new_pair(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm.lib.idle.CERTAIN_WITHIN_S", 0.0)
    job = idle(slurm)
    slurm.answer("scancel", NO_ANSWER)
    slurm.answer("squeue", IN_QUEUE, IN_QUEUE, *[{"code": 1, "stderr": "Unable to contact slurm controller"}] * 9)
    ending = given_back(slurm, job)
    assert ending is not None
    assert (ending.exit_code, ending.goes_on) == (73, False)
    assert "the jobs 103, 104, which are held" in ending.reason


def test_a_cancellation_that_slurm_refuses_keeps_the_old_pair(slurm: FakeSlurm) -> None:
    job = idle(slurm)
    slurm.answer("scancel", {"code": 1, "stderr": "scancel: error: Kill job error on job id 102: Access denied"})
    slurm.answer("squeue", *[IN_QUEUE] * 9)
    assert given_back(slurm, job) is None
    assert [call.argv for call in slurm.of("scancel")[-2:]] == [["104"], ["103"]]


def test_where_a_job_may_be_left_it_is_said_and_not_tried_again(
    slurm: FakeSlurm, text: pytest.LogCaptureFixture
) -> None:
    refusal = {"code": 1, "stderr": "sbatch: error: no"}
    slurm.answer("sbatch", {}, {}, {}, refusal)  # the new runtime job is taken, its training is not
    slurm.answer("scancel", {"code": 1, "stderr": "Unable to contact slurm controller"})
    slurm.answer("squeue", *[IN_QUEUE] * 100)
    now = [0.0]
    watch = IdleWatch(idle(slurm), SignalNotes(), clock=lambda: now[0])
    while now[0] < 4000:
        assert watch.look(heard=False) is None
        now[0] = max(now[0] + 1, watch._next_question())
    assert len(slurm.of("sbatch")) == 4
    (warning,) = (record.message for record in text.records if record.levelno == logging.WARNING)
    assert "could not cancel 103 (Unable to contact slurm controller): cancel by hand with scancel" in warning
    assert "trying again" not in warning


def test_one_more_attempt_releases_it(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm.lib.idle.RELEASE_PAUSES_S", (0.0, 0.0))
    job = idle(slurm)
    slurm.answer("squeue", IN_QUEUE, IN_QUEUE, OUT)
    slurm.answer("scontrol", {}, {}, {}, {}, {"code": 1, "stderr": "busy"}, {})
    ending = given_back(slurm, job)
    assert ending is not None
    assert ending.goes_on


def test_who_ends_the_runtime_job_meanwhile_ends_the_run(slurm: FakeSlurm) -> None:
    job = idle(slurm)
    notes = SignalNotes()
    slurm.answer("squeue", IN_QUEUE, IN_QUEUE, OUT)
    look = notes.check

    def check() -> None:
        look()
        if len(slurm.of("sbatch")) == 4:  # the signal comes after the last look at it before the swap
            notes.note(signal.SIGTERM)

    notes.check = check  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        given_back(slurm, job, notes)
    assert [call.argv for call in slurm.of("scancel")[-2:]] == [["104"], ["103"]]


@pytest.mark.parametrize(
    ("command", "answers"),
    [
        ("sbatch", [{}, {}, {}, {"signal": 9}]),
        ("scancel", [{"signal": 9}]),
        ("squeue", [IN_QUEUE, IN_QUEUE, {**OUT, "signal": 9}]),
    ],
)
def test_a_body_that_is_killed_leaves_at_worst_a_held_pair(
    slurm: FakeSlurm, command: str, answers: list[dict[str, object]]
) -> None:
    job = idle(slurm)
    slurm.answer("squeue", IN_QUEUE, IN_QUEUE, OUT)
    slurm.answer(command, *answers)
    child = multiprocessing.get_context("fork").Process(target=given_back, args=(slurm, job))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert ["release", "103"] not in [call.argv for call in slurm.of("scontrol")]
    runtime, training = slurm.of("sbatch")[2:4]
    assert "--hold" in runtime.argv
    assert "--dependency=after:103" in training.argv
