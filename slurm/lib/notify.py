"""Who tells people that a run has ended? Each job body offers it at its end; the first to claim the message sends it.

A claim is a file in the run's directory named after the job that the run is about, its training job, else its runtime
job: written once, by whoever comes first. So a body that is killed leaves the message to the other one, and nobody
sends it twice. Mail is Slurm's own there; local runs ask the host's mail program. A message never lasts: what a
receiver does not take within a few seconds is a warning in the log.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from slurm.lib.coordination import (
    CoordinationDir,
    Flag,
    host_name,
    parse_flag,
    parse_object,
    read_if_there,
    tail_if_there,
    utc_now,
    write_if_absent,
)
from slurm.lib.errors import EnvironmentProblem, SuiteError
from slurm.lib.job_context import JobContext
from slurm.lib.logs import log
from slurm.lib.notice import Ending, Notice, elapsed_s
from slurm.lib.processes import run
from slurm.lib.restarts import Ended
from slurm.lib.scheduler import Slurm
from slurm.lib.secrets import mask_values, secret_values
from slurm.lib.signals import SignalNotes
from slurm.lib.trainer_words import steps_said
from slurm.lib.webhook import host_of, post

MOST_S = 5.0  # from the beginning of all messages to the end of the wait for them
POST_S = 4.0  # for one of them
LEAST_S = 1.0  # for a job whose time is up: most receivers answer in a fraction of it
TAIL = 1 << 18  # bytes of the trainer's log in which its last step is looked for
ASK_S = 5.0  # of a job that begins
MAIL_PROGRAMS = ("sendmail", "mail", "mailx")
MAIL_FOLDERS = "/usr/sbin:/usr/lib:/usr/bin:/bin"  # where sendmail is, which is on few people's PATH


@dataclass(frozen=True)
class _Message:
    """One message under way; ``complaints`` are filled in by its thread."""

    where: str
    thread: threading.Thread
    complaints: list[str]


@dataclass
class Sending:
    """The messages that a body sends; ``finish`` waits for them, for as long as one may be waited for."""

    messages: list[_Message] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def begin(self, where: str, send: Callable[[], str | None]) -> None:
        """Send one message in the background."""
        complaints: list[str] = []

        def carry_out() -> None:
            try:
                complaint = send()
            except Exception as fault:  # in this thread nobody else would hear of it
                complaint = f"an internal error ({type(fault).__name__})"
            complaints.append(complaint or "")

        thread = threading.Thread(target=carry_out, name="notify", daemon=True)
        self.messages.append(_Message(where, thread, complaints))
        try:
            thread.start()
        except RuntimeError as problem:  # there are as many as this user, or this job, may have
            complaints.append(str(problem))

    def finish(self, seconds: float = MOST_S) -> None:
        """Wait for all, no longer than ``seconds`` and ``MOST_S`` allow; say what came of each."""
        end = min(time.monotonic() + max(LEAST_S, seconds), self.began + MOST_S)
        for message in self.messages:
            if message.thread.is_alive():
                message.thread.join(max(0.0, end - time.monotonic()))
            complaint = message.complaints[0] if message.complaints else "no answer in time; the job ends without it"
            if complaint:
                log.warning("NOTIFY: %s was not told: %s", message.where, complaint)
            else:
                log.info("NOTIFY: told %s", message.where)


def patience_s(notes: SignalNotes) -> float:
    """How long a job that ends waits for its messages: one that was told to stop is soon killed."""
    return MOST_S if notes.stopped_at is None else LEAST_S


def tell(job: JobContext, ending: Ending) -> Sending:
    """Begin to tell the people in NOTIFY how a run ended, unless somebody has claimed that before.

    Never raises: what it cannot do is a warning, and the end of the job goes on.
    """
    sending = Sending()
    try:
        _begin_all(job, ending, sending)
    except Exception as fault:  # whatever it is, the job's own result counts for more
        secrets = secret_values(job.environment) | set(job.settings.webhooks)
        words = mask_values(f"{type(fault).__name__}: {fault}", secrets)
        log.warning("NOTIFY: not everybody is told of the end: an internal error (%s)", words)
    return sending


def _begin_all(job: JobContext, ending: Ending, sending: Sending) -> None:
    settings = job.settings
    mails = settings.mail_addresses if job.is_local else ()
    if not (settings.webhooks or mails) or not _is_claimed(job, ending):
        return
    notice = notice_of(job, ending)
    for url in settings.webhooks:
        sending.begin(f"the webhook at {host_of(url)}", partial(post, url, notice.body(), job.environment, POST_S))
    if mails:
        sending.begin(", ".join(mails), lambda: send_mail(notice.mail(), notice.title, mails, job.environment))


def warn_of_mail(job: JobContext) -> None:
    """Say of a job that was given to sbatch directly that nobody asked Slurm for the mails in NOTIFY."""
    addresses = ",".join(job.settings.mail_addresses)
    if not addresses or job.was_launched or not isinstance(job.scheduler, Slurm):
        return
    if job.scheduler.mails(job.job_id, ASK_S) is False:
        log.warning(
            "NOTIFY: no mail goes to %s, since Slurm sends it, and launch.py did not submit this job; "
            "give sbatch --mail-type=END,FAIL --mail-user=%s (webhooks are told all the same)",
            *(addresses, addresses),
        )


def _is_claimed(job: JobContext, ending: Ending) -> bool:
    """Whether this job sends the message; so it does where no claim can be written: two are better than none."""
    claim = {"schema": 1, "by": job.job_id, "host": host_name(), "time": utc_now(), "state": ending.ended.value}
    try:
        return write_if_absent(job.directory.notified(ending.job_id), json.dumps(claim) + "\n", 0o600)
    except EnvironmentProblem as problem:
        log.warning("NOTIFY: %s; the message may come twice", problem)
        return True


def notice_of(job: JobContext, ending: Ending) -> Notice:
    """The message about an end, without a secret in it."""
    directory = job.directory
    trainer_said = tail_if_there(directory.log("training", ending.job_id, "out"), TAIL)
    step, steps = steps_said(trainer_said.replace("\r", "\n").splitlines())
    masked = mask_values(ending.reason, secret_values(job.environment))
    elapsed = elapsed_s(parse_object(read_if_there(directory.run_record)), datetime.now(timezone.utc))
    shown = Ending(ending.job_id, ending.ended, ending.exit_code, masked)
    return Notice(directory.path.name, str(directory.path), shown, step, steps, elapsed)


def ended_by(directory: CoordinationDir, job_id: str, exit_code: int | None, reason: str) -> Ending:
    """The ending of a training about which another job speaks: by its completion flag, else by what is known."""
    flag = parse_flag(read_if_there(directory.training_complete) or "{}")
    if flag is not None and not flag.by_hand and flag.job_id == job_id:
        return Ending(job_id, _how(flag), flag.exit_code, flag.reason or reason)
    ended = Ended.CANCELLED if "CANCELLED" in reason else Ended.FAILED if exit_code != 0 else Ended.COMPLETED
    return Ending(job_id, ended, exit_code, reason)


def _how(flag: Flag) -> Ended:
    known = flag.ended in {ended.value for ended in Ended}
    return Ended(flag.ended) if known else Ended.COMPLETED if flag.exit_code == 0 else Ended.FAILED


# --- mail of local runs ----------------------------------------------------------------------------------------------


def mail_program(environment: Mapping[str, str]) -> str | None:
    """The host's mail program; None where there is none."""
    places = os.pathsep.join(filter(None, [environment.get("PATH"), MAIL_FOLDERS]))
    return next(filter(None, (shutil.which(name, path=places) for name in MAIL_PROGRAMS)), None)


def send_mail(message: str, title: str, to: tuple[str, ...], environment: Mapping[str, str]) -> str | None:
    """Hand a mail to the host's mail program; returns what went wrong."""
    program = mail_program(environment)
    if program is None:
        return "this host has no mail program"
    headers, _, text = message.partition("\n\n")
    sendmail = Path(program).name == "sendmail"
    argv = (program, "-i", "--", *to) if sendmail else (program, "-s", " ".join(title.split()), *to)
    said = f"To: {', '.join(to)}\n{headers}\n\n{text}" if sendmail else text
    known = {name: environment[name] for name in ("PATH", "HOME", "USER", "LOGNAME", "LANG") if name in environment}
    try:
        done = run(argv, timeout_s=POST_S, environment=known, said=said)
    except SuiteError as problem:
        return str(problem)
    return None if done.ok else done.complaint
