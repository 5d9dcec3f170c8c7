"""A head that only takes registrations: for what a node says to it, and what it makes of its silence."""

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
class Told:
    """What nodes have said: registrations with their keys and times as they come, goodbyes (path with query, key), and
    the order in which all of them were dealt with."""

    wishes: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    goodbyes: list[tuple[str, str | None]] = field(default_factory=list)
    order: list[str] = field(default_factory=list)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True


@contextmanager
def stand_in_head(told: Told, key: str, port: int = 0, delay_s: float = 0, status: int = 200) -> Iterator[int]:
    """Its port, for the length of the block. It takes ``delay_s`` for a registration and answers with ``status``."""

    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            wish = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            told.wishes.append({"path": self.path, **wish})
            told.keys.append(self.headers["X-API-Key"])
            told.times.append(time.monotonic())
            if not over.wait(delay_s):
                told.order.append("POST")
                self.answer(status)

        def do_DELETE(self) -> None:
            told.goodbyes.append((self.path, self.headers["X-API-Key"]))
            told.order.append("DELETE")
            self.answer(200)

        def answer(self, good: int) -> None:
            body = b'{"detail": "the words of the head"}'
            self.send_response(good if self.headers["X-API-Key"] == key else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with _Server(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            over.set()
            server.shutdown()
            thread.join()
