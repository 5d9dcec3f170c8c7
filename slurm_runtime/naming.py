"""Under which name do other nodes reach this one, and the sandboxes on it?"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading

from slurm_runtime.background import Background
from slurm_runtime.deadlines import within

LOOKUP_TIMEOUT_S = 3.0  # a resolver that does not answer must not hold up the first sandbox


def full_name() -> str:
    """``hostname -f`` where it resolves and says more than localhost, else the plain host name."""
    plain, full = socket.gethostname(), socket.getfqdn()
    if full.startswith("localhost") or "." not in full:
        return plain
    try:
        socket.getaddrinfo(full, None)
    except OSError:
        return plain
    return full


async def public_name() -> str:
    """This node's name for others; its plain host name if the resolver takes longer than 3 s."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[str] = loop.create_future()

    def tell(name: str) -> None:
        if not found.done():
            found.set_result(name)

    def look_up() -> None:
        name = full_name()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(tell, name)

    # Not one of the loop's own threads: it would wait for them at its end, as long as the resolver likes.
    threading.Thread(target=look_up, daemon=True).start()
    try:
        return await within(LOOKUP_TIMEOUT_S, found)
    except asyncio.TimeoutError:  # another class on Python 3.10
        return socket.gethostname()


class PublicHost:
    """The host name in sandbox URLs: the configured one, else this node's, looked up once."""

    def __init__(self, configured: str | None, background: Background) -> None:
        self.configured = configured
        self.background = background
        self._lookup: asyncio.Task[str] | None = None

    def look_up(self) -> asyncio.Task[str]:
        """Begin to look it up, unless that has begun."""
        self._lookup = self._lookup or self.background.own(public_name())
        return self._lookup

    async def name(self) -> str:
        return self.configured if self.configured is not None else await asyncio.shield(self.look_up())
