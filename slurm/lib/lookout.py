"""Looking in the background: what waits for a slow shared directory or a silent controller holds up nobody else.

A job body's main thread acts on signals and on the ends of its children within a fraction of a second. A look at a
flag takes as long as the file server likes, and a question to Slurm up to ten seconds. So each is asked in a thread of
its own, and the main thread reads what has been seen so far.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from slurm.lib.signals import SignalNotes
from slurm.lib.under_way import end_those_of

T = TypeVar("T")
NOTE_EVERY_S = 0.05  # how soon a signal ends the wait for an answer


class Lookout(Generic[T]):
    """Calls ``look`` every ``every_s`` seconds for the length of a ``with`` block, until it has seen something.

    The first look is at once. One that hangs ends with the process.
    """

    def __init__(self, look: Callable[[], T | None], every_s: float = 0.0) -> None:
        self._look, self._every_s = look, every_s
        self._seen: T | None = None
        self._fault: BaseException | None = None
        self._end, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def seen(self) -> T | None:
        """What a look has returned, at once; None while there is nothing. Raises what a look has raised."""
        if self._fault is not None:
            raise self._fault
        return self._seen

    def wait(self, seconds: float) -> bool:
        """Whether something has been seen, or a look has failed, within so many seconds."""
        return self._over.wait(seconds)

    def dismiss(self, seconds: float) -> None:
        """End the command that a look waits for; none starts another. Waits for that for so many seconds at most."""
        self._end.set()
        end_those_of([self._thread], seconds)

    def _run(self) -> None:
        try:
            while self._seen is None:
                self._seen = self._look()
                if self._end.wait(self._every_s if self._seen is None else 0.0):
                    return
        except BaseException as fault:  # for whoever asks what was seen
            self._fault = fault
        finally:
            self._over.set()

    def __enter__(self) -> Lookout[T]:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._end.set()


def answered(question: Callable[[], T], notes: SignalNotes) -> T:
    """The answer to a question that may take long; ``Interrupted`` as soon as a signal has come."""
    return inquiry(question, notes)()


def inquiry(question: Callable[[], T], notes: SignalNotes) -> Callable[[], T]:
    """Ask now; the returned function waits for the answer, or is ``Interrupted`` as soon as a signal has come."""
    answers: list[T] = []

    def ask() -> bool:
        answers.append(question())
        return True

    lookout = Lookout(ask).__enter__()  # which ends with its first look

    def answer() -> T:
        while not lookout.wait(NOTE_EVERY_S):
            notes.check()
        lookout.seen()
        return answers[0]

    return answer
