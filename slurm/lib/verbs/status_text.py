"""How ``launch.py status`` shows runs: a block each for people, lines of changes, JSON for scripts."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence

from slurm.lib.coordination import jobs_base
from slurm.lib.observe.run_view import JobView, PairView, RunState, RunView, Stage
from slurm.lib.reports.run_words import (
    SCHEMA,
    attempt_words,
    failed_start_words,
    gpu_words,
    is_worth_a_line,
    job_words,
    lead_of,
    phase_words,
    run_dict,
    sandbox_words,
    shortened,
)
from slurm.lib.reports.worker_words import array_lines, node_lines
from slurm.lib.verbs.table import terminal_width

LABEL = 10
GOING_ON = "docs/restarts.md: by hand from the newest checkpoint, or by itself with RESTARTS=N"


def told(view: RunView) -> object:
    """What of a run is worth a line once it is another."""
    jobs = [(job.job_id, job.stage, job.word, job.reason) for job in view.pair.everybody] if view.pair else []
    return view.state, view.phase, jobs


def change_line(view: RunView) -> str:
    lead = lead_of(view)
    jobs = f" ({job_words(lead, time.time())})" if lead else ""
    words = ", ".join(filter(None, (attempt_words(view), phase_words(view))))
    return f"{time.strftime('%H:%M:%S')} {view.record.name} {view.state.value}{': ' if words else ''}{words}{jobs}\n"


def json_line(view: RunView) -> str:
    return json.dumps({"schema": SCHEMA, **run_dict(view)}) + "\n"


def as_text(views: Sequence[RunView]) -> str:
    """A block for each run; on a terminal its lines are cut to the width."""
    if not views:
        return f"no runs below SKYRL_JOBS_BASE={jobs_base(os.environ)}\n"
    width, now = terminal_width(), time.time()
    blocks = [[*_heading(view), *_body(view, now)] for view in views]
    return "\n".join("".join(f"{_fitting(line, width)}\n" for line in block) for block in blocks)


def _fitting(line: str, width: int | None) -> str:
    return line if width is None else shortened(line, width)


def _heading(view: RunView) -> list[str]:
    attempt = attempt_words(view)
    words = [view.record.name, view.state.value, f"attempt {attempt}" if attempt else "", view.record.config]
    return ["  ".join(filter(None, words))]


def _body(view: RunView, now: float) -> list[str]:
    lines = [] if view.state.is_over and not phase_words(view) else [("phase", phase_words(view))]
    for job in view.pair.jobs if view.pair else ():
        lines.append((job.kind, f"job {job.job_id}: {job_words(job, now)}"))
    lines += [("workers", words) for words in array_lines(view.pair.workers, now)] if view.pair else []
    lines += [("next", _next(view.following, now))] if view.following else []
    lines += [("sandboxes", sandbox_words(view.sandboxes))] if view.sandboxes else []
    failed = filter(None, map(failed_start_words, view.pair.everybody if view.pair else ()))
    lines += [("sandboxes", words) for words in failed]
    table = node_lines(view.nodes, now) if view.nodes else []
    lines += [("nodes" if at == 0 else "", line) for at, line in enumerate(table)]
    lines += [("gpus", words) for words in gpu_words(view.gpus)] if view.gpus else []
    lines += [(_speaker(job), job.error) for job in _troubled(view)]
    lines += [("to go on", GOING_ON)] if view.state is RunState.INTERRUPTED else []
    lines += [("not known", problem) for problem in view.record.problems]
    lines += [("directory", str(view.record.directory.path))] if view.record.directory else []
    return [f"  {label:<{LABEL}} {words}" for label, words in lines]


def _speaker(job: JobView) -> str:
    """Whose last error it is; of workers there are several."""
    return f"{job.job_id} says" if job.kind == "worker" else f"{job.kind} says"


def _next(pair: PairView, now: float) -> str:
    ids = ", ".join(job.job_id for job in pair.jobs)
    return f"attempt {pair.attempt}, jobs {ids}: {job_words(pair.lead, now)}"


def _troubled(view: RunView) -> list[JobView]:
    """The jobs whose last error is worth a line; none of a run that went well."""
    jobs = view.pair.everybody if view.pair else ()
    well = view.pair is not None and view.pair.lead.exit_code == 0 and view.pair.lead.stage is Stage.ENDED
    told = [job for job in jobs if job.kind != "worker" or job.ended != "cancelled"]
    return [] if well else list(filter(is_worth_a_line, told))


def as_json(views: Sequence[RunView], heard: bool) -> str:
    """The same for scripts."""
    told_of = {"schema": SCHEMA, "slurm_answers": heard, "runs": [run_dict(view) for view in views]}
    return json.dumps(told_of, indent=2) + "\n"
