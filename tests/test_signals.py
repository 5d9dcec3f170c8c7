"""Signals leave notes, whatever moment they come at."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slurm.lib.signals import Interrupted, SignalNotes

ROOT = Path(__file__).resolve().parent.parent
SLEEPER = """
from slurm.lib.signals import noted_signals

with noted_signals() as notes:
    seen = []
    notes.on_other = seen.append
    print("ready", flush=True)
    while not seen:
        notes.sleep(1e-6)
print(notes.stop_signal, notes.forced)
"""


def test_a_signal_in_the_midst_of_a_sleep_is_no_deadlock() -> None:
    argv = [sys.executable, "-c", SLEEPER]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout
        try:
            process.stdout.readline()
            end = time.monotonic() + 1
            while time.monotonic() < end:
                os.kill(process.pid, signal.SIGTERM)
            os.kill(process.pid, signal.SIGUSR1)
            assert process.communicate(timeout=20)[0] == "15 True\n"
        finally:
            process.kill()


def test_a_sleep_lasts_its_time_and_ends_with_the_first_signal() -> None:
    notes = SignalNotes()
    begin = time.monotonic()
    notes.sleep(0.05)
    notes.sleep(-1)
    assert time.monotonic() - begin >= 0.05
    notes.note(signal.SIGTERM)
    notes.sleep(60)
    notes.sleep(60)
    assert time.monotonic() - begin < 30
    with pytest.raises(Interrupted, match="SIGTERM"):
        notes.check()
