"""What do clients read of a sandbox on some node? The node's own answer, kept as ready-made bytes. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from slurm_runtime.models import RuntimeSummary

DEAD = frozenset({"failed", "not found"})  # pod_status of sandboxes that do not live
LINE_FIELDS = tuple(RuntimeSummary.model_fields)


class BadNews(ValueError):
    """A node's answer is not what a node answers."""


def packed(thing: object) -> bytes:
    return json.dumps(thing, separators=(",", ":")).encode("ascii")


@dataclass(frozen=True)
class Known:
    """One sandbox: where it is, its names, and what is answered of it.

    ``at`` is the number of the node's change that it tells of. ``given_up`` says that its node was lost, so that it
    counts as failed although it may live; ``unwanted`` that somebody has stopped it since, or was told that it failed.
    """

    node: str
    runtime_id: str
    session_id: str
    pod_status: str
    has_url: bool
    state: str
    image: str
    body: bytes
    line: bytes
    at: int
    given_up: bool = False
    unwanted: bool = False

    @property
    def is_dead(self) -> bool:
        return self.pod_status in DEAD

    @property
    def is_failed(self) -> bool:
        return self.pod_status == "failed"


def known(node: str, told: Mapping[str, Any], at: int) -> Known:
    """A sandbox as a node told it; ``BadNews`` for what is no ``RuntimeAnswer``."""
    try:
        statuses = told.get("container_statuses") or [{}]
        return Known(
            node,
            str(told["runtime_id"]),
            str(told["session_id"]),
            str(told["pod_status"]),
            bool(told.get("url")),
            str(statuses[0].get("state", "")),
            str(told.get("image", "")),
            packed(told),
            packed({name: told[name] for name in LINE_FIELDS if name in told}),
            at,
        )
    except (KeyError, TypeError, AttributeError, IndexError) as problem:
        raise BadNews(f"node {node} told of a sandbox without {problem}") from None


def changed(sandbox: Known, at: int, *, state: str, pod_status: str, reason: str) -> Known:
    """The same sandbox once it is dead, by what the head knows and its node has not told."""
    told = json.loads(sandbox.body)
    told.update(
        status="stopped",
        pod_status=pod_status,
        events=[reason],
        container_statuses=[{"state": state, "reason": reason}],
    )
    if pod_status == "failed":
        told["pod_logs"] = reason
    return known(sandbox.node, told, at)


def stopped(sandbox: Known, at: int) -> Known:
    """After its node has answered that it is stopped; the number is of the change that says so."""
    return changed(sandbox, at, state="stopped", pod_status="not found", reason="stopped on request")


def given_up(sandbox: Known, reason: str) -> Known:
    """After its node was lost, or left with it."""
    failed = changed(sandbox, sandbox.at, state="failed", pod_status="failed", reason=reason)
    return replace(failed, given_up=True)


def waiting(runtime_id: str, session_id: str, image: str, reason: str) -> dict[str, Any]:
    """A sandbox that no node has yet, as a server tells one that waits for a slot."""
    return {
        "runtime_id": runtime_id,
        "session_id": session_id,
        "status": "starting",
        "pod_status": "pending",
        "session_api_key": "",
        "work_hosts": {},
        "restart_count": 0,
        "restart_reasons": [],
        "events": [reason],
        "container_statuses": [{"state": "pending", "reason": reason}],
        "image": image,
    }


def joined(parts: list[bytes]) -> bytes:
    """A JSON list of ready-made objects."""
    return b"[" + b",".join(parts) + b"]"


def listing(lines: list[bytes]) -> bytes:
    """The answer of GET /list."""
    return b'{"runtimes":' + joined(lines) + b',"total":' + str(len(lines)).encode("ascii") + b"}"
