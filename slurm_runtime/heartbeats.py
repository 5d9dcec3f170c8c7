"""Who of the run was heard of, and when: the two jobs tell each other that they live."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

MOST_NAMES = 64
LONGEST_NAME = 128


class TooManyNames(Exception):
    """Somebody beats under ever new names."""


@dataclass(frozen=True)
class Beat:
    """The last beat of one name, by the monotonic clock, and how many there were."""

    at: float
    count: int


class Heartbeats:
    """The last beat of each name; ``clock`` counts seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._beats: dict[str, Beat] = {}

    def beat(self, name: str) -> Beat:
        """Record that ``name`` lives; ``TooManyNames`` for the 65th name."""
        before = self._beats.get(name)
        if before is None and len(self._beats) >= MOST_NAMES:
            raise TooManyNames(f"{MOST_NAMES} names beat already; a run has two jobs")
        self._beats[name] = Beat(self._clock(), 1 + (before.count if before else 0))
        return self._beats[name]

    def get(self, name: str) -> Beat | None:
        return self._beats.get(name)

    def age_s(self, beat: Beat) -> float:
        return self._clock() - beat.at
