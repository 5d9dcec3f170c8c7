"""The attempts at one training: what one leaves for the next, what Slurm is asked, and which of them begin."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

import pytest

from slurm.lib.attempts import STDERR_TAIL, Chain, checkpoint_at_start, checkpoints_of, refused, why_ended
from slurm.lib.checkpoints import TRACKER
from slurm.lib.config import load_config
from slurm.lib.coordination import CoordinationDir, Flag
from slurm.lib.git import GitState
from slurm.lib.job_context import JobContext
from slurm.lib.job_environment import without_slurm
from slurm.lib.launch_mark import PREFIX
from slurm.lib.plan import Request, make_plan
from slurm.lib.processes import descendants
from slurm.lib.restarts import Cause, Ended
from slurm.lib.run_record import Provenance, partner_of, read_jobs
from slurm.lib.scheduler import Slurm
from slurm.lib.settings import Settings
from slurm.lib.signals import Interrupted, SignalNotes
from slurm.lib.submission import submit
from slurm.lib.unheard import Insistence, submitted
from tests.fake_slurm import FakeSlurm

ROOT = Path(__file__).resolve().parent.parent
NOW = datetime(2026, 3, 4, 5, 6, 7)
TOKEN = "wandb-token-of-somebody"


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path / "fake")


def launched(slurm: FakeSlurm, *overrides: str) -> CoordinationDir:
    """The directory of a run with the jobs 101 and 102."""
    seen = {"PATH": slurm.path, "HOME": str(slurm.folder), "WANDB_API_KEY": TOKEN}
    words = [f"SKYRL_JOBS_BASE={slurm.jobs}", "TRAINING_COMMAND=true", "CHECKPOINT_DIR=", "RESTARTS=2", *overrides]
    config = load_config("dev", words, without_slurm(seen), ROOT / "slurm" / "config", NOW, ROOT.parent)
    done = submit(make_plan(config, Request(), seen, ROOT, sys.executable, NOW), SignalNotes(), git, ROOT)
    return done.directory


def git() -> Provenance:
    return Provenance(GitState("c0ffee", False))


def body(slurm: FakeSlurm, directory: CoordinationDir, job_id: str, which: int, more: Mapping[str, str]) -> JobContext:
    """The context of a job as its body has it, in the environment that the ``which``th sbatch gave it."""
    given = slurm.of("sbatch")[which].environment
    secrets = json.loads(directory.secrets.read_text())
    settings = load_config(None, [], given, ROOT / "slurm" / "config", NOW, ROOT.parent).settings
    # The fake commands record the environment that they get, and Python adds this to its own.
    environment = {name: value for name, value in {**given, **more, **secrets}.items() if name != "LC_CTYPE"}
    return JobContext(job_id, directory, settings, environment, Slurm(environment), directory.code, own_dir=True)


INSIDE = {"SLURM_JOB_ID": "102", "SLURM_CPUS_PER_TASK": "3", "CUDA_VISIBLE_DEVICES": "0", "SLURM_CONF": "/x/slurm.conf"}


def first(slurm: FakeSlurm, directory: CoordinationDir) -> JobContext:
    """The first attempt's training job."""
    return body(slurm, directory, "102", 1, INSIDE | {"SKYRL_COORD_DIR": str(directory.path)})


def begun(slurm: FakeSlurm, *overrides: str) -> tuple[JobContext, Chain]:
    job = first(slurm, launched(slurm, *overrides))
    chain = Chain(job)
    chain.begin("101", SignalNotes().check)
    return job, chain


def save(directory: CoordinationDir, step: int) -> None:
    path = directory.checkpoints / "skyrl" / TRACKER
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(step))


@pytest.mark.parametrize(
    ("before", "after", "cause"),
    [(5 * STDERR_TAIL, 0, Cause.TIME_LIMIT), (0, 5 * STDERR_TAIL, Cause.PERSON)],
)
def test_slurms_last_words_are_read_at_the_end_of_a_long_stderr(
    slurm: FakeSlurm, before: int, after: int, cause: Cause
) -> None:
    """The trainer may have written gigabytes there, all of which a job about to be killed has no time to read."""
    job = first(slurm, launched(slurm))
    words = "slurmstepd: error: *** JOB 102 ON gpu-1 CANCELLED AT 2026-03-04T05:06:07 DUE TO TIME LIMIT ***\n"
    job.directory.log("training", "102", "err").write_text("x" * before + "\n" + words + "x" * after)
    assert why_ended(job, "training", None) is cause


def test_the_next_pair_is_queued_like_the_first_one(slurm: FakeSlurm) -> None:
    job, chain = begun(slurm)
    assert chain.successor == {"runtime": "103", "training": "104"}
    runtime, training = slurm.of("sbatch")[2:]
    assert slurm.names[-4:] == ["sbatch", "sbatch", "scontrol release", "scontrol release"]
    assert slurm.of("scontrol")[-1].argv == ["release", "103"]
    assert {"--hold", "--dependency=afterany:102", "--signal=B:USR1@900"} <= set(runtime.argv)
    assert {"--dependency=after:103,afterany:102", "--kill-on-invalid-dep=yes"} <= set(training.argv)
    before_runtime, before_training = slurm.of("sbatch")[:2]
    run = job.directory.path
    for call, before in ((runtime, before_runtime), (training, before_training)):
        mine = {**call.environment}
        assert mine.pop("SKYRL_AFTER_JOB_ID") == "102"
        assert mine.pop("SKYRL_ATTEMPT") == "2"
        assert call.argv[-1] == f"{run}/code/slurm/jobs/{Path(before.argv[-1]).name}"
        same = {**before.environment, "SKYRL_COORD_DIR": str(run), "SKYRL_CODE_DIR": f"{run}/code"}
        assert mine.pop("SLURM_CONF") == "/x/slurm.conf"
        expected = {
            name: value for name, value in same.items() if name not in {"SKYRL_ATTEMPT", "SKYRL_RUNTIME_JOB_ID"}
        }
        assert mine.pop("SKYRL_RUNTIME_JOB_ID", "103") == "103"
        assert mine == expected


def test_no_secret_leaves_its_file(slurm: FakeSlurm) -> None:
    job, _ = begun(slurm)
    assert job.environment["WANDB_API_KEY"] == TOKEN
    for call in slurm.calls:
        assert TOKEN not in json.dumps([call.argv, call.environment]), call.name
    holders = [path.name for path in job.directory.path.rglob("*") if path.is_file() and TOKEN in path.read_text()]
    assert holders == ["secrets.json"]


def test_the_records(slurm: FakeSlurm) -> None:
    directory = launched(slurm)
    save(directory, 3)
    Chain(first(slurm, directory)).begin("101", SignalNotes().check)
    record = json.loads(directory.attempt(1).read_text())
    assert record == {
        "schema": 1,
        "attempt": 1,
        "jobs": {"runtime": "101", "training": "102"},
        "checkpoint": "step 3",
        "successor": {"runtime": "103", "training": "104"},
    }
    assert checkpoint_at_start(directory, 1) == "step 3"
    assert checkpoint_at_start(directory, 2) == ""
    assert json.loads((directory.path / "run_103.json").read_text())["git"]["commit"] == "c0ffee"
    assert read_jobs(directory) == {"runtime": "103", "training": "104"}, "the cleanup keeps the directory for them"
    assert partner_of(directory, "runtime", "101") == "102"
    assert partner_of(directory, "runtime", "103") == "104"
    assert partner_of(directory, "runtime", "999") is None


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        (Settings(), False),
        (Settings(training_command="x", training_command_is_verl=True), False),
        (Settings(training_command="x"), True),
    ],
)
def test_what_verl_is_still_writing_is_no_checkpoint(tmp_path: Path, settings: Settings, counts: bool) -> None:
    directory = CoordinationDir(tmp_path)
    part = directory.checkpoints / settings.wandb_experiment / "global_step_3" / "data.pt"
    part.parent.mkdir(parents=True)
    part.write_text("half of it")
    assert bool(checkpoints_of(settings, directory).mark()) == counts


def test_the_last_attempt_queues_none(slurm: FakeSlurm) -> None:
    directory = launched(slurm)
    job = body(slurm, directory, "106", 1, {"SKYRL_ATTEMPT": "3"})
    before = len(slurm.calls)
    chain = Chain(job)
    chain.begin("105", SignalNotes().check)
    assert not chain.successor
    assert len(slurm.calls) == before
    assert json.loads(directory.attempt(3).read_text())["successor"] == {}


def test_a_refusal_of_slurms_does_not_end_the_training(
    slurm: FakeSlurm, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slurm.lib.logs.log.propagate", True)
    directory = launched(slurm)
    job = first(slurm, directory)
    words = "sbatch: error: Batch job submission failed: Access/permission denied"
    slurm.answer("sbatch", {}, {}, {"code": 1, "stdout": "", "stderr": words})
    chain = Chain(job)
    chain.begin("101", SignalNotes().check)
    assert not chain.successor
    assert "there will be no restart: Slurm did not take the job" in caplog.text
    by_hand = f"launch it again with: --set CHECKPOINT_DIR={directory.checkpoints} --set WANDB_EXPERIMENT=skyrl"
    assert by_hand in caplog.text
    chain.conclude(Ended.INTERRUPTED)
    assert caplog.text.count(by_hand) == 2


SILENT_SLURM = {
    "code": 1,
    "stdout": "",
    "stderr": "sbatch: error: Unable to contact slurm controller (connect failure)",
}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No wait for the next attempt at the trainer's start, and short ones for Slurm."""
    monkeypatch.setattr("slurm.lib.attempts.START_S", 0.0)
    monkeypatch.setattr("slurm.lib.unheard.PAUSE_S", 0.1)
    monkeypatch.setattr("slurm.lib.unheard.LOOK_PAUSE_S", 0.1)
    monkeypatch.setattr("slurm.lib.logs.log.propagate", True)


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_silent_slurm_holds_up_no_trainer(
    slurm: FakeSlurm, caplog: pytest.LogCaptureFixture, impatient: None
) -> None:
    directory = launched(slurm)
    slurm.answer("sbatch", {}, {}, SILENT_SLURM)
    slurm.answer("squeue --user", *[SILENT_SLURM] * 6)
    chain = Chain(first(slurm, directory))
    chain.begin("101", SignalNotes().check)
    assert not chain.successor
    assert "the next attempt is not queued yet; the trainer starts meanwhile" in caplog.text
    until(lambda: json.loads(directory.attempt(1).read_text())["successor"])
    assert chain.successor == {"runtime": "104", "training": "105"}
    chain.conclude(Ended.INTERRUPTED)
    assert "no further attempt is queued" not in caplog.text
    assert not slurm.of("scancel")


def test_what_is_being_queued_is_taken_back_at_the_end(
    slurm: FakeSlurm, caplog: pytest.LogCaptureFixture, impatient: None
) -> None:
    directory = launched(slurm)
    slurm.answer("sbatch", {}, {}, {}, SILENT_SLURM)  # the first job of the next attempt is taken
    slurm.answer("squeue --user", *[SILENT_SLURM] * 1000)
    chain = Chain(first(slurm, directory))
    chain.begin("101", SignalNotes().check)
    until(lambda: "Slurm does not answer; waiting up to 600 s" in caplog.text)
    chain.conclude(Ended.INTERRUPTED)
    assert not chain.successor
    assert [call.argv for call in slurm.of("scancel")] == [["103"]]
    assert "no further attempt is queued" in caplog.text
    assert "was still being queued" not in caplog.text
    assert list(directory.path.glob("submission_*")), "the next launch looks for the one that was not heard of"


def test_a_signal_ends_the_wait_for_slurm(slurm: FakeSlurm, impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm.lib.attempts.START_S", 60.0)
    directory = launched(slurm)
    slurm.answer("sbatch", {}, {}, SILENT_SLURM)
    slurm.answer("squeue --user", *[SILENT_SLURM] * 1000)
    notes = SignalNotes()
    notes.note(15)
    chain = Chain(first(slurm, directory))
    with pytest.raises(Interrupted):
        chain.begin("101", notes.check)
    chain.conclude(Ended.CANCELLED)
    assert not chain.successor


def test_the_end_waits_for_a_slow_slurm_to_take_back_what_was_begun(
    slurm: FakeSlurm, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the first wait, before the trainer's processes are ended, was not long enough, the second one goes on."""
    monkeypatch.setattr("slurm.lib.logs.log.propagate", True)
    directory = launched(slurm)
    slurm.answer("sbatch", {}, {}, {}, {"after_s": 3.0})
    notes = SignalNotes()
    chain = Chain(first(slurm, directory))

    def end() -> None:
        until(lambda: len(slurm.of("sbatch")) == 4)
        notes.note(15)

    threading.Thread(target=end).start()
    with pytest.raises(Interrupted):
        chain.begin("101", notes.check)
    assert not chain.settle(0.05)
    chain.conclude(Ended.CANCELLED)
    assert [call.argv for call in slurm.of("scancel")] == [["104"], ["103"]]
    assert "was still being queued" not in caplog.text


def test_the_end_does_not_wait_longer_than_slurm_lets_it(
    slurm: FakeSlurm, caplog: pytest.LogCaptureFixture, impatient: None
) -> None:
    directory = launched(slurm)
    slurm.answer("sbatch", {}, {}, {"after_s": 3.0})
    chain = Chain(first(slurm, directory))
    chain.begin("101", SignalNotes().check)
    until(lambda: len(slurm.of("sbatch")) == 3)
    chain.conclude(Ended.CANCELLED, left_s=0.1)
    assert "was still being queued; what Slurm may have taken of it is held" in caplog.text
    assert chain.settle(60.0)


@pytest.mark.parametrize("answered", [0, 1])
def test_no_command_of_slurms_outlives_the_body(slurm: FakeSlurm, impatient: None, answered: int) -> None:
    """Neither the one that hangs then, nor those by which what it did is looked for and taken back."""
    before = descendants({os.getpid()})
    directory = launched(slurm)
    slurm.answer("sbatch", {}, {}, *[{}] * answered, {"after_s": 600.0})
    slurm.answer("squeue --user", *[{"after_s": 600.0}] * 5)
    slurm.answer("scancel", *[{"after_s": 600.0}] * 5)
    chain = Chain(first(slurm, directory))
    chain.begin("101", SignalNotes().check)
    until(lambda: len(slurm.of("sbatch")) == 3 + answered)
    chain.conclude(Ended.CANCELLED, left_s=0.1)
    until(lambda: chain.settle(0.0))
    assert not descendants({os.getpid()}) - before


def test_no_attempt_is_let_go_once_it_was_given_up(
    slurm: FakeSlurm, caplog: pytest.LogCaptureFixture, impatient: None
) -> None:
    """Though Slurm, which is slow, has let go of its training job meanwhile."""
    directory = launched(slurm)
    slurm.answer("scontrol", {}, {}, {"after_s": 1.0}, {})
    chain = Chain(first(slurm, directory))
    chain.begin("101", SignalNotes().check)
    until(lambda: len(let_go(slurm)) == 3)
    chain.conclude(Ended.INTERRUPTED, left_s=0.1)
    assert "what Slurm may have taken of it is held" in caplog.text
    assert "no further attempt is queued" in caplog.text
    until(lambda: chain.settle(0.0))
    time.sleep(1.2)  # by then it would have been let go
    assert let_go(slurm)[2:] == ["104"]
    assert not chain.successor
    assert list(directory.path.glob("submission_*.json")), "the next launch knows what to remove"


def let_go(slurm: FakeSlurm) -> list[str]:
    return [call.argv[1] for call in slurm.of("scontrol") if call.argv[0] == "release"]


def test_a_job_is_not_submitted_once_more_when_nobody_wants_it(slurm: FakeSlurm, impatient: None) -> None:
    slurm.answer("sbatch", SILENT_SLURM)
    notes = SignalNotes()
    notes.note(15)
    with pytest.raises(Interrupted):
        submitted(Slurm({"PATH": slurm.path}), ["sbatch", f"--comment={PREFIX}x"], "x", Insistence(notes, 60.0))
    assert len(slurm.of("sbatch")) == 1


def test_a_fault_of_ours_costs_the_restart_and_says_so(
    slurm: FakeSlurm, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slurm.lib.logs.log.propagate", True)
    job = first(slurm, launched(slurm))
    monkeypatch.setattr("slurm.lib.attempts.submit", lambda *_args, **_more: [].pop())
    chain = Chain(job)
    chain.begin("101", SignalNotes().check)
    chain.conclude(Ended.INTERRUPTED)
    assert (
        "no further attempt is queued, for an internal error (IndexError: pop from empty list). To go on" in caplog.text
    )


@pytest.mark.parametrize("ended", Ended)
def test_what_follows_the_end(slurm: FakeSlurm, ended: Ended) -> None:
    _, chain = begun(slurm)
    chain.conclude(ended)
    cancelled = [call.argv for call in slurm.of("scancel")]
    assert cancelled == ([] if ended is Ended.INTERRUPTED else [["104", "103"]])


@pytest.mark.parametrize(("word", "waits"), [("PENDING", True), ("", False), ("CANCELLED", False)])
def test_a_person_may_take_the_next_pair_out_of_the_queue(slurm: FakeSlurm, word: str, waits: bool) -> None:
    _, chain = begun(slurm)
    slurm.answer("squeue", {"stdout": f"{word}|Dependency|\n" if word else ""})
    assert chain.waits() is waits
    assert bool(chain.successor) is waits


def test_without_restarts_slurm_is_asked_nothing(slurm: FakeSlurm) -> None:
    directory = launched(slurm, "RESTARTS=0")
    before = len(slurm.calls)
    chain = Chain(first(slurm, directory))
    chain.begin("101", SignalNotes().check)
    chain.conclude(Ended.INTERRUPTED)
    assert len(slurm.calls) == before
    assert not directory.attempt(1).exists()


# --- the next attempt's first act ------------------------------------------------------------------------------------


def second(slurm: FakeSlurm, directory: CoordinationDir, kind: str) -> JobContext:
    which = {"runtime": 2, "training": 3}[kind]
    return body(slurm, directory, str(101 + which), which, {"SKYRL_COORD_DIR": str(directory.path)})


def ended_as(directory: CoordinationDir, ended: Ended, code: int = 1) -> None:
    directory.publish(directory.training_complete, Flag.of_this_host("102", "101", code, "a reason", ended.value))


@pytest.mark.parametrize("kind", ["runtime", "training"])
@pytest.mark.parametrize(
    ("ended", "step", "code"),
    [
        (Ended.INTERRUPTED, 5, None),
        (Ended.INTERRUPTED, 3, 76),
        (Ended.COMPLETED, 5, 0),
        (Ended.FAILED, 5, 0),
        (Ended.CANCELLED, 5, 0),
    ],
)
def test_both_jobs_of_the_next_attempt_decide_alike(
    slurm: FakeSlurm, kind: str, ended: Ended, step: int, code: int | None
) -> None:
    directory = launched(slurm)
    save(directory, 3)
    Chain(first(slurm, directory)).begin("101", SignalNotes().check)
    save(directory, step)
    ended_as(directory, ended)
    slurm.answer("squeue", {"stdout": "TIMEOUT|TimeLimit|gpu1\n"}, {"stdout": "PENDING|Resources|\n"})
    assert refused(second(slurm, directory, kind), kind, SignalNotes()) == code
    withdrawn = kind == "runtime" and code is not None
    assert [call.argv for call in slurm.of("scancel")] == ([["104"]] if withdrawn else [])
    assert json.loads(directory.training_complete.read_text())["job_id"] == "102", "the result stays"


def test_a_training_job_that_runs_already_sees_for_itself(slurm: FakeSlurm) -> None:
    job, _ = begun(slurm)
    ended_as(job.directory, Ended.COMPLETED, 0)
    slurm.answer("squeue", {"stdout": "COMPLETED|None|gpu1\n"}, {"stdout": "RUNNING|None|gpu1\n"})
    assert refused(second(slurm, job.directory, "runtime"), "runtime", SignalNotes()) == 0
    assert not slurm.of("scancel")


def test_without_a_flag_slurms_word_counts(slurm: FakeSlurm) -> None:
    job, _ = begun(slurm)
    save(job.directory, 1)
    slurm.answer("squeue", {"stdout": "NODE_FAIL|NodeDown|gpu1\n"})
    assert refused(second(slurm, job.directory, "runtime"), "runtime", SignalNotes()) is None
    assert refused(first(slurm, job.directory), "training", SignalNotes()) is None, "the launch's own begins anyway"


def test_the_flag_that_the_runtime_wrote_for_a_lost_training_is_not_its_word(slurm: FakeSlurm) -> None:
    job, _ = begun(slurm)
    save(job.directory, 1)
    job.directory.publish(job.directory.training_complete, Flag("102", "101", reason="the training job 102 is gone"))
    slurm.answer("squeue", {"stdout": "NODE_FAIL|NodeDown|gpu1\n"})
    assert refused(second(slurm, job.directory, "runtime"), "runtime", SignalNotes()) is None


def test_a_signal_while_it_decides(slurm: FakeSlurm) -> None:
    """A job that ended in order has a flag, which a file system may show late; the wait for it can be ended."""
    job, _ = begun(slurm)
    slurm.answer("squeue", {"stdout": "FAILED|NonZeroExitCode|gpu1\n"})
    notes = SignalNotes()
    notes.note(15)
    assert refused(second(slurm, job.directory, "runtime"), "runtime", notes) == 143
