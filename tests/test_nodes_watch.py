"""Whether enough nodes can still join a head: what is waited for, and what is given up."""

from __future__ import annotations

import pytest

from slurm.lib.nodes_watch import Hope, JoinedNode, hope_of, joined_nodes, verdict
from slurm.lib.scheduler import JobState, JobStatus

OWN = JoinedNode("cpu-a", "7", "ready", 8)
FIRST = JoinedNode("cpu-b.8_1", "8_1", "ready", 8)
LOST = JoinedNode("cpu-c.8_2", "8_2", "lost", 8, "not heard of for 15 s")


@pytest.mark.parametrize(
    ("nodes", "hope", "still_s", "gives_up"),
    [
        ((OWN,), Hope(pending=("8_1", "8_2")), 1e6, False),  # for hours in the queue
        ((OWN,), Hope(running=("8_1", "8_2")), 599, False),
        ((OWN,), Hope(running=("8_1", "8_2")), 601, True),  # they run, and say nothing
        ((OWN,), Hope(running=("8_1",)), 1, True),  # the other one has ended
        ((OWN, FIRST), Hope(running=("8_1", "8_2")), 1, False),
        ((OWN, FIRST, LOST), Hope(running=("8_1", "8_2")), 1, True),  # Slurm calls it running, and it is lost
        ((OWN, FIRST, LOST), Hope(pending=("9_3",), running=("8_1",)), 1, False),
        ((), Hope(), 1, True),
        ((), Hope(is_known=False), 1e6, False),  # a person may submit workers at any time
    ],
)
def test_when_waiting_for_nodes_is_of_no_use(
    nodes: tuple[JoinedNode, ...], hope: Hope, still_s: float, gives_up: bool
) -> None:
    assert bool(verdict(24, 8, nodes, hope, still_s, 600)) is gives_up


def test_what_is_said_names_what_was_lost_and_what_is_silent() -> None:
    assert verdict(24, 8, (OWN, FIRST, LOST), Hope(running=("8_1",)), 1, 600) == (
        "16 of 24 slots have joined, and the workers that are left cannot bring the rest (cpu-c.8_2: not heard of for "
        "15 s); read the logs worker_*.err"
    )
    assert verdict(24, 8, (OWN, FIRST), Hope(running=("8_1", "8_2")), 601, 600) == (
        "16 of 24 slots have joined; the workers 8_2 run, and have not joined for 600 s (RUNTIME_READY_TIMEOUT)"
    )


def test_what_is_said_names_what_never_joined_in_slurms_words() -> None:
    """One whose log could not be made has left none."""
    ended = (("8_1", "FAILED, NonZeroExitCode, on cpu-b"), ("8_2", "FAILED, JobLaunchFailure, on cpu-c"))
    assert "(cpu-c.8_2: not heard of for 15 s; 8_1: FAILED, NonZeroExitCode, on cpu-b); read" in verdict(
        24, 8, (OWN, LOST), Hope(ended=ended), 1, 600
    )
    why = verdict(24, 8, (OWN, FIRST), Hope(ended=ended), 1, 600)
    assert "(8_2: FAILED, JobLaunchFailure, on cpu-c); is its run directory there on that node, and writable?" in why


def test_a_step_has_joined_by_its_node() -> None:
    """Slurm knows it by its job alone, which is the head's own."""
    node = JoinedNode("cpu-b", "7", "ready", 8)
    assert verdict(24, 8, (OWN, node), Hope(running=("cpu-b", "cpu-c")), 1, 600) == ""
    assert verdict(24, 8, (OWN, node), Hope(running=("cpu-b",)), 1, 600)


def test_slurms_words_about_tasks() -> None:
    states = [JobState.PENDING, JobState.RUNNING, JobState.UNKNOWN, JobState.ENDED_BADLY, JobState.PURGED]
    said = {f"8_{number}": JobStatus(state, state.name) for number, state in enumerate(states)}
    ended = (("8_3", "ENDED_BADLY"), ("8_4", "PURGED"))
    assert hope_of(said) == Hope(pending=("8_0", "8_2"), running=("8_1",), ended=ended)


@pytest.mark.parametrize("said", [None, [], {}, {"nodes": 3}, {"nodes": [1, None]}, "x"])
def test_what_no_head_says_is_no_node(said: object) -> None:
    assert joined_nodes(said) == ()


def test_a_heads_answer() -> None:
    row = {"name": "cpu-b", "job": "8_1", "state": "draining", "slots": 8, "reason": "asked to", "url": "http://x"}
    assert joined_nodes({"nodes": [row]}) == (JoinedNode("cpu-b", "8_1", "draining", 8, "asked to"),)
