"""On which node of a runtime does a sandbox live? Each node that serves is asked itself, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from slurm.lib.errors import NotRunning, UsageError
from slurm.lib.observe.nodes import Node
from slurm.lib.observe.run_files import printable
from slurm.lib.observe.sandboxes import answer_to

ASK_S = 2.0
AT_ONCE = 16
SHOWN = 20  # sandboxes in a message


@dataclass(frozen=True)
class Whereabouts:
    """A living sandbox, and the node that it lives on."""

    session: str
    runtime_id: str
    node: Node

    @property
    def names(self) -> tuple[str, str]:
        return self.session, self.runtime_id


def parse_list(text: str, node: Node) -> list[Whereabouts]:
    """The sandboxes in a node's answer to GET /list."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return []
    listed = data.get("runtimes") if isinstance(data, dict) else None
    ids = [(one.get("session_id"), one.get("runtime_id")) for one in listed or [] if isinstance(one, dict)]
    return [Whereabouts(a, b, node) for a, b in ids if isinstance(a, str) and isinstance(b, str)]


def sandboxes_of(nodes: Sequence[Node], key: str | None) -> tuple[list[Whereabouts], list[str]]:
    """The living sandboxes of all nodes that are there; and the names of nodes that did not answer."""
    there = [node for node in nodes if node.url and node.state not in {"lost", "left"}]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(lambda node: answer_to("/list", node.url, key, ASK_S), there))
    found = [one for node, (_, text) in zip(there, answers, strict=True) for one in parse_list(text, node)]
    return found, [node.name for node, (status, _) in zip(there, answers, strict=True) if status != 200]


def chosen(found: Sequence[Whereabouts], silent: Sequence[str], name: str) -> Node:
    """The node of the sandbox that a person means; ``UsageError`` or ``NotRunning`` where that is not one."""
    meant = [one for one in found if name in one.names]
    meant = meant or [one for one in found if name and any(known.startswith(name) for known in one.names)]
    unasked = f"; {', '.join(silent)} did not answer: name the node with --worker or --runtime" if silent else ""
    if not meant and not found:
        raise NotRunning(f"no sandbox lives on the runtime's nodes{unasked}")
    if not meant:
        raise UsageError(f"no sandbox {name!r} lives on the runtime's nodes; there are {_listed(found)}{unasked}")
    if len(meant) > 1:
        raise UsageError(f"{name!r} means {len(meant)} sandboxes: {_listed(meant)}; write more of one")
    return meant[0].node


def _listed(found: Sequence[Whereabouts]) -> str:
    named = sorted(f"{printable(one.session)} on {one.node.name}" for one in found)
    return ", ".join(named[:SHOWN]) + (f" and {len(named) - SHOWN} more" if len(named) > SHOWN else "")
