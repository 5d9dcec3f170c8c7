"""What is there to learn from a run: what each job did when, steps, sandboxes, use of what it had, and how it ended?

Read from the run's directory; of what has ended, accounting is asked too, where there is one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from slurm.lib.coordination import CoordinationDir
from slurm.lib.job_arrays import is_slurms
from slurm.lib.lookout import inquiry
from slurm.lib.observe.job_log import JobLog, read_job_log
from slurm.lib.observe.phase import last_error
from slurm.lib.observe.record import Pair, RunRecord
from slurm.lib.observe.run_files import log_ends, names_in, read_small
from slurm.lib.observe.run_view import JobView, PairView, RunView, Stage, pair_view
from slurm.lib.observe.sandbox_statistics import SandboxStatistics, all_nodes, read_statistics
from slurm.lib.observe.steps import Step, merged
from slurm.lib.observe.timeline import QUEUE, TRAINING, Mark, Span, spans, utc_epoch, zone_shift
from slurm.lib.observe.unknown import Unknown
from slurm.lib.observe.usage import Usage, UsageSample, efficiency, from_sacct, read_usage
from slurm.lib.scheduler import AccountedUse, Slurm
from slurm.lib.signals import SignalNotes

MOST_SAMPLES = 1 << 24  # bytes; a file of samples is 1 MB for a node
SLACK_S = 120.0  # clocks of nodes that differ by less are no reason to doubt what they say
EARLIER = timedelta(days=1)  # than the record, by which clock ever: accounting is asked about jobs since then
NO_SAMPLES = Unknown("no samples: the run is older than this version, or its job has not begun")
NO_STATISTICS = Unknown("no counts yet: they come within a minute of its start; runs of older versions have none")

DAMAGED = Unknown("its statistics are damaged, or of another schema")


@dataclass(frozen=True)
class JobReport:
    """A job: when it was submitted, started and ended (epoch seconds), and what it did in between.

    ``nodes`` is what the head in a runtime job said of its nodes.
    ``usages`` are what it used by each source that knows, the more exact one first; ``cut_steps`` is true where the log
    has more steps than are read.
    """

    job: JobView
    submitted: float | None = None
    started: float | None = None
    ended: float | None = None
    spans: tuple[Span, ...] = ()
    steps: tuple[Step, ...] = ()
    cut_steps: bool = False
    usages: tuple[Usage, ...] = ()
    samples: tuple[UsageSample, ...] = ()
    sandboxes: SandboxStatistics | Unknown | None = None
    nodes: tuple[Mark, ...] = ()
    problems: tuple[str, ...] = ()

    def queue_s(self, now: float) -> float | None:
        """How long it was in the queue, until now if it still is; None where that is not known."""
        until = self.started if self.started is not None else now if self.job.stage is Stage.PENDING else None
        return None if self.submitted is None or until is None else max(0.0, until - self.submitted)


@dataclass(frozen=True)
class AttemptReport:
    """The jobs of an attempt, a training job first, and the workers of its runtime."""

    number: int
    jobs: tuple[JobReport, ...]
    workers: tuple[JobReport, ...] = ()

    @property
    def servers(self) -> tuple[JobReport, ...]:
        """The nodes of its runtime that have run: its own job's, and the workers."""
        return tuple(one for one in (*self.jobs, *self.workers) if one.job.kind != "training" and one.job.has_log)

    @property
    def sandboxes(self) -> SandboxStatistics | Unknown | None:
        """What the API servers of all nodes have counted."""
        found = [one.sandboxes for one in self.servers if isinstance(one.sandboxes, SandboxStatistics)]
        runtime = self.job("runtime")
        return all_nodes(found) if found else runtime.sandboxes if runtime else None

    def job(self, kind: str) -> JobReport | None:
        return next((one for one in self.jobs if one.job.kind == kind), None)

    @property
    def steps(self) -> tuple[Step, ...]:
        training = self.job("training")
        return training.steps if training else ()


@dataclass(frozen=True)
class RunReport:
    """All attempts of a run as they were at ``now``; ``steps`` of all of them, the last time that each was done."""

    view: RunView
    attempts: tuple[AttemptReport, ...]
    now: float
    heard: bool = True

    @property
    def steps(self) -> tuple[Step, ...]:
        return merged(attempt.steps for attempt in self.attempts)

    @property
    def jobs(self) -> tuple[JobReport, ...]:
        return tuple(job for attempt in self.attempts for job in attempt.jobs)

    @property
    def launched(self) -> float | None:
        """When it was launched, else the first thing that is known of it."""
        created = utc_epoch(self.view.record.created)
        known = [moment for job in self.jobs for moment in (job.submitted, job.started) if moment is not None]
        return created if created is not None else min(known, default=None)

    @property
    def finished(self) -> float | None:
        """When the last of its jobs ended; None while one goes on."""
        if not self.view.state.is_over:
            return None
        return max((job.ended for job in self.jobs if job.ended is not None), default=None)

    @property
    def problems(self) -> tuple[str, ...]:
        found = [*self.view.record.problems, *(problem for job in self.jobs for problem in job.problems)]
        return tuple(dict.fromkeys(found))


# --- reading ----------------------------------------------------------------------------------------------------------


def read_report(view: RunView, slurm: Slurm, notes: SignalNotes, *, heard: bool = True) -> RunReport:
    """The report of a run that was looked at; ``Interrupted`` as soon as a signal has come while Slurm is asked."""
    pairs = all_pairs(view)
    everybody = [job for pair in pairs for job in pair.everybody if job.kind != "worker" or job.array]
    ids = [job.job_id for job in everybody if is_slurms(job.job_id) and job.has_log]
    asked = bool(ids) and slurm.is_here and view.record.backend != "local"
    answer = inquiry(lambda: slurm.use(ids, _since(view.record)) if asked else {}, notes)
    now = time.time()
    read = [[_read_job(view.record, pair, job, notes) for job in pair.everybody] for pair in pairs]
    use = answer()
    attempts = []
    for pair, jobs in zip(pairs, read, strict=True):
        told = tuple(with_accounting(job, use.get(job.job.job_id, ())) for job in jobs)
        attempts.append(AttemptReport(pair.attempt, told[: len(pair.jobs)], told[len(pair.jobs) :]))
    return RunReport(view, tuple(attempts), now, heard)


def all_pairs(view: RunView) -> list[PairView]:
    """Every attempt, those that Slurm was not asked about by what the run's directory says of them."""
    known = [pair for pair in (view.pair, view.following) if pair]
    by_ids = {tuple(job.job_id for job in pair.jobs): pair for pair in known}
    return [
        by_ids.get(tuple(job.job_id for job in pair.jobs)) or pair_view(view.record, pair, {})
        for pair in view.record.pairs
    ]


def _since(record: RunRecord) -> str:
    created = utc_epoch(record.created)
    first = datetime.fromtimestamp(created) if created is not None else datetime.now() - EARLIER
    return (first - EARLIER).isoformat(timespec="seconds")


def _read_job(record: RunRecord, pair: PairView, job: JobView, notes: SignalNotes) -> JobReport:
    directory = record.directory
    submitted = _submitted(record, pair, job)
    if directory is None or not job.has_log:
        return without_log(job, submitted)
    log, problems = JobLog(), []
    try:
        log = read_job_log(directory.log(job.kind, job.job_id, "out"), job.kind, notes.check)
    except OSError as problem:
        problems = [f"{job.kind}_{job.job_id}.out: {problem.strerror or 'it is no regular file'}"]
    job = replace(job, error=job.error or _error(directory, job))
    made = replace(job_report(job, log, submitted), problems=tuple(problems))
    return with_measurements(made, *_measurements(directory, job))


def _submitted(record: RunRecord, pair: PairView, job: JobView) -> float | None:
    """When a job was submitted: as the record of its pair says, or that of the run for a runtime that was joined."""
    recorded = next((one for one in record.pairs if _ids(one) == [other.job_id for other in pair.jobs]), None)
    return utc_epoch(recorded.created) if recorded and recorded.created else None


def _ids(pair: Pair) -> list[str]:
    return [job.job_id for job in pair.jobs]


def _error(directory: CoordinationDir, job: JobView) -> str:
    err = log_ends(directory.log(job.kind, job.job_id, "err"))
    return "" if isinstance(err, Unknown) else last_error(err)


def _measurements(directory: CoordinationDir, job: JobView) -> tuple[str | Unknown, str | Unknown]:
    """The texts of a job's samples and of its server's statistics."""
    names = names_in(directory.path)

    def text(name: str, absent: Unknown) -> str | Unknown:
        is_there = not isinstance(names, Unknown) and name in names
        return read_small(directory.path / name, MOST_SAMPLES) if is_there else absent

    statistics = f"sandbox_statistics_{job.job_id}.json"
    return text(f"usage_{job.kind}_{job.job_id}.jsonl", NO_SAMPLES), text(statistics, NO_STATISTICS)


# --- pure -------------------------------------------------------------------------------------------------------------


def without_log(job: JobView, submitted: float | None) -> JobReport:
    """A job that has not begun to write its log: in the queue, or ended there."""
    started = job.starts_at if job.stage is Stage.RUNNING else None
    ended = utc_epoch(job.end_time)
    submitted = _believed(submitted, started if started is not None else ended)
    queue = _queue_span(submitted, started if started is not None else ended, job.stage is Stage.PENDING)
    return JobReport(job, submitted, started, ended, queue)


def job_report(job: JobView, log: JobLog, submitted: float | None) -> JobReport:
    """A job by its log."""
    told = utc_epoch(job.end_time)
    shift = zone_shift(log.marks, told)
    marks = [Mark(mark.at + shift, mark.words) for mark in log.marks]
    steps = tuple(replace(step, at=None if step.at is None else step.at + shift) for step in log.steps)
    goes_on = job.may_run and told is None
    by_slurm = job.starts_at if job.stage is Stage.RUNNING else None  # its log is empty yet
    started = marks[0].at if marks else by_slurm
    submitted = _believed(submitted, started)
    last = marks[-1].at if marks else None
    ended = told if told is not None else _latest(last, _end_by_slurm(job)) if not goes_on else None
    found = spans(marks, steps, ended, goes_on)
    job = replace(job, node=job.node or log.node)
    nodes = tuple(Mark(mark.at + shift, mark.words) for mark in log.nodes)
    done = (*_queue_span(submitted, started), *found)
    return JobReport(job, submitted, started, ended, done, steps, log.cut, nodes=nodes)


def _believed(submitted: float | None, started: float | None) -> float | None:
    """When a job that began then was submitted. What is noted long after its begin, by another launch, is not believed.

    A submission is noted once Slurm has taken it, in whole seconds: the job may have begun in the second before.
    """
    if submitted is None or started is None:
        return submitted
    return None if submitted > started + SLACK_S else min(submitted, started)


def _end_by_slurm(job: JobView) -> float | None:
    """When a job ended of which only Slurm says it: its body was killed."""
    known = job.stage is Stage.ENDED and job.starts_at is not None and job.elapsed_s is not None
    return (job.starts_at or 0.0) + (job.elapsed_s or 0.0) if known else None


def _latest(*moments: float | None) -> float | None:
    return max((moment for moment in moments if moment is not None), default=None)


def _queue_span(submitted: float | None, until: float | None, goes_on: bool = False) -> tuple[Span, ...]:
    if submitted is None or (until is None and not goes_on):
        return ()
    return (Span(QUEUE, submitted, until),)


def with_measurements(report: JobReport, samples: str | Unknown, statistics: str | Unknown) -> JobReport:
    """The job with what was measured while it ran."""
    read = read_usage(samples) if isinstance(samples, str) else ()
    usages = (efficiency(read),) if read else ()
    if report.job.kind == "training":
        return replace(report, samples=read, usages=usages)
    found = statistics if isinstance(statistics, Unknown) else read_statistics(statistics) or DAMAGED
    return replace(report, samples=read, usages=usages, sandboxes=found)


def with_accounting(report: JobReport, rows: Iterable[AccountedUse]) -> JobReport:
    """The job with what accounting says of it, which counts before its samples, once it has ended."""
    used = from_sacct(rows)
    is_told = used.span_s is not None and report.job.stage is Stage.ENDED
    return replace(report, usages=(used, *report.usages)) if is_told else report


def figure(usages: Sequence[Usage], of: Callable[[Usage], float | None]) -> tuple[float, str] | None:
    """A figure of the first source that knows it, and the source's name."""
    known = ((of(usage), usage.source) for usage in usages)
    return next(((value, source) for value, source in known if value is not None and math.isfinite(value)), None)


def start_up(report: JobReport) -> tuple[Span, ...]:
    """What a job did from its start until it served, or trained."""
    found = [span for span in report.spans if span.words != QUEUE]
    ends = {TRAINING, "serving", "stopping", "stopping the trainer"}
    at = next((at for at, span in enumerate(found) if span.words in ends), len(found))
    return tuple(found[:at])


def first_step_at(report: RunReport) -> float | None:
    """When the first step of the run began."""
    begins = [span.begin for job in report.jobs for span in job.spans if span.words == TRAINING]
    return min(begins, default=None)
