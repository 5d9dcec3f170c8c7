"""What is drawn: the points of each plot, so few that a page stays small; pure, and without matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from slurm.lib.observe.run_report import JobReport, RunReport, start_up
from slurm.lib.observe.sandbox_statistics import Seconds
from slurm.lib.observe.steps import OTHER, Step, part_shares, with_rest
from slurm.lib.observe.timeline import QUEUE, TRAINING
from slurm.lib.observe.usage import UsageSample

MOST_POINTS = 400  # of a curve; a plot is some 500 pixels wide
MOST_ROWS = 24  # of a timeline
MOST_PARTS = 5  # of a step that have a colour; the rest is other
LEAST_PART = 0.01  # of the time of all steps
MOST_NODES = 8  # of a job that have a curve

# What a span is drawn as.
QUEUED, STARTING, WAITING, WORKING, SERVING, STOPPING = (
    "in the queue",
    "starting",
    "waiting for its runtime",
    "training",
    "serving",
    "stopping",
)
_STOPS = frozenset({"saving before the time limit", "stopping the trainer", "stopping"})
_AS_THEY_ARE = {QUEUE: QUEUED, TRAINING: WORKING, "waiting for its runtime": WAITING, "serving": SERVING}


def category(words: str) -> str:
    """How a span is drawn."""
    return _AS_THEY_ARE.get(words, STOPPING if words in _STOPS else STARTING)


@dataclass(frozen=True)
class Bar:
    """From ``begin`` on, for so many seconds after a zero."""

    begin: float
    seconds: float
    category: str


@dataclass(frozen=True)
class Row:
    """A job in the timeline; ``ticks`` are the ends of its steps, where there are few."""

    label: str
    bars: tuple[Bar, ...]
    ticks: tuple[float, ...] = ()


MOST_TICKS = 80


def timeline(report: RunReport) -> tuple[Row, ...]:
    """A row for each job that did something, the newest attempts where there are many, by time since the launch."""
    zero = report.launched
    if zero is None:
        return ()
    several = len(report.attempts) > 1
    rows = [
        _row(job, f"{job.job.kind} {attempt.number}" if several else job.job.kind, zero, report.now)
        for attempt in report.attempts
        for job in reversed(attempt.jobs)
        if job.spans
    ]
    return tuple(rows[-MOST_ROWS:])


def _row(job: JobReport, label: str, zero: float, now: float) -> Row:
    bars = [Bar(span.begin - zero, span.seconds(now), category(span.words)) for span in job.spans]
    ends = [step.at - zero for step in job.steps if step.at is not None]
    return Row(label, _joined(bars), tuple(ends) if len(ends) <= MOST_TICKS else ())


def _joined(bars: Sequence[Bar]) -> tuple[Bar, ...]:
    """Bars of one category that follow each other as one."""
    found: list[Bar] = []
    for bar in bars:
        last = found[-1] if found else None
        if last and last.category == bar.category:
            found[-1] = Bar(last.begin, bar.begin + bar.seconds - last.begin, bar.category)
        else:
            found.append(bar)
    return tuple(found)


@dataclass(frozen=True)
class Phase:
    """A phase of the start-up of a job of a kind, or of a training's wait, by time since the first job started."""

    kind: str
    words: str
    begin: float
    seconds: float


def start_up_phases(jobs: Sequence[JobReport], now: float) -> tuple[Phase, ...]:
    """The phases of the start-up of an attempt's jobs, by their begin."""
    spans = [(job.job.kind, span) for job in jobs for span in start_up(job)]
    zero = min((span.begin for _kind, span in spans), default=0.0)
    made = [Phase(kind, span.words, span.begin - zero, span.seconds(now)) for kind, span in spans]
    starts = [job.started for job in jobs if job.job.kind == "training" and job.started is not None]
    waits = [Phase(QUEUED, "waiting for GPUs", 0.0, start - zero) for start in starts if start > zero]
    return tuple(sorted([*made, *waits], key=lambda phase: (phase.begin, phase.kind != "runtime")))


# --- steps ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepBars:
    """The lengths of steps: of each part a value for each of ``numbers``. One point is the mean of ``per_point`` steps,
    ``highest`` the longest of them."""

    numbers: tuple[float, ...]
    parts: tuple[tuple[str, tuple[float, ...]], ...]
    highest: tuple[float, ...]
    per_point: int = 1


def step_bars(steps: Sequence[Step]) -> StepBars | None:
    """None where the length of no step is known."""
    known = [step for step in steps if step.seconds is not None]
    if not known:
        return None
    per_point = math.ceil(len(known) / MOST_POINTS)
    groups = [known[at : at + per_point] for at in range(0, len(known), per_point)]
    names = [name for name, share in part_shares(known) if name != OTHER and share >= LEAST_PART][:MOST_PARTS]
    parts = [(name, tuple(fmean(_part(step, name) for step in group) for group in groups)) for name in names]
    totals = [fmean(step.seconds or 0.0 for step in group) for group in groups]
    rest = tuple(max(0.0, total - sum(values[at] for _name, values in parts)) for at, total in enumerate(totals))
    return StepBars(
        tuple(fmean(step.number for step in group) for group in groups),
        (*parts, (OTHER if parts else "", rest)),
        tuple(max(step.seconds or 0.0 for step in group) for group in groups),
        per_point,
    )


def _part(step: Step, name: str) -> float:
    return dict(with_rest(step)).get(name, 0.0)


@dataclass(frozen=True)
class Curve:
    """Values by x; of many points the mean of each ``per_point``, with the least and the largest."""

    x: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    per_point: int = 1


def curve(points: Sequence[tuple[float, float]]) -> Curve:
    """The points as a curve that is not longer than ``MOST_POINTS``."""
    per_point = max(1, math.ceil(len(points) / MOST_POINTS))
    groups = [points[at : at + per_point] for at in range(0, len(points), per_point)]
    return Curve(
        tuple(fmean(x for x, _y in group) for group in groups),
        tuple(fmean(y for _x, y in group) for group in groups),
        tuple(min(y for _x, y in group) for group in groups),
        tuple(max(y for _x, y in group) for group in groups),
        per_point,
    )


def reward_curve(steps: Sequence[Step]) -> Curve | None:
    points = [(float(step.number), step.reward) for step in steps if step.reward is not None]
    return curve(points) if points else None


def smoothed(values: Sequence[float], width: int) -> tuple[float, ...]:
    """The mean of the values around each."""
    half = width // 2
    return tuple(fmean(values[max(0, at - half) : at + half + 1]) for at in range(len(values)))


# --- use --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UseCurve:
    """What a job used on one node over time since the launch: CPU and GPU in percent, memory in GiB."""

    kind: str
    cpu: Curve | None
    memory: Curve | None
    gpu: Curve | None


def use_curves(report: RunReport) -> tuple[UseCurve, ...]:
    zero = report.launched
    jobs = [job for job in report.jobs if job.samples and zero is not None]
    return tuple(_use(job.job.kind, rows, zero or 0.0) for job in jobs for rows in _by_node(job.samples))


def _by_node(samples: Sequence[UsageSample]) -> list[list[UsageSample]]:
    nodes: dict[str, list[UsageSample]] = {}
    for sample in samples:
        nodes.setdefault(sample.node, []).append(sample)
    return list(nodes.values())[:MOST_NODES]


def _use(kind: str, rows: Sequence[UsageSample], zero: float) -> UseCurve:
    cpu = [
        (after.at - zero, 100 * min(1.0, max(0.0, used / (after.cpus * (after.at - before.at)))))
        for before, after in pairwise(rows)
        if after.cpus and (used := _between(before, after)) is not None and after.at > before.at
    ]
    memory = [(row.at - zero, row.memory_bytes / 2**30) for row in rows if row.memory_bytes is not None]
    busy = [(row.at - zero, [gpu.busy_percent for gpu in row.gpus if gpu.busy_percent is not None]) for row in rows]
    gpu = [(at, fmean(values)) for at, values in busy if values]
    return UseCurve(kind, *(curve(points) if points else None for points in (cpu, memory, gpu)))


def _between(before: UsageSample, after: UsageSample) -> float | None:
    return None if before.cpu_s is None or after.cpu_s is None else after.cpu_s - before.cpu_s


# --- sandboxes --------------------------------------------------------------------------------------------------------


RATIO, FINEST_S = 1.1, 0.001  # the bounds of a server's buckets (slurm_runtime/statistics.py)
MOST_BINS = 24


def start_bins(found: Sequence[Seconds]) -> tuple[tuple[float, float, int], ...]:
    """From, to, and how many starts took so long: equal ratios, of all servers of a run."""
    counts: dict[int, int] = {}
    for seconds in found:
        before = 0
        for bound, cumulative in seconds.buckets:
            if cumulative > before:
                place = _place(bound)
                counts[place] = counts.get(place, 0) + cumulative - before
                before = cumulative
    if not counts:
        return ()
    first, last = min(counts), max(counts)
    width = math.ceil((last - first + 1) / MOST_BINS)
    return tuple(
        (_bound(at - 1), _bound(at - 1 + width), sum(counts.get(place, 0) for place in range(at, at + width)))
        for at in range(first, last + 1, width)
    )


def _place(bound: float) -> int:
    """Which bucket ends with this bound; the longest start ends one, wherever in it that is."""
    return math.ceil(math.log(max(bound, FINEST_S) / FINEST_S, RATIO) - 0.02)


def _bound(place: int) -> float:
    return float(FINEST_S * RATIO**place)


def round_ticks(low: float, high: float) -> tuple[float, ...]:
    """1, 2 and 5 times powers of ten from one value to another; the powers alone where that is far."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    digits = (1,) if last - first > 4 else (1, 2, 5)
    ticks = [digit * 10.0**power for power in range(first, last + 1) for digit in digits]
    return tuple(tick for tick in ticks if low <= tick <= high)
