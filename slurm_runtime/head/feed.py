"""What happens on one node? One long poll after the other, as long as the node is here."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from slurm_runtime.deadlines import within
from slurm_runtime.head.answers import BadNews, known
from slurm_runtime.head.directory import News
from slurm_runtime.head.link import CutOff, Link, NotSent
from slurm_runtime.logs import log
from slurm_runtime.node_models import NodeFacts

LATE_S = 5.0  # after it, until the connection counts as dead
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 1.0  # after a poll that failed

Hear = Callable[[NodeFacts, News], None]


class Feed:
    """Follows one life of a node. ``hear`` gets what it tells; ``rest_s`` says how long to rest between two polls.

    A poll stays open for ``poll_s``: several of them fit into the patience with a silent node.

    ``upto`` is the number of the last change that was heard, -1 before the first answer; ``trouble`` is why the last
    poll failed, empty where it did not.
    """

    def __init__(self, name: str, link: Link, hear: Hear, rest_s: Callable[[], float], poll_s: float) -> None:
        self.name = name
        self.upto = -1
        self._link = link
        self._hear = hear
        self._rest_s = rest_s
        self._poll_s = poll_s
        self._boot = ""
        self._resting: asyncio.Future[None] | None = None
        self._heard = asyncio.Event()
        self.trouble = ""

    async def follow(self) -> None:
        """Poll again and again; ends only by cancellation."""
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                await self._poll()
            except (NotSent, CutOff, BadNews) as problem:
                self._say(str(problem))
            except Exception as fault:  # a fault of ours: with nobody to follow it the node would stay as it was
                self._say(f"what it tells cannot be taken over: {fault!r:.300}")
                self.upto = -1
            else:
                self._say("")
                pause_s = FIRST_PAUSE_S
                await self._rest()
                continue
            await asyncio.sleep(pause_s)
            pause_s = min(LONGEST_PAUSE_S, pause_s * 2)

    async def until(self, upto: int, timeout_s: float) -> bool:
        """Whether change ``upto`` was heard within ``timeout_s``; rests no longer meanwhile."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while self.upto < upto:
            self.hurry()
            try:
                await within(deadline - loop.time(), self._heard.wait())
            except asyncio.TimeoutError:
                return False
        return True

    def hurry(self) -> None:
        """Poll now, rather than after the rest."""
        if self._resting is not None and not self._resting.done():
            self._resting.set_result(None)

    async def _poll(self) -> None:
        path = f"/changes?since={self.upto}&boot={self._boot}&wait_s={self._poll_s:g}"
        reply = await self._link.ask("GET", path, timeout_s=self._poll_s + LATE_S)
        if reply.status != 200:
            raise BadNews(f"{self._link.url} answers GET /changes with {reply.status}: {reply.body[:200]!r}")
        facts, news = read(self.name, reply.body)
        self._boot, self.upto = facts.boot, news.upto
        self._hear(facts, news)
        self._heard.set()
        self._heard = asyncio.Event()

    async def _rest(self) -> None:
        rest_s = self._rest_s()
        if rest_s <= 0:
            return
        loop = asyncio.get_running_loop()
        self._resting = loop.create_future()
        timer = loop.call_later(rest_s, self.hurry)
        try:
            await self._resting
        finally:
            timer.cancel()

    def _say(self, trouble: str) -> None:
        """Once when it begins, once when it is over."""
        if trouble and not self.trouble:
            log.warning("node %s: %s; asked again", self.name, trouble)
        elif self.trouble and not trouble:
            log.info("node %s answers again", self.name)
        self.trouble = trouble


def read(name: str, body: bytes) -> tuple[NodeFacts, News]:
    """What an answer of GET /changes tells; ``BadNews`` for what is none, or is another node's. Pure."""
    try:
        told: dict[str, Any] = json.loads(body)
        facts = NodeFacts.model_validate(told["node"])
        upto = int(told["upto"])
        news = News(
            upto,
            bool(told["complete"]),
            tuple(known(name, one, upto) for one in told["sandboxes"]),
            frozenset(map(str, told.get("earlier", ()))),
            tuple(map(str, told.get("gone", ()))),
        )
    except (ValueError, KeyError, TypeError, ValidationError) as problem:
        raise BadNews(f"what node {name} tells of changes cannot be read: {problem!r:.300}") from None
    if facts.name != name:
        raise BadNews(f"the server that has joined as node {name} calls itself {facts.name}")
    return facts, news
