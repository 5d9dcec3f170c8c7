"""Podman's API service for one job: started on the job's own storage, answering, stopped with the job."""

from __future__ import annotations

import contextlib
import http.client
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from slurm.lib.errors import EnvironmentProblem
from slurm.lib.podman_storage import PodmanStorage
from slurm.lib.processes import Child, ChildSpec, write_through
from slurm.lib.waiting import wait_for

START_DEADLINE_S = 30.0  # 0.3 s here; a busy node's first rootless start can take many times that


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("podman", timeout=2)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(2)
        self.sock.connect(self._path)


def answers(path: Path) -> bool:
    """Whether a Podman service answers on the socket."""
    connection = _UnixConnection(path)
    try:
        connection.request("GET", "/_ping")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


class PodmanService:
    """The running service; ``exit_code`` is None while it runs."""

    def __init__(self, child: Child, last_words: deque[bytes]) -> None:
        self._child = child
        self._last_words = last_words

    @property
    def exit_code(self) -> int | None:
        return self._child.exit_code

    def check_alive(self) -> None:
        """``EnvironmentProblem`` with the service's last words if it has ended."""
        if self.exit_code is not None:
            words = " ".join(b" ".join(self._last_words).decode("utf-8", "replace").split())
            raise EnvironmentProblem(
                f"the Podman service on {socket.gethostname()} ended with exit code {self.exit_code}: "
                f"{words or 'without a word'}"
            )


def _keep_errors(last_words: deque[bytes]) -> Callable[[bytes], None]:
    """A sink that keeps the lines in which Podman reports errors; the others are progress."""

    def keep(line: bytes) -> None:
        if b"level=error" in line or b"level=fatal" in line or line.startswith(b"Error"):
            last_words.append(line)

    return keep


@contextlib.contextmanager
def podman_service(
    storage: PodmanStorage, environment: Mapping[str, str], check: Callable[[], None], stop_grace_s: float
) -> Iterator[PodmanService]:
    """The service on the job's storage, answering; ``check`` raises if waiting for it is to end early."""
    argv = ("podman", "system", "service", "--time=0", storage.url)
    spec = ChildSpec(argv, storage.environment(environment), "the Podman service", stderr=subprocess.PIPE)
    with Child(spec, stop_grace_s=stop_grace_s) as child:
        last_words: deque[bytes] = deque(maxlen=5)
        child.copy_stderr(_keep_errors(last_words), write_through(sys.stdout))
        service = PodmanService(child, last_words)
        _await(storage, service, check)
        yield service


def _await(storage: PodmanStorage, service: PodmanService, check: Callable[[], None]) -> None:
    def still_possible() -> None:
        check()
        service.check_alive()

    wait_for(
        f"the Podman service on {storage.socket}",
        lambda: answers(storage.socket) or None,
        START_DEADLINE_S,
        still_possible=still_possible,
        pause=lambda _elapsed: 0.02,
    )
