"""What has the API server of this job done so far? Counted over the whole job, kept in a file for who looks later.

The file is replaced whole (mode 0600), every few seconds while something changed and at the end. A server that follows
a killed one (``--adopt``) goes on with what stands there. ``Statistics`` does no input or output; ``StatisticsFile``
writes in a thread, so that a slow or full disk holds up no request, and not the server's end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slurm_runtime.logs import log
from slurm_runtime.steps import STEPS, StepTimes

SCHEMA = 1
# 1 ms to 18 minutes, each a tenth above the one before: a quantile is at most so much too high.
BOUNDS_S = tuple(round(0.001 * 1.1**power, 6) for power in range(146))
MOST_REASONS, OTHER = 50, "other reasons"
PERIOD_S = 5.0
LAST_WRITE_S = 0.5  # for the last state to be written while the server ends


@dataclass
class Durations:
    """How long something took: exact count, sum and longest; quantiles are upper bounds of ``BOUNDS_S``."""

    counts: Counter[int] = field(default_factory=Counter)
    sum: float = 0.0
    max: float = 0.0

    def note(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.sum += seconds
        self.max = max(self.max, seconds)

    @property
    def count(self) -> int:
        return self.counts.total()

    def quantile(self, share: float) -> float | None:
        """So many seconds or less took this share of all; None while there is nothing."""
        rank = math.ceil(share * self.count)
        return next((bound for bound, count in self.buckets() if count >= rank), None)

    def buckets(self) -> list[tuple[float, int]]:
        """Cumulative counts; of bounds that add nothing there is no pair. The last one is the longest."""
        total, found = 0, []
        for place in sorted(self.counts):
            total += self.counts[place]
            found.append((min(self.max, BOUNDS_S[place]) if place < len(BOUNDS_S) else self.max, total))
        return found

    def told(self) -> dict[str, Any]:
        """As JSON."""
        quantiles = {f"p{share * 100:.0f}": self.quantile(share) for share in (0.5, 0.9, 0.99)}
        most = self.max if self.count else None
        return {
            "count": self.count,
            "sum": self.sum,
            **quantiles,
            "max": most,
            "buckets": [list(pair) for pair in self.buckets()],
        }

    @staticmethod
    def read(data: Mapping[str, Any]) -> Durations:
        """From ``told``; ``ValueError``, ``TypeError`` or ``KeyError`` for anything else."""
        counts: Counter[int] = Counter()
        before = 0
        for bound, total in data["buckets"]:
            counts[bisect_left(BOUNDS_S, float(bound))] += int(total) - before
            before = int(total)
        if min(counts.values(), default=1) <= 0:
            raise ValueError("buckets that do not grow")
        return Durations(counts, float(data["sum"]), float(data["max"] or 0.0))


@dataclass
class Statistics:
    """The counts of a job's API server.

    A start is *asked* once for each new sandbox, *succeeded* when that answers for the first time, *failed* when it
    ends before. A sandbox that has answered *ends* once. One whose server was killed amid its start is asked for and no
    more. ``warm`` of those that succeeded run in a container that waited for them. ``steps_before`` are those that
    servers before this one counted.
    """

    asked: int = 0
    succeeded: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    warm: int = 0
    start_seconds: Durations = field(default_factory=Durations)
    requests: Durations = field(default_factory=Durations)
    peak_living: int = 0
    steps: StepTimes = field(default_factory=StepTimes)
    steps_before: StepTimes = field(default_factory=StepTimes)

    def note_asked(self) -> None:
        self.asked += 1

    def note_started(self, seconds: float, was_warm: bool = False) -> None:
        """A sandbox answers for the first time, so many seconds after it was asked for."""
        self.succeeded += 1
        self.warm += was_warm
        self.start_seconds.note(seconds)

    def note_living(self, living: int) -> None:
        self.peak_living = max(self.peak_living, living)

    def note_failed(self, reason: str) -> None:
        _count(self.failed, reason)

    def note_ended(self, reason: str) -> None:
        _count(self.ended, reason)

    def told(self, slots: int) -> dict[str, Any]:
        """As JSON, but for the time."""
        return {
            "schema": SCHEMA,
            "starts": {
                "asked": self.asked,
                "succeeded": self.succeeded,
                "warm": self.warm,
                "failed": dict(self.failed),
            },
            "start_seconds": self.start_seconds.told(),
            "steps": {step: self._step(step) for step in STEPS},
            "peak_living": self.peak_living,
            "slots": slots,
            "ended": dict(self.ended),
            "requests": self.requests.told(),
        }

    def _step(self, step: str) -> dict[str, Any]:
        count = self.steps.counts[step] + self.steps_before.counts[step]
        return {"count": count, "sum": self.steps.seconds[step] + self.steps_before.seconds[step]}

    @staticmethod
    def read(text: str, steps: StepTimes) -> Statistics:
        """What servers before this one counted; from zero where that cannot be read."""
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
            return Statistics._read(json.loads(text), steps)
        return Statistics(steps=steps)

    @staticmethod
    def _read(data: Mapping[str, Any], steps: StepTimes) -> Statistics:
        if data["schema"] != SCHEMA:
            raise ValueError("another schema")
        starts, before = data["starts"], StepTimes()
        for step in STEPS:
            before.counts[step] = int(data["steps"][step]["count"])
            before.seconds[step] = float(data["steps"][step]["sum"])
        return Statistics(
            asked=int(starts["asked"]),
            succeeded=int(starts["succeeded"]),
            warm=int(starts.get("warm", 0)),
            failed=Counter({str(reason): int(count) for reason, count in starts["failed"].items()}),
            ended=Counter({str(reason): int(count) for reason, count in data["ended"].items()}),
            start_seconds=Durations.read(data["start_seconds"]),
            requests=Durations.read(data["requests"]),
            peak_living=int(data["peak_living"]),
            steps=steps,
            steps_before=before,
        )


def _count(counts: Counter[str], reason: str) -> None:
    """Bounded: what Podman's words make of reasons must not fill the file."""
    counts[reason if reason in counts or len(counts) < MOST_REASONS else OTHER] += 1


class StatisticsFile:
    """Writes what ``told`` says into a file for the length of a ``with`` block; nowhere without one.

    ``told`` is asked by ``look``, in the thread of the caller. Who leaves the block waits ``LAST_WRITE_S`` at most.
    """

    def __init__(self, path: Path | None, told: Callable[[], dict[str, Any]]) -> None:
        self.path = path
        self.told = told
        self._last: dict[str, Any] = {}
        self._text: str | None = None
        self._is_over = False
        self._said = False
        self._change = threading.Condition()
        self._done = threading.Event()

    def __enter__(self) -> StatisticsFile:
        if self.path is not None:
            threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.look(is_last=True)
        if self.path is not None:
            self._done.wait(LAST_WRITE_S)

    async def keep(self) -> None:
        """Look every few seconds; ends only by cancellation."""
        while self.path is not None:
            self.look()
            await asyncio.sleep(PERIOD_S)

    def look(self, is_last: bool = False) -> None:
        """Have the state written, if it is another than before."""
        state = self.told() if self.path is not None else {}
        with self._change:
            if state != self._last:
                self._last = state
                self._text = json.dumps({**state, "at": round(time.time(), 3)}, separators=(",", ":"))
            self._is_over = is_last
            self._change.notify()

    def _run(self) -> None:
        over = False
        while not over:
            with self._change:
                while self._text is None and not self._is_over:
                    self._change.wait()
                text, self._text, over = self._text, None, self._is_over
            if text is not None:
                self._write(text)
        self._done.set()

    def _write(self, text: str) -> None:
        assert self.path is not None
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
                file.write(text + "\n")
            beside.replace(self.path)
        except OSError as problem:
            with contextlib.suppress(OSError):
                beside.unlink()
            if not self._said:
                log.warning("the statistics of this server are not written: %s", problem)
            self._said = True


def kept(path: Path | None, goes_on: bool, steps: StepTimes) -> Statistics:
    """Those in the file where this server ``goes_on`` with a killed one's; else from zero."""
    text = ""
    if path is not None and goes_on:
        with contextlib.suppress(OSError):
            text = path.read_text(encoding="utf-8", errors="replace")
    return Statistics.read(text, steps)
