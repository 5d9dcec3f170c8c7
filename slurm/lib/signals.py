"""What a signal does to a command or a job body: it leaves a note, and the loop that waits acts on it.

Handlers only record; nothing is torn down inside one. A sleep through the notes ends early when a signal arrives,
and the handlers that were there before come back at the end of the ``with`` block.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
FORWARDED = (signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(Exception):
    """A stopping signal arrived during a wait."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {signal.Signals(number).name}")
        self.number = number


class SignalNotes:
    """The signals seen so far.

    ``stop_signal`` is the first stopping signal or None, and ``stopped_at`` when it came, by the monotonic clock.
    ``forced`` is true once a second one came.
    ``on_other`` is called with the number of each forwarded signal (USR1, USR2).
    """

    def __init__(self) -> None:
        self.stop_signal: int | None = None
        self.stopped_at: float | None = None
        self.forced = False
        self.on_other: Callable[[int], None] | None = None
        # Its put may come in the midst of its own get. There the set of a threading.Event would wait for ever, for a
        # lock that the interrupted thread itself holds.
        self._woken: queue.SimpleQueue[int] = queue.SimpleQueue()

    def note(self, number: int, _frame: FrameType | None = None) -> None:
        """The handler."""
        if number in FORWARDED:
            if self.on_other:
                self.on_other(number)
            return
        self.forced = self.stop_signal is not None
        self.stopped_at = time.monotonic() if self.stopped_at is None else self.stopped_at
        self.stop_signal = self.stop_signal or number
        self._woken.put(number)

    def sleep(self, seconds: float) -> None:
        """Sleep, but no longer than until the next stopping signal."""
        if self.stop_signal is None:
            with contextlib.suppress(queue.Empty):
                self._woken.get(timeout=max(0.0, seconds))

    def check(self) -> None:
        """Raise ``Interrupted`` if a stopping signal has come."""
        if self.stop_signal is not None:
            raise Interrupted(self.stop_signal)


@contextlib.contextmanager
def noted_signals() -> Iterator[SignalNotes]:
    """Record stopping and forwarded signals during the block; main thread only."""
    notes = SignalNotes()
    before = {number: signal.signal(number, notes.note) for number in (*STOPPING, *FORWARDED)}
    try:
        yield notes
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
