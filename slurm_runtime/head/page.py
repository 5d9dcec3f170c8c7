"""What does a person see at GET / of the head: the nodes, slots, the line, sandboxes, the last failures. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from slurm_runtime.node_models import NodeAnswer, NodesAnswer
from slurm_runtime.page import MOST_ROWS, REFRESH_S, age, document, link, section, text, tile

# As the page of a node colours its states.
COLOURS = {"ready": "ready", "joining": "pending", "silent": "pending", "draining": "paused", "lost": "failed"}


@dataclass(frozen=True)
class Overview:
    """The fleet at one moment; sandboxes are as the nodes told them, ``failures`` the last ones, newest first."""

    fleet: NodesAnswer
    living: int
    shown: tuple[bytes, ...]
    failures: tuple[bytes, ...]
    version: str


def render(overview: Overview) -> str:
    """The page: one HTML document without scripts or anything to fetch, which asks for itself again every 5 s."""
    return document(
        "Sandboxes",
        f'<meta http-equiv="refresh" content="{REFRESH_S}">',
        _head(overview) + _tiles(overview) + _tables(overview),
    )


def _head(overview: Overview) -> str:
    return (
        f'<h1>Sandboxes</h1><p class="faint">head of {len(overview.fleet.nodes)} nodes · {text(overview.version)}</p>'
    )


def _tiles(overview: Overview) -> str:
    fleet = overview.fleet
    meter = f'<meter min="0" max="{max(1, fleet.slots)}" value="{fleet.used}" aria-label="slots in use"></meter>'
    ready = sum(node.state == "ready" for node in fleet.nodes)
    return (
        f'<div class="tiles">{tile(f"{fleet.used} / {fleet.slots}", "slots in use", meter)}'
        f"{tile(str(ready), 'nodes that take sandboxes')}{tile(str(overview.living), 'sandboxes')}"
        f"{tile(str(fleet.waiting), 'starts in the line')}</div>"
    )


def _tables(overview: Overview) -> str:
    left_out = overview.living - len(overview.shown)
    more = f'<p class="faint">and {left_out} more, which GET /list tells</p>' if left_out > 0 else ""
    nodes = ("Node", "State", "Slots", "Sandboxes", "Job", "Heard of", "Why", "Its own page")
    sandboxes, failed = ("State", "Session", "Image", "Reason", "URL"), ("Session", "Image", "Why, and its last lines")
    return (
        section("Nodes", nodes, map(_node_row, overview.fleet.nodes), "No node has joined yet.")
        + section("Sandboxes", sandboxes, _rows(overview.shown), "No sandbox lives.", more)
        + section("Last failures", failed, _failures(overview.failures))
    )


def _node_row(node: NodeAnswer) -> str:
    colour = COLOURS.get(node.state, "stopped")
    return (
        f'<tr><td>{text(node.name)}</td><td class="state {colour}">{text(node.state)}</td>'
        f"<td>{node.used} / {node.slots}</td><td>{node.sandboxes}</td><td>{text(node.job)}</td>"
        f"<td>{age(node.heard_s_ago)} ago</td><td>{text(node.reason)}</td><td>{link(node.url)}</td></tr>"
    )


def _rows(shown: Sequence[bytes]) -> Iterable[str]:
    for body in shown[:MOST_ROWS]:
        told: dict[str, Any] = json.loads(body)
        state = str(told["container_statuses"][0].get("state", ""))
        yield (
            f'<tr><td class="state {text(state)}">{text(state)}</td><td>{text(told["session_id"])}</td>'
            f"<td>{text(told['image'])}</td><td>{text(told['events'][0])}</td><td>{link(told.get('url'))}</td></tr>"
        )


def _failures(failures: Sequence[bytes]) -> Iterable[str]:
    for body in failures:
        told: dict[str, Any] = json.loads(body)
        why = f"<pre>{text(str(told.get('pod_logs', '')))}</pre>"
        yield f"<tr><td>{text(told['session_id'])}</td><td>{text(told['image'])}</td><td>{why}</td></tr>"
