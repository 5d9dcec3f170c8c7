"""How are a sandbox's processes stopped for a while, and let go on? By its cgroup, else one by one."""

from __future__ import annotations

import asyncio

from slurm_runtime.connection import Connection
from slurm_runtime.control import ControlError
from slurm_runtime.entries import Entry, UnknownSandbox, WrongState
from slurm_runtime.launcher import Launcher
from slurm_runtime.podman import EngineError
from slurm_runtime.sandbox import Sandbox, State
from slurm_runtime.starts import Starts


class Pauses:
    """Pauses and resumes sandboxes; of one, one request after the other."""

    def __init__(self, launcher: Launcher, connection: Connection, starts: Starts) -> None:
        self.config = launcher.config
        self.engine = launcher.engine
        self.launcher = launcher
        self.connection = connection
        self.starts = starts

    async def pause(self, entry: Entry) -> Sandbox:
        """Stop its processes; again is fine. ``WrongState`` if it has none, ``EngineError`` if it cannot be done."""
        async with entry.pausing:
            await entry.until(lambda sandbox: sandbox.state is not State.STARTING, self.config.ready_grace_s)
            if entry.sandbox.state is State.PAUSED:
                return entry.sandbox
            if entry.sandbox.state is not State.READY:
                runtime_id = entry.specification.runtime_id
                raise WrongState(f"sandbox {runtime_id} is {entry.sandbox.pod_status} and cannot be paused")
            await self._freeze(entry, True)
            if entry.sandbox.state is State.READY:  # it may have died meanwhile
                entry.become(entry.sandbox.changed(State.PAUSED, "paused on request"))
            return entry.sandbox

    async def resume(self, entry: Entry) -> Sandbox:
        """Let its processes go on; it is ready again once its server answers. Fine for one that was not paused."""
        async with entry.pausing:
            if entry.sandbox.state.is_dead:
                runtime_id = entry.specification.runtime_id
                raise UnknownSandbox(f"sandbox {runtime_id} is {entry.sandbox.status}; nothing is left to resume")
            if entry.sandbox.state is State.PAUSED:
                await self._freeze(entry, False)
                entry.become(entry.sandbox.changed(State.STARTING, "resumed; its server does not answer yet"))
                entry.bring_up = asyncio.create_task(self.starts.bring_back(entry))
                await entry.until(lambda sandbox: sandbox.state is not State.STARTING, self.config.ready_grace_s)
            return entry.sandbox

    async def _freeze(self, entry: Entry, frozen: bool) -> None:
        facts = self.connection.facts or await self.connection.ready()
        if facts.can_pause:
            await self.connection.patiently(lambda: self._freeze_by_podman(entry, frozen))
            return
        control = self.launcher.control
        if control is None:
            raise EngineError("sandboxes cannot be paused here: Podman has no cgroup for them and no warden runs")
        try:
            await (control.pause if frozen else control.resume)(entry.name, entry.holder)
        except ControlError as problem:
            raise EngineError(f"the sandbox could not be {'paused' if frozen else 'resumed'}: {problem}") from None

    async def _freeze_by_podman(self, entry: Entry, frozen: bool) -> None:
        """Fit to be done again: Podman refuses to pause what is paused."""
        if (await self.engine.inspect(entry.name)).status == ("paused" if frozen else "running"):
            return
        await (self.engine.pause if frozen else self.engine.unpause)(entry.name)
