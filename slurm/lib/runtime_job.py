"""The runtime job: private Podman storage, Podman service, API server; its address is published once it answers.

With RUNTIME_NODES it is the head and node 0 of a runtime on several nodes: then the head is what is published, once
enough nodes have joined it. ``serving`` brings up what serves, ``watchers`` sees what happens, ``supervisor`` decides
what it means, and here that is done.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from slurm.lib.api_server_child import ApiServer, Membership
from slurm.lib.attempts import refused, why_ended
from slurm.lib.coordination import Flag
from slurm.lib.deadlines import own_end
from slurm.lib.endings import End, is_followed, note_ends
from slurm.lib.errors import EXIT_SIGNAL_BASE, EXIT_UNAVAILABLE, EnvironmentProblem
from slurm.lib.head_child import head_of
from slurm.lib.job_context import JobContext, run_body
from slurm.lib.logs import log
from slurm.lib.lookout import answered
from slurm.lib.nodes_watch import JoinWatch
from slurm.lib.notice import Ending
from slurm.lib.notify import Sending, ended_by, patience_s, tell, warn_of_mail
from slurm.lib.restarts import Ended
from slurm.lib.run_record import partner_of
from slurm.lib.runs import stranger
from slurm.lib.scheduler import JobState, Slurm
from slurm.lib.serving import Ground, ServingBody, Watch, await_health
from slurm.lib.shared_images import removed_with_the_run
from slurm.lib.signals import SignalNotes
from slurm.lib.supervisor import (
    Action,
    NoteEnd,
    Outcome,
    Part,
    Publish,
    Stop,
    Supervisor,
    TellTraining,
    Withdraw,
)
from slurm.lib.watchers import RunWatch, TrainingWatcher
from slurm.lib.worker_plan import has_arrays, has_head
from slurm.lib.worker_recall import Recall
from slurm.lib.worker_steps import WorkerSteps, worker_steps

ASK_S = 5.0  # whose a training is
ASK_AT_END_S = 2.0  # how a training is, before this job has noted its own end


def main(argv: Sequence[str]) -> int:
    """Run the job; returns its exit code."""
    return run_body("runtime", "runtime_server.py", argv, run)


def run(job: JobContext, notes: SignalNotes) -> int:
    """Serve until there is a reason to end; the reason stands where the training job looks."""
    log.info("runtime job %s on %s, coordination directory %s", job.job_id, socket.gethostname(), job.directory.path)
    warn_of_mail(job)
    with removed_with_the_run(job), Recall(job) as recall:
        refusal = refused(job, "runtime", notes)
        if refusal is not None:
            return refusal
        say_what_to_submit(job)
        return RuntimeJob(job, notes, Supervisor(has_head=has_head(job.settings)), recall=recall).run()


def say_what_to_submit(job: JobContext) -> None:
    """For a job given to sbatch directly, whose further nodes nobody has queued."""
    if not has_arrays(job.settings) or job.was_launched:
        return
    last = job.settings.runtime_nodes - 1
    log.info(
        "this job submits no further nodes; do so with:  SKYRL_COORD_DIR=%s sbatch --array=1-%d SIZES %s WORDS, where "
        "SIZES are this job's options of sbatch (--partition, --cpus-per-task, --mem, --time), and WORDS its --config "
        "and --set",
        *(job.directory.path, last, job.code / "slurm" / "jobs" / "runtime_worker.py"),
    )


@dataclass
class RuntimeJob(ServingBody):
    """The runtime job's edge of the supervisor. ``recall`` ends its worker arrays; ``steps`` are workers too."""

    withdrawn: tuple[End, ...] = ()
    recall: Recall | None = None
    steps: WorkerSteps = field(default_factory=WorkerSteps)
    watch: RunWatch = field(init=False)

    kind = "runtime"

    def __post_init__(self) -> None:
        self.watch = RunWatch(self.job, self.notes, TrainingWatcher.of(self.job))

    @property
    def watching(self) -> Watch:
        return self.watch

    @contextlib.contextmanager
    def membership(self, ground: Ground) -> Iterator[tuple[str, Membership | None]]:
        """The key of the run; and with several nodes the head, which is this job's too, and its further nodes."""
        job, key = self.job, api_key(self.job)
        if not has_head(job.settings):
            yield key, None
            return
        with head_of(job, ground, key) as head, worker_steps(job) as steps:
            self.watch.head, self.steps = head, steps
            self.restarts[Part.HEAD] = head.restart
            await_health(head, self)
            admit(job, head)
            until = answered(lambda: own_end(job.job_id, job.environment, job.scheduler), self.notes)
            with self.joining(head, steps):
                yield key, Membership(head.local_url, node_name(job), until, job.settings.runtime_drain_lead)

    @contextlib.contextmanager
    def joining(self, head: ApiServer, steps: WorkerSteps) -> Iterator[None]:
        """What has joined the head is looked at in the background, and the steps that are this job's nodes."""
        with JoinWatch(self.job, head, steps).asking() as joined, steps.watched(head):
            self.watch.joined = joined
            yield

    def do_own(self, action: Action) -> None:
        if isinstance(action, Publish):
            face = self.watch.head or self.watch.server
            assert face is not None
            self.watch.serves(face)
            publish(self.job, face)
        elif isinstance(action, Stop):
            self.let_workers_go(action.outcome)
        elif isinstance(action, TellTraining):
            tell_training(self.job, action.outcome)
        elif isinstance(action, Withdraw):
            training = self.watch.training
            has_begun = training.launched_with and training.has_heard
            if not has_begun:  # else Slurm is not asked about it: KillWait may run
                self.withdrawn = withdraw_training(self.job, action.outcome, training.launched_with)
        elif isinstance(action, NoteEnd):
            self.conclude(action)

    def let_workers_go(self, outcome: Outcome) -> None:
        """Have the workers end while this job stops everything else: Slurm's KillWait may be running."""
        self.steps.let_go()
        if self.recall:
            # Under a signal KillWait runs, and what follows the recall has to come before Slurm's KILL.
            self.recall.begin(as_planned=outcome.as_planned and self.notes.stop_signal is None)

    def conclude(self, action: NoteEnd) -> None:
        """The last word, in the log and in the run's record."""
        outcome = action.outcome
        (log.info if outcome.as_planned else log.error)("runtime job %s ends: %s", self.job.job_id, outcome.reason)
        ending = self.unsaid(outcome)
        told = tell(self.job, ending) if ending else Sending()
        self.note_end(outcome)
        told.finish(patience_s(self.notes))

    def note_end(self, outcome: Outcome) -> None:
        own = End("runtime", self.job.job_id, outcome.exit_code, outcome.reason, "runtime")
        note_ends(self.job.directory, own, *(outcome.others or self.training_said()), *self.withdrawn)

    def training_said(self) -> tuple[End, ...]:
        """What the training's flag says by now: where both are signalled, both write one record at one moment."""
        flag = self.watch.training.reader.read()
        return (End.of_flag("training", flag),) if flag and not flag.by_hand else ()

    def unsaid(self, outcome: Outcome) -> Ending | None:
        """The end that this job tells people of: its own where it has no training, else that of one that is gone.

        A training that lives tells it itself, and one that another attempt follows is not the end.
        """
        job = self.job
        if not job.settings.notify:
            return None
        training = partner_of(job.directory, "runtime", job.job_id)
        if training is None:
            return Ending(job.job_id, self.how_alone(outcome), outcome.exit_code, outcome.reason)
        known = [end for end in (*outcome.others, *self.withdrawn) if end.kind == "training"]
        goes_on = is_followed(job.directory, training) or (outcome.as_planned and not known)
        if goes_on or not (known or job.scheduler.status(training, ASK_AT_END_S).state.is_final):
            return None
        end = known[0] if known else End("training", training, outcome.exit_code, outcome.reason, "runtime")
        return ended_by(job.directory, end.job_id, end.exit_code, end.reason)

    def how_alone(self, outcome: Outcome) -> Ended:
        """How the end of a runtime without a training is called."""
        if outcome.exit_code > EXIT_SIGNAL_BASE:
            return why_ended(self.job, "runtime", None).ended
        return Ended.FAILED if outcome.exit_code else Ended.COMPLETED


def tell_training(job: JobContext, outcome: Outcome) -> None:
    """Say why this job ends before the training does."""
    flag = Flag.of_this_host(job.job_id, job.job_id, outcome.exit_code, outcome.reason, how_ended(job, outcome))
    try:
        job.directory.publish(job.directory.runtime_failed, flag)
    except EnvironmentProblem as problem:
        log.error("%s; the training job will notice that this job has ended", problem)


def how_ended(job: JobContext, outcome: Outcome) -> str:
    """Whether a person ended this job, or something that nobody wanted, after which a training may be restarted."""
    if not job.settings.restarts:
        return ""
    signalled = outcome.exit_code > EXIT_SIGNAL_BASE
    return why_ended(job, "runtime", None).ended if signalled else Ended.INTERRUPTED


def withdraw_training(job: JobContext, outcome: Outcome, known: str | None) -> tuple[End, ...]:
    """Take a training job that has not started out of the queue: it could only fail. Its flag says why; so it ended.

    ``known`` is its id where that need not be looked up.
    """
    training = known or partner_of(job.directory, "runtime", job.job_id)
    if not training or job.scheduler.status(training).state is not JobState.PENDING:
        return ()
    whose = stranger(training, job.directory, job.scheduler, ASK_S) if isinstance(job.scheduler, Slurm) else ""
    if whose:
        log.warning("a record here names the training job %s, which %s; it stays in the queue", training, whose)
        return ()
    complaint = job.scheduler.cancel([training])
    log.warning("cancelled the pending training job %s, which could only fail%s", training, complaint or "")
    reason = f"taken out of the queue before it began: the runtime job {job.job_id} failed: {outcome.reason}"
    flag = Flag.of_this_host(training, job.job_id, EXIT_UNAVAILABLE, reason, Ended.FAILED)
    try:
        job.directory.speak_for(job.directory.training_complete, flag)
    except EnvironmentProblem as problem:
        log.error("%s", problem)
    return (End("training", training, flag.exit_code, reason, "runtime"),)


def api_key(job: JobContext) -> str:
    """The key of this run's server: the configured one, else a new one."""
    return job.environment.get("ALLHANDS_API_KEY") or secrets.token_urlsafe(32)


def node_name(job: JobContext) -> str:
    """How this job's own node is called among those of its head."""
    return job.environment.get("SLURMD_NODENAME") or socket.gethostname()


def admit(job: JobContext, head: ApiServer) -> None:
    """Say where the head is, for the nodes that are to join it."""
    job.directory.publish_head(head.url, head.key, Flag.of_this_host(job.job_id, job.job_id))
    log.info("head answers at %s; its nodes may join", head.url)


def publish(job: JobContext, server: ApiServer) -> None:
    """Say where the server is, now that it answers."""
    job.directory.publish_server(server.url, server.key, Flag.of_this_host(job.job_id, job.job_id))
    log.info("API server ready at %s", server.url)
