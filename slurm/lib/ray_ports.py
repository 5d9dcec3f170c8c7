"""Which ports does Ray use on one node of a run? A block of its own: derived from the job id, held, tried before use.

Blocks begin at fixed places, so that two runs on one node either have the same block or share no port. Whoever has
bound a block's first port owns the block: the kernel decides between two that want it at once, and gives it back when
the owner dies. Ray knows only ports, not sockets, so that the others are tried and let go.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass

# A worker process takes one port, and VERL's nodes have a hundred CPUs: two processes for each fit.
BLOCK_SIZE = 500
# Below Linux's ephemeral ports (32768 on, ip_local_port_range), which any program's connections take.
DEFAULT_RANGE = range(20000, 32500)
FIRST_WORKER = 20  # what lies below it is the lock and Ray's own services


@dataclass(frozen=True)
class PortBlock:
    """The ports ``first`` to ``first + 499``."""

    first: int

    @property
    def ports(self) -> range:
        return range(self.first, self.first + BLOCK_SIZE)

    @property
    def gcs(self) -> int:
        """Where the head's directory of the cluster answers (``RAY_ADDRESS``)."""
        return self.first + 1

    @property
    def node_manager(self) -> int:
        """Where every node's raylet answers."""
        return self.first + 2

    def options(self, head: bool) -> tuple[str, ...]:
        """All of ``ray start`` that names a port."""
        own = {"port": self.gcs, "ray-client-server-port": self.first + 3, "dashboard-port": self.first + 4}
        every = {
            "node-manager-port": self.node_manager,
            "object-manager-port": self.first + 5,
            "dashboard-agent-listen-port": self.first + 6,
            "dashboard-agent-grpc-port": self.first + 7,
            "runtime-env-agent-port": self.first + 8,
            "metrics-export-port": self.first + 9,
            "min-worker-port": self.first + FIRST_WORKER,
            "max-worker-port": self.ports[-1],
        }
        return tuple(f"--{name}={port}" for name, port in ({**own, **every} if head else every).items())

    @property
    def environment(self) -> dict[str, str]:
        """The two ports that Ray takes from the environment; by default they are the same for every head."""
        return {"AUTOSCALER_METRIC_PORT": str(self.first + 10), "DASHBOARD_METRIC_PORT": str(self.first + 11)}

    def __str__(self) -> str:
        return f"{self.first}-{self.ports[-1]}"


def blocks(job_id: str, allowed: range = DEFAULT_RANGE) -> list[PortBlock]:
    """All blocks within ``allowed``, in the order in which this job tries them; empty if none fits."""
    count = len(allowed) // BLOCK_SIZE
    begin = int(re.sub(r"[^0-9]", "", job_id) or 0)
    return [PortBlock(allowed.start + (begin + step) % count * BLOCK_SIZE) for step in range(count)]


def taken_port(ports: range) -> int | None:
    """The first of these ports that some process of this node listens on, or None."""
    return next((port for port in ports if not _can_bind(port)), None)


def _can_bind(port: int) -> bool:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Ray does; ended connections are no hindrance
        try:
            trial.bind(("", port))
        except OSError:
            return False
    return True


@contextlib.contextmanager
def held(block: PortBlock) -> Iterator[int | None]:
    """The block as this process's own for the length of the ``with``; yields a port that is taken, or None."""
    with socket.socket() as lock:
        try:
            lock.bind(("", block.first))
        except OSError:
            yield block.first
            return
        yield taken_port(block.ports[1:])
