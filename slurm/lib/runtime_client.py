"""What the jobs ask the runtime's API server, over HTTP: is it well, does the key fit, who was heard of last."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

TIMEOUT_S = 5.0
QUICK_TIMEOUT_S = 1.0  # asked on this host in a loop that must also see signals


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


@dataclass(frozen=True)
class RuntimeClient:
    """A server at ``url`` (``http://HOST:PORT[/PREFIX]``) with its key; never goes through a proxy."""

    url: str
    key: str | None

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    def ask(self, method: str, path: str, timeout_s: float = TIMEOUT_S) -> Answer:
        try:
            parts = urlsplit(self.url)
            make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            connection = make(self.host, parts.port, timeout=timeout_s)
            try:
                connection.request(method, parts.path.rstrip("/") + path, headers=self._headers())
                response = connection.getresponse()
                return Answer(response.status, _decoded(response.read(1 << 20)))
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

    def heard_s_ago(self, name: str) -> float | None:
        """Seconds since the server last heard of ``name``, by its clock; None if never or if it does not say."""
        body = self.ask("GET", f"/heartbeat/{quote(name, safe='')}", timeout_s=QUICK_TIMEOUT_S).body
        age = body.get("age_s") if isinstance(body, dict) else None
        return float(age) if isinstance(age, (int, float)) else None


def _decoded(data: bytes) -> object:
    try:
        return json.loads(data)
    except ValueError:
        return data.decode("utf-8", "replace")[:200]


class Heartbeat(threading.Thread):
    """Beats at the server until stopped, and knows when the server last answered."""

    PERIOD_S = 1.5

    def __init__(self, client: RuntimeClient, name: str) -> None:
        super().__init__(daemon=True)
        self._client, self._name = client, name
        self._end = threading.Event()
        self._answered_at = time.monotonic()

    def run(self) -> None:
        while not self._end.wait(self.PERIOD_S):
            if self._client.beat(self._name).status in range(200, 500):  # 404: another's server, alive all the same
                self._answered_at = time.monotonic()

    def age_s(self) -> float:
        """Seconds since the server's last answer."""
        return time.monotonic() - self._answered_at

    def __enter__(self) -> Heartbeat:
        self._client.beat(self._name)
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._end.set()
