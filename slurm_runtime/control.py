"""What the manager asks to be done inside the namespaces of sandboxes; the warden does it, tests have a fake."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from slurm_runtime.agent.tree import AgentTree

Event = Mapping[str, Any]
OnEvent = Callable[[Event], None]


class ControlError(Exception):
    """It could not be done; ``str()`` says what and why."""


class ForkRefused(ControlError):
    """A forked server would differ from a plain one; start the plain one."""


class Control(Protocol):
    """Every call has a deadline and raises ``ControlError`` when it fails; ``holder`` is a container's first process.

    Events: ``{"event": "exited", "sandbox", "exit_code"}``, ``{"event": "offender", "sandbox", "reason"}`` (killed
    already) and ``{"event": "fork_server", "state": "ready" | "died" | "unavailable", "reason"}``.
    """

    async def start(self) -> None:
        """Begin; the events come from now on."""
        ...

    def podman_is(self, pid: int) -> None:
        """Podman's service is another process now."""
        ...

    async def start_fork_server(self, tree: AgentTree) -> None:
        """Import the agent server of ``tree`` once; ``fork`` works afterwards."""
        ...

    async def fork(
        self,
        sandbox: str,
        holder: int,
        arguments: Sequence[str],
        working_dir: str,
        seccomp: Mapping[str, Any] | None,
    ) -> int:
        """Fork the agent server into the container; its process id, or ``ForkRefused``."""
        ...

    async def adopt(self, sandbox: str, pid: int) -> None:
        """Know the agent server that another warden forked into the container; nobody tells of its exit."""
        ...

    async def pause(self, sandbox: str, holder: int) -> None:
        """Stop all processes of the container."""
        ...

    async def resume(self, sandbox: str, holder: int) -> None:
        """Let them go on."""
        ...

    async def deny_network(self, sandbox: str, holder: int) -> None:
        """Take away every route out; the published port still answers."""
        ...

    async def pin(self, sandbox: str, holder: int, cpus: Sequence[int]) -> None:
        """Let its processes run on these CPUs only."""
        ...

    async def watch(
        self,
        sandbox: str,
        holder: int,
        memory_bytes: int,
        processes: int,
        disk_bytes: int,
        disk_paths: Sequence[str],
    ) -> None:
        """Sample it, and stop it when it takes more than this; 0 is no limit."""
        ...

    async def forget(self, sandbox: str) -> None:
        """Sample it no more."""
        ...

    async def usage(self) -> Mapping[str, Mapping[str, float]]:
        """The last sample of each: ``memory_bytes``, ``processes``, ``cpu_s``, ``disk_bytes``, ``commands``."""
        ...

    async def end_stray(self, monitor: int, started: int, container: str, program: str, runtime: str) -> bool:
        """End a container that Podman does not know any more; False if nothing of it is left.

        ``monitor`` is its conmon, which started then (ticks) and runs ``program``; ``runtime`` is to forget it.
        """
        ...

    async def tidy_networks(self, empty_for_s: float) -> int:
        """Take away the network namespaces of containers that were empty at every call for so long; how many."""
        ...

    async def close(self) -> None:
        """End it with everything it started; sandboxes live on."""
        ...
