"""Does a sandbox's server answer through its published URL, and is it ready to work?"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from slurm_runtime.sandbox import Dialect

if TYPE_CHECKING:
    import aiohttp

PROBE_TIMEOUT_S = 5.0  # what the clients grant
BODY_LIMIT = 65536
NOT_THERE = 404

# Agent servers answer /ready from 1.12 on, older ones only /health; action execution servers answer /alive.
AGENT_PATHS = ("/ready", "/health")
ACTION_PATHS = ("/alive", *AGENT_PATHS)

Get = Callable[[str], Awaitable["tuple[int, bytes]"]]


def paths_for(dialect: Dialect) -> tuple[str, ...]:
    """The paths to ask, in order; a 404 leads to the next one."""
    return AGENT_PATHS if dialect is Dialect.SDK else ACTION_PATHS


def judge(path: str, status: int, body: bytes) -> bool:
    """Whether this answer means ready.

    An action execution server says 200 on /alive while it initialises, and only its body tells.
    """
    if not 200 <= status < 300:
        return False
    return path != "/alive" or _status_word(body) in {None, "ok"}


def _status_word(body: bytes) -> str | None:
    """``status`` of a JSON object, None where the body is something else."""
    try:
        answer = json.loads(body)
    except ValueError:
        return None
    return str(answer.get("status", "ok")) if isinstance(answer, dict) else None


async def is_ready(url: str, dialect: Dialect, get: Get) -> bool:
    """Ask the paths of the dialect in turn."""
    for path in paths_for(dialect):
        status, body = await get(url + path)
        if status != NOT_THERE:
            return judge(path, status, body)
    return False


class Prober:
    """Asks sandboxes over HTTP; one pool of connections, no proxy."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, url: str, dialect: Dialect) -> bool:
        """Whether the sandbox is ready; not being reachable is a no."""
        import aiohttp  # 0.1 s: see podman.py

        try:
            return await is_ready(url, dialect, self._get)
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError):  # another class on Python 3.10
            return False

    async def idle_s(self, url: str) -> float | None:
        """Seconds since an agent server was last asked to do something; None where it does not say."""
        import aiohttp

        try:
            status, body = await self._get(f"{url}/server_info")
            return float(json.loads(body)["idle_time"]) if status == 200 else None
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError, KeyError, TypeError):
            return None

    async def _get(self, url: str) -> tuple[int, bytes]:
        import aiohttp

        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False)
        async with self._session.get(url, allow_redirects=False) as answer:
            return answer.status, await answer.content.read(BODY_LIMIT)

    async def close(self) -> None:
        if self._session:
            await self._session.close()
