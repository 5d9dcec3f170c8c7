"""What a benchmark of sandboxes runs in: a Podman store and service of its own, and the API server on it.

Nothing of the user's own Podman is touched, and everything is gone afterwards, as with a runtime job.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm.lib.guardian import guarded
from slurm.lib.podman_service import podman_service
from slurm.lib.podman_storage import PodmanStorage, podman_storage
from slurm.lib.processes import Child, ChildSpec
from slurm_runtime.agent.tree import AgentTree, default_cache, newest
from slurm_runtime.busybox_image import DEFAULT_NAME, ensure_archive

CHECKOUT = Path(__file__).resolve().parent.parent
START_DEADLINE_S = 60.0
PODMAN_DEADLINE_S = 300.0
SANDBOX_PORT = 60000
RAW = "skyrl.benchmark=raw"
AGENT_COMMAND = f"/usr/local/bin/openhands-agent-server --port {SANDBOX_PORT}"


def add_scratch(parser: ArgumentParser) -> None:
    """The option that says where a room is made."""
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="folder on this node's disk")


def add_room(parser: ArgumentParser) -> None:
    """The options that say where a room is made and which image is in it."""
    parser.add_argument("--image", help="the image in --archive (default: the small one that the suite makes)")
    parser.add_argument("--archive", type=Path, help="an image archive, as 'podman save' writes it")
    add_scratch(parser)


@dataclass(frozen=True)
class Room:
    """The store, the image in it, the agent tree, and how ``podman`` is called for it."""

    storage: PodmanStorage
    image: str
    tree: AgentTree

    @property
    def environment(self) -> dict[str, str]:
        return self.storage.environment(os.environ)

    def podman(self, *words: str) -> str:
        """Run a command of Podman; its output. The benchmark ends if it fails."""
        argv = ("podman", *words)
        done = subprocess.run(
            argv, env=self.environment, capture_output=True, text=True, timeout=PODMAN_DEADLINE_S, check=False
        )
        if done.returncode:
            sys.exit(f"podman {words[0]} failed: {done.stderr.strip()[-500:]}")
        return done.stdout.strip()

    def run_words(self, *command: str) -> tuple[str, ...]:
        """``podman run -d`` with the network, the published port and the mounts that our sandboxes have."""
        mounts = [word for mount in self.tree.mounts for word in ("-v", f"{mount.source}:{mount.target}:ro")]
        network = ("--network", "slirp4netns", "-p", f"127.0.0.1:{free_port()}:{SANDBOX_PORT}")
        return ("run", "-d", "--label", RAW, *network, *mounts, "-v", "/workspace", self.image, *command)

    def remove_all(self) -> None:
        """All that were made with ``run_words``."""
        names = self.podman("ps", "--all", "--quiet", "--filter", f"label={RAW}").split()
        if names:
            self.podman("rm", "--force", "--time", "0", "--volumes", *names)


_ports = itertools.cycle(range(20000, 30000))  # below those that the kernel gives to connections


def free_port() -> int:
    """A port that is free now and was not given out lately. Podman's own choice collides once in some hundred runs."""
    for port in _ports:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError


@contextlib.contextmanager
def room(scratch: Path, image: str | None, archive: Path | None) -> Iterator[Room]:
    """Everything made; the image is loaded from ``archive``, or is the small one that the suite makes itself."""
    tree = newest(default_cache(os.environ))
    if tree is None:
        sys.exit("there is no agent tree; make one with: python -m slurm_runtime.agent build")
    with (
        guarded(Path(__file__).resolve().parent.parent) as guardian,
        podman_storage(scratch, f"bench{os.getpid()}", [], announce=guardian.own_storage) as storage,
        podman_service(storage, os.environ, lambda: None, 2.0, log=sys.stderr),  # the other is for values
    ):
        made = Room(storage, image or DEFAULT_NAME, tree)
        source = archive or ensure_archive(storage.root / "image.tar")
        made.podman("load", "--quiet", "--input", str(source))
        yield made


@dataclass(frozen=True)
class Server:
    """A running API server: its address, its key and its process."""

    url: str
    key: str
    pid: int
    log: Path


@contextlib.contextmanager
def server(place: Room, slots: int, start: str, *flags: str) -> Iterator[Server]:
    """The API server with so many slots and further ``flags``, ready to start sandboxes by AGENT_START=``start``."""
    folder = Path(tempfile.mkdtemp(prefix="server-", dir=place.storage.root))
    key_file, log_file, key = folder / "key", folder / "log", secrets.token_urlsafe(16)
    key_file.touch(0o600)
    key_file.write_text(key)
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener, log_file.open("wb") as log:
        port = listener.getsockname()[1]
        argv = (
            sys.executable,
            "-m",
            "slurm_runtime.api_server",
            *_flags(place, slots, start, key_file, listener),
            *flags,
        )
        environment = {**place.environment, "PYTHONPATH": str(CHECKOUT)}
        spec = ChildSpec(
            argv, environment, "the API server", stdin_pipe=True, stderr=log, pass_fds=(listener.fileno(),)
        )
        with Child(spec, stop_grace_s=60.0) as child:
            found = Server(f"http://127.0.0.1:{port}", key, child.pid, log_file)
            _await_log(found, child, "fork server: ready" if start == "fork" else " answers (")
            yield found


def _flags(place: Room, slots: int, start: str, key_file: Path, listener: socket.socket) -> Sequence[str]:
    cpus = os.cpu_count() or 1
    flags = {
        "--fd": listener.fileno(),
        "--api-key-file": key_file,
        "--public-host": "127.0.0.1",
        "--cpus": cpus,
        "--cpus-per-worker": cpus / slots,
        "--memory-per-worker": "2G",
        "--agent-dir": place.tree.root,
        "--agent-start": start,
        "--stop-timeout": 50,
    }
    return [*(str(word) for flag in flags.items() for word in flag), "--stop-with-stdin"]


def _await_log(found: Server, child: Child, words: str) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while words not in found.log.read_text():
        if child.exit_code is not None or time.monotonic() > deadline:
            sys.exit(f"the API server did not become ready:\n{found.log.read_text()[-2000:]}")
        time.sleep(0.05)
