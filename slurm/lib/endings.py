"""How did each job of a run end? Said in the record that names it, so that ``run.json`` tells the whole story later.

A training that ends without a word, such as one cancelled in the queue, gets its completion flag from the runtime job,
so that whoever waits for the flag has an end.

Both jobs of a pair write the same file, and there is no lock that every shared file system keeps. So each says of both
what it knows, unless the other one has just written, reads again, and says it again where that is missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slurm.lib.coordination import CoordinationDir, Flag, parse_object, read_if_there, replace_if_unchanged, utc_now
from slurm.lib.errors import EnvironmentProblem
from slurm.lib.logs import log
from slurm.lib.run_record import job_ids, read_record, record_paths

LOOKS, PAUSE_S = 4, 0.1  # the other job needs milliseconds from its reading to its writing
PATIENCE_S = 5.0  # with a directory so slow that further looks would keep the node for minutes


@dataclass(frozen=True)
class End:
    """How one job ended: ``exit_code`` None where it could not say, ``by`` the kind of the job that says so."""

    kind: str
    job_id: str
    exit_code: int | None
    reason: str
    by: str

    @staticmethod
    def of_flag(kind: str, flag: Flag) -> End:
        """What a job has said of itself."""
        return End(kind, flag.job_id, flag.exit_code, flag.reason, kind)


def note_ends(directory: CoordinationDir, *ends: End) -> None:
    """Write how jobs ended into the records that name them; a job's own word wins over its partner's.

    A folder that cannot be written is said in the log alone: the flags have told the partner.
    """
    try:
        _speak_for_the_training(directory, ends)
        begin = time.monotonic()
        for look in range(LOOKS):
            if look and time.monotonic() - begin > PATIENCE_S:
                return
            time.sleep(PAUSE_S if look else 0.0)
            news = [path for path in record_paths(directory) if _noted(path, ends)]
            if not news:
                return
    except (EnvironmentProblem, OSError) as problem:
        log.warning("how the jobs ended does not stand in run.json: %s", problem)


def _speak_for_the_training(directory: CoordinationDir, ends: tuple[End, ...]) -> None:
    """Write the completion flag, without an exit code, of a training that could not do so.

    Not of one that another attempt follows, whose flag this one might replace.
    """
    runtime = next((end.job_id for end in ends if end.kind == "runtime"), "")
    for end in ends:
        wordless = end.kind == "training" and end.by == "runtime" and end.exit_code is None
        if wordless and not is_followed(directory, end.job_id):
            directory.speak_for(directory.training_complete, Flag.of_this_host(end.job_id, runtime, None, end.reason))


def is_followed(directory: CoordinationDir, training: str) -> bool:
    """Whether this training has queued another attempt."""
    attempts = map(read_record, directory.path.glob("attempt_*.json"))
    return any(data.get("successor") and job_ids(data.get("jobs")).get("training") == training for data in attempts)


def _noted(path: Path, ends: tuple[End, ...]) -> bool:
    """Write what is new to one record, unless it is written at this moment; returns whether anything was new."""
    before = read_if_there(path)
    data = parse_object(before)
    jobs = data.get("jobs")
    told = [end for end in ends if isinstance(jobs, dict) and _is_news(jobs.get(end.kind), end)]
    if not told or not isinstance(jobs, dict) or before is None:
        return False
    for end in told:
        what = {"exit_code": end.exit_code, "reason": end.reason, "said_by": end.by, "time": utc_now()}
        jobs[end.kind] = {**jobs[end.kind], "ended": what}
    replace_if_unchanged(path, json.dumps(data, indent=2, sort_keys=True) + "\n", before)
    return True


def _is_news(job: object, end: End) -> bool:
    """Whether the record names this job, and says nothing of its end, or only its partner's word against its own."""
    if not isinstance(job, Mapping) or str(job.get("id")) != end.job_id:
        return False
    said = job.get("ended")
    return not isinstance(said, Mapping) or (said.get("said_by") != end.kind and end.by == end.kind)
