"""What is this server as a node: its name, its life, when it ends, and whether it still takes new sandboxes?"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from slurm_runtime.entries import Draining
from slurm_runtime.logs import log
from slurm_runtime.page import HeadRow, moment

LONGEST_SLEEP_S = 60.0  # the clock may be set


@dataclass
class HeadSeen:
    """The head of this node: whether the last registration there went well, and when one last did (monotonic)."""

    url: str
    registered: bool = False
    heard_at: float | None = None


class Node:
    """A server of a run, in the eyes of its head.

    ``boot`` is another one for each life of the server. ``until`` is when it ends (epoch seconds), None where that is
    not known; ``drain_lead_s`` before it the node drains itself. ``on_change`` hears of it.
    ``head`` is None for a server that serves its clients alone.
    """

    def __init__(self, name: str, until: float | None, drain_lead_s: float, on_change: Callable[[], object]) -> None:
        self.name = name
        self.until = until
        self.drain_lead_s = drain_lead_s
        self.boot = secrets.token_hex(8)
        self.reason = ""
        self.head: HeadSeen | None = None
        self._on_change = on_change

    @property
    def draining(self) -> bool:
        return bool(self.reason)

    def head_row(self, now: float) -> HeadRow | None:
        """What the operator's page and the metrics tell of the head."""
        head = self.head
        if head is None:
            return None
        return HeadRow(head.url, head.registered, None if head.heard_at is None else now - head.heard_at)

    def drain(self, reason: str) -> None:
        """Take no new sandboxes from now on; those that are here go on. The first reason stays."""
        if self.draining:
            return
        self.reason = " ".join(reason.split()) or "on request"
        log.info("this node drains, it takes no new sandboxes: %s", self.reason)
        self._on_change()

    def check(self) -> None:
        """``Draining`` where no new sandbox is taken."""
        if self.draining:
            end = f"; it ends at {moment(self.until)}" if self.until is not None else ""
            raise Draining(
                f"node {self.name} takes no new sandboxes ({self.reason}){end}; those on it go on: start this one on "
                "another node"
            )

    async def drain_in_time(self) -> None:
        """Drain when the end is near; returns then, at once where there is no end."""
        if self.until is None:
            return
        while (left_s := self.until - self.drain_lead_s - time.time()) > 0:
            await asyncio.sleep(min(left_s, LONGEST_SLEEP_S))
        self.drain(f"its time limit is near ({moment(self.until)})")
