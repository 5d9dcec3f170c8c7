"""Around every route: who may ask, how large and slow a body may be, one line of log for each request."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slurm_runtime.deadlines import at_once_or_within
from slurm_runtime.logs import log

MOST_BODY_BYTES = 4 << 20
MOST_CONTEXT_BYTES = 512 << 20  # of a build, as a tar.gz
MOST_BUILD_BODY_BYTES = MOST_CONTEXT_BYTES * 4 // 3 + MOST_BODY_BYTES  # it comes as base64 text, with line ends
BODY_S, BUILD_BODY_S = 60.0, 300.0  # for a whole body: a client that sends a byte a second must not stay for ever
ANSWER_S = 60.0  # for a piece of an answer: nor one that does not read
OPEN_PATH = "/health"  # the only one without a key
PAGES = frozenset({"/", "/docs", "/openapi.json", "/metrics"})  # what browsers and Prometheus read: HTTP Basic too
BUILD_PATH = "/build"
HEARTBEAT_PATH = "/heartbeat/"
UNHELD = frozenset({OPEN_PATH, "/docs", "/openapi.json"})
ASK_FOR_PASSWORD = {"WWW-Authenticate": 'Basic realm="API key as password, any user name", charset="UTF-8"'}

access_log = log.getChild("access")
OnAnswer = Callable[[Scope, int, float], None]


class Guard:
    """ASGI middleware: asks for the API key, bounds size and duration of bodies and answers, logs each request.

    ``on_answer`` hears of every answered request: its scope, its status (0 where the client left before) and how many
    seconds it took. ``body_s`` bounds the seconds that a body may take, except one of /build.
    """

    def __init__(
        self, app: ASGIApp, api_key: str | None, on_answer: OnAnswer | None = None, body_s: float = BODY_S
    ) -> None:
        self.app = app
        self.api_key = None if api_key is None else api_key.encode("utf-8", "surrogateescape")
        self.on_answer = on_answer
        self.body_s = body_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, answer, body = time.monotonic(), _Answer(send), _Body(receive, *self._bounds(scope))
        try:
            await self._pass(scope, body, answer)
        except ClientGone as gone:
            log.info("%s %s: %s", scope["method"], route_of(scope), gone)
        finally:
            self._tell(scope, body.seen, answer.status, time.monotonic() - began)

    async def _pass(self, scope: Scope, body: _Body, answer: _Answer) -> None:
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, body.receive, answer.send)
        else:
            await self.app(scope, body.receive, answer.send)

    def _bounds(self, scope: Scope) -> tuple[int, float]:
        is_build = scope["path"] == BUILD_PATH and scope["method"] == "POST"
        return (MOST_BUILD_BODY_BYTES, BUILD_BODY_S) if is_build else (MOST_BODY_BYTES, self.body_s)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        if not may_pass(scope, self.api_key):
            headers = ASK_FOR_PASSWORD if scope["path"] in PAGES else None
            return error(401, "missing or wrong API key: send it as header X-API-Key", headers)
        most = self._bounds(scope)[0]
        if _content_length(scope) > most:
            return error(413, f"the body is larger than {most} bytes")
        return None

    def _tell(self, scope: Scope, size: int, status: int, seconds: float) -> None:
        if self.on_answer:
            self.on_answer(scope, status, seconds)
        if access_log.isEnabledFor(logging.DEBUG):
            access_log.debug("%s", access_line(scope, size, status, seconds))


class Hold:
    """ASGI middleware: lets a request wait until all sandboxes are known, so that none is answered "no such sandbox".

    Not held are the paths of ``UNHELD``, which are not about sandboxes. ``settled`` says False when it takes too long.
    """

    def __init__(self, app: ASGIApp, settled: Callable[[], Awaitable[bool]]) -> None:
        self.app = app
        self.settled = settled

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_unheld(scope["path"]) and not await self.settled():
            await error(504, "the sandboxes of the server before this one are not taken over yet; ask again")(
                scope, receive, send
            )
            return
        await self.app(scope, receive, send)


def is_unheld(path: str) -> bool:
    """Whether the answer to a path does not depend on which sandboxes there are."""
    return path in UNHELD or path.startswith(HEARTBEAT_PATH)


def may_pass(scope: Scope, api_key: bytes | None) -> bool:
    """Whether a request carries the key, or needs none."""
    path = scope["path"]
    if api_key is None or (path == OPEN_PATH and scope["method"] in {"GET", "HEAD"}):
        return True
    if hmac.compare_digest(_header(scope, b"x-api-key"), api_key):
        return True
    return path in PAGES and hmac.compare_digest(basic_password(_header(scope, b"authorization")), api_key)


def basic_password(header: bytes) -> bytes:
    """The password in an ``Authorization: Basic`` header, empty where there is none."""
    scheme, _, encoded = header.partition(b" ")
    if scheme.lower() != b"basic":
        return b""
    try:
        return base64.b64decode(encoded.strip(), validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""


def access_line(scope: Scope, size: int, status: int, seconds: float) -> str:
    """What the log says of a request: no header, no query, nothing that could be a key or break the line."""
    client = scope.get("client") or ("-", 0)
    path = quote(scope["path"].encode("utf-8", "replace"), safe="/:@!$&'()*+,;=~.-_")[:200]
    return (
        f"method={scope['method']} path={path} status={status} ms={seconds * 1000:.1f} "
        f"client={client[0]}:{client[1]} request_bytes={size}"
    )


def error(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error as every client gets it: an object with ``detail``."""
    return JSONResponse({"detail": detail.encode("utf-8", "replace").decode("utf-8")}, status, headers)


def _header(scope: Scope, wanted: bytes) -> bytes:
    return next((value for name, value in scope["headers"] if name == wanted), b"")


def _content_length(scope: Scope) -> int:
    text = _header(scope, b"content-length")
    return int(text) if text.isdigit() and len(text) < 20 else 0


class _Body:
    """A request's body: refused when it grows too large without having said so, or takes too long."""

    def __init__(self, receive: Receive, most: int, within_s: float) -> None:
        self._receive = receive
        self._most = most
        self._within_s = within_s
        self._deadline = time.monotonic() + within_s
        self._complete = False
        self.seen = 0

    async def receive(self) -> Message:
        """The next piece; once the body is complete, as long as it takes until the client leaves."""
        message = await self._next()
        self.seen += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self.seen > self._most:
            raise HTTPException(413, f"the body is larger than {self._most} bytes")
        return message

    async def _next(self) -> Message:
        if self._complete:
            return await self._receive()
        try:
            return await at_once_or_within(max(0.0, self._deadline - time.monotonic()), self._receive())
        except asyncio.TimeoutError:  # another class on Python 3.10
            sentence = f"the body did not arrive within {self._within_s:g} s"
            raise HTTPException(408, sentence, {"Connection": "close"}) from None


class _Answer:
    """Notes the status of an answer, and gives up on a client that does not read it."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = int(message["status"])
        try:
            await at_once_or_within(ANSWER_S, self._send(message))
        except asyncio.TimeoutError:
            raise ClientGone(f"the client did not read its answer for {ANSWER_S:g} s") from None


class ClientGone(OSError):
    """The client left, or does not read: nobody is there to be told. An OSError, which servers close quietly for."""


def route_of(scope: Scope) -> str:
    """The path of the route that served a request, with its parameters as names; ``-`` for none."""
    route: Any = scope.get("route")
    return str(getattr(route, "path", "-"))
