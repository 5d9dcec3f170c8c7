"""What is a run's state? Decided from its record, from Slurm's word about its jobs, and from what their logs say.

A job's own word about its end counts most: it is its last act. Then Slurm's, then its partner's. Where Slurm is silent
and nobody has said that a job ended, its state is unknown, not ended.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from slurm.lib.observe.phase import Phase
from slurm.lib.observe.record import Pair, RecordedJob, RunRecord
from slurm.lib.observe.unknown import Unknown
from slurm.lib.scheduler import JobState, ShownJob

if TYPE_CHECKING:  # what servers answer is imported where one is asked: 2 ms, felt in commands that look
    from slurm.lib.observe.gpus import Gpu
    from slurm.lib.observe.nodes import Nodes
    from slurm.lib.observe.sandboxes import Sandboxes


class Stage(str, enum.Enum):
    """How far a job is."""

    PENDING = "pending"
    RUNNING = "running"
    ENDED = "ended"
    UNKNOWN = "unknown"


class RunState(str, enum.Enum):
    """A run's state in one word, for people and for scripts."""

    PENDING = "pending"
    STARTING = "starting"  # its runtime job runs, and its server is not ready
    WAITING = "waiting"  # its server is ready, and its training job waits for GPUs
    SERVING = "serving"  # a runtime that was launched alone, without a training
    RUNNING = "running"  # its training job runs
    ENDING = "ending"  # its training has ended, its runtime not yet
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"  # by a time limit, a lost node and the like; no other attempt follows
    ENDED = "ended"  # how is not known
    UNKNOWN = "unknown"

    @property
    def is_over(self) -> bool:
        return self in {
            RunState.COMPLETED,
            RunState.FAILED,
            RunState.CANCELLED,
            RunState.INTERRUPTED,
            RunState.ENDED,
        }


# What is known of a job from outside: Slurm's word, None where it knows none, or why there is no word.
Word = ShownJob | Unknown | None


@dataclass(frozen=True)
class JobView:
    """A job: its stage, and what goes with that.

    ``word`` and ``reason`` are Slurm's for its state; ``starts_at`` in epoch seconds of the controller's clock; what is
    None or empty is not known, or does not apply. ``ended`` is a word of ``restarts.Ended``; ``why_unknown`` says why
    the stage is not known; ``error`` is the last line of its ``.err`` that says what went wrong. ``failed_starts`` are
    the sandboxes of a runtime job that did not start, by reason, and ``failed_start`` is its word about the last one.
    ``is_presumed``: it counts as ended only since Slurm knows no such job, which may be one of another cluster.
    Of a worker ``array`` is the array, empty for a step of the runtime job, ``number`` Slurm's own for it, and
    ``is_needed`` whether the training waits for its start.
    """

    kind: str
    job_id: str
    stage: Stage
    word: str = ""
    reason: str = ""
    node: str = ""
    partition: str = ""
    starts_at: float | None = None
    elapsed_s: float | None = None
    limit_s: float | None = None
    exit_code: int | None = None
    end_reason: str = ""
    end_time: str = ""
    ended: str = ""
    why_unknown: str = ""
    has_log: bool = False
    error: str = ""
    failed_starts: Mapping[str, int] = field(default_factory=dict)
    asked_starts: int = 0
    failed_start: str = ""
    is_presumed: bool = False
    array: str = ""
    number: str = ""
    is_needed: bool = False

    @property
    def lives(self) -> bool:
        return self.stage in {Stage.PENDING, Stage.RUNNING}

    @property
    def may_run(self) -> bool:
        return self.stage in {Stage.RUNNING, Stage.UNKNOWN}


@dataclass(frozen=True)
class PairView:
    """The jobs of one attempt as they are now, a training job first; and the workers of its runtime."""

    jobs: tuple[JobView, ...]
    attempt: int
    workers: tuple[JobView, ...] = ()

    @property
    def everybody(self) -> tuple[JobView, ...]:
        return (*self.jobs, *self.workers)

    def job(self, kind: str) -> JobView | None:
        return next((job for job in self.jobs if job.kind == kind), None)

    @property
    def lead(self) -> JobView:
        """The job that the run is about."""
        return self.jobs[0]


GPUS = "waiting for GPUs"
LEFT = "its runtime job has ended, and Slurm does not know it any more"
NO_PHASE = Unknown("nothing is known of its jobs")


@dataclass(frozen=True)
class RunView:
    """A run as it is now: its record, the attempt that counts, the one that waits for its end, and how far it is.

    ``pairs`` are all its attempts, and jobs that joined it, in the order in which they were submitted.
    ``sandboxes`` is None where no server runs, ``nodes`` where the runtime has one, ``gpus`` where they were not asked
    for.
    """

    record: RunRecord
    pair: PairView | None
    following: PairView | None = None
    pairs: tuple[PairView, ...] = ()
    phase: Phase | Unknown = NO_PHASE
    sandboxes: Sandboxes | Unknown | None = None
    nodes: Nodes | Unknown | None = None
    gpus: tuple[Gpu, ...] | Unknown | None = None

    @property
    def state(self) -> RunState:
        return state_of(self.pair, self.record) if self.pair else RunState.UNKNOWN

    @property
    def lives(self) -> bool:
        """Whether a job of it, or a worker, is in the queue or runs; also where that is not known."""
        pairs = [pair for pair in (self.pair, self.following) if pair]
        return any(job.lives or job.stage is Stage.UNKNOWN for pair in pairs for job in pair.everybody)

    @property
    def unended(self) -> list[JobView]:
        """The jobs and workers of whatever attempt that live, and those of which that is not known, each once."""
        jobs = {job.job_id: job for pair in self.pairs for job in pair.everybody}
        return [job for job in jobs.values() if job.stage is not Stage.ENDED]


def believed(record: RunRecord, word: Word) -> Word:
    """Slurm's word about a job of a run, unless its number is by now that of another user's job."""
    foreign = isinstance(word, ShownJob) and word.user and record.user and word.user != record.user
    return None if foreign else word


def job_view(job: RecordedJob, word: Word) -> JobView:
    """The job, from what the run's directory and Slurm say."""
    view = _by_slurm(job, word)
    end = job.end
    if end is None or (view.lives and not end.is_own):
        return view
    code = end.exit_code if end.exit_code is not None else view.exit_code
    return replace(
        view,
        stage=Stage.ENDED,
        exit_code=code,
        end_reason=end.reason,
        end_time=end.time,
        ended=end.ended or view.ended,
        why_unknown="",
        is_presumed=False,
    )


_ENDED_WORDS = {  # Slurm's words as restarts.Ended has them
    "COMPLETED": "completed",
    "CANCELLED": "cancelled",
    "TIMEOUT": "interrupted",
    "NODE_FAIL": "interrupted",
    "PREEMPTED": "interrupted",
    "BOOT_FAIL": "interrupted",
    "FAILED": "failed",
    "OUT_OF_MEMORY": "failed",
    "DEADLINE": "failed",
}


def _by_slurm(job: RecordedJob, word: Word) -> JobView:
    view = JobView(job.kind, job.job_id, Stage.UNKNOWN, has_log=job.has_log, array=job.array, is_needed=job.is_needed)
    if isinstance(word, Unknown):
        return replace(view, why_unknown=word.why)
    if word is None:
        why = "how it ended is not known: Slurm does not know it any more"
        return replace(view, stage=Stage.ENDED, end_reason=why, is_presumed=True)
    limit = word.limit_s if word.limit_s is None or math.isfinite(word.limit_s) else None
    view = replace(
        view,
        word=word.word,
        reason=word.reason,
        node=word.node,
        partition=word.partition,
        starts_at=word.starts_at,
        elapsed_s=word.elapsed_s,
        limit_s=limit,
        number=word.number,
    )
    if word.state is JobState.PENDING or word.state is JobState.RUNNING:
        return replace(view, stage=Stage[word.state.name])
    if word.state is JobState.UNKNOWN:
        return replace(view, why_unknown=f"Slurm says {word.word}")
    reason = "" if word.word == "CANCELLED" else word.reason  # what it waited for before
    words = f"Slurm says {word.word}" + (f" ({reason})" if reason else "")
    code = 0 if word.word == "COMPLETED" and word.exit_code is None else word.exit_code
    ended = _ENDED_WORDS.get(word.word, "")
    return replace(view, stage=Stage.ENDED, exit_code=code, ended=ended, end_reason=words)


def pair_view(record: RunRecord, pair: Pair, words: Mapping[str, Word]) -> PairView:
    """The pair with what Slurm says of each job, by id."""
    jobs, workers = (
        tuple(job_view(job, believed(record, words.get(job.job_id))) for job in some)
        for some in (pair.jobs, pair.workers)
    )
    workers = tuple(_with_runtime(worker, jobs) if not worker.array else worker for worker in workers)
    return PairView(jobs, pair.attempt, tuple(_left(worker) for worker in workers) if pair.is_left else workers)


def _with_runtime(step: JobView, jobs: Sequence[JobView]) -> JobView:
    """A worker that is a step of the runtime job: it lives no longer than that one."""
    runtime = next((job for job in jobs if job.kind == "runtime"), None)
    stage = runtime.stage if runtime else Stage.UNKNOWN
    why = runtime.why_unknown if runtime else ""
    return replace(step, stage=stage, end_reason="", is_presumed=False, why_unknown=why)


def _left(worker: JobView) -> JobView:
    """A worker of a runtime that has ended, which takes its workers with it: it need not be known to Slurm."""
    return replace(worker, end_reason=LEFT, is_presumed=False) if worker.is_presumed else worker


def current(pairs: Sequence[PairView], record: RunRecord) -> int:
    """Which pair the run is about now: one that lives, else the one whose end was the run's."""
    numbers = range(len(pairs))
    flag = record.completion
    told = [at for at in numbers if flag and flag.job_id and pairs[at].lead.job_id == flag.job_id]
    is_last_word = flag is not None and flag.ended not in {"", "interrupted"}
    begun = [at for at in numbers if pairs[at].lead.has_log or any(job.has_log for job in pairs[at].jobs)]
    unknown = [at for at in numbers if pairs[at].lead.stage is Stage.UNKNOWN]
    choices = (
        [at for at in numbers if pairs[at].lead.lives][:1],
        told if is_last_word else [],
        [at for at in unknown if at in begun][-1:],
        unknown[:1],
        begun[-1:],
        told,
    )
    return next((found[0] for found in choices if found), 0)


def followed_by(pairs: Sequence[PairView], at: int) -> PairView | None:
    """The pair that waits for the end of the current one."""
    return next((pair for pair in pairs[at + 1 :] if pair.lead.lives), None)


def is_ready(pair: PairView, record: RunRecord) -> bool:
    """Whether the pair's API server has said that it is ready; its job may have ended since."""
    runtime, flag = pair.job("runtime"), record.ready
    return flag is not None and (flag.by_hand or runtime is None or flag.job_id in {"", runtime.job_id})


def state_of(pair: PairView, record: RunRecord) -> RunState:
    """The state of a run that is about this pair."""
    training, runtime = pair.job("training"), pair.job("runtime")
    serves = runtime is not None and runtime.stage is Stage.RUNNING
    if pair.lead.stage is Stage.UNKNOWN:
        return RunState.UNKNOWN
    if pair.lead.stage is Stage.ENDED:
        return RunState.ENDING if training and serves else _ended(pair.lead)
    if training and training.stage is Stage.RUNNING:
        return RunState.RUNNING
    if not serves:
        return RunState.PENDING
    if not is_ready(pair, record):
        return RunState.STARTING
    return RunState.WAITING if training else RunState.SERVING


def _ended(job: JobView) -> RunState:
    if job.ended:
        return next((state for state in RunState if state.value == job.ended), RunState.ENDED)
    if job.exit_code is None:
        return RunState.ENDED
    return RunState.FAILED if job.exit_code else RunState.COMPLETED


def phase_now(pair: PairView, record: RunRecord, phases: Mapping[str, Phase | Unknown]) -> Phase | Unknown:
    """What the run does: its training's phase, or what that waits for. ``phases`` by kind of job, from the logs."""
    training, runtime = pair.job("training"), pair.job("runtime")
    of_training, of_runtime = phases.get("training"), phases.get("runtime")
    state = state_of(pair, record)
    if state is RunState.UNKNOWN:
        return Unknown(pair.lead.why_unknown)
    if state is RunState.WAITING:
        waits = [worker for worker in pair.workers if worker.is_needed and worker.stage is Stage.PENDING]
        return Phase(f"waiting for {len(waits)} workers" if waits[1:] else "waiting for a worker" if waits else GPUS)
    if state is RunState.PENDING:
        return Phase("in the queue")
    if training is None or state is RunState.STARTING:
        return of_runtime or Unknown("its runtime has no log yet")
    if state.is_over or state is RunState.ENDING:
        words = state.value if state is RunState.ENDING else Stage.ENDED.value
        return replace(of_training, words=words) if isinstance(of_training, Phase) else Phase(words)
    if isinstance(of_training, Phase) and of_training.words == "waiting for its runtime" and runtime:
        return _waiting_for(runtime, of_runtime)
    return of_training or Unknown("its training has no log")


def _waiting_for(runtime: JobView, phase: Phase | Unknown | None) -> Phase:
    words = phase.words if isinstance(phase, Phase) and runtime.stage is Stage.RUNNING else runtime.stage.value
    return Phase(f"waiting for its runtime ({words})")
