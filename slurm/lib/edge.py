"""The edge of a process: a signal that ends its work, or an error, is one line of log and a documented exit code."""

from __future__ import annotations

from collections.abc import Callable

from slurm.lib.errors import EXIT_SIGNAL_BASE, SuiteError
from slurm.lib.logs import log
from slurm.lib.signals import Interrupted, SignalNotes, noted_signals
from slurm.lib.under_way import end_those_of_other_threads


def exit_code_of(work: Callable[[SignalNotes], int], interrupted: str) -> int:
    """What ``work`` returns, else the code of what ended it; main thread only.

    Commands that other threads wait for are ended then, and these start none any more.

    :param interrupted: what the log says when a signal did, with ``%s`` for the signal
    """
    with noted_signals() as notes:
        try:
            return work(notes)
        except Interrupted as stop:
            log.warning(interrupted, stop)
            return EXIT_SIGNAL_BASE + stop.number
        except SuiteError as problem:
            log.error("%s", problem)
            return problem.exit_code
        finally:
            end_those_of_other_threads()
