"""What is looked after beside requests: orphans, containers that died, sandboxes that idle, removals that failed."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Mapping

from slurm_runtime.adoption import Adoption
from slurm_runtime.background import Background
from slurm_runtime.connection import Connection
from slurm_runtime.control import ControlError, Event
from slurm_runtime.deadlines import within
from slurm_runtime.diagnostics import IDLE, Diagnosis
from slurm_runtime.endings import SERVING, Endings
from slurm_runtime.entries import Entry
from slurm_runtime.launcher import Launcher
from slurm_runtime.logs import log
from slurm_runtime.ownership import SERVER_LABEL, is_orphan
from slurm_runtime.podman import ContainerState, EngineError, EngineFacts, EngineUnreachable
from slurm_runtime.register import Register
from slurm_runtime.remains import Remains
from slurm_runtime.sandbox import State

IdleOf = Callable[[str], Awaitable[float | None]]  # seconds since the server at a URL was asked for something

LISTING_PERIOD_S = 300.0  # between lists of all containers: one of 512 keeps Podman busy for a second
# Between looks for containers of dead servers: what Podman was asked for by a server that was killed meanwhile appears
# a moment after the first look.
SWEEP_AGAIN_S = (3.0, 30.0, 300.0)
IDLE_LOOK_S = 10.0  # between looks whether a sandbox idles


class Supervisor:
    """Looks again and again; ``mark`` is the label of this server's containers."""

    def __init__(
        self,
        launcher: Launcher,
        connection: Connection,
        register: Register,
        endings: Endings,
        background: Background,
        adoption: Adoption,
        remains: Remains,
        mark: str,
        idle_of: IdleOf,
    ) -> None:
        self.config = launcher.config
        self.engine = launcher.engine
        self.launcher = launcher
        self.connection = connection
        self.register = register
        self.endings = endings
        self.background = background
        self.adoption = adoption
        self.remains = remains
        self.mark = mark
        self.swept = asyncio.Event()  # all sandboxes are known that there are
        if not self.config.adopt:
            self.swept.set()
        self.idle_of = idle_of
        self._next_idle_look = 0.0
        self._next_listing = 0.0
        self._next_sweep = 0.0
        self._sweeps = 0
        self._orphans: list[str] = []
        self._refused: set[str] = set()  # containers whose removal Podman refused, which has been said

    async def run(self) -> None:
        """Connect to Podman, then look once a period; ends only by cancellation."""
        while True:
            try:
                facts = await self.connection.ready()
                if self.config.adopt and not self.swept.is_set():
                    await self.adopt(facts)
                is_time = time.monotonic() >= self._next_sweep
                await (self.sweep() if is_time else self._remove_orphans())
                if is_time or self.remains.is_due:
                    await self.remains.end(facts)
                await self._look()
                await self._retry_cleaning()
                await self._reap_idle()
                self.connection.answers()
            except EngineError as problem:
                self.connection.fails(problem)
            await asyncio.sleep(self.config.watch_period_s)

    async def sweep(self) -> None:
        """Remove sandboxes whose server is dead: it was killed before it could. Those that stay are tried again.

        One that it had noted as failed, and whose container it had not yet removed, is known and yet nobody's.
        """
        with_container = {entry.name for entry in self.register.entries() if entry.has_container}
        self._orphans = [state.name for state, _ in await self._strangers(with_container)]
        if self._orphans:
            log.warning("removing %d sandboxes of a server that was killed", len(self._orphans))
            await self._remove_orphans()
        self._sweeps += 1
        self._next_sweep = time.monotonic() + SWEEP_AGAIN_S[min(self._sweeps, len(SWEEP_AGAIN_S)) - 1]

    async def _strangers(self, known: Collection[str]) -> list[tuple[ContainerState, Mapping[str, str]]]:
        """The containers of dead servers that are none of the ``known`` ones."""
        found = await self.engine.list(SERVER_LABEL)
        return [
            (state, labels)
            for state, labels in found
            if state.name not in known and is_orphan(labels.get(SERVER_LABEL, ""), self.mark)
        ]

    async def adopt(self, facts: EngineFacts) -> None:
        """Take over sandboxes whose server is dead; requests wait for it."""
        strangers = await self._strangers({entry.name for entry in self.register.entries()})
        if strangers:
            await self.adoption.adopt(strangers, facts)
        self.swept.set()

    async def close(self, timeout_s: float) -> None:
        """Of a server that stops before it has taken over what it should: that has no other owner, so it is removed."""
        if self.swept.is_set():
            return
        with contextlib.suppress(asyncio.TimeoutError, EngineError):
            await within(timeout_s, self.sweep())
        self.swept.set()

    async def _remove_orphans(self) -> None:
        names = self._orphans
        gone = await asyncio.gather(*(self._is_removed(name, self.engine.remove(name)) for name in names))
        self._orphans = [name for name, is_gone in zip(names, gone, strict=True) if not is_gone]

    async def _is_removed(self, name: str, removal: Awaitable[None]) -> bool:
        """Whether ``removal`` of a container works; a refusal is said once and concerns that container only.

        ``EngineUnreachable`` goes up: it is about Podman.
        """
        try:
            await removal
        except EngineUnreachable:
            raise
        except EngineError as problem:
            if name not in self._refused:
                log.error("container %s is not removed yet, which is tried again: %s", name, problem)
            self._refused.add(name)
            return False
        self._refused.discard(name)
        return True

    async def _look(self) -> None:
        """Bury every sandbox whose container is dead or gone; a second witness where the kernel tells of deaths."""
        serving = self.register.in_states(SERVING)
        now = time.monotonic()
        if now < self._next_listing and all(entry.is_watched for entry in serving):
            await self.engine.ping()
            return
        self._next_listing = now + LISTING_PERIOD_S
        listed = await self.engine.list(SERVER_LABEL)  # whatever its value: one that was taken over keeps its mark
        running = {state.name for state, _ in listed if state.running}
        dead = [entry for entry in serving if entry.name not in running]
        await asyncio.gather(*(self._is_removed(entry.name, self.endings.bury(entry)) for entry in dead))

    async def _retry_cleaning(self) -> None:
        """Try again what Podman refused to remove."""
        left = [entry for entry in self.register.entries() if _is_left(entry)]
        await asyncio.gather(*(self._is_removed(entry.name, self.endings.clean(entry)) for entry in left))

    async def _reap_idle(self) -> None:
        """Stop sandboxes in which nothing runs and nothing was asked for; what cannot be told is left alone."""
        now, control = time.monotonic(), self.launcher.control
        if not self.config.idle_timeout_s or control is None or now < self._next_idle_look:
            return
        self._next_idle_look = now + min(IDLE_LOOK_S, self.config.idle_timeout_s)
        try:
            usage = await control.usage()
        except ControlError:
            return
        ready = self.register.in_states({State.READY})
        await asyncio.gather(*(self._stop_if_idle(entry, usage.get(entry.name), now) for entry in ready))

    async def _stop_if_idle(self, entry: Entry, usage: Mapping[str, float] | None, now: float) -> None:
        """A command that runs is no idleness, however long ago the server was asked for it; nor has it just ended."""
        if usage is None or usage["commands"]:
            entry.busy_at = now
            return
        asked = await self.idle_of(entry.sandbox.url or "")
        idle_s = 0.0 if asked is None else min(asked, now - entry.busy_at)
        if idle_s >= self.config.idle_timeout_s and entry.sandbox.state is State.READY:
            sentence = f"nothing happened in it for {idle_s:.0f} s (--idle-timeout)"
            wish = entry.specification
            log.warning("sandbox %s of session %s is stopped: %s", wish.runtime_id, wish.session_id, sentence)
            ending = self.endings.end(entry, State.STOPPED, Diagnosis(sentence, "", kind=IDLE))
            await self._is_removed(entry.name, ending)

    def hear(self, event: Event) -> None:
        """What the warden saw of a sandbox: its forked server ended, or it took more than it may."""
        entry = self.register.of_container(str(event.get("sandbox", "")))
        if entry is None:
            return
        if event.get("event") == "exited":
            entry.server_exit, entry.server_ended = int(event["exit_code"]), True
            entry.knows_server_exit.set()
            self.background.start(self.endings.bury(entry))
        elif event.get("event") == "offender":
            entry.offence = str(event.get("reason"))
            entry.become(entry.sandbox.blamed(entry.offence))
            self.background.start(self.endings.bury(entry))


def _is_left(entry: Entry) -> bool:
    """Whether something of a dead sandbox is left and nobody is at it. Pure."""
    idle = entry.ending is None or entry.ending.done()
    working = entry.bring_up is not None and not entry.bring_up.done()
    return entry.sandbox.state.is_dead and not entry.is_clean and idle and not working
