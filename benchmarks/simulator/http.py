"""HTTP/1.1 for the benchmark's own two ends: as much of it as the head and its nodes use, so that it costs little.

A server's and a client's half on bare asyncio protocols, one request at a time on a kept connection, bodies with a
Content-Length. A general server or client would take more CPU time than the head that is measured.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

REASONS = {200: b"OK", 201: b"Created", 401: b"Unauthorized", 404: b"Not Found", 422: b"Unprocessable Content"}
HEAD_END = b"\r\n\r\n"


class BadAnswer(Exception):
    """The other end speaks no HTTP that this one understands."""


def header(head: bytes, name: bytes) -> bytes:
    """The value of a header, by its name in small letters; empty where it is missing. Pure."""
    at = head.lower().find(b"\r\n" + name + b":")
    if at < 0:
        return b""
    return head[at + len(name) + 3 :].split(b"\r\n", 1)[0].strip()


def whole(buffer: bytes) -> tuple[bytes, bytes, bytes] | None:
    """Head, body and what comes after the first message in a buffer; None while it is incomplete. Pure."""
    end = buffer.find(HEAD_END)
    if end < 0:
        return None
    head, start = buffer[:end], end + len(HEAD_END)
    if header(head, b"transfer-encoding"):
        raise BadAnswer("a body in chunks")
    stop = start + int(header(head, b"content-length") or b"0")
    return None if len(buffer) < stop else (head, buffer[start:stop], buffer[stop:])


def message(first_line: bytes, body: bytes, more: bytes = b"") -> bytes:
    """A request or an answer with its JSON body; ``more`` are further header lines. Pure."""
    length = b"%d" % len(body)
    return first_line + b"\r\ncontent-type: application/json\r\ncontent-length: " + length + more + HEAD_END + body


class Call:
    """One request at the server; ``answer`` ends it. ``on_gone`` is called if the client leaves before."""

    __slots__ = ("_connection", "body", "head", "is_done", "method", "on_gone", "target")

    def __init__(self, connection: Served, head: bytes, body: bytes) -> None:
        method, target, _ = head.split(b"\r\n", 1)[0].split(b" ", 2)
        self._connection = connection
        self.head, self.body = head, body
        self.method, self.target = method.decode("ascii"), target.decode("ascii")
        self.is_done = False
        self.on_gone: Callable[[], None] | None = None

    def answer(self, status: int, body: bytes, more: bytes = b"") -> None:
        """Send the answer, with further header lines; nothing happens if the client has left, or was answered."""
        if not self.is_done:
            self.is_done = True
            self._connection.send(message(b"HTTP/1.1 %d %b" % (status, REASONS.get(status, b"Error")), body, more))

    def answer_json(self, status: int, found: Any, more: bytes = b"") -> None:
        self.answer(status, json.dumps(found).encode(), more)


class Served(asyncio.Protocol):
    """One connection at the server, which is one of ``connections`` while it stands."""

    def __init__(self, handle: Callable[[Call], None], connections: set[Served]) -> None:
        self._handle = handle
        self._connections = connections
        self._buffer = b""
        self._call: Call | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        call, self._call = self._call, None
        if call is not None and not call.is_done:
            call.is_done = True
            if call.on_gone:
                call.on_gone()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._call is None:
            self._next()

    def _next(self) -> None:
        found = whole(self._buffer)
        if found is not None:
            head, body, self._buffer = found
            self._call = call = Call(self, head, body)
            self._handle(call)

    def send(self, answer: bytes) -> None:
        self._call = None
        self.transport.write(answer)
        if self._buffer:
            self._next()


class Connection(asyncio.Protocol):
    """One kept connection at the client, opened by the first request and again after it was closed."""

    def __init__(self, host: str, port: int, key: str) -> None:
        self._address = (host, port)
        self._more = f"\r\nhost: {host}:{port}\r\nx-api-key: {key}".encode()
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self._buffer = transport, b""

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._fail(exc or ConnectionResetError("the connection was closed"))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        try:
            found = whole(self._buffer)
        except (BadAnswer, ValueError) as problem:
            self._fail(problem)
            self.close()
            return
        if found is not None and self._answer is not None and not self._answer.done():
            head, body, self._buffer = found
            self._answer.set_result((int(head[9:12]), body))

    def _fail(self, problem: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(problem)

    async def request(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Status and body of the answer; ``OSError`` if the connection breaks. Its caller bounds the time."""
        loop = asyncio.get_running_loop()
        if self._transport is None:
            await loop.create_connection(lambda: self, *self._address)
        assert self._transport
        self._answer = loop.create_future()
        self._transport.write(message(f"{method} {path} HTTP/1.1".encode(), body, self._more))
        return await self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def address_of(url: str) -> tuple[str, int]:
    """Host and port of ``http://host:port``. Pure."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    return host, int(port)
