"""A webhook's receiver: a real HTTP server that keeps what is posted to it, and answers as a test wants."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Receiver:
    """What came, as (path, body); ``answers`` are given one after the other, the last one for ever.

    While ``hangs`` is set no request is answered.
    """

    url: str
    posts: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    answers: list[int] = field(default_factory=lambda: [200])
    hangs: threading.Event = field(default_factory=threading.Event)
    answered: int = 0

    def of(self, run: str) -> list[dict[str, Any]]:
        """The messages about a run."""
        return [body for _, body in self.posts if body["run"] == run]


@contextmanager
def receiver(host: str = "127.0.0.1", port: int = 0) -> Iterator[Receiver]:
    """A receiver at a port of ``host``, by default a free one."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            made.headers.append(dict(self.headers))
            made.posts.append((self.path, body))
            code = made.answers.pop(0) if len(made.answers) > 1 else made.answers[0]
            while made.hangs.is_set():
                time.sleep(0.05)
            self.send_response(code)
            if 300 <= code < 400:
                self.send_header("Location", f"{made.url}/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()
            made.answered += 1

        def log_message(self, *_said: object) -> None:
            pass

    with ThreadingHTTPServer((host, port), Handler) as server:
        server.daemon_threads = True
        made = Receiver(f"http://{host}:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield made
        finally:
            made.hangs.clear()
            server.shutdown()
