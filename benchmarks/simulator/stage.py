"""What a benchmark of the head runs in: the head, the simulated nodes and the clients, each a process on its CPUs."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import httpx

from benchmarks.simulator.load import Plan, Start
from slurm.lib.processes import Child, ChildSpec
from slurm_runtime.warden.proc import proportional_bytes

CHECKOUT = Path(__file__).resolve().parent.parent.parent
READY_S = 60.0
BACKLOG = 2048
# A process's clock of CPU time, as clock_getcpuclockid(3) makes its name; /proc/PID/stat counts hundredths of a second.
CPUCLOCK_SCHED = 2


@dataclass(frozen=True)
class Cpus:
    """Which CPUs the head may use, and which all others share."""

    head: frozenset[int]
    others: frozenset[int]


def cpus_from(usable: Sequence[int]) -> Cpus:
    """The first CPU for the head, the others for the rest; all for both where there is one only. Pure."""
    return Cpus(frozenset(usable[:1]), frozenset(usable[1:] or usable))


@dataclass(frozen=True)
class Process:
    """A process of the benchmark, and the URL at which it answers."""

    child: Child
    url: str
    key: str
    log: Path

    def cpu_s(self) -> float:
        """CPU seconds that it has used, all its threads together."""
        return time.clock_gettime((~self.child.pid << 3) | CPUCLOCK_SCHED)

    def pss_mb(self) -> float:
        """Its memory, shared pages divided among those who share them."""
        return proportional_bytes(self.child.pid) / (1 << 20)

    def ask(self, method: str, path: str, timeout_s: float = 60.0) -> Any:
        """The JSON that it answers with; the benchmark ends if it refuses."""
        headers = {"X-API-Key": self.key}
        found = _client().request(method, f"{self.url}{path}", headers=headers, timeout=timeout_s)
        if found.status_code >= 300:
            raise SystemExit(f"{method} {path} of {self.child.spec.name}: {found.status_code} {found.text[:300]}")
        return found.json()


@dataclass(frozen=True)
class Stage:
    """Where everything runs: a folder for logs and the key, and the CPUs."""

    folder: Path
    cpus: Cpus
    key: str

    @property
    def key_file(self) -> Path:
        return self.folder / "key"

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")])}

    @contextlib.contextmanager
    def head(self) -> Iterator[Process]:
        """The real head, as a run starts it, answering."""
        log = self.folder / "head.log"
        with socket.create_server(("127.0.0.1", 0), backlog=BACKLOG) as listener, log.open("ab") as sink:
            flags = ("--fd", str(listener.fileno()), "--api-key-file", str(self.key_file), "--public-host", "127.0.0.1")
            argv = (sys.executable, "-m", "slurm_runtime.head", *flags, "--stop-with-stdin")
            spec = ChildSpec(
                argv, self.environment, "the head", stdin_pipe=True, stderr=sink, pass_fds=(listener.fileno(),)
            )
            with Child(spec, stop_grace_s=20.0) as child:
                os.sched_setaffinity(child.pid, self.cpus.head)
                url = f"http://127.0.0.1:{listener.getsockname()[1]}"
                made = Process(child, url, self.key, log)
                until(lambda: _answers(made), READY_S, f"the head did not answer, see {log}")
                yield made

    @contextlib.contextmanager
    def simulator(self, head: str, slots: int) -> Iterator[Process]:
        """The simulator, still without nodes; ``head`` is the head's URL, or ``none``."""
        log = self.folder / "simulator.log"
        program = str(Path(__file__).with_name("process.py"))
        argv = (sys.executable, program, "--head", head, "--key-file", str(self.key_file), "--slots", str(slots))
        with log.open("ab") as sink:
            spec = ChildSpec(
                argv, self.environment, "the simulator", stdin_pipe=True, stdout=subprocess.PIPE, stderr=sink
            )
            with Child(spec) as child, _output(child) as output:
                os.sched_setaffinity(child.pid, self.cpus.others)
                url = output.readline().decode().strip()
                if not url:
                    raise SystemExit(f"the simulator did not start, see {log}")
                yield Process(child, url, self.key, log)

    @contextlib.contextmanager
    def clients(self, plan: Plan) -> Iterator[Clients]:
        """Clients that have begun to do what is planned."""
        log = self.folder / "clients.log"
        program = str(Path(__file__).with_name("load.py"))
        with log.open("ab") as sink:
            spec = ChildSpec(
                (sys.executable, program),
                self.environment,
                "the clients",
                stdin_pipe=True,
                stdout=subprocess.PIPE,
                stderr=sink,
            )
            with Child(spec) as child, _output(child) as output:
                os.sched_setaffinity(child.pid, self.cpus.others)
                clients = Clients(child, output, log)
                clients.say(json.dumps(asdict(plan)))
                yield clients

    def load(self, plan: Plan) -> list[Start]:
        """The outcome of clients, from begin to end."""
        with self.clients(plan) as clients:
            return clients.outcome()


class Clients:
    """A process of clients under way."""

    def __init__(self, child: Child, output: IO[bytes], log: Path) -> None:
        self.child = child
        self.output = output
        self.log = log

    def say(self, line: str) -> None:
        assert self.child.process.stdin
        self.child.process.stdin.write(line.encode() + b"\n")
        self.child.process.stdin.flush()

    def held(self) -> int:
        """How many hold a sandbox, once all starts have ended."""
        return int(json.loads(self._line())["held"])

    def outcome(self) -> list[Start]:
        """Every start, once all clients have ended."""
        return [Start(**found) for found in json.loads(self._line())]

    def _line(self) -> bytes:
        line = self.output.readline()
        if not line:
            raise SystemExit(f"the clients ended early, see {self.log}")
        return line


@functools.cache
def _client() -> httpx.Client:
    """One for all: to make one takes longer than most answers."""
    return httpx.Client(trust_env=False)


def _output(child: Child) -> IO[bytes]:
    """Its standard output, which is closed at the end of a block."""
    assert child.process.stdout
    return child.process.stdout


def _answers(process: Process) -> bool:
    if process.child.exit_code is not None:
        raise SystemExit(f"{process.child.spec.name} ended with exit code {process.child.exit_code}, see {process.log}")
    try:
        return _client().get(f"{process.url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def until(is_so: Any, deadline_s: float, otherwise: str) -> float:
    """Wait for ``is_so``; the seconds it took. The benchmark ends with ``otherwise`` after the deadline."""
    began = time.monotonic()
    while not is_so():
        if time.monotonic() - began > deadline_s:
            raise SystemExit(f"{otherwise} (waited {deadline_s:g} s)")
        time.sleep(0.05)
    return time.monotonic() - began


@contextlib.contextmanager
def stage(folder: Path, cpus: Cpus) -> Iterator[Stage]:
    """A key and a folder for what follows."""
    made = Stage(folder, cpus, secrets.token_urlsafe(24))
    made.key_file.touch(0o600)
    made.key_file.write_text(made.key)
    yield made
