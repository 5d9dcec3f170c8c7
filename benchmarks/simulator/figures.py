"""What do many starts say together? Pure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.measure import percentile
from benchmarks.simulator.load import Start

BY_CHANCE_S = 0.05  # two requests over two connections may arrive in either order

Times = Mapping[str, Sequence[float]]
"""When a node got a start and when it answered it, by session."""


@dataclass(frozen=True)
class Spread:
    """Milliseconds."""

    median: float
    p99: float
    longest: float


@dataclass(frozen=True)
class Summary:
    """Starts under one load: how many, how many went wrong and how, how long they took.

    ``whole`` is from the moment at which a start was due to its answer; ``added`` is that less the time that the node
    itself took; ``look`` is a GET /sessions/{session_id}.
    """

    starts: int
    failed: int
    why: dict[str, int]
    whole: Spread
    added: Spread
    look: Spread


def spread(seconds: Sequence[float]) -> Spread:
    if not seconds:
        return Spread(0.0, 0.0, 0.0)
    return Spread(*(1000 * value for value in (statistics.median(seconds), percentile(seconds, 0.99), max(seconds))))


def added_s(start: Start, times: Times) -> float | None:
    """What a start took beside its node's own work; None where it was not answered, or not by a node."""
    if start.status != 201 or start.session not in times:
        return None
    received, answered = times[start.session]
    return (start.answered - start.due) - (answered - received)


def summary(starts: Sequence[Start], times: Times) -> Summary:
    good = [start for start in starts if start.status == 201]
    added = [seconds for start in good if (seconds := added_s(start, times)) is not None]
    failed = [start for start in starts if start.detail]
    why = Counter(f"{start.status} {start.detail[:120]}" for start in failed)
    return Summary(
        len(starts),
        len(failed),
        dict(why.most_common(5)),
        spread([start.answered - start.due for start in good]),
        spread(added),
        spread([seconds for start in starts for seconds in start.looks_s]),
    )


def overtaken(starts: Sequence[Start], times: Times) -> int:
    """Starts that another one, which was due clearly later, overtook on the way to a node (violations of FIFO)."""
    placed = sorted((times[start.session][0], start.due) for start in starts if start.session in times)
    latest_due, found = 0.0, 0
    for _, due in placed:
        found += due + BY_CHANCE_S < latest_due
        latest_due = max(latest_due, due)
    return found


def waits_by_group(starts: Sequence[Start], times: Times) -> dict[str, Spread]:
    """How long the starts of each group waited until they reached a node."""
    waits: dict[str, list[float]] = {}
    for start in starts:
        if start.session in times:
            waits.setdefault(start.group, []).append(times[start.session][0] - start.due)
    return {group: spread(seconds) for group, seconds in sorted(waits.items())}
