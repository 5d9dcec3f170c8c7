"""How many sandboxes has a run's API server? It is asked itself, with the run's key and a short deadline."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slurm.lib.observe.unknown import Unknown

if TYPE_CHECKING:
    import socket

MOST = 1 << 20  # bytes of an answer
_PLAIN = re.compile(r"http://([\w.-]+):(\d{1,5})((?:/[\w./-]*)?)", re.ASCII)
_IN_A_HEADER = re.compile(r"[!-~]*", re.ASCII)
_FIGURE = re.compile(r"^(skyrl_\w+)(?:\{[^}]*\})? (\d+(?:\.\d+)?(?:e\+?\d+)?)$", re.MULTILINE | re.ASCII)


@dataclass(frozen=True)
class Sandboxes:
    """Living sandboxes, the slots that they hold, all slots, and starts that wait for one."""

    living: int
    used: int
    slots: int
    waiting: int


def parse_metrics(text: str) -> Sandboxes | None:
    """The figures in a server's answer to GET /metrics; None where they are not those of our server, or a head.

    A head tells those of its nodes; while it has none, or no sandbox, some are missing. It has a line of its own.
    """
    sums: dict[str, float] = {}
    for name, value in _FIGURE.findall(text):
        sums[name] = sums.get(name, 0.0) + float(value)
    names = ("skyrl_sandboxes", "skyrl_slots_used", "skyrl_slots_total", "skyrl_starts_waiting")
    if "skyrl_head_starts_waiting" in sums:
        sums = {**dict.fromkeys(names, 0.0), **sums}
        sums["skyrl_starts_waiting"] += sums["skyrl_head_starts_waiting"]
    if not all(name in sums and sums[name] < 1e9 for name in names):
        return None
    return Sandboxes(*(int(sums[name]) for name in names))


def ask(url: str, key: str | None, timeout_s: float) -> Sandboxes | Unknown:
    """What the server at ``url`` says."""
    status, text = answer_to("/metrics", url, key, timeout_s)
    if not status:
        return Unknown("its API server is not reachable from here")
    if status in {401, 403}:
        return Unknown("its API server refuses the key in the run directory")
    found = parse_metrics(text) if status == 200 else None
    return found or Unknown("its API server does not tell (GET /metrics)")


def answer_to(path: str, url: str, key: str | None, timeout_s: float) -> tuple[int, str]:
    """Status and body of a GET; status 0 where there is no answer.

    Written out, since http.client would double the time that a look at runs takes to start.
    """
    where = _PLAIN.fullmatch(url)
    if where is None or not _IN_A_HEADER.fullmatch(key or ""):
        from slurm.lib.runtime_client import RuntimeClient

        answer = RuntimeClient(url, key).page(path, timeout_s)
        return answer.status, str(answer.body)
    import socket  # most runs have ended, and no server is asked

    host, port, prefix = where.groups()
    wants = f"GET {prefix.rstrip('/')}{path} HTTP/1.0\r\nHost: {host}:{port}\r\n"
    wants += f"X-API-Key: {key}\r\n" if key else ""
    try:
        with socket.create_connection((host, int(port)), timeout_s) as connection:
            connection.sendall(f"{wants}\r\n".encode("ascii"))
            data = b"".join(_read(connection))
    except (OSError, OverflowError, UnicodeError):
        return 0, ""
    head, _, body = data.partition(b"\r\n\r\n")
    status = re.match(rb"HTTP/1\.[01] (\d{3}) ", head)
    return (int(status[1]) if status else 0), body.decode("utf-8", "replace")


def _read(connection: socket.socket) -> Iterator[bytes]:
    """What comes until the server closes, at most ``MOST``."""
    left = MOST
    while left > 0 and (data := connection.recv(65536)):
        left -= len(data)
        yield data
