"""How does the head talk to one node? Over HTTP with the run's own key, as many requests at once as there are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from slurm_runtime.node_models import REFUSED, UPTO

if TYPE_CHECKING:
    import aiohttp

CONNECT_S = 5.0
IDLE_S = 30.0  # below the 75 s after which a node closes an idle connection
MOST_ANSWER_BYTES = 256 << 20  # thousands of sandboxes with their last lines
ANSWER_S = 60.0  # for what a node answers by itself; Podman has 20 s to come back


class NotSent(Exception):
    """The node could not be connected to: it has seen nothing of the request."""


class CutOff(Exception):
    """The connection broke, or no answer came in time: the node may or may not have done what was asked."""


@dataclass(frozen=True)
class Reply:
    """What a node answered. ``upto`` is the number of the change it tells of, -1 where it says none."""

    status: int
    body: bytes
    kind: str = "application/json"
    upto: int = -1
    refused: str = ""

    @property
    def is_good(self) -> bool:
        return 200 <= self.status < 300


@dataclass
class Link:
    """The connections to one node. ``close`` cuts off whatever is under way."""

    url: str
    key: str = field(repr=False)
    _session: aiohttp.ClientSession | None = field(default=None, repr=False)
    _closed: bool = False

    async def ask(
        self,
        method: str,
        path: str,
        body: bytes | AsyncIterator[bytes] | None = None,
        headers: dict[str, str] | None = None,
        timeout_s: float = ANSWER_S,
    ) -> Reply:
        """The node's answer, whatever its status; ``NotSent`` or ``CutOff`` where there is none."""
        import aiohttp

        deadline = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_S)
        try:
            async with self._open().request(
                method, self.url + path, data=body, headers=headers, timeout=deadline, allow_redirects=False
            ) as answer:
                if not 0 <= _length(answer) <= MOST_ANSWER_BYTES:
                    raise CutOff(f"{self.url} begins an answer without an end, or above {MOST_ANSWER_BYTES} bytes")
                return _reply(answer.status, await answer.read(), answer.headers)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as problem:
            raise NotSent(f"{self.url} cannot be connected to: {_words(problem)}") from None
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as problem:  # another class on Python 3.10
            raise CutOff(f"{self.url} gave no answer: {_words(problem)}") from None

    def _open(self) -> aiohttp.ClientSession:
        import aiohttp

        if self._closed:
            raise aiohttp.ClientConnectionError("it is lost")
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S, ttl_dns_cache=300)
            self._session = aiohttp.ClientSession(
                connector=connector,
                headers={"X-API-Key": self.key},
                trust_env=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
            )
        return self._session

    async def close(self) -> None:
        self._closed = True
        if self._session is not None:
            await self._session.close()


def _length(answer: aiohttp.ClientResponse) -> int:
    """As the answer says; -1 where it does not, which no node does."""
    return -1 if answer.content_length is None else answer.content_length


def _reply(status: int, body: bytes, headers: object) -> Reply:
    get = headers.get  # type: ignore[attr-defined]  # multidict's view, whose type comes with aiohttp
    upto = get(UPTO, "")
    return Reply(
        status,
        body,
        get("Content-Type", "application/json"),
        int(upto) if upto.isdecimal() and len(upto) < 20 else -1,
        get(REFUSED, ""),
    )


def _words(problem: BaseException) -> str:
    return str(problem) or type(problem).__name__
