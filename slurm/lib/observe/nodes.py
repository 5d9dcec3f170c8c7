"""Which nodes has a run's runtime, where it has several? Its head is asked, with the run's key and a short deadline."""

from __future__ import annotations

import json
from dataclasses import dataclass

from slurm.lib.observe.run_files import printable
from slurm.lib.observe.sandboxes import answer_to
from slurm.lib.observe.unknown import Unknown

MOST = 1e9  # no figure of ours is as large, but for times
LATEST = 1e11


@dataclass(frozen=True)
class Node:
    """A node as the head knows it: its job, its state in a word of the head's, and when it ends (epoch seconds).

    ``url`` is that of its own API server.
    """

    name: str
    job: str = ""
    state: str = ""
    reason: str = ""
    slots: int = 0
    used: int = 0
    sandboxes: int = 0
    until: float | None = None
    url: str = ""


@dataclass(frozen=True)
class Nodes:
    """All nodes that have joined, by name; the slots of those that take sandboxes, and starts that wait for one."""

    nodes: tuple[Node, ...]
    slots: int = 0
    used: int = 0
    waiting: int = 0


def parse_nodes(text: str) -> Nodes | None:
    """The nodes in a head's answer to GET /nodes; None for anything else."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return None
    listed = data.get("nodes") if isinstance(data, dict) else None
    if not isinstance(listed, list):
        return None
    found = [_node(one) for one in listed if isinstance(one, dict)]
    return Nodes(tuple(sorted(found, key=lambda node: node.name)), *(_count(data, n) for n in _TOTALS))


_TOTALS = ("slots", "used", "waiting")


def _node(data: dict[str, object]) -> Node:
    name, job, state, reason = (_text(data.get(key)) for key in ("name", "job", "state", "reason"))
    slots, used, sandboxes = (_count(data, key) for key in ("slots", "used", "sandboxes"))
    until, url = _figure(data.get("until"), LATEST), _text(data.get("url"))
    return Node(name, job, state, reason, slots, used, sandboxes, until, url)


def of_worker(nodes: Nodes, worker: str) -> Node | None:
    """The node of a worker: that of its last life, where it has had several."""
    found = [node for node in nodes.nodes if node.job == worker]
    return next((node for node in found if node.state not in {"lost", "left"}), found[-1] if found else None)


def ask(url: str, key: str | None, timeout_s: float) -> Nodes | Unknown:
    """What the head at ``url`` says."""
    status, text = answer_to("/nodes", url, key, timeout_s)
    if not status:
        return Unknown("its head is not reachable from here")
    found = parse_nodes(text) if status == 200 else None
    return found or Unknown("its server does not tell (GET /nodes)")


def _text(value: object) -> str:
    return " ".join(printable(value).split())[:300] if isinstance(value, str) else ""


def _count(data: dict[str, object], name: str) -> int:
    return int(_figure(data.get(name), MOST) or 0)


def _figure(value: object, most: float) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value < most else None  # NaN is not
