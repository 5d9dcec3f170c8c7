"""Does the head know of this node? The node registers there again and again, and says when it leaves.

A head that is away is tried again for ever: it may be started again at any time, and knows of nobody then.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

from slurm_runtime.deadlines import within
from slurm_runtime.logs import log
from slurm_runtime.node import HeadSeen, Node
from slurm_runtime.node_models import BEAT_S, NodeWish

if TYPE_CHECKING:
    import aiohttp

ANSWER_S = 5.0  # for one registration: a head that was killed may have it waiting on its socket for long
LEAVE_S = 1.0  # for saying goodbye, beside the removal of all sandboxes
FIRST_PAUSE_S = 0.1  # after a registration that failed, growing to BEAT_S
WORDS = 300
REFUSING = frozenset({401, 403})


@dataclass(frozen=True)
class Outcome:
    """How a registration ended; ``sentence`` is for the log, ``kind`` is the same for the same trouble."""

    kind: str = ""
    sentence: str = ""

    @property
    def is_good(self) -> bool:
        return not self.kind


def judged(head: str, status: int, words: str) -> Outcome:
    """What an answer of the head means. Pure."""
    if 200 <= status < 300:
        return Outcome()
    if status in REFUSING:
        sentence = f"the head at {head} refuses this server's API key ({status}): start both with the same key"
        return Outcome("refused", sentence)
    return Outcome(f"status {status}", f"the head at {head} does not take this node ({status}: {words})")


def silent(head: str, problem: str) -> Outcome:
    """The head was not reached. Pure."""
    return Outcome("silent", f"the head at {head} does not answer ({problem}); it is asked again until it does")


def pause_s(failures: int) -> float:
    """Seconds until the next registration, after so many in a row that failed. Pure."""
    return min(BEAT_S, FIRST_PAUSE_S * 1.5 ** (failures - 1)) if failures else BEAT_S


def job_of(environment: Mapping[str, str]) -> str:
    """The Slurm job of this process, ``123_4`` for a task of an array; empty outside of one. Pure."""
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID", "")


class Membership:
    """Keeps ``node`` known to the head at ``head`` (``http://host:port``).

    ``own_url`` says how the head and clients reach this server. The key goes as a header, as clients send it.
    """

    def __init__(
        self, head: str, api_key: str | None, node: Node, own_url: Callable[[], Awaitable[str]], job: str = ""
    ) -> None:
        self.head = head
        self.node = node
        self.job = job
        self.seen = node.head = HeadSeen(head)
        self._own_url = own_url
        self._headers = {"X-API-Key": api_key} if api_key else {}
        self._last: Outcome | None = None
        self._over = asyncio.Event()
        self._beating: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Register at once, then every ``BEAT_S``, until ``leave``. Nobody else may end it: see there."""
        self._beating = asyncio.create_task(self._beat())

    async def _beat(self) -> None:
        async with _session() as session:
            await self._beat_by(session)

    async def _beat_by(self, session: aiohttp.ClientSession) -> None:
        url, failures = await self._own_url(), 0
        while not self._over.is_set():
            outcome = await self._register(session, url)
            self._note(outcome)
            failures = 0 if outcome.is_good else failures + 1
            # Spread, so that the nodes of a run do not all come in the same moment.
            with contextlib.suppress(asyncio.TimeoutError):
                await within(pause_s(failures) * random.uniform(0.8, 1.0), self._over.wait())

    async def _register(self, session: aiohttp.ClientSession, url: str) -> Outcome:
        import aiohttp

        wish = NodeWish(name=self.node.name, url=url, boot=self.node.boot, job=self.job, until=self.node.until)
        try:
            body = wish.model_dump(exclude_none=True)
            asked = session.post(f"{self.head}/nodes", json=body, headers=self._headers, allow_redirects=False)
            async with asked as answer:
                return judged(self.head, answer.status, _words(await answer.content.read(1 << 16)))
        except asyncio.TimeoutError:  # another class on Python 3.10
            return silent(self.head, f"nothing within {ANSWER_S:g} s")
        except (aiohttp.ClientError, OSError) as problem:
            return silent(self.head, str(problem) or type(problem).__name__)
        except Exception as fault:  # a fault of ours must not lose the node with all its sandboxes
            return Outcome("fault", f"registering with the head at {self.head} failed unexpectedly: {fault!r}")

    def _note(self, outcome: Outcome) -> None:
        """Say what has changed; the same trouble is said once."""
        before, self._last = self._last, outcome
        again = "" if self.seen.heard_at is None else " again"
        self.seen.registered = outcome.is_good
        if outcome.is_good:
            self.seen.heard_at = time.monotonic()
        if before is not None and before.kind == outcome.kind:
            return
        if outcome.is_good:
            log.info("node %s is registered%s with the head at %s", self.node.name, again, self.head)
        else:
            (log.error if outcome.kind == "refused" else log.warning)("%s", outcome.sentence)

    async def leave(self) -> None:
        """Take no new sandboxes, register no more, and tell the head so, within ``LEAVE_S``."""
        self.node.drain("its API server was told to stop")
        self._over.set()
        beating = [self._beating] if self._beating else []
        try:
            await within(LEAVE_S, self._say_goodbye(beating))
        except asyncio.TimeoutError:
            log.warning("the head at %s could not be told within %g s that this node leaves", self.head, LEAVE_S)
        finally:
            for task in beating:
                task.cancel()
            await asyncio.gather(*beating, return_exceptions=True)

    async def _say_goodbye(self, beating: Collection[asyncio.Task[None]]) -> None:
        """After the last registration, which would undo it: one that is cut off may still reach the head."""
        import aiohttp

        if beating:
            await asyncio.wait(beating)
        path = f"/nodes/{quote(self.node.name, safe='')}?{urlencode({'reason': self.node.reason})}"
        try:
            async with _session() as session:
                asked = session.delete(self.head + path, headers=self._headers, allow_redirects=False)
                async with asked as answer:
                    log.info("told the head at %s that this node leaves (%d)", self.head, answer.status)
        except (aiohttp.ClientError, OSError) as problem:
            log.warning("the head at %s could not be told that this node leaves: %s", self.head, problem)


def _session() -> aiohttp.ClientSession:
    import aiohttp  # 0.1 s: see podman.py

    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_S), trust_env=False)


def _words(body: bytes) -> str:
    """The sentence in an answer of the head."""
    try:
        found = json.loads(body)["detail"]
    except (ValueError, KeyError, TypeError):
        found = body.decode("utf-8", "replace")
    return " ".join(str(found).split())[:WORDS]
