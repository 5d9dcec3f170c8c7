"""Was an end asked for: SIGTERM and SIGINT as a question that the loop asks at safe places."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from shell_rl.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Holds the first signal that came; a handler that only notes it cannot break a clean-up in two."""

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler."""
        self._signal = self._signal or signal.Signals(number)

    def check(self) -> None:
        """Raise where a signal came.

        :raises Interrupted: its exit code is 128 + the signal's number
        """
        if self._signal is not None:
            raise Interrupted(self._signal.value, self._signal.name)


@contextmanager
def noted_signals() -> Iterator[Interruption]:
    """Note SIGTERM and SIGINT instead of dying of them, until the block ends. Main thread only."""
    interruption = Interruption()
    before = {number: signal.signal(number, interruption.note) for number in SIGNALS}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
