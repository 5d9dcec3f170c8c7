"""What is this server as a node: its name, its life, when it ends, and whether it still takes new sandboxes?"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from datetime import datetime, timezone

from slurm_runtime.entries import Draining
from slurm_runtime.logs import log

LONGEST_SLEEP_S = 60.0  # the clock may be set


class Node:
    """A server of a run, in the eyes of its head.

    ``boot`` is another one for each life of the server. ``until`` is when it ends (epoch seconds), None where that is
    not known; ``drain_lead_s`` before it the node drains itself. ``on_change`` hears of it.
    """

    def __init__(self, name: str, until: float | None, drain_lead_s: float, on_change: Callable[[], object]) -> None:
        self.name = name
        self.until = until
        self.drain_lead_s = drain_lead_s
        self.boot = secrets.token_hex(8)
        self.reason = ""
        self._on_change = on_change

    @property
    def draining(self) -> bool:
        return bool(self.reason)

    def drain(self, reason: str) -> None:
        """Take no new sandboxes from now on; those that are here go on. The first reason stays."""
        if self.draining:
            return
        self.reason = reason.strip() or "on request"
        log.warning("this node drains, it takes no new sandboxes: %s", self.reason)
        self._on_change()

    def check(self) -> None:
        """``Draining`` where no new sandbox is taken."""
        if self.draining:
            end = f"; it ends at {at(self.until)}" if self.until is not None else ""
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
        self.drain(f"its time limit is near ({at(self.until)})")


def at(epoch: float) -> str:
    """``14:05 UTC``. Pure."""
    return f"{datetime.fromtimestamp(epoch, timezone.utc):%H:%M} UTC"
