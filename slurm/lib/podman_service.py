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
from typing import IO

from slurm.lib.errors import EnvironmentProblem
from slurm.lib.podman_storage import PodmanStorage
from slurm.lib.processes import Child, ChildSpec, how_it_ended, write_through
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
    """The running service; ``exit_code`` is None while it runs. Its words go to ``log``, or to standard output."""

    def __init__(
        self, storage: PodmanStorage, environment: Mapping[str, str], stop_grace_s: float, log: IO[str] | None = None
    ) -> None:
        argv = ("podman", "system", "service", "--time=0", storage.url)
        self._storage = storage
        self._spec = ChildSpec(argv, storage.environment(environment), "the Podman service", stderr=subprocess.PIPE)
        self._stop_grace_s = stop_grace_s
        self._log = log or sys.stdout
        self._start()

    def _start(self) -> None:
        self._last_words: deque[bytes] = deque(maxlen=5)
        self._child = Child(self._spec, self._stop_grace_s)
        self._child.copy_stderr(_keep_errors(self._last_words), write_through(self._log))

    def __enter__(self) -> PodmanService:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._child.stop()

    @property
    def exit_code(self) -> int | None:
        return self._child.exit_code

    def answers(self) -> bool:
        """Whether it answers on its socket."""
        return answers(self._storage.socket)

    def restart(self) -> None:
        """Start it again on the same storage after it has ended; not yet answering. Containers go on meanwhile.

        An ordinary user's service is two processes of one group, of which the outer waits for the inner: the inner may
        live on without the other. Podman takes no socket that is there already, be it nobody's.
        """
        self._child.kill()
        self._storage.socket.unlink(missing_ok=True)
        self._start()

    def check_alive(self) -> None:
        """``EnvironmentProblem`` with the service's last words if it has ended."""
        code = self.exit_code
        if code is not None:
            words = " ".join(b" ".join(self._last_words).decode("utf-8", "replace").split())
            raise EnvironmentProblem(
                f"the Podman service on {socket.gethostname()} ended with {how_it_ended(code, words)}"
            )


def _keep_errors(last_words: deque[bytes]) -> Callable[[bytes], None]:
    """A sink that keeps the lines in which Podman reports errors; the others are progress."""

    def keep(line: bytes) -> None:
        if b"level=error" in line or b"level=fatal" in line or line.startswith(b"Error"):
            last_words.append(line)

    return keep


@contextlib.contextmanager
def podman_service(
    storage: PodmanStorage,
    environment: Mapping[str, str],
    check: Callable[[], None],
    stop_grace_s: float,
    log: IO[str] | None = None,
) -> Iterator[PodmanService]:
    """The service on the job's storage, answering; ``check`` raises if waiting for it is to end early."""
    with PodmanService(storage, environment, stop_grace_s, log) as service:
        _await(storage, service, check)
        yield service


def _await(storage: PodmanStorage, service: PodmanService, check: Callable[[], None]) -> None:
    def still_possible() -> None:
        check()
        service.check_alive()

    wait_for(
        f"the Podman service on {storage.socket}",
        lambda: service.answers() or None,
        START_DEADLINE_S,
        still_possible=still_possible,
        pause=lambda _elapsed: 0.02,
    )
