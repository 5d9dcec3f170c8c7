"""How a process ends: the code of its work, of an error, or of a real signal, and what the log says."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from slurm.lib.edge import exit_code_of
from slurm.lib.errors import EnvironmentProblem
from slurm.lib.logs import setup_command_logging
from slurm.lib.signals import SignalNotes


def well(_notes: SignalNotes) -> int:
    return 7


def lacking(_notes: SignalNotes) -> int:
    raise EnvironmentProblem("no disk on this node; free some")


def stopped(notes: SignalNotes) -> int:
    os.kill(os.getpid(), signal.SIGTERM)
    notes.sleep(10)
    notes.check()
    return 0


@pytest.mark.parametrize(
    ("work", "code", "said"),
    [
        (well, 7, ""),
        (lacking, 71, "[ERROR] no disk on this node; free some\n"),
        (stopped, 143, "[WARN] ended by signal SIGTERM in the middle\n"),
    ],
)
def test_what_ends_the_work_is_one_line_and_a_code(
    work: Callable[[SignalNotes], int], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_command_logging()
    before = signal.getsignal(signal.SIGTERM)
    assert exit_code_of(work, "ended by %s in the middle") == code
    out, err = capsys.readouterr()
    assert (out, err[len("2026-01-01 00:00:00 ") :]) == ("", said)
    assert signal.getsignal(signal.SIGTERM) == before
