"""Which commands do the threads of this process wait for? None of them outlives its work.

A thread in which Slurm is asked, or a mail is sent, is not waited for: it ends with the process. Its command would not.
A squeue about one job goes on for 18 s where the controller does not run, and sbatch for a minute.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar
from weakref import WeakSet

from slurm.lib.errors import WaitTimeout

T = TypeVar("T")
KILLED_WITHIN_S = 2.0  # from SIGKILL to the end of a command, on a busy node

_lock = threading.Lock()
_dismissed: WeakSet[threading.Thread] = WeakSet()
_under_way: dict[object, tuple[threading.Thread, Callable[[], None]]] = {}


@contextlib.contextmanager
def under_way(start: Callable[[], T], kill: Callable[[T], None]) -> Iterator[T]:
    """A command that this thread waits for in the block; ``kill`` may be called by another thread meanwhile.

    ``WaitTimeout`` in place of its start in a thread that nobody waits for any more.
    """
    thread, token = threading.current_thread(), object()
    with _lock:
        if thread in _dismissed:
            raise WaitTimeout("not started, since this process is ending")
        command = start()
        _under_way[token] = (thread, lambda: kill(command))
    try:
        yield command
    finally:
        _under_way.pop(token, None)


def end_those_of_other_threads(deadline_s: float = KILLED_WITHIN_S) -> None:
    """Kill what other threads wait for, and let these start nothing more; the last act of a process."""
    end = time.monotonic() + deadline_s
    with _taken(_lock, deadline_s):
        _dismissed.update(set(threading.enumerate()) - {threading.current_thread()})
    while doomed := [kill for thread, kill in list(_under_way.values()) if thread in _dismissed]:
        for kill in doomed:
            kill()
        if time.monotonic() > end:
            return
        time.sleep(0.01)


@contextlib.contextmanager
def _taken(lock: threading.Lock, seconds: float) -> Iterator[None]:
    """The lock, or none after so many seconds: a start may hang in a file server, and a process's end must not."""
    is_taken = lock.acquire(timeout=seconds)
    try:
        yield
    finally:
        if is_taken:
            lock.release()
