"""Which run directories may be removed, and how do they go?

Only those of runs that ended some time ago, and in which nothing of the trainer's own lies, such as a checkpoint. What
is not known, a silent Slurm, a record that is not whole, keeps a directory. It is renamed before its files go, so that
whoever cleans next finishes what was cut off; a name of a run is then never that of half a directory.
"""

from __future__ import annotations

import contextlib
import enum
import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from slurm.lib.coordination import AGENT, JOINED_AGENT, CoordinationDir, is_run_dir
from slurm.lib.job_arrays import arrays_of, is_task
from slurm.lib.leftovers import discard, rests
from slurm.lib.observe.remains import Known, Remains, remains_of
from slurm.lib.observe.run_view import JobView, RunView, Stage, believed
from slurm.lib.observe.saving import Saving, saving_of
from slurm.lib.observe.survey import Survey
from slurm.lib.run_record import job_ids, read_record, record_paths
from slurm.lib.runs import KINDS, FoundRun, RunJob, is_own, run_folders
from slurm.lib.scheduler import QUESTION_TIMEOUT_S, JobState, ShownJob

# So long a directory must have rested where Slurm alone says that a job which began has ended, by not knowing it: a job
# that runs on another cluster notes what it uses more often.
UNHEARD_S = 86400.0
SKEW_S = 5.0  # between the clocks of the host of a launch and of the file server
ELSEWHERE_S = 10.0  # for all questions about living runs below other jobs bases
NO_RECORD = "run.json is missing"  # as observe.record says it; scripts make such directories


class Stay(str, enum.Enum):
    """Why a directory stays."""

    LIVES = "lives"
    UNKNOWN = "unknown"  # whether it lives, or what lies in it
    YOUNG = "young"
    CHECKPOINT = "checkpoint"
    FILES = "files"  # of the trainer's own, or of a person's
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
    unseen = next((job for job in _presumed(view) if not job.has_log), None)
    if unseen:
        why = f"its {unseen.kind} job {unseen.job_id} was never seen to begin, and this Slurm does not know it"
        return Verdict(Stay.UNKNOWN, f"{why}: is it another cluster's?")
    if not heard and view.record.backend != "local":
        return Verdict(Stay.UNKNOWN, "Slurm does not answer")
    if view.pair is None:  # of a script's directory nothing else can be known
        return GOES if view.record.problems else Verdict(Stay.UNKNOWN, "its record names no job of ours")
    return GOES if view.state.is_over else Verdict(Stay.UNKNOWN, f"it is {view.state.value}")


def _jobs(view: RunView) -> list[JobView]:
    return [job for pair in view.pairs for job in pair.jobs]


def _workers(view: RunView) -> list[JobView]:
    return [worker for pair in view.pairs for worker in pair.workers]


def _presumed(view: RunView) -> list[JobView]:
    """Slurm's jobs that count as ended only since it does not know them.

    Workers are none: they never outlive their runtime job by more than it takes to leave.
    """
    return [job for job in _jobs(view) if job.is_presumed and job.job_id.isdigit()]


def by_word_of_end(view: RunView, shown: Mapping[str, ShownJob] | None) -> Verdict:
    """Whether jobs which said that they ended live again (``scontrol requeue``); ``shown`` is Slurm's word of them.

    None while it does not answer.
    """
    said = _of_their_word(view)
    if shown is None:
        silence = f"whether its job {said[0]} was queued again is not known: Slurm does not answer" if said else ""
        return Verdict(Stay.UNKNOWN, silence) if said else GOES
    words = [(job_id, believed(view.record, shown.get(job_id))) for job_id in said]
    living = [(job_id, word) for job_id, word in words if isinstance(word, ShownJob) and not word.state.is_final]
    for job_id, word in living:
        known = word.state in {JobState.PENDING, JobState.RUNNING}
        why = f"its job {job_id}, which said that it ended, is {word.word} in Slurm: was it queued again?"
        why = f"its worker {job_id} is {word.word} in Slurm" if is_task(job_id) else why
        return Verdict(Stay.LIVES if known else Stay.UNKNOWN, why)
    return GOES


def _of_their_word(view: RunView) -> list[str]:
    """The ids of Slurm's jobs that have ended by somebody's word, of which Slurm need not have been asked."""
    ids = [job.job_id for job in _jobs(view) if job.job_id.isdigit() and not job.is_presumed and not job.word]
    ids += [worker.job_id for worker in _workers(view) if not worker.word]
    return list(dict.fromkeys(ids))


def by_rest(view: RunView, rested_s: float) -> Verdict:
    """Whether a run of whose job's end nobody told has rested for so long that it cannot run on another cluster."""
    silent = next(iter(_presumed(view)), None)
    if silent is None or rested_s > UNHEARD_S:
        return GOES
    why = f"this Slurm does not know its {silent.kind} job {silent.job_id}, which never said that it ended"
    return Verdict(Stay.UNKNOWN, f"{why}, and something in it was changed within a day: is it another cluster's?")


def by_age(age_s: float, older_s: float) -> Verdict:
    """Whether so long has passed since its end, or since the last change in it."""
    return GOES if age_s > older_s else Verdict(Stay.YOUNG, "it ended, or was changed, since")


def by_files(remains: Remains) -> Verdict:
    """Whether all of it may go: never a checkpoint, what is none of ours, nor what could not be looked into."""
    if remains.mounted:
        return Verdict(Stay.UNKNOWN, f"another file system is mounted at {remains.mounted}")
    if remains.checkpoint:
        return Verdict(Stay.CHECKPOINT, f"a checkpoint is in it: {remains.checkpoint}")
    if remains.foreign:
        more = f" and {remains.foreign_count - 1} more" if remains.foreign_count > 1 else ""
        return Verdict(Stay.FILES, f"files of the trainer's own: {remains.foreign}{more}")
    return Verdict(Stay.UNKNOWN, f"it cannot be looked into: {remains.problem}") if remains.problem else GOES


def by_users(path: Path, used: Mapping[str, str], is_submitted_to: bool) -> Verdict:
    """Whether somebody counts on it. ``used``: texts in the settings of runs that live, and which run each is of.

    A directory's name, with its time and number, says enough: a command may have ``~`` or a variable before it.
    """
    if is_submitted_to:
        return Verdict(Stay.USED, "a launch into it is not finished")
    name = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(path.name)}(?![A-Za-z0-9_])")
    run = next((run for text, run in used.items() if name.search(text)), None)
    return Verdict(Stay.USED, f"{run}, which has not ended, names it in its settings") if run else GOES


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
    paths = [path for path in run_folders(base) if is_own(path) and is_run_dir(path)]
    runs = [FoundRun(path.name, CoordinationDir(path)) for path in paths]
    alone = {path: run for path, run in zip(paths, map(_named, runs), strict=True) if run}
    views = survey.look([*runs, *alone.values()], servers=False, logs=False)
    named = {path: view.pair.lead for path, view in zip(alone, views[len(runs) :], strict=True) if view.pair}
    seen = dict(zip(paths, views, strict=False))
    jobs = {path: by_jobs(view, named.get(path), survey.heard) for path, view in seen.items()}
    jobs |= _still_ended(survey, {path: seen[path] for path, verdict in jobs.items() if verdict == GOES})
    used = _used_texts(path for path, verdict in jobs.items() if verdict.stay)
    if GOES in jobs.values():
        jobs_below = [job.job_id for view in views for job in (*_jobs(view), *_workers(view))]
        used |= _used_elsewhere(survey, set(arrays_of(jobs_below)))
    look = Look(older_s, now, used)
    found = [look.at(path, seen[path], jobs[path]) for path in paths if only is None or path in only]
    return [*found, *(rest for rest in _rests(base) if only is None or rest.path in only)]


def _still_ended(survey: Survey, views: Mapping[Path, RunView]) -> dict[Path, Verdict]:
    """The verdicts about runs that have ended by their own word, once Slurm has been asked about them, too."""
    asked = list(dict.fromkeys(job_id for view in views.values() for job_id in _of_their_word(view)))
    shown = survey.asked_anew(asked) if asked else {}
    return {path: by_word_of_end(view, shown) for path, view in views.items()}


def _named(run: FoundRun) -> FoundRun | None:
    """The job of Slurm's that the directory is named for, as a run of its own, where no record tells of any."""
    job_id = run.name.rpartition("_")[2]
    return FoundRun(job_id, None, RunJob("runtime", job_id)) if job_id.isdigit() and not run.jobs() else None


def _used_texts(paths: Iterable[Path]) -> dict[str, str]:
    """What the settings of runs which may live say, links in paths followed, and the name of each run."""
    said = [(value, path.name) for path in paths for settings in _settings(path) for value in settings.values()]
    return {text: run for value, run in said for text in (value, _followed(value))}


def _followed(value: str) -> str:
    """A path with its links followed; empty for any other text."""
    try:
        return os.path.realpath(value) if value.startswith("/") else ""
    except ValueError:  # a foreign record, with a zero byte
        return ""


def _settings(path: Path) -> list[dict[str, str]]:
    """The settings in each of a directory's records."""
    said = [read_record(record).get("settings") for record in record_paths(CoordinationDir(path))]
    return [
        {name: value for name, value in settings.items() if isinstance(value, str)}
        for settings in said
        if isinstance(settings, dict)
    ]


def _used_elsewhere(survey: Survey, known: Collection[str]) -> dict[str, str]:
    """The same of living runs below other jobs bases, as far as Slurm tells of their directories in time."""
    until = time.monotonic() + ELSEWHERE_S
    queued = survey.slurm.own_named(list(KINDS)) if survey.slurm.is_here else None
    folders = set()
    for job_id in queued or []:
        if job_id not in known and time.monotonic() < until:
            log = survey.slurm.log_path(job_id, timeout_s=QUESTION_TIMEOUT_S)
            folders |= {log.parent} if log else set()
    return _used_texts(sorted(folders))


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
        remains = remains_of(path, _known(path))
        rested_s = self.now - remains.changed_at
        age_s = min(age_s, rested_s)
        submitted = next(path.glob("submission_*.json"), None) is not None
        verdicts = (
            by_age(age_s, self.older_s),
            by_rest(view, rested_s),
            by_users(path, self.used, submitted),
            by_files(remains),
        )
        verdict = next((one for one in verdicts if one.stay), GOES)
        return Candidate(path, verdict, state, None if remains.mounted else remains.size, age_s)


def _known(path: Path) -> Known:
    """What the records of a run say of the files in its directory."""
    directory = CoordinationDir(path)
    records = [read_record(record) for record in record_paths(directory)]
    trainings = [ids["training"] for ids in (job_ids(data.get("jobs")) for data in records) if "training" in ids]
    saving = [saving_of(directory, training) for training in trainings]
    places = [one.place for one in saving if isinstance(one, Saving)]
    inside = [str(place.relative_to(path)) for place in places if path in place.parents]
    confs = [Path(conf).name for data in records for conf in _texts(data.get("config_files"))]
    return Known(tuple(inside), tuple(confs), _copies(records))


def _texts(data: object) -> list[str]:
    return [item for item in data if isinstance(item, str) and item] if isinstance(data, list) else []


def _copies(records: Iterable[Mapping[str, object]]) -> dict[str, float]:
    """The copies of launches with SNAPSHOT=1: when each was recorded, after its copy was taken."""
    copies: dict[str, float] = {}
    for number, data in enumerate(records):
        settings, training = data.get("settings"), job_ids(data.get("jobs")).get("training", "")
        if isinstance(settings, dict) and settings.get("SNAPSHOT") in {"1", "true"}:
            name = JOINED_AGENT.replace("%j", training) if number else AGENT
            copies[name] = _epoch(str(data.get("created"))) + SKEW_S
    return copies


def _rests(base: Path) -> Iterator[Candidate]:
    """What is left of directories that were being removed."""
    with contextlib.suppress(OSError):
        for path in rests(base):
            remains = remains_of(path)
            verdict = by_files(Remains(mounted=remains.mounted))
            yield Candidate(path, verdict, size=remains.size, is_rest=True)


# --- removed ----------------------------------------------------------------------------------------------------------


def removed(found: Sequence[Candidate], between: Callable[[], None] = lambda: None) -> list[Candidate]:
    """Remove what may go, calling ``between`` before each, and before each of its files.

    Returns the same with those that could not go. One that somebody else removes at the same time is gone, too.
    """
    done = []
    for candidate in found:
        if candidate.goes:
            between()
        complaint = discard(candidate.path, between) if candidate.goes else ""
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
