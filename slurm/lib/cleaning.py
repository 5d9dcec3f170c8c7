"""Which run directories may be removed, and how do they go?

Only those of runs that have ended, some time ago, without a checkpoint in them. What is not known, a silent Slurm, a
record that is not whole, keeps a directory. It is renamed before its files go, so that whoever cleans next finishes
what was cut off; a name of a run is then never that of half a directory.
"""

from __future__ import annotations

import contextlib
import enum
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from slurm.lib.coordination import CoordinationDir, is_run_dir
from slurm.lib.leftovers import DISCARDED, discard
from slurm.lib.observe.remains import Remains, remains_of
from slurm.lib.observe.run_view import JobView, RunView, Stage
from slurm.lib.observe.survey import Survey
from slurm.lib.run_record import read_record, record_paths
from slurm.lib.runs import FoundRun, RunJob, run_folders, stamp_of

NO_RECORD = "run.json is missing"  # as observe.record says it; scripts make such directories


class Stay(str, enum.Enum):
    """Why a directory stays."""

    LIVES = "lives"
    UNKNOWN = "unknown"  # whether it lives, or what lies in it
    YOUNG = "young"
    CHECKPOINT = "checkpoint"
    USED = "used"  # by a run that lives, or by a launch that is not finished
    FAILED = "failed"  # to go


@dataclass(frozen=True)
class Verdict:
    """Why a directory stays, with the sentence for people; ``stay`` is None for one that may go."""

    stay: Stay | None = None
    why: str = ""


GOES = Verdict()


@dataclass(frozen=True)
class Candidate:
    """A run's directory, or what is left of one (``is_rest``), with the verdict.

    ``size`` in bytes on the disk, None where it was not looked at; ``age_s`` since its end or last change.
    """

    path: Path
    verdict: Verdict = GOES
    state: str = ""
    size: int | None = None
    age_s: float | None = None
    is_rest: bool = False

    @property
    def goes(self) -> bool:
        return self.verdict.stay is None


# --- decided from what is known ---------------------------------------------------------------------------------------


def by_jobs(view: RunView, named: JobView | None, heard: bool) -> Verdict:
    """Whether a run has ended for sure; ``named`` is the job that its name tells of, where no record does."""
    unended = [*view.unended, *([named] if named and named.stage is not Stage.ENDED else [])]
    living = next((job for job in unended if job.lives), None)
    if living:
        return Verdict(Stay.LIVES, f"its {living.kind} job {living.job_id} is {living.stage.value}")
    problems = [problem for problem in view.record.problems if problem != NO_RECORD]
    if problems:
        return Verdict(Stay.UNKNOWN, f"which jobs it has is not known: {'; '.join(problems)}")
    if unended:
        job = unended[0]
        return Verdict(Stay.UNKNOWN, f"whether its job {job.job_id} lives is not known: {job.why_unknown}")
    if not heard and view.record.backend != "local":
        return Verdict(Stay.UNKNOWN, "Slurm does not answer")
    if view.pair is None:  # of a script's directory nothing else can be known
        return GOES if view.record.problems else Verdict(Stay.UNKNOWN, "its record names no job of ours")
    return GOES if view.state.is_over else Verdict(Stay.UNKNOWN, f"it is {view.state.value}")


def by_age(age_s: float, older_s: float) -> Verdict:
    """Whether so long has passed since its end, or since the last change in it."""
    return GOES if age_s > older_s else Verdict(Stay.YOUNG, "it ended, or was changed, since")


def by_files(remains: Remains) -> Verdict:
    """Whether all of it may go: never a checkpoint, nor what could not be looked into."""
    if remains.checkpoint:
        return Verdict(Stay.CHECKPOINT, f"a checkpoint is in it: {remains.checkpoint}")
    return Verdict(Stay.UNKNOWN, f"it cannot be looked into: {remains.problem}") if remains.problem else GOES


def by_users(path: Path, used: Mapping[str, str], is_submitted_to: bool) -> Verdict:
    """Whether somebody counts on it. ``used``: folders in the settings of runs that live, and which run each is of."""
    if is_submitted_to:
        return Verdict(Stay.USED, "a launch into it is not finished")
    inside = [run for folder, run in used.items() if Path(folder) == path or path in Path(folder).parents]
    return Verdict(Stay.USED, f"{inside[0]}, which has not ended, uses a folder in it") if inside else GOES


def ended_at(view: RunView) -> float:
    """When the last of its jobs said that it ended, in epoch seconds; minus infinity where none did."""
    return max((_epoch(job.end_time) for pair in view.pairs for job in pair.jobs), default=float("-inf"))


def _epoch(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return float("-inf")


# --- looked at --------------------------------------------------------------------------------------------------------


def candidates(
    base: Path, older_s: float, survey: Survey, now: float, only: Collection[Path] | None = None
) -> list[Candidate]:
    """This user's run directories below a jobs base, and what is left of some, with the verdict about each.

    ``now`` is the time by the clock that stamps files there. With ``only`` the others are not looked at closely.
    """
    paths = [path for path in run_folders(base) if _is_own(path) and is_run_dir(path)]
    runs = [FoundRun(path.name, CoordinationDir(path)) for path in paths]
    alone = {path: run for path, run in zip(paths, map(_named, runs), strict=True) if run}
    views = survey.look([*runs, *alone.values()], servers=False, logs=False)
    named = {path: view.pair.lead for path, view in zip(alone, views[len(runs) :], strict=True) if view.pair}
    seen = dict(zip(paths, views, strict=False))
    jobs = {path: by_jobs(view, named.get(path), survey.heard) for path, view in seen.items()}
    used = _used_folders(path for path, verdict in jobs.items() if verdict.stay)
    look = Look(older_s, now, used)
    found = [look.at(path, seen[path], jobs[path]) for path in paths if only is None or path in only]
    return [*found, *(rest for rest in _rests(base) if only is None or rest.path in only)]


def _is_own(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.getuid()
    except OSError:
        return False


def _named(run: FoundRun) -> FoundRun | None:
    """The job of Slurm's that the directory is named for, as a run of its own, where no record tells of any."""
    job_id = run.name.rpartition("_")[2]
    return FoundRun(job_id, None, RunJob("runtime", job_id)) if job_id.isdigit() and not run.jobs() else None


def _used_folders(paths: Iterable[Path]) -> dict[str, str]:
    """The folders that the settings of runs which may live name, and the name of each run."""
    used: dict[str, str] = {}
    for path in paths:
        for record in record_paths(CoordinationDir(path)):
            settings = read_record(record).get("settings")
            values = settings.values() if isinstance(settings, dict) else ()
            used |= {value: path.name for value in values if isinstance(value, str) and value.startswith("/")}
    return used


@dataclass(frozen=True)
class Look:
    """Looks at directories, closer only where what is known so far lets one go."""

    older_s: float
    now: float
    used: Mapping[str, str]

    def at(self, path: Path, view: RunView, verdict: Verdict) -> Candidate:
        state = view.state.value if view.pair else ""
        if verdict.stay:
            return Candidate(path, verdict, state)
        age_s = self.now - ended_at(view)
        verdict = by_age(age_s, self.older_s)
        if verdict.stay:
            return Candidate(path, verdict, state, age_s=age_s)
        remains = remains_of(path, _checkpoint_folders(path))
        age_s = min(age_s, self.now - remains.changed_at)
        submitted = next(path.glob("submission_*.json"), None) is not None
        verdicts = (by_age(age_s, self.older_s), by_users(path, self.used, submitted), by_files(remains))
        verdict = next((one for one in verdicts if one.stay), GOES)
        return Candidate(path, verdict, state, remains.size, age_s)


def _checkpoint_folders(path: Path) -> list[str]:
    """The folders in a run's directory, by their paths in there, that its settings name for checkpoints."""
    said = [read_record(record).get("settings") for record in record_paths(CoordinationDir(path))]
    named = [settings.get("CHECKPOINT_DIR") for settings in said if isinstance(settings, dict)]
    inside = [Path(folder) for folder in named if isinstance(folder, str) and path in Path(folder).parents]
    return [str(folder.relative_to(path)) for folder in inside]


def _rests(base: Path) -> Iterator[Candidate]:
    """What is left of directories that were being removed."""
    with contextlib.suppress(OSError):
        for path in sorted(base.glob(f"{DISCARDED}*")):
            is_folder = path.is_dir() and not path.is_symlink()
            if is_folder and stamp_of(path.name.removeprefix(DISCARDED)) and _is_own(path):
                yield Candidate(path, size=remains_of(path).size, is_rest=True)


# --- removed ----------------------------------------------------------------------------------------------------------


def removed(found: Sequence[Candidate], between: Callable[[], None] = lambda: None) -> list[Candidate]:
    """Remove what may go, calling ``between`` before each; returns the same with those that could not go.

    One that somebody else removes at the same time is gone, too.
    """
    done = []
    for candidate in found:
        if candidate.goes:
            between()
        complaint = discard(candidate.path) if candidate.goes else ""
        failed = Verdict(Stay.FAILED, f"it cannot be removed: {complaint}")
        done.append(Candidate(candidate.path, failed, candidate.state) if complaint else candidate)
    return done


def clock_of(base: Path) -> float:
    """The time by the clock that stamps the files of a jobs base; this host's where nothing can be written there."""
    from slurm.lib.coordination import server_time
    from slurm.lib.errors import EnvironmentProblem

    try:
        return server_time(base)
    except EnvironmentProblem:
        return time.time()
