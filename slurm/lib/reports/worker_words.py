"""How are the workers and nodes of a runtime said to people: a line for each array, a table of the nodes?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from slurm.lib.job_arrays import folded
from slurm.lib.observe.run_view import JobView, Stage
from slurm.lib.observe.unknown import Unknown
from slurm.lib.reports.run_words import about, job_words, shortened

if TYPE_CHECKING:
    from slurm.lib.observe.nodes import Node, Nodes

MOST_ENDS = 3  # told by their ids in a line
REASON = 60  # characters of one in the table
_COLUMNS = ("NODE", "JOB", "STATE", "SLOTS USED", "SANDBOXES", "UNTIL", "REASON")


def array_lines(workers: Sequence[JobView], now: float) -> list[str]:
    """A line for each array; of workers that are steps of the runtime job only its head knows."""
    arrays = dict.fromkeys(worker.array for worker in workers if worker.array)
    return [_array_words([worker for worker in workers if worker.array == array], now) for array in arrays]


def _array_words(workers: Sequence[JobView], now: float) -> str:
    """``124_[1-5]: 3 of 5 run, 2 PENDING (Priority): others go first``."""
    ids = folded([worker.job_id for worker in workers])
    running = [worker for worker in workers if worker.stage is Stage.RUNNING]
    ended = [worker for worker in workers if worker.stage is Stage.ENDED]
    said = Counter(job_words(worker, now) for worker in workers if worker.stage in {Stage.PENDING, Stage.UNKNOWN})
    words = [] if len(ended) == len(workers) else [f"{len(running)} of {len(workers)} run"]
    words += [f"{count} {what}" for what, count in said.items()]
    words += [_end_words(ended)] if ended else []
    return f"{ids}{'' if workers[0].is_needed else ', beyond what is needed'}: {', '.join(words)}"


def _end_words(ended: Sequence[JobView]) -> str:
    """How many have ended; of few how."""
    reasons = Counter(worker.end_reason for worker in ended)
    told = "; ".join(
        f"{reason} ({folded([one.job_id for one in ended if one.end_reason == reason])})" for reason in reasons
    )
    return f"{len(ended)} ended" + (f": {told}" if len(reasons) <= MOST_ENDS else "")


def node_lines(nodes: Nodes | Unknown, now: float) -> list[str]:
    """A table of the nodes that have joined, with those that have left; or why it is not known."""
    if isinstance(nodes, Unknown):
        return [f"unknown: {nodes.why}"]
    if not nodes.nodes:
        return ["none has joined yet"]
    rows = [_COLUMNS, *(_row(node, now) for node in nodes.nodes)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(_COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    waiting = f", {nodes.waiting} starts wait for one" if nodes.waiting else ""
    return [*lines, f"together {nodes.used} of {nodes.slots} slots used{waiting}"]


def _row(node: Node, now: float) -> tuple[str, ...]:
    is_there = node.state not in {"lost", "left"}
    until = about(node.until, now) if node.until is not None else ""
    used = f"{node.used} of {node.slots}" if is_there else ""
    return (
        node.name,
        node.job,
        node.state,
        used,
        str(node.sandboxes) if is_there else "",
        until if is_there else "",
        shortened(node.reason, REASON),
    )
