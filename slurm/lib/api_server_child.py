"""The sandbox API server as a job's child: ours, or the user's own ``slurm-remote-runtime``.

Ours inherits a listening socket, so that no other process can take the port between choice and use; it ignores the
signals that ``scancel`` sends to every process of the job and stops when the job body closes its stdin.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from slurm.lib.coordination import write_atomically
from slurm.lib.errors import EnvironmentProblem
from slurm.lib.images import archives_folder
from slurm.lib.job_context import JobContext
from slurm.lib.logs import log
from slurm.lib.podman_storage import PodmanStorage
from slurm.lib.processes import Child, ChildSpec, how_it_ended, write_through
from slurm.lib.sandbox_room import sandbox_room
from slurm.lib.settings import Settings
from slurm.lib.shared_images import are_shared

BACKLOG = 1024


def listening_socket(host: str, port: int | None, ports: range | None) -> socket.socket:
    """A socket on ``port``, else on a free one of ``ports``, else on any free one; says so if ``port`` was taken."""
    wanted = [port] if port else []
    others = random.sample(ports, len(ports)) if ports else [0]
    for number in [*wanted, *others]:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, number))
            listener.listen(BACKLOG)
        except OSError as problem:
            listener.close()
            if number == port:
                log.warning("RUNTIME_PORT=%s on %s: %s; using another", port, socket.gethostname(), problem.strerror)
            continue
        return listener
    raise EnvironmentProblem(f"no free port in RUNTIME_PORT_RANGE on {socket.gethostname()}; widen the range")


def public_host(is_local: bool) -> str:
    """The name by which other nodes reach this one (``hostname -f``); a local run stays on the loopback."""
    return "127.0.0.1" if is_local else socket.getfqdn()


def available_cpus(settings: Settings) -> int:
    """The CPUs that the job has: Slurm's word for this node, else the configured number."""
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return settings.cpus_for_runtime


def common_flags(settings: Settings, node: int = 0) -> tuple[str, ...]:
    """The flags that ``slurm-remote-runtime`` takes too; ``node`` is the node's number in the run."""
    flags = [
        ("--container-image", settings.container_image),
        ("--cpus-per-worker", f"{sandbox_room(settings, available_cpus(settings), node).cpus_each:.10g}"),
        ("--memory-per-worker", settings.memory_per_worker),
        ("--worker-startup-timeout", "600"),
    ]
    return tuple(word for flag in flags for word in flag)


def statistics_file(storage: PodmanStorage) -> Path:
    """Where our server keeps its counts: on this node, since the shared directory may be slow, or hang."""
    return storage.root / "statistics.json"


@dataclass(frozen=True)
class Membership:
    """How an API server belongs to a head, at ``head_url``: the name of its node, and until when that is there.

    ``until`` is the job's time limit in epoch seconds, None where there is none; ``number`` is the node's among the
    run's, which may share MAX_PARALLEL_AGENTS out among them.
    """

    head_url: str
    node: str
    until: float | None
    drain_lead_s: int
    number: int = 0

    @property
    def flags(self) -> tuple[str, ...]:
        """The same as flags of the server."""
        ends = () if self.until is None else ("--until", f"{self.until:.0f}")
        return ("--head", self.head_url, "--node-name", self.node, *ends, "--drain-lead", str(self.drain_lead_s))


def own_flags(
    job: JobContext, listener: socket.socket, key_file: Path, storage: PodmanStorage, node: int = 0
) -> tuple[str, ...]:
    """The flags of our server; ``node`` is the node's number in the run."""
    settings = job.settings
    archives = archives_folder(settings)
    flags = [
        ("--fd", str(listener.fileno())),
        ("--api-key-file", str(key_file)),
        ("--failures-file", str(storage.root / "failures.jsonl")),
        ("--statistics-file", str(statistics_file(storage))),
        ("--public-host", public_host(job.is_local)),
        ("--cpus", str(available_cpus(settings))),
        ("--label", f"job={job.job_id}"),
    ]
    if settings.max_parallel_agents:
        flags.append(("--max-sandboxes", str(sandbox_room(settings, available_cpus(settings), node).slots)))
    if are_shared(settings):
        flags.append(("--share-images", str(job.directory.images)))
    if settings.sandbox_port_range:
        ports = settings.sandbox_port_range
        flags.append(("--sandbox-port-range", f"{ports.start}-{ports.stop - 1}"))
    flags += [
        (name, str(value))
        for name, value in (
            ("--agent-start", settings.agent_start),
            ("--agent-image", settings.agent_image),
            ("--agent-dir", "" if settings.agent_image else settings.agent_dir or ""),
            ("--network", settings.network),
            ("--disk-per-worker", settings.disk_per_worker),
            ("--cpu-pinning-method", settings.cpu_pinning_method),
            ("--warm", settings.warm_sandboxes or ""),
            ("--image-archives", archives if settings.image_archives or archives.is_dir() else ""),
        )
        if str(value)
    ]
    # Legacy clients build what their images lack.
    switches = ("--enable-image-build", *(("--verbose",) if settings.skyrl_debug else ()))
    return (*common_flags(settings, node), *(word for flag in flags for word in flag), "--stop-with-stdin", *switches)


@dataclass
class AlarmFilter:
    """Passes on the lines of a log that are warnings or errors, with what belongs to them (a traceback's lines)."""

    _passing: bool = field(default=False, init=False)
    _STAMPED = re.compile(rb"^\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d|^(INFO|DEBUG):")
    _ALARM = re.compile(rb"\[(WARN|WARNING|ERROR|CRITICAL)\]|^(WARNING|ERROR|CRITICAL):|^Traceback ")

    def wants(self, line: bytes) -> bool:
        if self._ALARM.search(line):
            self._passing = True
        elif self._STAMPED.match(line):
            self._passing = False
        return self._passing


class ApiServer:
    """The running server. ``url`` is what other nodes use, ``local_url`` what this job uses.

    ``own_session`` is told the session of each process that serves, the first and those of restarts, which get the
    flags ``again`` too.
    """

    def __init__(
        self,
        spec: ChildSpec,
        key: str,
        host: str,
        port: int,
        *,
        is_ours: bool,
        stop_s: float,
        own_session: Callable[[int], None],
        again: tuple[str, ...] = ("--adopt",),
    ) -> None:
        self._spec = spec
        self._again = again
        self._stop_s = stop_s
        self._own_session = own_session
        self.key = key
        self.url = f"http://{host}:{port}"
        self.local_url = f"http://127.0.0.1:{port}"
        self.is_ours = is_ours
        self._start(spec)

    def _start(self, spec: ChildSpec) -> None:
        self._last_words: deque[bytes] = deque(maxlen=5)
        self._child = Child(spec, self._stop_s)
        self._own_session(self._child.pid)
        copy_log(self._child, self._last_words)

    @property
    def name(self) -> str:
        """What messages call it."""
        return self._spec.name

    def __enter__(self) -> ApiServer:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def restart(self) -> None:
        """Start our server again after it has ended, on the same socket and with the same key; not yet answering.

        Who connects meanwhile waits in the socket's queue. The new server takes over the sandboxes of the dead one.
        """
        assert self.is_ours, "only our own server takes sandboxes over"
        self._child.stop()
        self._start(replace(self._spec, argv=(*self._spec.argv, *self._again)))

    def check_alive(self) -> None:
        """``EnvironmentProblem`` with the server's last words if it has ended."""
        code = self._child.exit_code
        if code is not None:
            words = b" | ".join(line.strip() for line in self._last_words).decode("utf-8", "replace")
            raise EnvironmentProblem(
                f"{self._spec.name} on {socket.gethostname()} ended with {how_it_ended(code, words)}"
            )

    def stop(self) -> None:
        """Have it remove its sandboxes and end; killed when its share of the budget is over."""
        self._child.stop()


def users_own_runtime(settings: Settings) -> Path | None:
    """SLURM_RUNTIME_DIR's Python, where a user's own server is to run in place of ours."""
    if settings.slurm_runtime_dir is None:
        return None
    python = settings.slurm_runtime_dir / ".venv" / "bin" / "python"
    if not os.access(python, os.X_OK):
        raise EnvironmentProblem(f"SLURM_RUNTIME_DIR={settings.slurm_runtime_dir} has no .venv: {python} is not there")
    return python


@contextlib.contextmanager
def api_server(
    job: JobContext,
    storage: PodmanStorage,
    key: str,
    stop_s: float,
    own_session: Callable[[int], None],
    membership: Membership | None = None,
) -> Iterator[ApiServer]:
    """The server, started (not yet answering); stopped within ``stop_s`` seconds at the end of the block.

    With a ``membership`` it is a node of that head, which has RUNTIME_PORT, where it is this job's.
    """
    python = users_own_runtime(job.settings)
    listener = listening_socket(
        "127.0.0.1" if job.is_local else "0.0.0.0",  # the sandbox URLs must reach other nodes; the key guards them
        None if membership else job.settings.runtime_port,
        job.settings.runtime_port_range,
    )
    with listener:
        port = listener.getsockname()[1]
        if python is None:
            spec = _own_spec(job, storage, listener, key, stop_s, membership)
        else:
            spec = _foreign_spec(job, storage, port, key)
            listener.close()
        host = public_host(job.is_local)
        with ApiServer(spec, key, host, port, is_ours=python is None, stop_s=stop_s, own_session=own_session) as server:
            yield server


def _own_spec(
    job: JobContext,
    storage: PodmanStorage,
    listener: socket.socket,
    key: str,
    stop_s: float,
    membership: Membership | None = None,
) -> ChildSpec:
    key_file = storage.root / "api_key"
    write_atomically(key_file, key + "\n", 0o600)
    argv = (
        sys.executable,
        "-m",
        "slurm_runtime.api_server",
        *own_flags(job, listener, key_file, storage, membership.number if membership else 0),
        *(membership.flags if membership else ()),
        "--stop-timeout",
        f"{0.8 * stop_s:g}",
    )
    logins = job.settings.registry_auth_file
    own = {"PYTHONPATH": str(job.code), **({"REGISTRY_AUTH_FILE": str(logins)} if logins else {})}
    return ChildSpec(
        argv,
        storage.environment({**job.open_environment, **own}),
        "the API server",
        cwd=job.code,  # Python looks there first, not where a local run was launched
        stdin_pipe=True,
        stderr=subprocess.PIPE,
        pass_fds=(listener.fileno(),),
        ignores_stops=True,
    )


def _foreign_spec(job: JobContext, storage: PodmanStorage, port: int, key: str) -> ChildSpec:
    folder = job.settings.slurm_runtime_dir
    assert folder is not None
    argv = (str(folder / ".venv" / "bin" / "python"), "-m", "slurm_runtime.api_server", *common_flags(job.settings))
    listen = ("--host", "127.0.0.1" if job.is_local else "0.0.0.0", "--port", str(port), "--verbose")
    environment = storage.environment({**job.open_environment, "ALLHANDS_API_KEY": key})
    environment.pop("PYTHONPATH", None)
    return ChildSpec((*argv, *listen), environment, "slurm-remote-runtime", cwd=folder, stderr=subprocess.PIPE)


def copy_log(child: Child, last_words: deque[bytes]) -> None:
    """Everything the child logs to ``.out`` as it happens; warnings and errors to ``.err`` too."""
    alarms = AlarmFilter()
    to_out, to_err = write_through(sys.stdout), write_through(sys.stderr)

    def sink(line: bytes) -> None:
        last_words.append(line)
        to_out(line)
        if alarms.wants(line):
            to_err(line)

    child.copy_stderr(sink)
