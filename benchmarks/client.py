"""What a benchmark's client asks of the API server."""

from __future__ import annotations

from typing import Any

import aiohttp

from benchmarks.room import AGENT_COMMAND, Room, Server

COMMAND_S = 60
TIMEOUT = aiohttp.ClientTimeout(total=600)


def connected(found: Server) -> aiohttp.ClientSession:
    """A session that sends the server's key."""
    return aiohttp.ClientSession(headers={"X-API-Key": found.key}, timeout=TIMEOUT, trust_env=False)


async def start(session: aiohttp.ClientSession, found: Server, place: Room, **fields: Any) -> dict[str, Any]:
    """The answer to a /start of an agent server; the benchmark ends if it was refused."""
    body = {"image": place.image, "command": AGENT_COMMAND, "working_dir": "/", **fields}
    async with session.post(f"{found.url}/start", json=body) as answer:
        sandbox: dict[str, Any] = await answer.json()
        if answer.status != 201:
            raise SystemExit(f"/start answered {answer.status}: {sandbox['detail']}")
    return sandbox


async def stdout_of(session: aiohttp.ClientSession, sandbox: dict[str, Any], command: str) -> str:
    """What a command says in a sandbox, through the sandbox's URL; its exit code is in front where it is not 0."""
    key = {"X-Session-API-Key": sandbox["session_api_key"]}
    body = {"command": command, "timeout": COMMAND_S}
    async with session.post(f"{sandbox['url']}/api/bash/execute_bash_command", json=body, headers=key) as answer:
        if answer.status != 200:
            return f"HTTP {answer.status}"
        said = await answer.json()
    return str(said["stdout"] or "") if said["exit_code"] == 0 else f"exit code {said['exit_code']}"
