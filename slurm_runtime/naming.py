"""Under which name do other nodes reach this one?"""

from __future__ import annotations

import asyncio
import socket

LOOKUP_TIMEOUT_S = 3.0  # a resolver that does not answer must not hold up the first sandbox


def _full_name() -> str:
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
    try:
        return await asyncio.wait_for(asyncio.to_thread(_full_name), LOOKUP_TIMEOUT_S)
    except asyncio.TimeoutError:  # another class on Python 3.10
        return socket.gethostname()
