"""Installs and runs the peers under the agent tree's own Python, so that they need nothing of this machine."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.room import Room
from slurm_runtime.agent.tree import MOUNT_POINT

HERE = Path(__file__).resolve().parent
SWE_REX = "1.4.0"
RUN_DEADLINE_S = 600.0
INSTALL_DEADLINE_S = 900.0
MOUNTED = "/opt/peers"
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
class Peers:
    """A folder with the peers' packages and with the programs that they expect."""

    place: Room
    folder: Path

    def workspace_seconds(self, count: int) -> list[float]:
        """Starts of OpenHands' DockerWorkspace."""
        volumes = [f"{mount.source}:{mount.target}:ro" for mount in self.place.tree.mounts]
        return self._seconds("docker_workspace", self._workspace_image(), volumes, count)

    def swe_rex_seconds(self, count: int) -> list[float]:
        """Starts of SWE-ReX, whose containers find ``swerex-remote`` in a mount."""
        shim = self.folder / "bin" / "swerex-remote"
        mounts = {self.place.tree.root: MOUNT_POINT, self.folder: MOUNTED, shim: "/usr/local/bin/swerex-remote"}
        volumes = [f"{source}:{target}:ro" for source, target in mounts.items()]
        return self._seconds("swe_rex", self.place.image, volumes, count)

    def _seconds(self, name: str, image: str, volumes: Sequence[str], count: int) -> list[float]:
        """Run one of the scripts beside this file; the seconds that it printed."""
        environment = {
            **self.place.environment,
            "PYTHONPATH": str(self.folder / name),
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "OPENHANDS_SUPPRESS_BANNER": "1",
            "no_proxy": "*",
            "HOME": str(self.place.storage.root),
        }
        argv = [str(self._python), str(HERE / f"{name}.py"), image, ",".join(volumes), str(count)]
        done = subprocess.run(
            argv, env=environment, capture_output=True, text=True, timeout=RUN_DEADLINE_S, check=False
        )
        found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not found:
            sys.exit(f"{name} failed: {(done.stderr or done.stdout)[-2000:]}")
        seconds: list[float] = json.loads(found[-1].removeprefix("RESULT "))
        return seconds

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
