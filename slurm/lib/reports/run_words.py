"""How is what is known of a run said: to people in words, to scripts as JSON (schema 1)?"""

from __future__ import annotations

import re
import time
from dataclasses import asdict
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from slurm.lib.observe.phase import Phase
from slurm.lib.observe.run_view import JobView, PairView, RunView, Stage
from slurm.lib.observe.unknown import Unknown

if TYPE_CHECKING:
    from slurm.lib.observe.gpus import Gpu
    from slurm.lib.observe.nodes import Nodes
    from slurm.lib.observe.sandboxes import Sandboxes

SCHEMA = 1
GREEN, YELLOW, RED, DIM = "\x1b[32m", "\x1b[33m", "\x1b[31m", "\x1b[2m"
PAINT = {
    **dict.fromkeys(["running", "serving", "completed"], GREEN),
    **dict.fromkeys(["pending", "starting", "waiting", "ending", "unknown"], YELLOW),
    **dict.fromkeys(["failed", "interrupted"], RED),
    **dict.fromkeys(["cancelled", "ended"], DIM),
}
# What Slurm's reasons mean for a run, where its word does not say it.
_REASONS = {
    "Dependency": "waits for the job before it",
    "JobHeldUser": "held; scontrol release lets it start",
    "JobHeldAdmin": "held by an administrator",
    "BeginTime": "not before the time that it was given",
    "Priority": "others go first",
    "Resources": "waits for free resources",
    "ReqNodeNotAvail": "its nodes are down, drained or reserved; sinfo -R tells why",
}


_COMPLETE = re.compile(r"^(training job \S+) is complete: .*")  # what comes then is said of the training itself


def shortened(text: str, width: int) -> str:
    """The text in so many characters."""
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def clock(seconds: float | None) -> str:
    """A length of time as Slurm writes it, ``1-02:03:04`` or ``3:04``; empty where it is not known."""
    if seconds is None:
        return ""
    days, rest = divmod(int(seconds), 86400)
    hours, minutes = rest // 3600, rest // 60 % 60
    if days:
        return f"{days}-{hours:02}:{minutes:02}:{rest % 60:02}"
    return f"{hours}:{minutes:02}:{rest % 60:02}" if hours else f"{minutes}:{rest % 60:02}"


def about(moment: float, now: float) -> str:
    """A moment to come or gone by, to the minute; with its day where that is another."""
    there, here = time.localtime(moment), time.localtime(now)
    return time.strftime("%H:%M" if there[:3] == here[:3] else "%a %d %b %H:%M", there)


def job_words(job: JobView, now: float) -> str:
    """A job's state and what goes with it, in the words that people use."""
    if job.stage is Stage.UNKNOWN:
        return f"unknown: {job.why_unknown}"
    if job.stage is Stage.ENDED:
        return _end_words(job)
    if job.stage is Stage.PENDING:
        return _pending_words(job, now)
    word = job.word if job.word in {"COMPLETING", "SUSPENDED"} else "RUNNING"
    where = f" on {job.node}" if job.node else ""
    limit = f" of {clock(job.limit_s)}" if job.limit_s is not None else ""
    since = f", {clock(job.elapsed_s)}{limit}" if job.elapsed_s is not None else ""
    why = f" ({job.reason})" if job.reason else ""
    return f"{word}{where}{since}{why}"


def _pending_words(job: JobView, now: float) -> str:
    word = job.word if job.word != "CONFIGURING" else "PENDING (its nodes are being made ready)"
    meaning = _REASONS.get(job.reason.partition(",")[0])
    reason = f" ({job.reason})" if job.reason else ""
    starts = job.starts_at is not None and job.starts_at > now - 60 and job.reason != "Dependency"
    after = f", starts about {about(job.starts_at or now, now)}" if starts else f": {meaning}" if meaning else ""
    return f"{word}{reason}{after}"


def _end_words(job: JobView) -> str:
    code = f" with exit code {job.exit_code}" if job.exit_code is not None else ""
    reason = _COMPLETE.sub(r"\1 has ended", job.end_reason) if job.kind == "runtime" else job.end_reason
    return f"ended{code}" + (f": {reason}" if reason else "")


def phase_words(view: RunView) -> str:
    """How far a run is; of one that is over only its steps."""
    phase = view.phase
    if isinstance(phase, Unknown):
        return phase.why
    if not view.state.is_over:
        return str(phase)
    of = f" of {phase.steps}" if phase.steps is not None else ""
    return f"step {phase.step}{of}" if phase.step is not None else ""


def attempt_words(view: RunView) -> str:
    """Which attempt it is of how many; empty for a run that has one."""
    if view.pair is None or (view.record.attempts == 1 and view.pair.attempt == 1):
        return ""
    return f"{view.pair.attempt} of {max(view.record.attempts, view.pair.attempt)}"


def sandbox_words(sandboxes: Sandboxes | Unknown) -> str:
    if isinstance(sandboxes, Unknown):
        return f"unknown: {sandboxes.why}"
    waiting = f", {sandboxes.waiting} waiting for a slot" if sandboxes.waiting else ""
    return f"{sandboxes.living} living, {sandboxes.used} of {sandboxes.slots} slots used{waiting}"


def failed_start_words(job: JobView) -> str:
    """How many sandboxes did not start, and why; empty where all did."""
    reasons = sorted(job.failed_starts.items(), key=lambda pair: -pair[1])
    if not reasons:
        return ""
    said = f"; the last: {job.failed_start}" if job.failed_start else ""
    why = ", ".join(f"{count} {reason}" for reason, count in reasons)
    return f"{sum(job.failed_starts.values())} of {job.asked_starts} starts failed: {why}{said}"


def gpu_words(gpus: tuple[Gpu, ...] | Unknown) -> list[str]:
    """A line for each node."""
    if isinstance(gpus, Unknown):
        return [f"unknown: {gpus.why}"]
    return [
        f"{node}: " + ", ".join(_gpu_words(gpu) for gpu in gpus if gpu.node == node)
        for node in dict.fromkeys(gpu.node for gpu in gpus)
    ]


def _gpu_words(gpu: Gpu) -> str:
    busy = "busy ?" if gpu.busy_percent is None else f"{gpu.busy_percent} %"
    memory = "" if None in {gpu.used_mib, gpu.total_mib} else f" {_gib(gpu.used_mib)} of {_gib(gpu.total_mib)} GiB"
    return f"{gpu.index} {busy}{memory}"


def _gib(mib: int | None) -> str:
    return f"{(mib or 0) / 1024:.0f}"


def lead_of(view: RunView) -> JobView | None:
    return view.pair.lead if view.pair else None


def exit_code(view: RunView) -> int | None:
    """The exit code of a run that is over, where it is known: its training's, or that of a runtime launched alone."""
    lead = lead_of(view)
    return lead.exit_code if lead and view.state.is_over else None


# --- JSON -------------------------------------------------------------------------------------------------------------


def run_dict(view: RunView) -> dict[str, object]:
    """A run for scripts. What is not known is null, or ``{"unknown": WHY}``."""
    record, lead = view.record, lead_of(view)
    over = view.state.is_over and lead is not None
    return {
        "run": record.name,
        "directory": str(record.directory.path) if record.directory else None,
        "state": view.state.value,
        "phase": _phase_dict(view.phase),
        "attempt": view.pair.attempt if view.pair else None,
        "attempts": record.attempts,
        "jobs": [job_dict(job) for job in view.pair.jobs] if view.pair else [],
        "workers": [_worker_dict(worker) for worker in view.pair.workers] if view.pair else [],
        "next_attempt": _next_dict(view.following),
        "sandboxes": _known(view.sandboxes),
        "nodes": _known(view.nodes),
        "gpus": _gpus_dict(view.gpus),
        "exit_code": exit_code(view),
        "reason": lead.end_reason if over and lead else None,
        "created": record.created or None,
        "user": record.user or None,
        "host": record.host or None,
        "config": record.config or None,
        "backend": record.backend,
        "pairing": record.pairing or None,
        "problems": list(record.problems),
    }


def _known(value: Sandboxes | Nodes | Unknown | None) -> object:
    if isinstance(value, Unknown):
        return {"unknown": value.why}
    return None if value is None else asdict(value)


def _gpus_dict(gpus: tuple[Gpu, ...] | Unknown | None) -> object:
    if isinstance(gpus, Unknown):
        return {"unknown": gpus.why}
    return None if gpus is None else [asdict(gpu) for gpu in gpus]


def _phase_dict(phase: Phase | Unknown) -> dict[str, object]:
    return {"unknown": phase.why} if isinstance(phase, Unknown) else asdict(phase)


def _next_dict(pair: PairView | None) -> dict[str, object] | None:
    return {"attempt": pair.attempt, "jobs": [job_dict(job) for job in pair.jobs]} if pair else None


def _worker_dict(worker: JobView) -> dict[str, object]:
    """A task of a worker array for scripts; ``needed`` where the training waits for its start."""
    return {**job_dict(worker), "array": worker.array, "needed": worker.is_needed}


def job_dict(job: JobView) -> dict[str, object]:
    """A job for scripts; ``stage`` is ours, ``slurm_state`` and ``slurm_reason`` are Slurm's words."""
    starts = None if job.starts_at is None else datetime.fromtimestamp(job.starts_at, timezone.utc).isoformat()
    return {
        "kind": job.kind,
        "id": job.job_id,
        "stage": job.stage.value,
        "slurm_state": job.word or None,
        "slurm_reason": job.reason or None,
        "node": job.node or None,
        "partition": job.partition or None,
        "starts_at": starts,
        "elapsed_s": job.elapsed_s,
        "limit_s": job.limit_s,
        "exit_code": job.exit_code,
        "end_reason": job.end_reason or None,
        "ended_at": job.end_time or None,
        "last_error": job.error or None,
        "failed_starts": dict(job.failed_starts),
        "unknown": job.why_unknown or None,
    }


def is_worth_a_line(job: JobView) -> bool:
    """Whether a job's last error is: not of one that ended well, nor what its end says already."""
    end, error = job.end_reason, job.error
    went_well = job.stage is Stage.ENDED and job.exit_code == 0
    return bool(error) and not went_well and not (end and (end in error or error in end))
