"""Is what has been seen told at once, and does a look that hangs hold up nobody?"""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from slurm.lib.lookout import Lookout, answered
from slurm.lib.signals import Interrupted, noted_signals


def test_the_first_thing_seen_is_told_and_nothing_is_looked_for_after_it() -> None:
    looks = iter([None, None, "seen", "too late"])
    with Lookout(lambda: next(looks), every_s=0.01) as lookout:
        assert lookout.wait(5)
        assert lookout.seen() == "seen"
    assert next(looks) == "too late"


def test_a_look_that_hangs_holds_up_nobody() -> None:
    hangs = threading.Event()
    begin = time.monotonic()
    with Lookout[bool](hangs.wait) as lookout:
        assert lookout.seen() is None
        assert not lookout.wait(0.05)
    assert time.monotonic() - begin < 1
    hangs.set()


def test_nobody_looks_after_the_block() -> None:
    looks: list[float] = []
    with Lookout[None](lambda: looks.append(0.0), every_s=0.01) as lookout:
        while not looks:
            assert not lookout.wait(0.01)
    lookout.wait(5)
    number = len(looks)
    time.sleep(0.1)
    assert len(looks) == number


def test_a_fault_of_a_look_is_raised_where_it_is_asked_for() -> None:
    with Lookout(lambda: 1 // 0) as lookout:
        assert lookout.wait(5)
        with pytest.raises(ZeroDivisionError):
            lookout.seen()


def test_an_answer_may_be_anything_and_a_signal_ends_the_wait_for_one() -> None:
    hangs = threading.Event()
    with noted_signals() as notes:
        assert answered(lambda: None, notes) is None
        with pytest.raises(ZeroDivisionError):
            answered(lambda: 1 // 0, notes)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        begin = time.monotonic()
        with pytest.raises(Interrupted):
            answered(hangs.wait, notes)
        assert time.monotonic() - begin < 1
    hangs.set()
