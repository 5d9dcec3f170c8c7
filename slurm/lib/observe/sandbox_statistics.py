"""What did a run's API server do, over the whole of its job? From its statistics in the run directory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from slurm.lib.observe.run_files import printable

SCHEMA = 1
MOST = 2.0**53  # no figure of ours is as large


@dataclass(frozen=True)
class Seconds:
    """How long something took: how often, in all, and some quantiles, exact or the upper bounds of buckets.

    ``buckets``: up to so many seconds, how many; cumulative. None is not known.
    """

    count: int = 0
    sum: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    max: float | None = None
    buckets: tuple[tuple[float, int], ...] = ()


@dataclass(frozen=True)
class Starts:
    """Starts of sandboxes: ``failed`` by reason."""

    asked: int = 0
    succeeded: int = 0
    failed: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SandboxStatistics:
    """The counts of a runtime job's API server until ``at`` (epoch seconds of its node); ``ended`` by reason."""

    at: float
    starts: Starts = Starts()
    start_seconds: Seconds = Seconds()
    steps: Mapping[str, Seconds] = field(default_factory=dict)
    peak_living: int = 0
    slots: int | None = None
    ended: Mapping[str, int] = field(default_factory=dict)
    requests: Seconds = Seconds()


def all_nodes(found: Sequence[SandboxStatistics]) -> SandboxStatistics:
    """The counts of several nodes' servers as one.

    Quantiles are those of all starts, as their buckets tell them: a bucket's upper bound. ``peak_living`` is the sum of
    the nodes' peaks, which need not have been at one time.
    """
    if len(found) == 1:
        return found[0]
    slots = [one.slots for one in found if one.slots is not None]
    steps = dict.fromkeys(name for one in found for name in one.steps)
    return SandboxStatistics(
        max(one.at for one in found),
        Starts(
            sum(one.starts.asked for one in found),
            sum(one.starts.succeeded for one in found),
            _added(one.starts.failed for one in found),
        ),
        _together([one.start_seconds for one in found]),
        {name: _together([one.steps[name] for one in found if name in one.steps]) for name in steps},
        sum(one.peak_living for one in found),
        sum(slots) if slots else None,
        _added(one.ended for one in found),
        _together([one.requests for one in found]),
    )


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    added: Counter[str] = Counter()
    for one in counts:
        added.update(one)
    return dict(added)


def _together(found: Sequence[Seconds]) -> Seconds:
    """What took time on several nodes."""
    bounds = sorted({bound for one in found for bound, _ in one.buckets})
    buckets = tuple((bound, sum(_within(one, bound) for one in found)) for bound in bounds)
    sums = [one.sum for one in found if one.sum is not None]
    most = max((one.max for one in found if one.max is not None), default=None)
    count = sum(one.count for one in found)
    is_whole = all(one.buckets or not one.count for one in found)
    p50, p90, p99 = (_quantile(buckets, share * count, most) if is_whole else None for share in (0.5, 0.9, 0.99))
    return Seconds(count, sum(sums) if sums else None, p50, p90, p99, most, buckets)


def _within(one: Seconds, bound: float) -> int:
    """How many took no longer; of a node with other buckets as many as are known to."""
    return max((count for upper, count in one.buckets if upper <= bound), default=0)


def _quantile(buckets: Sequence[tuple[float, int]], rank: float, most: float | None) -> float | None:
    """The upper bound of the bucket that a rank falls into; beyond the last one the longest."""
    if not rank:
        return None
    bound = next((upper for upper, count in buckets if count >= rank), None)
    return most if bound is None or (most is not None and most < bound) else bound


def read_statistics(text: str) -> SandboxStatistics | None:
    """The statistics in a file of ours; None for one that is half, damaged or of another schema."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA or not (at := _figure(data.get("at"))):
        return None
    slots = _figure(data.get("slots"))
    return SandboxStatistics(
        at,
        _starts(_mapping(data.get("starts"))),
        _seconds(data.get("start_seconds")),
        {_line(name): _seconds(one) for name, one in _mapping(data.get("steps")).items()},
        _count(data.get("peak_living")),
        None if slots is None else int(slots),
        _counts(data.get("ended")),
        _seconds(data.get("requests")),
    )


def _starts(data: Mapping[str, object]) -> Starts:
    return Starts(_count(data.get("asked")), _count(data.get("succeeded")), _counts(data.get("failed")))


def _seconds(data: object) -> Seconds:
    said = _mapping(data)
    total, p50, p90, p99, most = (_figure(said.get(name)) for name in ("sum", "p50", "p90", "p99", "max"))
    buckets = said.get("buckets")
    pairs = [_bucket(one) for one in (buckets if isinstance(buckets, list) else [])]
    whole = tuple(pair for pair in pairs if pair is not None)
    return Seconds(_count(said.get("count")), total, p50, p90, p99, most, whole)


def _bucket(data: object) -> tuple[float, int] | None:
    if not isinstance(data, list) or len(data) != 2 or (bound := _figure(data[0])) is None:
        return None
    return bound, _count(data[1])


def _counts(data: object) -> dict[str, int]:
    return {_line(name): count for name, one in _mapping(data).items() if (count := _count(one))}


def _line(text: str) -> str:
    return " ".join(printable(text).split())[:200]


def _count(value: object) -> int:
    return int(_figure(value) or 0)


def _figure(value: object) -> float | None:
    """A number that can be one of ours; JSON as Python reads it has NaN, too."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value < MOST else None  # NaN is not


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}
