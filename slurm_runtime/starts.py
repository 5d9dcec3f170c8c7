"""From a request to a ready sandbox: its slot, its container, its server's first answer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

from slurm_runtime.admission import Admission
from slurm_runtime.connection import Connection
from slurm_runtime.diagnostics import FAULT, NO_ANSWER, Diagnosis, kind_of
from slurm_runtime.endings import Endings
from slurm_runtime.entries import Entry, NeverReady, SandboxDied
from slurm_runtime.launcher import Launcher
from slurm_runtime.logs import log
from slurm_runtime.naming import PublicHost
from slurm_runtime.podman import EngineError, EngineSilent, EngineUnreachable
from slurm_runtime.sandbox import Dialect, State
from slurm_runtime.slots import units_for

Probe = Callable[[str, Dialect], Awaitable[bool]]

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.01, 0.5  # between probes of a sandbox that is not ready
LOOK_PERIOD_S = 0.2  # between looks whether such a sandbox still lives


class Starts:
    """Brings sandboxes up; every failure ends in state FAILED with its reason."""

    def __init__(
        self,
        launcher: Launcher,
        connection: Connection,
        admission: Admission,
        endings: Endings,
        host: PublicHost,
        probe: Probe,
    ) -> None:
        self.config = launcher.config
        self.engine = launcher.engine
        self.launcher = launcher
        self.connection = connection
        self.admission = admission
        self.endings = endings
        self.host = host
        self.probe = probe

    async def bring_up(self, entry: Entry) -> None:
        """The whole start; what its client should hear of a failure is ``entry.problem``."""
        try:
            await self.connection.ready()
            with self.launcher.steps.of("slot"):
                units = units_for(entry.specification.resource_factor)
                entry.lease = entry.lease or await self.admission.lease(units)
            await self.connection.patiently(lambda: self._launch(entry))
            self.endings.watch(entry)
            entry.become(entry.sandbox.changed(State.STARTING, "its server does not answer yet"))
            with self.launcher.steps.of("answer"):
                await self._until_ready(entry)
            self.endings.note_started(entry)
            return
        except EngineError as problem:
            entry.problem = problem
            diagnosis = Diagnosis(str(problem), "", kind=kind_of(problem))
        except SandboxDied:
            diagnosis = await self.endings.diagnosis(entry)
        except NeverReady as problem:
            diagnosis = await self._never_ready(entry, problem)
        except Exception as fault:  # a fault of ours must not leave a client polling a sandbox that nobody starts
            log.exception("the start of sandbox %s failed unexpectedly", entry.specification.runtime_id)
            entry.problem = fault
            diagnosis = Diagnosis("an internal error; the server's log has the details", "", kind=FAULT)
        await self.endings.fail(entry, diagnosis)

    async def _launch(self, entry: Entry) -> None:
        """Fit to be done again: what a try before it has made is removed first."""
        if entry.warm is None:
            await self.launcher.discard(entry)
        facts = await self.connection.ready()
        await self.launcher.launch(entry, facts, self.admission.slots, await self.host.name())

    async def bring_back(self, entry: Entry) -> None:
        """Of one that was paused, or taken over: until its server answers again."""
        try:
            await self._until_ready(entry)
            return
        except NeverReady as problem:
            diagnosis = await self._never_ready(entry, problem)
        except (SandboxDied, EngineError):
            diagnosis = await self.endings.diagnosis(entry)
        await self.endings.fail(entry, diagnosis)

    async def _never_ready(self, entry: Entry, problem: NeverReady) -> Diagnosis:
        return Diagnosis(str(problem), (await self.endings.diagnosis(entry)).last_lines, kind=NO_ANSWER)

    async def _until_ready(self, entry: Entry) -> None:
        url = entry.sandbox.url or ""
        deadline = time.monotonic() + self.config.startup_timeout_s
        pause_s, next_look = FIRST_PAUSE_S, time.monotonic() + LOOK_PERIOD_S
        while not await self.probe(url, entry.specification.dialect):
            if entry.has_ended or entry.server_ended or time.monotonic() > next_look:
                await self._still_running(entry)
                next_look = time.monotonic() + LOOK_PERIOD_S
            if time.monotonic() > deadline:
                raise NeverReady(f"its server did not answer at {url} within {self.config.startup_timeout_s:g} s")
            await asyncio.sleep(pause_s)
            pause_s = min(LONGEST_PAUSE_S, pause_s * 1.3)
        entry.become(entry.sandbox.changed(State.READY, f"its server answers at {url}"))
        entry.ready_at = entry.ready_at or time.monotonic()
        wish = entry.specification
        log.debug("sandbox %s of session %s is ready at %s", wish.runtime_id, wish.session_id, url)

    async def _still_running(self, entry: Entry) -> None:
        if entry.server_ended or entry.has_ended:
            raise SandboxDied
        if entry.is_watched:
            return
        with contextlib.suppress(EngineUnreachable, EngineSilent):  # no answer is no death
            if not (await self.engine.inspect(entry.name)).running:
                raise SandboxDied
