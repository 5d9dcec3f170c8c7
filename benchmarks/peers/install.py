"""Installs and runs the peers under the agent tree's own Python, so that they need nothing of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.room import Room, Server
from slurm_runtime.agent.tree import MOUNT_POINT

HERE = Path(__file__).resolve().parent
SWE_REX = "1.4.0"
RUN_DEADLINE_S = 600.0
INSTALL_DEADLINE_S = 900.0
MOUNTED = "/opt/peers"
KINDS = ("START", "COMMAND", "SESSION")
# DockerWorkspace calls `docker`. It asks for more open files than some machines' hard limit allows; Podman then
# refuses where Docker's daemon, as root, does not.
DOCKER = """#!/bin/bash
words=()
while (($#)); do
    case "$1" in
        --ulimit) shift ;;
        --ulimit=*) ;;
        *) words+=("$1") ;;
    esac
    shift
done
exec podman "${words[@]}"
"""


@dataclass(frozen=True)
class Said:
    """What a driver reported: seconds by kind (START, COMMAND, SESSION), and whether it came to its end in time."""

    seconds: dict[str, list[float]]
    whole: bool


@dataclass(frozen=True)
class Peers:
    """A folder with the peers' packages and with the programs that they expect."""

    place: Room
    folder: Path

    def workspace(self, mode: str, count: int, deadline_s: float = RUN_DEADLINE_S) -> Said:
        """OpenHands' DockerWorkspace; the modes are those of openhands_workspaces.py."""
        volumes = [f"{mount.source}:{mount.target}:ro" for mount in self.place.tree.mounts]
        words = ("docker", self._workspace_image(), ",".join(volumes), mode, str(count))
        return self._drive("openhands_workspaces", "docker_workspace", words, deadline_s)

    def workspace_on(self, found: Server, mode: str, count: int, deadline_s: float = RUN_DEADLINE_S) -> Said:
        """OpenHands' APIRemoteWorkspace, as published, on an API server."""
        words = ("api", self.place.image, "", mode, str(count))
        to = {"RUNTIME_URL": found.url, "RUNTIME_KEY": found.key}
        return self._drive("openhands_workspaces", "docker_workspace", words, deadline_s, to)

    def swe_rex(self, mode: str, count: int, deadline_s: float = RUN_DEADLINE_S) -> Said:
        """SWE-ReX, whose containers find ``swerex-remote`` in a mount; the modes are those of swe_rex.py."""
        shim = self.folder / "bin" / "swerex-remote"
        mounts = {self.place.tree.root: MOUNT_POINT, self.folder: MOUNTED, shim: "/usr/local/bin/swerex-remote"}
        volumes = [f"{source}:{target}:ro" for source, target in mounts.items()]
        words = (self.place.image, ",".join(volumes), mode, str(count))
        return self._drive("swe_rex", "swe_rex", words, deadline_s)

    def _drive(
        self, script: str, packages: str, words: Sequence[str], deadline_s: float, more: Mapping[str, str] | None = None
    ) -> Said:
        """Run one of the scripts beside this file until its end or the deadline, with all that it started.

        Not to be through in time is a result where many are started at once, and ends the benchmark elsewhere.
        """
        environment = {**self._environment(packages), **(more or {})}
        argv = [str(self._python), str(HERE / f"{script}.py"), *words]
        with tempfile.TemporaryFile("w+", dir=self.place.storage.root) as out:
            child = subprocess.Popen(
                argv,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            code = _ended(child, deadline_s)
            out.seek(0)
            text = out.read()
        if code and "many" not in words:
            sys.exit(f"{script} failed: {text[-2000:]}")
        return Said(parsed(text), code == 0)

    def _environment(self, packages: str) -> dict[str, str]:
        return {
            **self.place.environment,
            "PYTHONPATH": str(self.folder / packages),
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "OPENHANDS_SUPPRESS_BANNER": "1",
            "no_proxy": "*",
            "HOME": str(self.place.storage.root),
        }

    @property
    def _python(self) -> Path:
        return self.place.tree.root / self.place.tree.executable

    def _workspace_image(self) -> str:
        """The same image with the agent server as its entry point, as DockerWorkspace expects it."""
        entry = json.dumps(["/usr/local/bin/openhands-agent-server"])
        dockerfile = self.place.storage.root / "Dockerfile"
        dockerfile.write_text(f"FROM {self.place.image}\nENTRYPOINT {entry}\nWORKDIR /workspace\n")
        self.place.podman("build", "--quiet", "-t", "localhost/agent:1", "-f", str(dockerfile), str(dockerfile.parent))
        return "localhost/agent:1"


def parsed(text: str) -> dict[str, list[float]]:
    """Seconds by kind, from the lines of a driver among whatever else was printed."""
    found: dict[str, list[float]] = {}
    for line in text.splitlines():
        kind, _, seconds = line.partition(" ")
        if kind in KINDS:
            found.setdefault(kind, []).append(float(seconds))
    return found


def _ended(child: subprocess.Popen[bytes], deadline_s: float) -> int:
    """Its exit code, or -1 where it had to be ended; none of its process group stays."""
    try:
        return child.wait(deadline_s)
    except subprocess.TimeoutExpired:
        return -1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def installed(place: Room, cache: Path) -> Peers:
    """The peers in a cache folder, installed if they are not there."""
    folder = cache / f"swe-rex-{SWE_REX}-openhands-{place.tree.version}"
    peers = Peers(place, folder)
    if not (folder / ".whole").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _install(peers)
        (folder / ".whole").touch()
    return peers


def _install(peers: Peers) -> None:
    print("installing the peers (a minute or two, once)", file=sys.stderr)
    tree = peers.place.tree
    _pip(peers, "swe_rex", f"swe-rex=={SWE_REX}", "aiohttp")  # its client needs aiohttp, which it does not ask for
    _pip(peers, "docker_workspace", "--no-deps", f"openhands-workspace=={tree.version}")
    words = shlex.join(tree.python_command(("-c", "from swerex.server import main; main()")))
    remote = words.replace(" -I ", " ", 1)
    programs = {
        "docker": DOCKER,
        "swerex-remote": f'#!/bin/sh\nexport PYTHONPATH={MOUNTED}/swe_rex\nexec {remote} "$@"\n',
    }
    for name, text in programs.items():
        path = peers.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)


def _pip(peers: Peers, name: str, *packages: str) -> None:
    """Install into the folder of a peer, by this Python's pip for the tree's version of Python."""
    version = peers.place.tree.python.rpartition("python")[2]
    target = [
        "--target",
        str(peers.folder / name),
        "--python-version",
        version,
        "--only-binary=:all:",
        "--ignore-requires-python",
    ]
    argv = [sys.executable, "-m", "pip", "install", "--quiet", *target, *packages]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=INSTALL_DEADLINE_S, check=False)
    if done.returncode:
        sys.exit(f"{name} could not be installed: {done.stderr.strip()[-1000:]}")
