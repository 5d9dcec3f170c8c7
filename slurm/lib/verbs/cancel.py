"""``launch.py cancel``: end runs, those that are named or all that live, now or each after its next checkpoint."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from slurm.lib.cancel import END_S, SLOWEST_START_S, Cancellation, Hand, LocalHand, SlurmHand, Watched, conclude
from slurm.lib.command_line import Parser, say
from slurm.lib.coordination import host_name, jobs_base
from slurm.lib.errors import (
    EXIT_ENVIRONMENT,
    EXIT_OK,
    EXIT_SIGNAL_BASE,
    EXIT_TIMEOUT,
    EnvironmentProblem,
)
from slurm.lib.job_arrays import folded
from slurm.lib.logs import log
from slurm.lib.processes import own_age_s
from slurm.lib.runs import FoundRun, refuse_unknown_jobs
from slurm.lib.scheduler import Slurm
from slurm.lib.signals import Interrupted, SignalNotes
from slurm.lib.verbs.agreement import is_agreed
from slurm.lib.verbs.named import named
from slurm.lib.verbs.spans import seconds_in

if TYPE_CHECKING:  # imported by the form that needs it: Python's start is a part of the 15 s
    from slurm.lib.after_checkpoint import CheckpointWait, Due

FIND_S = 5.0  # for all questions about which runs are meant
PATIENCE_S = 2 * 3600.0
EPILOG = """\
exit codes: 0 all jobs of the runs have ended, or had before, or no run lives; 2 there is no such run, nothing to wait
for, or nobody to ask: nothing was cancelled; 71 a local run of another host, or a run's directory has gone while its
checkpoint was waited for; 75 a job has not ended within 15 s, Slurm did not answer, or no checkpoint came; 128+N
stopped by signal N: what was begun goes on, and what was waited for is not cancelled.
"""


def build_parser() -> Parser:
    parser = Parser(prog="launch.py cancel", description="End runs within 15 s: every job of each.", epilog=EPILOG)
    named = "a run's directory, the beginning of its name, the id of any of its jobs, or latest"
    parser.add_argument("runs", metavar="RUN", nargs="*", help=named)
    parser.add_argument("--all", action="store_true", help="all runs of yours that live; asks first")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--after-checkpoint", action="store_true", help="each run after its next checkpoint")
    patience = (
        f"how long a checkpoint is waited for, such as 30m (default: {PATIENCE_S / 3600:g}h); then nothing is done"
    )
    parser.add_argument("--patience", metavar="S", type=_patience, help=patience)
    parser.add_argument("--json", action="store_true", help="what was done as one JSON object")
    return parser


def _patience(text: str) -> float:
    return seconds_in(text, unit="s")


def main(argv: Sequence[str], notes: SignalNotes) -> int:
    """The verb; returns its exit code."""
    begin, end_s = time.monotonic(), END_S - min(own_age_s(), SLOWEST_START_S)
    parser = build_parser()
    arguments = parser.parse_args(argv)
    _refuse_options(parser, arguments)
    slurm = Slurm()
    work = Work(slurm, notes, bool(arguments.json))
    runs = _living(work, arguments.yes) if arguments.all else _named(arguments.runs, slurm, begin + FIND_S)
    if arguments.after_checkpoint:
        patience_s = PATIENCE_S if arguments.patience is None else arguments.patience
        return work.after_checkpoints(runs, patience_s)
    if arguments.all:  # the answer to the question took its time
        begin, end_s = time.monotonic(), END_S
    work.cancel(runs, begin, end_s)
    return work.conclude()


def _refuse_options(parser: Parser, arguments: argparse.Namespace) -> None:
    if bool(arguments.runs) is arguments.all:
        parser.error("name a RUN, or say --all" if not arguments.all else "--all means all runs: name none")
    if arguments.yes and not arguments.all:
        parser.error("--yes goes with --all: only that asks")
    if arguments.patience is not None and not arguments.after_checkpoint:
        parser.error("--patience goes with --after-checkpoint")


# --- which runs -------------------------------------------------------------------------------------------------------


def _named(names: Sequence[str], slurm: Slurm, until: float) -> list[FoundRun]:
    """The runs to cancel, each once; ``EnvironmentProblem`` for one whose processes are another host's."""
    found = named(names, slurm, until, refuse=refuse_unknown_jobs, otherwise="nothing was cancelled")
    for run in found:
        _refuse_elsewhere(run)
    return found


def _refuse_elsewhere(run: FoundRun) -> None:
    here = host_name()
    if run.host not in {"", here} and any(job.is_local for job in run.jobs()):
        raise EnvironmentProblem(f"{run.name} is a local run on {run.host}, and this is {here}: cancel it there")


def _living(work: Work, yes: bool) -> list[FoundRun]:
    """All runs that live, if they are to be cancelled; else none."""
    from slurm.lib.observe.survey import Survey
    from slurm.lib.verbs.living import living_runs

    living = living_runs(jobs_base(os.environ), Survey(work.slurm, work.notes))
    for name in living.elsewhere:
        log.warning("%s is a local run of another host, and is left alone: cancel it there", name)
    if not living.runs:
        log.info("no run of yours lives: there is nothing to cancel")
        return []
    title, lines = f"{len(living.runs)} of your runs live:", [_title(run) for run in living.runs]
    agreed = yes or is_agreed(title, lines, "cancel all of them?", "nothing was cancelled", work.notes)
    return list(living.runs) if agreed else []


def _title(run: FoundRun) -> str:
    jobs = ", ".join(f"{job.kind} {job.job_id}" for job in run.jobs() if job.kind != "worker")
    workers = folded([job.job_id for job in run.jobs() if job.kind == "worker"])
    jobs += f", workers {workers}" if workers else ""
    return f"{run.directory.path if run.directory else 'given to sbatch directly, not begun'}  ({jobs})"


# --- what is done with them -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """A run, what became of its jobs, and why it was waited for no longer, where it was waited for."""

    run: FoundRun
    jobs: tuple[Watched, ...]
    due: Due | None = None


@dataclass
class Work:
    """Cancels runs, and tells at the end what was done."""

    slurm: Slurm
    notes: SignalNotes
    as_json: bool
    done: list[Done] = field(default_factory=list)

    def cancel(self, runs: Sequence[FoundRun], begin: float, end_s: float, due: Sequence[Due] = ()) -> None:
        """Cancel runs within ``end_s`` seconds after ``begin``."""
        hands: dict[bool, Hand] = {False: SlurmHand(self.slurm), True: LocalHand()}
        watched = Cancellation(runs, hands, self.notes, begin, end_s).carry_out()
        conclude(watched)
        causes = {id(one.run): one for one in due}
        for run in runs:
            self.done.append(Done(run, tuple(one for one in watched if one.run is run), causes.get(id(run))))

    def after_checkpoints(self, runs: Sequence[FoundRun], patience_s: float) -> int:
        """Cancel each of the runs once it has saved, and tell; returns the exit code."""
        from slurm.lib.after_checkpoint import CheckpointWait
        from slurm.lib.observe.survey import Survey

        wait = CheckpointWait(Survey(self.slurm, self.notes), self.notes, patience_s)
        try:
            wait.start(runs)
            for due in iter(wait.next_due, []):
                self._take(due)
        except Interrupted as stop:
            log.warning("stopped by %s; %s", stop, _what_goes_on(wait))
            self.conclude()
            return EXIT_SIGNAL_BASE + stop.number
        code = self.conclude()
        for watch in wait.left:
            words = (watch.view.record.name, f"{patience_s:g}", watch.saving.place, watch.sentence)
            log.error("%s: no new checkpoint within %s s in %s (%s); it goes on, nothing of it was cancelled", *words)
        lost = any(one.due and one.due.cause.value == "lost" for one in self.done)
        return EXIT_TIMEOUT if wait.left else EXIT_ENVIRONMENT if lost and code == EXIT_OK else code

    def _take(self, due: Sequence[Due]) -> None:
        """Cancel what is due; what has ended by itself is only told."""
        self.done += [Done(one.run, (), one) for one in due if not one.is_to_be_cancelled]
        if doomed := [one for one in due if one.is_to_be_cancelled]:
            self.cancel([one.run for one in doomed], time.monotonic(), END_S, doomed)

    def conclude(self) -> int:
        """Tell what was done; returns the exit code."""
        said = say(as_json(self.done) if self.as_json else as_text(self.done))
        strangers = {(one.run.name, one.owner): one.stranger for one in self._watched() if one.stranger}
        for (run, job_id), whose in strangers.items():
            log.warning("a record of %s names the job %s, which %s", run, job_id, whose)
        left = [one.job.job_id for one in self._watched() if one.is_left]
        if left:
            log.error("not ended within 15 s: %s; look with squeue, and try again", folded(left))
        return EXIT_TIMEOUT if left else EXIT_OK if said else EXIT_ENVIRONMENT

    def _watched(self) -> Iterator[Watched]:
        return (one for done in self.done for one in done.jobs)


def _what_goes_on(wait: CheckpointWait) -> str:
    names = ", ".join(watch.view.record.name for watch in wait.left)
    return f"not cancelled, so it goes on: {names}" if names else "nothing was cancelled"


def _due_words(due: Due) -> str:
    after = f"after {due.waited_s:.0f} s"
    return {
        "checkpoint": f"has saved {after}: {due.checkpoint}",
        "pending": "its training was pending: nothing is lost",
        "ended": f"ended by itself {after} ({due.state}); nothing was cancelled",
        "lost": f"its directory is gone, or cannot be read any more, {after}; nothing was cancelled",
    }[due.cause.value]


def as_text(done: Sequence[Done]) -> str:
    """A line for each run, and below it why it was cancelled now, and one for each of its jobs."""
    lines = []
    for one in done:
        lines.append(f"run {one.run.directory.path if one.run.directory else one.run.name}")
        lines += [f"  {_due_words(one.due)}"] if one.due else []
        lines += [f"  {job.sentence}" for job in one.jobs if job.job.kind != "worker"]
        lines += [f"  {line}" for line in _worker_lines([job for job in one.jobs if job.job.kind == "worker"])]
    return "".join(f"{line}\n" for line in lines)


def _worker_lines(workers: Sequence[Watched]) -> list[str]:
    """A line for all workers of which the same became."""
    fates = dict.fromkeys(worker.fate for worker in workers)
    alike = {fate: [worker.job.job_id for worker in workers if worker.fate == fate] for fate in fates}
    return [_line(ids, fate) for fate, ids in alike.items()]


def _line(ids: Sequence[str], fate: str) -> str:
    if not ids[1:]:
        return f"worker {folded(ids)}: {fate}"
    return f"workers {folded(ids)}: {'were ' + fate[4:] if fate.startswith('was ') else fate}"


def as_json(done: Sequence[Done]) -> str:
    """The same for programs."""
    told = [
        {
            "run": one.run.name,
            "directory": str(one.run.directory.path) if one.run.directory else None,
            "jobs": [job.as_dict for job in one.jobs],
            "after_checkpoint": _due_dict(one.due) if one.due else None,
        }
        for one in done
    ]
    return json.dumps({"schema": 1, "runs": told}, indent=2) + "\n"


def _due_dict(due: Due) -> dict[str, object]:
    return {"cause": due.cause.value, "checkpoint": due.checkpoint or None, "waited_s": round(due.waited_s, 1)}
