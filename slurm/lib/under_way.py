"""Which commands do the threads of this process wait for? None of them outlives the process's work.

A thread in which Slurm is asked, or a mail is sent, is not waited for: it ends with the process. Its command would not.
A squeue about one job goes on for 18 s where the controller does not run, and sbatch for a minute.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar
from weakref import WeakKeyDictionary, WeakSet

from slurm.lib.errors import WaitTimeout

T = TypeVar("T")
KILLED_WITHIN_S = 2.0  # from SIGKILL to the end of a command, on a busy node

_dismissed: WeakSet[threading.Thread] = WeakSet()
_works_for: WeakKeyDictionary[threading.Thread, threading.Thread] = WeakKeyDictionary()
_under_way: dict[object, tuple[threading.Thread, Callable[[], None]]] = {}


@contextlib.contextmanager
def under_way(start: Callable[[], T], kill: Callable[[T], None]) -> Iterator[T]:
    """A command that this thread waits for in the block; ``kill`` may be called by another thread meanwhile.

    ``WaitTimeout`` in a thread that nobody waits for any more: in place of the start, or in place of the command's end,
    which tells nothing then.
    """
    thread, token = threading.current_thread(), object()
    # First the note and then the look, while whoever ends it dismisses first and then looks: one sees the other.
    _under_way[token] = (thread, lambda: None)
    try:
        if _is_dismissed(thread):
            raise WaitTimeout("not started, since nobody waits for it any more")
        command = start()
        _under_way[token] = (thread, lambda: kill(command))
        if _is_dismissed(thread):
            kill(command)
        yield command
        if _is_dismissed(thread):
            raise WaitTimeout("ended, since nobody waits for it any more")
    finally:
        _under_way.pop(token, None)


def follow(thread: threading.Thread) -> None:
    """This thread, which begins, works for ``thread``: if that one is dismissed, now or later, so is this."""
    _works_for[threading.current_thread()] = thread


def _is_dismissed(thread: threading.Thread | None) -> bool:
    while thread is not None:
        if thread in _dismissed:
            return True
        thread = _works_for.get(thread)
    return False


def end_those_of(threads: Iterable[threading.Thread], deadline_s: float = KILLED_WITHIN_S) -> None:
    """Kill what these threads wait for, and let them start nothing more, ever; takes ``deadline_s`` seconds at most."""
    end = time.monotonic() + deadline_s
    _dismissed.update(threads)
    while doomed := [kill for thread, kill in list(_under_way.values()) if _is_dismissed(thread)]:
        for kill in doomed:
            kill()
        if time.monotonic() > end:
            return
        time.sleep(0.01)


def end_those_of_other_threads() -> None:
    """The same for all threads but the one that calls: as the work of a process ends."""
    end_those_of(set(threading.enumerate()) - {threading.current_thread()})
