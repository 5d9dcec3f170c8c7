"""Are the people in NOTIFY told how a run ended: once, in words for people and programs, never at the run's cost?"""

from __future__ import annotations

import json
import signal
import socket
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from slurm.lib.config import load_config
from slurm.lib.coordination import CoordinationDir, Flag
from slurm.lib.endings import End
from slurm.lib.errors import ConfigError
from slurm.lib.job_context import JobContext
from slurm.lib.notice import NOTICE_FIELDS, Ending, Notice, elapsed_s
from slurm.lib.notify import MOST_S, Sending, ended_by, send_mail, tell, warn_of_mail
from slurm.lib.plan import Request, make_plan, shown
from slurm.lib.preflight.finding import Level
from slurm.lib.preflight.recipients import recipient_findings, unknown_hosts
from slurm.lib.restarts import Ended
from slurm.lib.runtime_job import RuntimeJob
from slurm.lib.scheduler import JobState, LocalJobs, Slurm
from slurm.lib.secrets import is_secret_name, redact_conf, secret_values
from slurm.lib.settings import KEYS, Settings, recipients, said
from slurm.lib.signals import SignalNotes
from slurm.lib.supervisor import AllStopped, Failed, NoteEnd, Outcome, StopSignal
from slurm.lib.webhook import post
from tests.fake_slurm import FakeSlurm
from tests.receiver import Receiver, receiver
from tests.test_partner import FakeScheduler

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "T0KEN-of-somebody"
HOOK = f"https://hooks.example/services/{TOKEN}"
ENDING = Ending("8", Ended.FAILED, 7, "the trainer failed with exit code 7")


@pytest.fixture
def hook() -> Iterator[Receiver]:
    with receiver() as made:
        yield made


def a_job(tmp_path: Path, job_id: str = "8", **settings: object) -> JobContext:
    directory = CoordinationDir(tmp_path / "20260304_101500_7")
    directory.path.mkdir(exist_ok=True)
    made = replace(Settings(), **settings)  # type: ignore[arg-type]
    environment = {"ALLHANDS_API_KEY": "sk-secret-of-the-run"}
    return JobContext(job_id, directory, made, environment, FakeScheduler(), ROOT, own_dir=True)


@pytest.mark.parametrize(
    ("environment", "shown", "warned"),
    [
        ({}, "JobId=8 JobName=skyrl-train\n   JobState=RUNNING\n", True),
        ({}, "JobId=8 JobName=skyrl-train\n   MailUser=(null) MailType=NONE\n", True),
        ({}, "JobId=8 JobName=skyrl-train\n   MailUser=me@lab.example MailType=END,FAIL\n", False),
        ({}, "", False),
        ({"SKYRL_CODE_DIR": "/x"}, "JobId=8 JobName=skyrl-train\n", False),
    ],
)
def test_a_job_given_to_sbatch_says_that_no_mail_comes(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    shown: str,
    warned: bool,
) -> None:
    """Unless Slurm was asked for it, or does not say."""
    slurm = FakeSlurm(tmp_path / "fake")
    monkeypatch.setenv("PATH", slurm.path)
    slurm.answer("scontrol", {"stdout": shown} if shown else {"code": 1})
    job = a_job(tmp_path, notify=("me@lab.example", HOOK))
    warn_of_mail(replace(job, environment=environment, scheduler=Slurm()))
    said = [record.getMessage() for record in caplog.records]
    assert [TOKEN in line for line in said] == [False] * warned
    for line in said:
        assert "no mail goes to me@lab.example" in line
        assert "give sbatch --mail-type=END,FAIL --mail-user=me@lab.example" in line


def test_a_job_without_mail_addresses_asks_nobody(tmp_path: Path) -> None:
    slurm = FakeSlurm(tmp_path / "fake")
    warn_of_mail(replace(a_job(tmp_path, notify=(HOOK,)), environment={}, scheduler=Slurm({"PATH": slurm.path})))
    assert not slurm.calls


# --- the key ---------------------------------------------------------------------------------------------------------


def test_addresses_and_webhooks_in_any_order() -> None:
    found = recipients(f"me@lab.example, {HOOK}\n you+x@sub.lab.example,me@lab.example")
    assert found == ("me@lab.example", HOOK, "you+x@sub.lab.example")
    assert recipients(("me@lab.example",)) == ("me@lab.example",)
    settings = replace(Settings(), notify=found)
    assert settings.webhooks == (HOOK,)
    assert settings.mail_addresses == ("me@lab.example", "you+x@sub.lab.example")
    assert recipients(said(KEYS["NOTIFY"], found)) == found, "a job reads back what was launched"


@pytest.mark.parametrize(
    "bad",
    [
        "me",
        "-f@x.y",
        "|sh@x.y",
        "/tmp/a@x.y",
        "ftp://x/y",
        "https://",
        "https:///x",
        "a@b@c",
        "@lab",
        "https://h:99999/",
        "-",
    ],
)
def test_every_entry_that_is_none_is_counted_and_none_is_repeated(bad: str) -> None:
    with pytest.raises(ValueError, match=r"^entries 2, 4, 5 are neither a mail address nor a webhook") as problem:
        recipients(f"me@lab.example {bad} {HOOK} {bad} x")
    assert TOKEN not in str(problem.value)


def test_a_wrong_value_is_an_error_without_the_secret(tmp_path: Path) -> None:
    words = [f"NOTIFY={HOOK} nobody", "GPU_NODES=0"]
    with pytest.raises(ConfigError) as problem:
        load_config("dev", words, {"HOME": str(tmp_path)}, ROOT / "slurm" / "config", datetime.now(), tmp_path)
    assert "entry 2 is neither" in str(problem.value)
    assert "GPU_NODES" in str(problem.value), "all mistakes together"
    assert TOKEN not in str(problem.value)


# --- the secret ------------------------------------------------------------------------------------------------------


def test_a_webhook_is_a_secret_and_a_mail_address_is_none() -> None:
    assert is_secret_name("NOTIFY")
    assert not is_secret_name("NOTIFY_SOCKET")  # systemd's
    assert secret_values({"NOTIFY": f"me@lab.example,{HOOK}"}) == {HOOK}
    assert secret_values({"NOTIFY": "me@lab.example"}) == frozenset()
    copy = redact_conf(f'NOTIFY="me@lab.example {HOOK}"\nMODEL=x\n', [])
    assert copy == "NOTIFY=${NOTIFY-}\nMODEL=x\n"


def plan_text(tmp_path: Path, *words: str, request: Request | None = None) -> str:
    seen = {"PATH": "/bin", "HOME": str(tmp_path), "HEADER": f"see {HOOK}"}
    overrides = [f"SKYRL_JOBS_BASE={tmp_path}", "TRAINING_COMMAND=true", *words]
    config = load_config("dev", overrides, seen, ROOT / "slurm" / "config", datetime.now(), tmp_path)
    plan = make_plan(config, request or Request(), seen, ROOT, "python3", datetime(2026, 3, 4))
    open_ones = [name for name, value in {**plan.environment, **plan.inherited}.items() if TOKEN in value]
    hidden = any(TOKEN in word for word in words)
    assert open_ones == ([] if hidden else ["HEADER"]), "a variable that holds the webhook goes by the file too"
    return shown(plan)


def test_the_plan_shows_the_mail_and_hides_the_webhook(tmp_path: Path) -> None:
    text = plan_text(tmp_path, f"NOTIFY=me@lab.example,{HOOK},you@lab.example")
    assert TOKEN not in text
    assert "NOTIFY=***  # by a 0600 file" in text
    runtime, training = text.split("# training job")
    assert "--mail" not in runtime
    assert "--mail-type=END,FAIL" in training
    assert "--mail-user=me@lab.example,you@lab.example" in training


def test_of_a_runtime_alone_its_own_job_sends_the_mail(tmp_path: Path) -> None:
    text = plan_text(tmp_path, "NOTIFY=me@lab.example", request=Request(training=False))
    assert "--mail-user=me@lab.example" in text
    assert "--mail" not in plan_text(tmp_path, f"NOTIFY={HOOK}"), "no address, no mail"


def test_of_one_heterogeneous_job_one_component_sends_the_mail(tmp_path: Path) -> None:
    assert plan_text(tmp_path, "NOTIFY=me@lab.example", "PAIRING=het").count("--mail-user") == 1


def test_a_persons_own_option_wins(tmp_path: Path) -> None:
    text = plan_text(tmp_path, "NOTIFY=me@lab.example", "GPU_SBATCH_ARGS=--mail-type=BEGIN")
    assert text.index("--mail-type=END,FAIL") < text.index("--mail-type=BEGIN"), "sbatch takes the last one"


# --- the message -----------------------------------------------------------------------------------------------------


def test_the_body_for_people_and_programs() -> None:
    notice = Notice("20260304_101500_7", "/jobs/20260304_101500_7", ENDING, 12, 300, 7260)
    body = json.loads(notice.body())
    assert tuple(body) == NOTICE_FIELDS
    first, reason, place = body["text"].splitlines()
    assert first == "skyrl run 20260304_101500_7 failed (exit code 7) after 2 h 1 min, at step 12 of 300"
    assert (reason, place) == (ENDING.reason, "/jobs/20260304_101500_7")
    assert body["content"] == body["text"]
    assert {name: body[name] for name in ("state", "exit_code", "step", "elapsed")} == {
        "state": "failed",
        "exit_code": 7,
        "step": 12,
        "elapsed": 7260,
    }


def test_a_long_reason_fits_every_receiver() -> None:
    notice = Notice("r", "/" + "d" * 200, replace(ENDING, reason="x" * 9000))
    assert len(json.loads(notice.body())["content"]) < 2000  # Discord's limit


def test_what_is_not_known_is_left_out() -> None:
    notice = Notice("r", "/d", Ending("8", Ended.CANCELLED, None, "scancel"))
    assert notice.title == "skyrl run r was cancelled"
    now = datetime.now(timezone.utc)
    assert elapsed_s({"created": (now - timedelta(seconds=90)).isoformat()}, now) == 90
    assert [elapsed_s(record, now) for record in ({}, {"created": 7}, {"created": "2026-01-01"})] == [None] * 3


def test_the_message_has_step_time_and_no_secret(tmp_path: Path, hook: Receiver) -> None:
    job = a_job(tmp_path, notify=(f"{hook.url}/{TOKEN}",))
    job.directory.log("training", "8", "out").write_text("step 3 of 9\nTraining Progress: 44%|x| 4/9 [\nnoise\n")
    job.directory.run_record.write_text(json.dumps({"created": datetime.now(timezone.utc).isoformat()}))
    tell(job, replace(ENDING, reason="the key sk-secret-of-the-run was refused")).finish()
    [(path, body)] = hook.posts
    assert path == f"/{TOKEN}"
    assert hook.headers[0]["Content-Type"] == "application/json"
    assert (body["step"], body["steps"], body["run"]) == (4, 9, "20260304_101500_7")
    assert body["elapsed"] < 60
    assert body["reason"] == "the key *** was refused"


# --- once, and never at the run's cost -------------------------------------------------------------------------------


def test_of_many_that_offer_it_one_sends(tmp_path: Path, hook: Receiver) -> None:
    job = a_job(tmp_path, notify=(hook.url,))
    sendings = [tell(replace(job, job_id=str(number)), ENDING) for number in range(6)]
    for sending in sendings:
        sending.finish()
    assert len(hook.posts) == 1
    claim = job.directory.notified("8")
    assert stat.S_IMODE(claim.stat().st_mode) == 0o600
    assert hook.url not in claim.read_text()


def test_where_no_claim_can_be_written_the_message_is_sent(tmp_path: Path, hook: Receiver) -> None:
    job = a_job(tmp_path, notify=(hook.url,))
    job.directory.path.rmdir()
    tell(job, ENDING).finish()
    assert len(hook.posts) == 1


def test_nobody_to_be_told_leaves_no_trace(tmp_path: Path) -> None:
    for notify in ((), ("me@lab.example",)):  # on Slurm the mail is Slurm's
        job = a_job(tmp_path, notify=notify)
        tell(job, ENDING).finish()
        assert not list(job.directory.path.iterdir())


def test_a_receiver_that_hangs_costs_a_few_seconds_and_a_warning(
    tmp_path: Path, hook: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    hook.hangs.set()
    job = a_job(tmp_path, notify=(f"{hook.url}/{TOKEN}",))
    sending = tell(job, ENDING)
    sending.finish(0.0)
    assert hook.answered == 0, "the end did not wait for the answer"
    sending.finish()
    assert hook.answered == 0
    assert len(hook.posts) == 1, "it may have been read: not sent twice"
    assert "NOTIFY: the webhook at 127.0.0.1 was not told: no answer in time" in caplog.text
    assert TOKEN not in caplog.text


def test_a_send_that_never_ends_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    """As one whose name server is silent, whom no time limit of a socket ends."""
    over, sending = threading.Event(), Sending()
    sending.begin("somebody", lambda: "ended" if over.wait(60) else None)
    begin = time.monotonic()
    sending.finish()
    assert time.monotonic() - begin < 30
    assert not over.is_set()
    over.set()
    assert "NOTIFY: somebody was not told: no answer in time; the job ends without it" in caplog.text


@pytest.mark.parametrize(
    ("answers", "posts", "complaint"),
    [
        ([200], 1, None),
        ([204], 1, None),
        ([503, 200], 2, None),
        ([429], 2, "HTTP 429 Too Many Requests"),
        ([404], 1, "HTTP 404 Not Found"),
        ([500], 1, "HTTP 500 Internal Server Error"),  # it may have taken the message
    ],
)
def test_one_retry_where_the_message_was_not_taken(
    hook: Receiver, answers: list[int], posts: int, complaint: str | None
) -> None:
    hook.answers = answers
    assert post(hook.url, '{"run": "r"}', {}, MOST_S) == complaint
    assert len(hook.posts) == posts


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(hook: Receiver, code: int) -> None:
    hook.answers = [code]
    complaint = post(hook.url + "/a", '{"run": "r"}', {}, MOST_S)
    assert complaint is not None and "it redirects, which is not followed" in complaint
    assert [path for path, _ in hook.posts] == ["/a"]


def test_a_receiver_that_is_not_there() -> None:
    assert post("http://127.0.0.1:1/x", "{}", {}, 1.5) == "Connection refused"


def test_a_receiver_that_starts_late_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts between the first attempt and the second."""
    monkeypatch.setattr("slurm.lib.webhook.PAUSE_S", 2.0)  # longer than a busy machine needs to start it
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with ThreadPoolExecutor() as pool:
        complaint = pool.submit(post, f"http://127.0.0.1:{port}/x", '{"run": "r"}', {}, 30.0)
        time.sleep(0.3)
        with receiver(port=port) as late:
            assert complaint.result(60) is None
    assert [path for path, _ in late.posts] == ["/x"]


def test_the_proxy_of_the_environment_is_used(hook: Receiver) -> None:
    """As a proxy the receiver is asked for the whole address."""
    assert post("http://hooks.nowhere.invalid/x", '{"run": "r"}', {"http_proxy": hook.url}, MOST_S) is None
    assert [path for path, _ in hook.posts] == ["http://hooks.nowhere.invalid/x"]


def test_an_unknown_host_is_a_warning_before_the_launch() -> None:
    nowhere = "x" * 64 + ".invalid"  # longer than names are, so that no name server is asked
    urls = [f"http://{nowhere}/{TOKEN}", "http://127.0.0.1/x"]
    assert unknown_hosts(urls, {}) == [nowhere]
    assert unknown_hosts(urls, {"http_proxy": "http://proxy:1"}) == []
    settings = Settings(notify=(*urls, "me@lab.example"), skyrl_backend="local")
    found = recipient_findings(settings, [nowhere], None)
    assert [finding.level for finding in found] == [Level.WARNING] * 2
    assert TOKEN not in str(found)
    assert recipient_findings(replace(settings, skyrl_backend="slurm"), [], None) == []


# --- who speaks for whom ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "exit_code", "reason", "ended"),
    [
        (Flag("8", "7", exit_code=7, reason="x", ended="interrupted"), None, "", Ended.INTERRUPTED),
        (Flag("8", "7", exit_code=0, reason="x"), None, "", Ended.COMPLETED),
        (Flag("9", "7", exit_code=0, reason="x"), 3, "another's flag", Ended.FAILED),
        (None, None, "the training job 8 is gone: ended badly (FAILED, NonZeroExitCode)", Ended.FAILED),
        (None, None, "the training job 8 is gone: ended badly (CANCELLED)", Ended.CANCELLED),
        (None, 0, "Slurm says that it ended well", Ended.COMPLETED),
    ],
)
def test_how_a_training_ended_by_its_flag_else_by_what_is_known(
    tmp_path: Path, flag: Flag | None, exit_code: int | None, reason: str, ended: Ended
) -> None:
    directory = CoordinationDir(tmp_path)
    if flag:
        directory.publish(directory.training_complete, flag)
    assert ended_by(directory, "8", exit_code, reason).ended is ended


def runtime_of(tmp_path: Path, with_training: bool, state: JobState = JobState.RUNNING) -> RuntimeJob:
    job = a_job(tmp_path, "7", notify=(HOOK,))
    jobs = {"runtime": {"id": "7"}, **({"training": {"id": "8"}} if with_training else {})}
    job.directory.run_record.write_text(json.dumps({"jobs": jobs}))
    assert isinstance(job.scheduler, FakeScheduler)
    job.scheduler.state = state
    return RuntimeJob(job, SignalNotes())


def test_a_signalled_runtime_says_how_it_ends_before_it_has_removed_everything(tmp_path: Path) -> None:
    """Slurm's KILL may come while its storage is removed; of the training it says what that has said by then."""
    running = runtime_of(tmp_path, True)
    flag = Flag("8", "7", exit_code=143, reason="ended by SIGTERM (scancel)", ended="cancelled")
    running.job.directory.publish(running.job.directory.training_complete, flag)
    running.notes.note(signal.SIGTERM)
    with running.noted():
        running.take(StopSignal(signal.SIGTERM))
    jobs = json.loads(running.job.directory.run_record.read_text())["jobs"]
    ends = {kind: job.get("ended", {}) for kind, job in jobs.items()}
    assert {kind: (end.get("reason"), end.get("said_by")) for kind, end in ends.items()} == {
        "runtime": ("ended by SIGTERM", "runtime"),
        "training": ("ended by SIGTERM (scancel)", "training"),
    }


def test_a_runtime_that_is_not_signalled_says_it_last(tmp_path: Path) -> None:
    running = runtime_of(tmp_path, True)
    with running.noted():
        running.take(Failed(71, "no Podman"))
    assert "ended" not in running.job.directory.run_record.read_text()
    running.take(AllStopped())
    assert json.loads(running.job.directory.run_record.read_text())["jobs"]["runtime"]["ended"]["exit_code"] == 71


GONE = End("training", "8", None, "the training job 8 is gone", "runtime")


@pytest.mark.parametrize(
    ("outcome", "state", "spoken_for"),
    [
        (Outcome(0, "complete", True, (replace(GONE, exit_code=0),)), JobState.RUNNING, "8"),
        (Outcome(69, "gone", False, (GONE,)), JobState.ENDED_BADLY, "8"),
        (Outcome(143, "ended by SIGTERM"), JobState.RUNNING, None),  # it tells that itself
        (Outcome(143, "ended by SIGTERM"), JobState.ENDED_BADLY, "8"),
        (Outcome(0, "the run is queued again", True), JobState.PURGED, None),
    ],
)
def test_the_runtime_speaks_for_a_training_that_is_gone(
    tmp_path: Path, outcome: Outcome, state: JobState, spoken_for: str | None
) -> None:
    ending = runtime_of(tmp_path, True, state).unsaid(outcome)
    assert (ending.job_id if ending else None) == spoken_for


def test_not_for_one_that_another_attempt_follows(tmp_path: Path) -> None:
    running = runtime_of(tmp_path, True)
    data = {"jobs": {"training": "8"}, "successor": {"training": "10"}}
    running.job.directory.attempt(1).write_text(json.dumps(data))
    assert running.unsaid(Outcome(69, "gone", False, (GONE,))) is None


def test_a_runtime_alone_speaks_for_itself(tmp_path: Path) -> None:
    ending = runtime_of(tmp_path, False).unsaid(Outcome(0, "set by hand", True))
    assert ending == Ending("7", Ended.COMPLETED, 0, "set by hand")


def test_a_silent_controller_does_not_hold_up_the_record_of_the_end(tmp_path: Path) -> None:
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text("#!/bin/sh\nexec sleep 60\n")
    squeue.chmod(0o755)
    running = runtime_of(tmp_path, True)
    running.job = replace(running.job, scheduler=Slurm({"PATH": f"{squeue.parent}:/usr/bin:/bin"}))
    begin = time.monotonic()
    assert running.unsaid(Outcome(143, "ended by SIGTERM")) is None
    assert time.monotonic() - begin < 8, "launch.py cancel kills a job 8 s after its SIGTERM"


def no_thread(_thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_without_threads_the_end_is_recorded_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At the limit of processes."""
    running = runtime_of(tmp_path, False)
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    running.conclude(NoteEnd(Outcome(0, "set by hand", True)))
    record = json.loads(running.job.directory.run_record.read_text())
    assert record["jobs"]["runtime"]["ended"]["exit_code"] == 0
    assert "NOTIFY: the webhook at hooks.example was not told: can't start new thread" in caplog.text


def test_whatever_goes_wrong_is_a_warning_without_the_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_words: object) -> Notice:
        raise MemoryError(f"no room for {HOOK}")

    monkeypatch.setattr("slurm.lib.notify.notice_of", broken)
    tell(a_job(tmp_path, notify=(HOOK,)), ENDING).finish()
    assert "not everybody is told of the end: an internal error (MemoryError: no room for ***)" in caplog.text
    assert TOKEN not in caplog.text


# --- mail of local runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sendmail", "mail"])
def test_the_hosts_mail_program_gets_subject_recipients_and_text(tmp_path: Path, name: str) -> None:
    program = tmp_path / name
    program.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/argv; cat >{tmp_path}/said\n')
    program.chmod(0o755)
    notice = Notice("r", "/jobs/ä", ENDING, 12)
    to = ("me@lab.example", "you@lab.example")
    assert send_mail(notice.mail(), notice.title, to, {"PATH": f"{tmp_path}:/bin"}) is None
    argv, said_text = (tmp_path / "argv").read_text(), (tmp_path / "said").read_text()
    assert all(address in argv for address in to)
    assert "skyrl run r failed (exit code 7), at step 12" in (said_text if name == "sendmail" else argv)


def test_a_mail_program_that_hangs_or_fails_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    program = tmp_path / "sendmail"
    program.write_text("#!/bin/sh\necho no queue >&2; exit 75\n")
    program.chmod(0o755)
    job = a_job(tmp_path, notify=("me@lab.example",))
    local = replace(job, scheduler=LocalJobs(tmp_path), environment={"PATH": f"{tmp_path}:/bin"})
    tell(local, ENDING).finish()
    assert "NOTIFY: me@lab.example was not told: no queue" in caplog.text


def test_threads_end_with_their_messages(tmp_path: Path, hook: Receiver) -> None:
    tell(a_job(tmp_path, notify=(hook.url,)), ENDING).finish()
    end = time.monotonic() + 5
    while any(thread.name == "notify" for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.01)
