"""An SSH tunnel from a port of this host to a server that only its own host reaches; it ends with its ``with`` block.

``ssh`` is the user's own, with the user's keys and configuration, and asks nothing: it works where ``ssh HOST`` works
without a word. It dies with this process, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections import deque
from collections.abc import Callable, Iterator

from slurm.lib.errors import EnvironmentProblem
from slurm.lib.processes import Child, ChildSpec, how_it_ended
from slurm.lib.waiting import wait_for

OPEN_S = 20.0
LOOPBACK = "127.0.0.1"
# A node that vanishes is noticed within a minute; a connection takes a second or so.
OPTIONS = (
    "BatchMode=yes",
    "ExitOnForwardFailure=yes",
    "ConnectTimeout=10",
    "ServerAliveInterval=15",
    "ServerAliveCountMax=3",
)


def tunnel_argv(port: int, target: str, host: str) -> tuple[str, ...]:
    """The command: a port of this host's loopback leads to ``target`` (HOST:PORT) as ``host`` sees it."""
    options = [word for option in OPTIONS for word in ("-o", option)]
    return ("ssh", "-N", "-T", *options, "-L", f"{LOOPBACK}:{port}:{target}", host)


def free_port(wanted: int | None) -> int:
    """The port, if it is free here, or with None any free one; ``EnvironmentProblem`` if it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, wanted or 0))
        except OSError as problem:
            raise EnvironmentProblem(
                f"port {wanted} of this host: {problem.strerror}; choose another with --port"
            ) from None
        return int(probe.getsockname()[1])


class Tunnel:
    """An open tunnel from ``port`` of this host's loopback."""

    def __init__(self, port: int, host: str, child: Child) -> None:
        self.port, self.host = port, host
        self._child = child
        self._last_words: deque[bytes] = deque(maxlen=3)
        child.copy_stderr(self._last_words.append)

    def check(self) -> None:
        """``EnvironmentProblem`` with ssh's last words once it has ended."""
        code = self._child.exit_code
        if code is not None:
            self._child.kill()  # what it said last may still be on its way
            words = " ".join(b" ".join(self._last_words).decode("utf-8", "replace").split())
            raise EnvironmentProblem(f"the SSH tunnel to {self.host} ended: {how_it_ended(code, words)}")

    def answers(self) -> bool:
        """Whether something is at its other end."""
        with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, self.port), 2.0):
            return True
        return False


@contextlib.contextmanager
def tunnel(port: int, target: str, host: str, check: Callable[[], None]) -> Iterator[Tunnel]:
    """The tunnel, open; ``EnvironmentProblem`` where ssh does not get there. ``check`` may end the wait."""
    argv = tunnel_argv(port, target, host)
    with Child(ChildSpec(argv, dict(os.environ), "the SSH tunnel", stderr=subprocess.PIPE)) as child:
        made = Tunnel(port, host, child)

        def still_possible() -> None:
            check()
            made.check()

        wait_for(f"the SSH tunnel to {host}", lambda: made.answers() or None, OPEN_S, still_possible=still_possible)
        yield made
