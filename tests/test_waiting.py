"""A wait ends for one of four reasons, and says which."""

from __future__ import annotations

import os
import signal

import pytest

from slurm.lib.errors import PartnerGone, WaitTimeout
from slurm.lib.signals import Interrupted, noted_signals
from slurm.lib.waiting import jittered_pause, wait_for


def test_it_ends_with_the_value() -> None:
    results = iter([None, None, "there"])
    assert wait_for("it", lambda: next(results), 5, pause=lambda _t: 0.001) == "there"


def test_it_ends_at_the_deadline_and_says_for_what() -> None:
    with pytest.raises(WaitTimeout, match=r"waited 0\.05 s for the moon"):
        wait_for("the moon", lambda: None, 0.05, pause=lambda _t: 0.01)


def test_it_ends_when_waiting_is_pointless() -> None:
    def dead() -> None:
        raise PartnerGone("gone")

    with pytest.raises(PartnerGone, match="gone"):
        wait_for("it", lambda: None, 60, still_possible=dead)


def test_it_ends_at_a_signal_however_long_the_pause() -> None:
    with noted_signals() as notes, pytest.raises(Interrupted):
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for("it", lambda: None, 60, still_possible=notes.check, pause=lambda _t: 60, sleep=notes.sleep)


def test_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with noted_signals():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_forces() -> None:
    with noted_signals() as notes:
        os.kill(os.getpid(), signal.SIGINT)
        assert (notes.stop_signal, notes.forced) == (signal.SIGINT, False)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (notes.stop_signal, notes.forced) == (signal.SIGINT, True)


def test_the_pause_is_short_at_first_and_never_in_step() -> None:
    early = {jittered_pause(1.0) for _ in range(50)}
    late = {jittered_pause(31.0) for _ in range(50)}
    assert max(early) <= 0.25
    assert 1 < min(late) <= max(late) <= 2
    assert len(early) > 1
