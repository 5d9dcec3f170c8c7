"""One node's part of a run's Ray cluster: what a job step runs on each node, from ``ray start`` to the last process.

It picks address, ports and folder on the node, starts ``ray start --block``, and ends when its standard input ends
(the training job closes it), when it is told to stop, or when Ray ends. Then everything that Ray started is ended by
pid: asked first, killed after a few seconds, since a ``gcs_server`` that is asked together with its raylet may never
end. ``ray stop`` is not used: it ends the user's other runs on the node too.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from slurm.lib.coordination import write_atomically
from slurm.lib.edge import exit_code_of
from slurm.lib.errors import EnvironmentProblem
from slurm.lib.gpu_environment import changed, compile_caches, integer_devices, without_amd
from slurm.lib.guardian import Guardian, guarded
from slurm.lib.job_environment import scratch_folders
from slurm.lib.logs import log, setup_command_logging
from slurm.lib.processes import Child, ChildSpec, adopt_orphans, kill_descendants
from slurm.lib.ray_address import own_address
from slurm.lib.ray_folder import choose, folder_name, ray_folder
from slurm.lib.ray_ports import BLOCK_SIZE, PortBlock, blocks, held, taken_port
from slurm.lib.ray_steps import RAY
from slurm.lib.signals import SignalNotes

LOOK_EVERY_S = 0.2
CONNECT_TIMEOUT_S = 1.0
MARKER = "SKYRL_RAY_NODE"
JOINING = ("RAY_ADDRESS", "RAY_TMPDIR")  # for those that join a cluster


@dataclass(frozen=True)
class NodeSpec:
    """What the training job tells a node.

    ``head`` is the head's HOST:PORT and ``folder`` its folder, which is Ray's on every node; both are empty for the
    head itself, which writes its own into the file ``announce``. ``peer`` is another node's name; ``ports`` the range
    to choose from, both ends included; ``grace_s`` the seconds from the question to end to the kill.
    ``integer_devices``: Ray's workers read the names of devices as integers.
    """

    job_id: str
    node: str
    rank: int
    python: tuple[str, ...]
    cpus: int
    gpus: int
    head: str = ""
    folder: str = ""
    announce: str = ""
    peer: str = ""
    interface: str = ""
    ports: tuple[int, int] = (20000, 32499)
    scratch: str = ""
    grace_s: float = 5.0
    integer_devices: bool = False

    def to_text(self) -> str:
        return json.dumps({name: value for name, value in asdict(self).items() if value != ""})

    @staticmethod
    def from_text(text: str) -> NodeSpec:
        data = json.loads(text)
        known = {field.name: data[field.name] for field in fields(NodeSpec) if field.name in data}
        return NodeSpec(**{**known, "python": tuple(data["python"]), "ports": tuple(data["ports"])})


@dataclass(frozen=True)
class Announcement:
    """What the head says of itself: where the cluster is joined (HOST:PORT), and the head's folder."""

    job_id: str
    address: str
    folder: str

    def to_text(self) -> str:
        return json.dumps(asdict(self)) + "\n"


def parse_announcement(text: str | None, job_id: str) -> Announcement | None:
    """The announcement of this job's head, or None for anything else."""
    try:
        found = Announcement(**json.loads(text or ""))
    except (ValueError, TypeError):
        return None
    return found if found.job_id == job_id else None


def start_argv(spec: NodeSpec, address: str, block: PortBlock, folder: Path) -> tuple[str, ...]:
    """The command that starts Ray on a node."""
    is_head = not spec.head
    at_head = ("--head", "--include-dashboard=false", f"--temp-dir={folder}")  # the others take the head's folder
    place = at_head if is_head else (f"--address={spec.head}",)
    own = (
        f"--node-ip-address={address}",
        f"--node-name={spec.node}",
        f"--num-cpus={spec.cpus}",  # else Ray counts the host's, and starts more workers than the job may run
        f"--num-gpus={spec.gpus}",
        "--log-color=false",
    )
    return (*spec.python, *RAY, *place, *own, *block.options(is_head))


def node_environment(spec: NodeSpec, base: Mapping[str, str], block: PortBlock, marker: str) -> dict[str, str]:
    """What Ray and thereby its workers find in their environment.

    Its devices are named as the trainer's are: ``base`` has the names that Slurm gave this step, whatever the training
    job made of its own.
    """
    devices = {**without_amd(base), **(integer_devices(base) if spec.integer_devices else {})}
    kept = changed(base, {**dict.fromkeys(JOINING), **devices})
    return {**kept, **block.environment, MARKER: marker}


def answers(address: str, port: int) -> bool:
    """Whether something accepts connections there."""
    try:
        socket.create_connection((address, port), CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True


class Node:
    """Ray on this node, from the choice of its ports to its end."""

    def __init__(self, spec: NodeSpec, folder: Path, guardian: Guardian, told_to_end: Callable[[], bool]) -> None:
        self.spec = spec
        self.folder = folder
        self.guardian = guardian
        self.told_to_end = told_to_end
        self.address = own_address(spec.interface, spec.peer)
        self.marker = f"{spec.job_id}.{spec.rank}.{secrets.token_hex(8)}"
        guardian.own_marker(MARKER, self.marker)

    def run(self) -> None:
        """Run Ray until it is told to end; ``EnvironmentProblem`` if it ends by itself."""
        allowed = range(self.spec.ports[0], self.spec.ports[1] + 1)
        taken = []
        for block in blocks(self.spec.job_id, allowed):
            with held(block) as port:
                if port is None:
                    port = self._run_with(block)
                if port is None:
                    return
            taken.append(str(port))
            log.warning("port %s of the block %s is taken on %s; trying the next block", port, block, self.spec.node)
        raise EnvironmentProblem(
            f"no block of {BLOCK_SIZE} free ports on {self.spec.node} in {allowed.start}-{allowed[-1]} "
            f"(taken: {', '.join(taken) or 'the range is too small'}); see RAY_PORT_RANGE"
        )

    def _run_with(self, block: PortBlock) -> int | None:
        """Run Ray on these ports; returns the port that somebody took before Ray did, None for an ordered end."""
        argv = start_argv(self.spec, self.address, block, self.folder)
        log.info(
            "starting Ray on %s: address %s, ports %s, folder %s", self.spec.node, self.address, block, self.folder
        )
        environment = node_environment(self.spec, os.environ, block, self.marker)
        environment |= compile_caches(self.folder, environment)
        spec = ChildSpec(argv, environment, "Ray", stderr=sys.stdout.fileno())
        with Child(spec) as child:
            self.guardian.own_session(child.pid)
            try:
                was_up = self._watch(child, block)
                code = child.exit_code
            finally:
                self._end(child)
        if code is None:
            return None
        port = None if was_up else taken_port(block.ports[1:])
        if port is None:
            raise EnvironmentProblem(f"Ray on {self.spec.node} has ended by itself with exit code {code}")
        return port

    def _end(self, child: Child) -> None:
        """Ask `ray start` alone, which ends the rest in order; kill what is left after the grace."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGTERM)
        child.wait(self.spec.grace_s)
        child.kill()
        kill_descendants(spared=set())

    def _watch(self, child: Child, block: PortBlock) -> bool:
        """Wait for Ray's end or for ours; returns whether Ray had come up."""
        up = False
        while child.exit_code is None and not self.told_to_end():
            if not up and answers(self.address, block.node_manager):
                up = True
                self._announce(block)
        return up

    def _announce(self, block: PortBlock) -> None:
        if self.spec.announce:
            said = Announcement(self.spec.job_id, f"{self.address}:{block.gcs}", str(self.folder))
            write_atomically(Path(self.spec.announce), said.to_text())
        log.info("Ray answers on %s", self.spec.node)


def run(spec: NodeSpec, notes: SignalNotes) -> int:
    """Be this node's part of the cluster; returns 0 after an ordered end."""
    log.info("node %s of job %s, on %s", spec.node, spec.job_id, socket.gethostname())
    scratch = scratch_folders(spec.scratch, os.environ)
    name = folder_name(os.getuid(), spec.job_id)
    folder = Path(spec.folder) if spec.folder else choose(scratch, name) / name

    def told_to_end() -> bool:
        notes.check()
        ready, _, _ = select.select([sys.stdin], [], [], LOOK_EVERY_S)
        return bool(ready) and not os.read(sys.stdin.fileno(), 4096)

    code = Path(__file__).resolve().parents[2]
    with guarded(code) as guardian, ray_folder(folder, shared=bool(spec.head), announce=guardian.own_folder):
        guardian.await_detached()  # before orphans come to us: the guardian must not
        adopt_orphans()
        Node(spec, folder, guardian, told_to_end).run()
    log.info("Ray on %s has ended, with every process of it", spec.node)
    return 0


def main(argv: Sequence[str]) -> int:
    setup_command_logging()
    return exit_code_of(lambda notes: run(NodeSpec.from_text(argv[0]), notes), "ended by %s")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
