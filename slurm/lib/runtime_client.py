"""What the jobs ask the runtime's API server, over HTTP: is it well, does the key fit, who was heard of last."""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

TIMEOUT_S = 5.0
NEVER_HEARD = 404
QUICK_TIMEOUT_S = 1.0  # asked on this host in a loop that must also see signals


_HOST = re.compile(r"[A-Za-z0-9._:][A-Za-z0-9._:-]*")  # nothing that a shell or a command line takes for more


@dataclass(frozen=True)
class Answer:
    """A status code (0: no answer at all) and the decoded JSON body, or the reason why there is none."""

    status: int
    body: object

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    @property
    def words(self) -> str:
        detail = self.body.get("detail") if isinstance(self.body, dict) else self.body
        return f"HTTP {self.status}: {detail}" if self.status else str(detail)


def is_host(text: str) -> bool:
    """Whether this can be the name or the address of a host, and nothing else: who wrote it may be another user."""
    return _HOST.fullmatch(text) is not None


def address_of(url: str) -> tuple[str, int] | None:
    """Host and port of a server's address; None for a text that is none."""
    try:
        parts = urlsplit(url)
        host, number = parts.hostname or "", parts.port or 80
    except ValueError:
        return None
    return (host, number) if url.isprintable() and " " not in url and is_host(host) else None


@dataclass(frozen=True)
class RuntimeClient:
    """A server at ``url`` (``http://HOST:PORT[/PREFIX]``) with its key; never goes through a proxy."""

    url: str
    key: str | None

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    def ask(self, method: str, path: str, timeout_s: float = TIMEOUT_S) -> Answer:
        answer = self._exchange(method, path, timeout_s)
        return Answer(answer.status, _decoded(answer.body)) if isinstance(answer.body, bytes) else answer

    def page(self, path: str, timeout_s: float) -> Answer:
        """What GET answers, its body the whole text."""
        answer = self._exchange("GET", path, timeout_s)
        return (
            Answer(answer.status, answer.body.decode("utf-8", "replace")) if isinstance(answer.body, bytes) else answer
        )

    def _exchange(self, method: str, path: str, timeout_s: float) -> Answer:
        try:
            parts = urlsplit(self.url)
            make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            connection = make(self.host, parts.port, timeout=timeout_s)
            try:
                connection.request(method, parts.path.rstrip("/") + path, headers=self._headers())
                response = connection.getresponse()
                return Answer(response.status, response.read(1 << 20))
            finally:
                connection.close()
        except (OSError, http.client.HTTPException, ValueError) as problem:
            return Answer(0, f"{type(problem).__name__}: {problem}")

    def _headers(self) -> Mapping[str, str]:
        return {"X-API-Key": self.key} if self.key else {}

    def health(self) -> Answer:
        return self.ask("GET", "/health")

    def check_key(self) -> Answer:
        """Any call that needs the key; 401 means that it is not this server's."""
        return self.ask("GET", "/list")

    def beat(self, name: str) -> Answer:
        return self.ask("POST", f"/heartbeat/{quote(name, safe='')}")

    def heard(self, name: str) -> Answer:
        """What the server knows of the beats of ``name``; 404 if none."""
        return self.ask("GET", f"/heartbeat/{quote(name, safe='')}", timeout_s=QUICK_TIMEOUT_S)

    def heard_s_ago(self, name: str) -> float | None:
        """Seconds since the server last heard of ``name``, by its clock; None if never or if it does not say."""
        body = self.heard(name).body
        age = body.get("age_s") if isinstance(body, dict) else None
        return float(age) if isinstance(age, (int, float)) else None


def _decoded(data: bytes) -> object:
    try:
        return json.loads(data)
    except ValueError:
        return data.decode("utf-8", "replace")[:200]


class Heartbeat(threading.Thread):
    """Beats at the server until stopped, and knows when the server last answered, and whether it was started again.

    A server that was counts the beats from 1 on. Of another's, which counts none, nothing is known.
    """

    PERIOD_S = 1.5

    def __init__(self, client: RuntimeClient, name: str) -> None:
        super().__init__(daemon=True)
        self._client, self._name = client, name
        self._end = threading.Event()
        self._answered_at = time.monotonic()
        self._count = 0
        self._restart_at: float | None = None

    def run(self) -> None:
        while not self._end.wait(self.PERIOD_S):
            self._beat()

    def _beat(self) -> None:
        answer = self._client.beat(self._name)
        if answer.status in range(200, 500):  # 404: another's server, alive all the same
            self._answered_at = time.monotonic()
        count = _count(answer)
        if count is not None:
            self._restart_at = time.monotonic() if count <= self._count else self._restart_at
            self._count = count

    def age_s(self) -> float:
        """Seconds since the server's last answer."""
        return time.monotonic() - self._answered_at

    def restarted_s_ago(self) -> float | None:
        """Seconds since the server was seen to have been started again, None if it was not. It is asked once more."""
        before = self._count  # first: the other thread's beats can only add to it
        answer = self._client.heard(self._name)
        count = 0 if answer.status == NEVER_HEARD else _count(answer)
        if count is not None and count < before:
            self._restart_at = time.monotonic()
        return None if self._restart_at is None else time.monotonic() - self._restart_at

    def __enter__(self) -> Heartbeat:
        self._beat()
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._end.set()


def _count(answer: Answer) -> int | None:
    """How many beats the server has counted; None where it does not say."""
    count = answer.body.get("count") if answer.ok and isinstance(answer.body, dict) else None
    return count if isinstance(count, int) else None
