"""What is judged of two hosts together: the way of a file, of a connection, of time. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from slurm.lib.doctor.exchange import Echo, clock_ahead, visible_after
from slurm.lib.doctor.host_verdicts import milliseconds
from slurm.lib.doctor.verdict import Verdict, fail, ok, warn

LATE_S, UNSEEN_S = 2.0, 45.0  # a new file is seen so late; so late, and it is taken for unseen
WRONG_CLOCK_S, MUNGE_S = 2.0, 300.0  # munge refuses what is older


def visibility_verdict(node: str, echoes: Sequence[Echo]) -> Verdict:
    """How soon a node sees what is written on another host; flags of a run go that way."""
    seconds = visible_after(echoes)
    if seconds is None:
        fix = "set SKYRL_JOBS_BASE to storage that all nodes share, and see its mount options (nfs(5): acdirmax)"
        return fail("visibility", f"{node} did not see a new file, or its answer was not seen, for {UNSEEN_S:g} s", fix)
    sentence = f"{node} sees a new file of this host, and this host its answer, after {milliseconds(seconds)}"
    if seconds > LATE_S:
        fix = "jobs notice each other's ends so late; choose other storage, or mount it with a short acdirmax"
        return warn("visibility", sentence, fix)
    return ok("visibility", sentence)


def clock_verdict(node: str, echoes: Sequence[Echo]) -> list[Verdict]:
    """Nothing of the suite compares two hosts' clocks, but people compare logs, and munge does."""
    found = clock_ahead(echoes)
    if found is None:
        return []
    ahead, unsure = found
    word = "ahead of" if ahead > 0 else "behind"
    off = f"{node}'s clock is {milliseconds(abs(ahead))} {word} this host's (± {milliseconds(unsure)})"
    surely = abs(ahead) - unsure
    if surely > MUNGE_S:
        return [fail("clock", off, "Slurm's authentication breaks at 5 minutes: ask the administrator for NTP")]
    if surely > WRONG_CLOCK_S:
        return [warn("clock", off, "the times in logs do not match: ask the administrator for NTP")]
    return [ok("clock", f"{node}'s clock is this host's within {milliseconds(abs(ahead) + unsure)}")]


def reach_verdict(source: str, target: str, problem: str | None) -> Verdict:
    """Whether a container's published port on ``target`` is reached from ``source``; None: it was not tried."""
    sentence = f"a container's published port on {target}"
    if problem is None:
        fix = "run the doctor again when nodes are free, with a longer --wait"
        return warn("port", f"{sentence} was not tried from {source}", fix)
    if problem:
        fix = "ask the administrator which ports are open between nodes, and set RUNTIME_PORT_RANGE to them"
        return fail("port", f"{sentence} is not reached from {source}: {problem}", fix)
    return ok("port", f"{sentence} is reached from {source}")
