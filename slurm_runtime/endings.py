"""How does a sandbox end? It is dead for its clients first, then its container goes, then its slot is free."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable

from slurm_runtime.admission import Admission
from slurm_runtime.background import Background
from slurm_runtime.connection import Connection
from slurm_runtime.control import ControlError
from slurm_runtime.deadlines import within
from slurm_runtime.deaths import Deaths
from slurm_runtime.diagnostics import PODMAN_SILENT, Diagnosis, diagnose, judged, killed_for_memory, never
from slurm_runtime.entries import Entry, uninterrupted
from slurm_runtime.failures import Failures
from slurm_runtime.launcher import Launcher
from slurm_runtime.logs import log
from slurm_runtime.podman import EngineError, EngineUnreachable
from slurm_runtime.sandbox import Sandbox, State
from slurm_runtime.statistics import Statistics

SERVING = frozenset({State.READY, State.PAUSED})  # those whose end nobody else sees to
FAILURES_KEPT = 20  # shown to people
SERVER_EXIT_S = 1.0  # for the warden to tell the exit code of a process whose end the kernel has told
SERVER_ENDED = "its agent server ended; with which exit code is not known, because its parent was gone before it"


class Endings:
    """Ends sandboxes, and notices that they have ended.

    A slot stays taken while the container may still run. ``failures`` are the last sandboxes that failed, the latest
    first, each with the time (monotonic) at which it did; ``kept`` is where the next server finds them. ``statistics``
    hear of every end.
    """

    def __init__(
        self,
        launcher: Launcher,
        connection: Connection,
        admission: Admission,
        background: Background,
        kept: Failures,
        statistics: Statistics,
    ) -> None:
        self.config = launcher.config
        self.engine = launcher.engine
        self.launcher = launcher
        self.connection = connection
        self.admission = admission
        self.background = background
        self.kept = kept
        self.statistics = statistics
        self.failures: deque[tuple[float, Sandbox]] = deque(maxlen=FAILURES_KEPT)
        self._removers = asyncio.Semaphore(self.config.removers)
        self._deaths = Deaths()

    async def end(self, entry: Entry, state: State, diagnosis: Diagnosis) -> None:
        """End it, its start included; one that is ending already is waited for. ``EngineError`` if Podman fails."""
        if entry.ending is None or entry.ending.done():
            entry.ending = asyncio.create_task(self._end_now(entry, state, diagnosis))
        await asyncio.shield(entry.ending)

    async def _end_now(self, entry: Entry, state: State, diagnosis: Diagnosis) -> None:
        if entry.bring_up and not entry.bring_up.done():
            entry.bring_up.cancel()
            await asyncio.wait([entry.bring_up])
        await self._finish(entry, state, diagnosis)

    async def fail(self, entry: Entry, diagnosis: Diagnosis) -> None:
        """For a start that ends itself: what Podman refuses to remove now is tried again later."""
        try:
            await self._finish(entry, State.FAILED, diagnosis)
        except EngineError as problem:
            log.error("container %s is not removed yet: %s", entry.name, problem)

    async def _finish(self, entry: Entry, state: State, diagnosis: Diagnosis) -> None:
        """Say that it is dead, then remove what is left of it."""
        if not entry.sandbox.state.is_dead:
            blamed = entry.sandbox.blamed(diagnosis.sentence) if diagnosis.out_of_memory else entry.sandbox
            entry.become(blamed.changed(state, diagnosis.sentence, last_lines=diagnosis.last_lines))
            speak = log.warning if state is State.FAILED else log.debug
            if state is State.FAILED:
                self.note_failure(entry.sandbox)
            self._count(entry, diagnosis.counted_as)
            wish = entry.specification
            speak("sandbox %s of session %s: %s", wish.runtime_id, wish.session_id, diagnosis.sentence)
        await self.clean(entry)

    def note_started(self, entry: Entry) -> None:
        """A new sandbox answers."""
        self.statistics.note_started(time.monotonic() - entry.asked_at, entry.was_warm)

    def _count(self, entry: Entry, reason: str) -> None:
        """A sandbox that this server was starting and that never answered is a start that failed."""
        failed = entry.is_new and entry.ready_at is None
        (self.statistics.note_failed if failed else self.statistics.note_ended)(reason)

    def note_failure(self, sandbox: Sandbox) -> None:
        self.failures.appendleft((time.monotonic(), sandbox))
        self.kept.note(sandbox)

    async def clean(self, entry: Entry) -> None:
        """Remove the container, then give port and slot back; ``EngineError`` leaves the rest for another time."""
        self._deaths.forget(entry.holder)
        self._deaths.forget(entry.server)
        if entry.has_container:
            await self._unwatch(entry)
            async with self._removers:
                await self.connection.patiently(lambda: uninterrupted(self.engine.remove(entry.name)))
            entry.has_container = False
        if entry.port:
            self.launcher.ports.give(entry.port)
            entry.port = None
        if entry.lease:
            lease, entry.lease = entry.lease, None
            self.admission.give(lease)

    async def _unwatch(self, entry: Entry) -> None:
        """A death that we cause is no event; stopped processes go on, so that Podman's own stop reaches them."""
        if self.launcher.control is not None and entry.holder:
            try:
                await self.launcher.control.forget(entry.name)
            except ControlError as problem:
                log.debug("the warden could not forget %s: %s", entry.name, problem)

    def watch(self, entry: Entry) -> None:
        """Have the kernel tell of the end of its container, and of a server that was forked into it, where it can."""
        entry.is_watched = self._deaths.watch(entry.holder, lambda: self._container_ended(entry))
        self._deaths.watch(entry.server, lambda: self.background.start(self._server_ended(entry)))

    def _container_ended(self, entry: Entry) -> None:
        """One that is being started is buried by its start."""
        entry.has_ended = True
        if entry.sandbox.state in SERVING:
            self.background.start(self.bury(entry))

    async def _server_ended(self, entry: Entry) -> None:
        """The warden that forked it knows its exit code; one that was started later does not."""
        with contextlib.suppress(asyncio.TimeoutError):
            await within(SERVER_EXIT_S, entry.knows_server_exit.wait())
        entry.server_ended = True
        if entry.sandbox.state in SERVING:
            await self.bury(entry)

    async def bury(self, entry: Entry) -> None:
        """End one whose container, or server, is dead."""
        diagnosis = await self.diagnosis(entry)
        if entry.sandbox.state in SERVING:
            await self.end(entry, State.FAILED, diagnosis)

    async def diagnosis(self, entry: Entry) -> Diagnosis:
        """Why it died. A forked server's exit code is known, its container may still idle."""
        found = await self.learned(entry.name, lambda: entry.awaits_verdict)
        kernel_killed = killed_for_memory(entry.holder)
        if entry.server_ended and entry.server_exit is None and not entry.offence:
            return Diagnosis(SERVER_ENDED, found.last_lines)
        return judged(found, entry.offence, entry.server_exit, kernel_killed, self._memory_bites)

    async def learned(self, name: str, is_due: Callable[[], bool] = never) -> Diagnosis:
        """What Podman tells of a container that has ended, as soon as it answers; ``is_due`` as for ``diagnose``."""
        try:
            return await self.connection.patiently(lambda: diagnose(self.engine, name, is_due))
        except EngineUnreachable as problem:
            sentence = f"it ended while Podman did not answer, so how is not known: {problem}"
            return Diagnosis(sentence, "", kind=PODMAN_SILENT)

    @property
    def _memory_bites(self) -> bool:
        """Whether the kernel, not the watchdog, enforces a memory limit."""
        facts = self.connection.facts
        return self.config.memory_bytes > 0 and facts is not None and "memory" in facts.controllers

    def close(self) -> None:
        """Notice no more deaths."""
        self._deaths.close()
