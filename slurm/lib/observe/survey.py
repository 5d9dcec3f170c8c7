"""Looks at runs: reads their directories, asks Slurm once for the jobs of all of them, and API servers side by side.

``sacct`` is asked only about jobs that the queue no longer knows and that nobody has said the end of. A controller that
does not answer leaves jobs unknown. What has been read of a run that is over is not read again.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from slurm.lib.coordination import CoordinationDir, host_name
from slurm.lib.job_arrays import is_slurms
from slurm.lib.lookout import inquiry
from slurm.lib.observe.record import Pair, RecordedJob, RunRecord, read_record
from slurm.lib.observe.run_files import LogEnds, key_of, log_ends, read_small
from slurm.lib.observe.unknown import Unknown
from slurm.lib.runs import FoundRun
from slurm.lib.scheduler import ASK_TIMEOUT_S, JobState, JobStatus, LocalJobs, ShownJob, Slurm
from slurm.lib.signals import SignalNotes

if TYPE_CHECKING:  # imported while Slurm is asked, which takes about as long
    from slurm.lib.observe.nodes import Nodes
    from slurm.lib.observe.phase import Phase
    from slurm.lib.observe.run_view import JobView, PairView, RunView, Word
    from slurm.lib.observe.sandboxes import Sandboxes

SILENT = Unknown("Slurm does not answer")
ABSENT = Unknown("this host has no Slurm commands (squeue)")
ACCOUNTING_EVERY_S = 60.0
AT_ONCE = 5000  # ids of jobs in one question: an argument of a command has 128 KiB
EARLIER = timedelta(days=1)  # than the record, by which clock ever: accounting is asked about jobs since then
# A worker leaves within half a minute of its runtime job, by the clock of whichever node; later nothing is asked about
# it: of old runs there are many.
LEAVING_S = 3600.0


@dataclass
class Survey:
    """Looks at runs, again and again; ``Interrupted`` as soon as a signal has come."""

    slurm: Slurm
    notes: SignalNotes = field(default_factory=SignalNotes)
    ask_s: float = ASK_TIMEOUT_S
    heard: bool = True  # whether Slurm has answered the last time it was asked
    _gone: dict[str, Word] = field(default_factory=dict)  # what accounting said of jobs that have ended
    _accounting_asked: dict[str, float] = field(default_factory=dict)  # when, of which job

    def look(
        self,
        runs: Sequence[FoundRun],
        *,
        select: Callable[[list[RunView]], list[RunView]] = lambda views: views,
        servers: bool = True,
        logs: bool = True,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> list[RunView]:
        """The runs as they are now; with ``servers`` their sandboxes are counted too.

        With ``logs`` those are read of what ``select`` leaves: how far a run is stands only there. ``meanwhile`` is
        done while Slurm is asked.
        """
        records = [record_of(run) for run in runs]
        asked = Servers.ask(records) if servers else None
        answer = inquiry(lambda: self._words(records), self.notes)
        meanwhile()
        words = answer()
        views = select([without_logs(record, words) for record in records])
        views = [with_logs(view) for view in views] if logs else views
        return [asked.told(view) for view in views] if asked else views

    def asked_anew(self, job_ids: Sequence[str]) -> dict[str, ShownJob] | None:
        """What Slurm knows of jobs, whatever has been said of their ends; None where it does not answer."""
        shown: dict[str, ShownJob] = {}
        for at in range(0, len(job_ids), AT_ONCE):
            part = job_ids[at : at + AT_ONCE]
            known = inquiry(lambda part=part: self.slurm.known(part, self.ask_s), self.notes)()  # type: ignore[misc]
            self.heard = self.heard and known is not None
            if known is None:
                return None
            shown |= known
        return shown

    def _words(self, records: Sequence[RunRecord]) -> dict[str, Word]:
        """What is known from outside of each job whose end the records do not tell in its own words."""
        words: dict[str, Word] = {}
        asked: list[str] = []
        for record in records:
            jobs = [job for job in _in_question(record) if not (job.end and job.end.is_own)]
            local = [job for job in jobs if not is_slurms(job.job_id)]
            words |= _local_words(record, local) if local else {}
            asked += [job.job_id for job in jobs if is_slurms(job.job_id) and job.job_id not in self._gone]
        return words | self._of_slurm(records, list(dict.fromkeys(asked)))

    def _of_slurm(self, records: Sequence[RunRecord], asked: Sequence[str]) -> dict[str, Word]:
        known: dict[str, Word] = dict(self._gone)
        if not asked:
            return known
        shown = self.slurm.known(asked, self.ask_s)
        self.heard = shown is not None
        if shown is None:
            return known | dict.fromkeys(asked, SILENT if self.slurm.is_here else ABSENT)
        gone = [job_id for job_id in asked if job_id not in shown]
        self._ask_accounting(records, gone)
        return known | shown | {job_id: self._gone.get(job_id) for job_id in gone}

    def _ask_accounting(self, records: Sequence[RunRecord], gone: Sequence[str]) -> None:
        """Ask about jobs that the queue does not know any more, and whose end nobody has told; each once a minute."""
        told = {job.job_id for record in records for job in _jobs(record) if job.end is not None}
        told |= {job.job_id for record in records for pair in record.pairs if pair.is_left for job in pair.workers}
        now = time.monotonic()
        asked = [
            job_id
            for job_id in gone
            if job_id not in told and now - self._accounting_asked.get(job_id, -math.inf) >= ACCOUNTING_EVERY_S
        ]
        if asked:
            self._accounting_asked |= dict.fromkeys(asked, now)
            found = self.slurm.accounted(asked, _since(records, asked), self.ask_s)
            self._gone |= {job_id: job for job_id, job in found.items() if job_id in asked and job.state.is_final}


def record_of(run: FoundRun) -> RunRecord:
    """The record of a run, or of the one job that is known of it."""
    if run.directory is not None:
        return read_record(run.directory)
    jobs = tuple(RecordedJob(job.kind, job.job_id) for job in run.jobs())
    problem = "it has no run directory yet: it was given to sbatch directly, and has not begun"
    return RunRecord(None, (Pair(jobs),), problems=(problem,))


def _jobs(record: RunRecord) -> list[RecordedJob]:
    return [job for pair in record.pairs for job in pair.everybody]


def _in_question(record: RunRecord) -> list[RecordedJob]:
    """The jobs that Slurm knows and that may live, by what the record says of time: workers follow their runtime."""
    found = [job for pair in record.pairs for job in (pair.jobs if _is_long_over(pair) else pair.everybody)]
    return [job for job in found if job.kind != "worker" or job.array]


def _is_long_over(pair: Pair) -> bool:
    """Whether so long has passed since its runtime job said that it ended."""
    runtime = pair.job("runtime")
    if runtime is None or runtime.end is None or not pair.is_left:
        return False
    try:
        return time.time() - datetime.fromisoformat(runtime.end.time).timestamp() > LEAVING_S
    except (ValueError, OverflowError):
        return False


def _since(records: Iterable[RunRecord], job_ids: Sequence[str]) -> str:
    """A day before the first of the records that name these jobs."""
    times = []
    for record in records:
        if any(job.job_id in job_ids for job in _jobs(record)):
            try:
                times.append(datetime.fromisoformat(record.created).astimezone().replace(tzinfo=None))
            except (ValueError, OverflowError):
                continue
    first = min(times, default=datetime.now())
    return (first - EARLIER).isoformat(timespec="seconds")


def _local_words(record: RunRecord, jobs: Sequence[RecordedJob]) -> dict[str, Word]:
    """What is known of processes, which is nothing on another host."""
    if record.directory is None:
        return {}
    here = host_name()
    if record.host not in {"", here}:
        why = f"it is a local run on {record.host}, and its processes are known only there"
        return {job.job_id: Unknown(why) for job in jobs}
    processes = LocalJobs(record.directory.path / LocalJobs.FILE)
    return {job.job_id: _local_word(job.job_id, processes.status(job.job_id), here) for job in jobs}


def _local_word(job_id: str, status: JobStatus, host: str) -> Word:
    if status.state is JobState.RUNNING:
        return ShownJob(job_id, "", "RUNNING", status.words, host)
    return Unknown(status.words) if status.state is JobState.UNKNOWN else None


def without_logs(record: RunRecord, words: Mapping[str, Word]) -> RunView:
    """The run as its record and Slurm tell it."""
    from slurm.lib.observe.run_view import RunView, current, followed_by, pair_view

    pairs = [pair_view(record, pair, words) for pair in record.pairs]
    if not pairs:
        return RunView(record, None)
    at = current(pairs, record)
    return RunView(record, pairs[at], followed_by(pairs, at), tuple(pairs))


def with_logs(view: RunView) -> RunView:
    """The same with its phase and its last errors, as its logs say."""
    from slurm.lib.observe.run_view import phase_now

    if view.pair is None:
        return view
    pair, phases = _read_logs(view.pair, view.record.directory)
    return replace(view, pair=pair, phase=phase_now(pair, view.record, phases))


def _read_logs(pair: PairView, directory: CoordinationDir | None) -> tuple[PairView, dict[str, Phase | Unknown]]:
    """The pair with the last error of each job, and the phase of each that has begun; workers with their starts."""
    from slurm.lib.observe.phase import last_error, phase_of

    workers = tuple(_read_worker(worker, directory) for worker in pair.workers)
    jobs, phases = [], {}
    for job in pair.jobs:
        if directory is not None and job.has_log:
            out = log_ends(directory.log(job.kind, job.job_id, "out"))
            phases[job.kind] = out if isinstance(out, Unknown) else phase_of(job.kind, out)
            err = log_ends(directory.log(job.kind, job.job_id, "err"))
            job = replace(job, error="" if isinstance(err, Unknown) else last_error(err))
            job = _with_starts(job, directory, err) if job.kind == "runtime" else job
        jobs.append(job)
    return replace(pair, jobs=tuple(jobs), workers=workers), phases


def _read_worker(worker: JobView, directory: CoordinationDir | None) -> JobView:
    if directory is None or not worker.has_log:
        return worker
    from slurm.lib.observe.phase import end_of_worker, last_error
    from slurm.lib.observe.run_view import Stage

    out, err = (log_ends(directory.log(worker.kind, worker.job_id, suffix)) for suffix in ("out", "err"))
    why = "" if isinstance(out, Unknown) else end_of_worker(out)
    if worker.stage is Stage.ENDED and why:
        worker = replace(worker, end_reason=why)
    worker = replace(worker, error="" if isinstance(err, Unknown) else last_error(err))
    return _with_starts(worker, directory, err)


def _with_starts(job: JobView, directory: CoordinationDir, err: LogEnds | Unknown) -> JobView:
    """The same with the sandboxes that did not start, as its API server has counted them."""
    text = read_small(directory.sandbox_statistics(job.job_id))
    if isinstance(text, Unknown):
        return job
    from slurm.lib.observe.phase import last_failed_start
    from slurm.lib.observe.sandbox_statistics import read_statistics

    found = read_statistics(text)
    if found is None or not found.starts.failed:
        return job
    word = "" if isinstance(err, Unknown) else last_failed_start(err)
    return replace(job, asked_starts=found.starts.asked, failed_starts=found.starts.failed, failed_start=word)


# --- API servers ------------------------------------------------------------------------------------------------------

SERVER_S = 2.0  # for an answer of each
LATE = Unknown("its API server does not answer in time")


@dataclass
class Servers:
    """The API servers of runs, asked side by side, while Slurm says which of them can live."""

    answers: dict[str, Sandboxes | Unknown] = field(default_factory=dict)
    nodes: dict[str, Nodes | Unknown] = field(default_factory=dict)
    threads: dict[str, threading.Thread] = field(default_factory=dict)
    until: float = field(default_factory=lambda: time.monotonic() + SERVER_S + 1.0)  # the deadline is for one read

    @staticmethod
    def ask(records: Iterable[RunRecord]) -> Servers:
        """Begin to ask those that have said that they are ready, and whose job has not said that it ended."""
        asked = Servers()
        for record in records:
            for job_id in _ready_jobs(record):
                asked._begin(record, job_id)
        return asked

    def _begin(self, record: RunRecord, job_id: str) -> None:
        assert record.directory
        url, key = read_small(record.directory.runtime_url), key_of(record.directory)
        if isinstance(url, Unknown):
            self.answers[job_id] = url
            return
        has_nodes = record.nodes > 1
        args = (job_id, url.strip(), key, has_nodes)
        self.threads[job_id] = threading.Thread(target=self._ask, args=args, daemon=True)
        self.threads[job_id].start()

    def _ask(self, job_id: str, url: str, key: str | None, has_nodes: bool) -> None:
        from slurm.lib.observe import sandboxes

        begin = time.monotonic()
        self.answers[job_id] = sandboxes.ask(url, key, SERVER_S)
        if has_nodes and not isinstance(self.answers[job_id], Unknown):
            from slurm.lib.observe import nodes

            self.nodes[job_id] = nodes.ask(url, key, max(0.2, SERVER_S - (time.monotonic() - begin)))

    def told(self, view: RunView) -> RunView:
        """The run with what its server said, if one can live."""
        runtime = view.pair.job("runtime") if view.pair else None
        if runtime is None or not runtime.may_run or runtime.job_id not in {*self.threads, *self.answers}:
            return view
        if runtime.job_id in self.threads:
            self.threads[runtime.job_id].join(max(0.0, self.until - time.monotonic()))
        nodes = self.nodes.get(runtime.job_id, LATE) if view.record.nodes > 1 else None
        answer = self.answers.get(runtime.job_id, LATE)
        return replace(view, sandboxes=answer, nodes=answer if isinstance(answer, Unknown) and nodes else nodes)


def _ready_jobs(record: RunRecord) -> Iterator[str]:
    """The runtime jobs that the ready flag can be about."""
    flag = record.ready if record.directory else None
    for job in _jobs(record):
        is_over = job.end is not None and job.end.is_own
        if flag and job.kind == "runtime" and not is_over and (flag.by_hand or flag.job_id == job.job_id):
            yield job.job_id
