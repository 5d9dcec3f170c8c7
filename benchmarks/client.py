"""What a benchmark's client asks of the API server."""

from __future__ import annotations

from typing import Any

import aiohttp

from benchmarks.room import AGENT_COMMAND, Room, Server

TIMEOUT = aiohttp.ClientTimeout(total=600)


def connected(found: Server) -> aiohttp.ClientSession:
    """A session that sends the server's key."""
    return aiohttp.ClientSession(headers={"X-API-Key": found.key}, timeout=TIMEOUT, trust_env=False)


async def start(session: aiohttp.ClientSession, found: Server, place: Room, **fields: str) -> dict[str, Any]:
    """The answer to a /start of an agent server; the benchmark ends if it was refused."""
    body = {"image": place.image, "command": AGENT_COMMAND, "working_dir": "/", **fields}
    async with session.post(f"{found.url}/start", json=body) as answer:
        sandbox: dict[str, Any] = await answer.json()
        if answer.status != 201:
            raise SystemExit(f"/start answered {answer.status}: {sandbox['detail']}")
    return sandbox
