"""All sandboxes: admits, starts, finds, stops, sweeps.

What it holds at all times: no more slots leased than there are; one living sandbox for a session; a slot is free again
only once its container is gone. Reads are answered from memory and never wait for Podman.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import tempfile
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from slurm_runtime import __version__
from slurm_runtime.admission import Admission
from slurm_runtime.agent.take_out import NoTree, remove, take_out
from slurm_runtime.agent_support import AgentSupport
from slurm_runtime.config import ServerConfig
from slurm_runtime.control import Control, ControlError, OnEvent
from slurm_runtime.deaths import Deaths
from slurm_runtime.diagnostics import OUT_OF_MEMORY, Diagnosis, diagnose, ended_with, killed_for_memory
from slurm_runtime.entries import (
    Entry,
    NeverFits,
    NeverReady,
    NoRoom,
    SandboxDied,
    StoppedEarly,
    Stopping,
    TooSlow,
    UnknownSandbox,
    WrongState,
    uninterrupted,
)
from slurm_runtime.images import Images
from slurm_runtime.launcher import Labels, Launcher
from slurm_runtime.logs import log
from slurm_runtime.naming import public_name
from slurm_runtime.ownership import SERVER_LABEL, is_orphan, process_mark
from slurm_runtime.page import Failure, SandboxRow, Snapshot
from slurm_runtime.podman import ContainerSpec, Engine, EngineError, EngineFacts, EngineUnreachable
from slurm_runtime.ports import Ports
from slurm_runtime.sandbox import Dialect, Sandbox, Specification, State
from slurm_runtime.slots import Slots, units_for

__all__ = [
    "Manager",
    "NeverFits",
    "NoRoom",
    "StoppedEarly",
    "Stopping",
    "TooSlow",
    "UnknownSandbox",
    "WrongState",
]

Probe = Callable[[str, Dialect], Awaitable[bool]]
IdleOf = Callable[[str], Awaitable[float | None]]  # seconds since the server at a URL was asked for something
MakeControl = Callable[[int, OnEvent], Control]  # for the process id of Podman's service

SESSION_LABEL = "skyrl.session"
DEAD_KEPT = 1000  # records of dead sandboxes, for clients that still ask
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.01, 0.5  # between probes of a sandbox that is not ready
LOOK_PERIOD_S = 0.2  # between looks whether such a sandbox still lives
LISTING_PERIOD_S = 300.0  # between lists of all containers: one of 512 keeps Podman busy for a second
KILLED = 128 + 9  # the exit code of a process that SIGKILL ended
FAILURES_KEPT = 20  # shown to people
IDLE_LOOK_S = 10.0  # between looks whether a sandbox idles


async def unknown(_url: str) -> float | None:
    """Of a server that does not say when it was last asked."""
    return None


class Manager:
    """The sandboxes of one server. ``run`` it in the background; ``close`` removes everything."""

    def __init__(
        self,
        config: ServerConfig,
        engine: Engine,
        probe: Probe,
        slots: Slots,
        agent: AgentSupport | None = None,
        make_control: MakeControl | None = None,
        idle_of: IdleOf = unknown,
    ) -> None:
        self.config = config
        self.engine = engine
        self.probe = probe
        self.admission = Admission(slots)
        self.images = Images(engine, config.image_archives)
        self.agent = agent or AgentSupport(wants_fork=False)
        self.make_control = make_control
        self.idle_of = idle_of
        self.mark = process_mark()
        labels = Labels({**config.labels, SERVER_LABEL: self.mark}, SESSION_LABEL)
        ports = Ports(config.publish_ip, config.sandbox_ports)
        self.launcher = Launcher(config, engine, self.images, ports, self.agent, labels)
        self.podman = "connecting"
        self.facts: EngineFacts | None = None
        self.notes: list[str] = []
        self.failures: deque[tuple[float, Sandbox]] = deque(maxlen=FAILURES_KEPT)
        self._entries: dict[str, Entry] = {}
        self._sessions: dict[str, str] = {}
        self._removers = asyncio.Semaphore(config.removers)
        self._connecting: asyncio.Task[EngineFacts] | None = None
        self._host: asyncio.Task[str] | None = None
        self._closing = False
        self._next_idle_look = 0.0
        self._next_listing = 0.0
        self._deaths = Deaths()
        self._agent_folder: Path | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def control(self) -> Control | None:
        return self.launcher.control

    # Reading: from memory.

    def by_session(self, session_id: str) -> Sandbox:
        runtime_id = self._sessions.get(session_id)
        if runtime_id is None:
            raise UnknownSandbox(f"no sandbox for session {session_id!r}")
        return self._entries[runtime_id].sandbox

    def by_runtime(self, runtime_id: str) -> Sandbox:
        return self._entry(runtime_id).sandbox

    def living(self) -> list[Sandbox]:
        return [entry.sandbox for entry in self._entries.values() if not entry.sandbox.state.is_dead]

    def snapshot(self) -> Snapshot:
        """Everything that a person wants to see of this server now."""
        now, slots = time.monotonic(), self.admission.slots
        rows = [entry for entry in self._entries.values() if not entry.sandbox.state.is_dead]
        return Snapshot(
            sandboxes=tuple(SandboxRow(entry.sandbox, now - entry.asked_at) for entry in rows),
            slots_used=slots.used,
            slots_total=slots.total,
            waiting=self.admission.waiting,
            pulls=self.images.under_way(),
            failures=tuple(Failure(sandbox, now - at) for at, sandbox in self.failures),
            notes=tuple(self.notes),
            agent=self.agent.described(),
            podman=self.podman if self.facts is None else f"{self.facts.version}, {self.podman}",
            node=socket.gethostname(),
            version=__version__,
        )

    def _entry(self, runtime_id: str) -> Entry:
        if runtime_id not in self._entries:
            raise UnknownSandbox(f"no sandbox with runtime_id {runtime_id!r}")
        return self._entries[runtime_id]

    # Starting.

    async def start(self, specification: Specification) -> Sandbox:
        """The sandbox of the session: the one that lives, else a new one.

        Returns once its container runs, a little later if that makes it ready; where the client's patience ends before,
        the sandbox is still PENDING, with a URL. A container that dies at once is a sandbox in state FAILED;
        ``EngineError`` means that Podman could not start one, ``NoRoom`` that no slot became free. Cancelled, because
        the client hung up, it stops the sandbox unless another client asked for it too.
        """
        if self._closing:
            raise Stopping("the server is stopping and starts no more sandboxes")
        entry = self._living_entry(specification.session_id) or self._enter(specification)
        entry.askers += 1
        try:
            await self._until_answerable(entry)
            await entry.until(lambda sandbox: sandbox.state is not State.STARTING, self.config.ready_grace_s)
        except asyncio.CancelledError:  # the client is gone: whoever holds its request cancels this
            self._in_background(self.hung_up(entry.specification.runtime_id))
            raise
        return entry.sandbox

    async def hung_up(self, runtime_id: str) -> None:
        """A client that asked for this sandbox is gone; stop it unless another one asked too."""
        entry = self._entries.get(runtime_id)
        if entry is None:
            return
        entry.askers -= 1
        if entry.askers <= 0 and not entry.sandbox.state.is_dead:
            log.warning("the client of session %s hung up during /start; stopping it", entry.specification.session_id)
            await self.stop(runtime_id)

    def _living_entry(self, session_id: str) -> Entry | None:
        entry = self._entries.get(self._sessions.get(session_id, ""))
        return entry if entry and not entry.sandbox.state.is_dead else None

    def _enter(self, specification: Specification) -> Entry:
        """Make the sandbox known, so that clients can ask for it at once, and begin its start."""
        total = self.admission.slots.total
        if units_for(specification.resource_factor) > total:
            raise NeverFits(
                f"resource_factor {specification.resource_factor:g} needs {units_for(specification.resource_factor)} "
                f"slots and this server has {total}; ask for less, or give the runtime job more CPUs"
            )
        self._forget_oldest_dead()
        entry = Entry(Sandbox(specification))
        self._entries[specification.runtime_id] = entry
        self._sessions[specification.session_id] = specification.runtime_id
        entry.bring_up = asyncio.create_task(self._bring_up(entry))
        return entry

    async def _until_answerable(self, entry: Entry) -> None:
        """Wait until the sandbox runs or is dead, or patience ends while its image is fetched; else raise why not."""
        is_string = entry.specification.dialect is Dialect.SDK
        patience_s = self.config.string_patience_s if is_string else self.config.list_patience_s
        if not await entry.until(lambda sandbox: sandbox.state is not State.PENDING, patience_s):
            if entry.lease and entry.sandbox.url and self.podman == "connected":
                return
            entry.problem = entry.problem or self._out_of_patience(entry, patience_s)
            await self._end(entry, State.STOPPED, Diagnosis("given up: it took longer than its client waits", ""))
            self._forget(entry)
        if entry.problem:
            raise entry.problem
        if entry.sandbox.state is State.STOPPED:
            raise StoppedEarly("the sandbox was stopped before it had started")

    def _out_of_patience(self, entry: Entry, patience_s: float) -> Exception:
        if entry.lease or self.podman != "connected":
            return TooSlow(f"not started within {patience_s:g} s ({entry.sandbox.reason}); ask again")
        slots = self.admission.slots
        return NoRoom(
            f"no room: {slots.used} of {slots.total} sandbox slots are in use and none became free within "
            f"{patience_s:g} s; run fewer sandboxes at once, or give the runtime job more CPUs"
        )

    async def _bring_up(self, entry: Entry) -> None:
        """From a request to a ready sandbox; every failure ends in state FAILED with its reason."""
        try:
            facts = await self.connect()
            with self.launcher.steps.of("slot"):
                entry.lease = await self.admission.lease(units_for(entry.specification.resource_factor))
            await self.launcher.launch(entry, facts, self.admission.slots, await self.public_host())
            entry.is_watched = self._deaths.watch(entry.holder, lambda: self._container_ended(entry))
            entry.become(entry.sandbox.changed(State.STARTING, "its server does not answer yet"))
            with self.launcher.steps.of("answer"):
                await self._until_ready(entry)
            return
        except EngineError as problem:
            entry.problem = problem
            diagnosis = Diagnosis(str(problem), "")
        except SandboxDied:
            diagnosis = await self._diagnosis(entry)
        except NeverReady as problem:
            diagnosis = Diagnosis(str(problem), (await self._diagnosis(entry)).last_lines)
        except Exception as fault:  # a fault of ours must not leave a client polling a sandbox that nobody starts
            log.exception("the start of sandbox %s failed unexpectedly", entry.specification.runtime_id)
            entry.problem = fault
            diagnosis = Diagnosis("an internal error; the server's log has the details", "")
        await self._finish_quietly(entry, diagnosis)

    async def _diagnosis(self, entry: Entry) -> Diagnosis:
        """Why it died. A forked server's exit code is known, its container may still idle."""
        found = await diagnose(self.engine, entry.name, entry.has_ended)
        if entry.offence:
            return Diagnosis(f"the sandbox was stopped: {entry.offence}", found.last_lines)
        code = found.exit_code if entry.server_exit is None else entry.server_exit
        if code == KILLED and killed_for_memory(entry.holder):
            return Diagnosis(OUT_OF_MEMORY, found.last_lines, out_of_memory=True)
        if code == KILLED and not found.out_of_memory and self._memory_bites:
            # Podman misses it where an init runs in the container: the kernel kills the init's child.
            sentence = f"{ended_with(code)}, most likely because it used more memory than it may (out of memory)"
            return Diagnosis(sentence, found.last_lines, out_of_memory=True)
        return found if entry.server_exit is None else Diagnosis(ended_with(code), found.last_lines)

    @property
    def _memory_bites(self) -> bool:
        """Whether the kernel, not the watchdog, enforces a memory limit."""
        return self.config.memory_bytes > 0 and self.facts is not None and "memory" in self.facts.controllers

    async def _until_ready(self, entry: Entry) -> None:
        url = entry.sandbox.url or ""
        deadline = time.monotonic() + self.config.startup_timeout_s
        pause_s, next_look = FIRST_PAUSE_S, time.monotonic() + LOOK_PERIOD_S
        while not await self.probe(url, entry.specification.dialect):
            if entry.has_ended or time.monotonic() > next_look:
                await self._still_running(entry)
                next_look = time.monotonic() + LOOK_PERIOD_S
            if time.monotonic() > deadline:
                raise NeverReady(f"its server did not answer at {url} within {self.config.startup_timeout_s:g} s")
            await asyncio.sleep(pause_s)
            pause_s = min(LONGEST_PAUSE_S, pause_s * 1.3)
        entry.become(entry.sandbox.changed(State.READY, f"its server answers at {url}"))
        entry.ready_at = entry.ready_at or time.monotonic()
        log.debug(
            "sandbox %s of session %s is ready at %s",
            entry.specification.runtime_id,
            entry.specification.session_id,
            url,
        )

    async def _still_running(self, entry: Entry) -> None:
        if entry.server_exit is not None or entry.has_ended:
            raise SandboxDied
        if not entry.is_watched and not (await self.engine.inspect(entry.name)).running:
            raise SandboxDied

    def _container_ended(self, entry: Entry) -> None:
        """The kernel says so. One that is being started is buried by its start."""
        entry.has_ended = True
        if entry.sandbox.state in {State.READY, State.PAUSED}:
            self._in_background(self._bury(entry))

    # Pausing.

    async def pause(self, runtime_id: str) -> Sandbox:
        """Stop its processes; again is fine. ``WrongState`` if it has none, ``EngineError`` if it cannot be done."""
        entry = self._entry(runtime_id)
        async with entry.pausing:
            await entry.until(lambda sandbox: sandbox.state is not State.STARTING, self.config.ready_grace_s)
            if entry.sandbox.state is State.PAUSED:
                return entry.sandbox
            if entry.sandbox.state is not State.READY:
                raise WrongState(f"sandbox {runtime_id} is {entry.sandbox.pod_status} and cannot be paused")
            await self._freeze(entry, True)
            if entry.sandbox.state is State.READY:  # it may have died meanwhile
                entry.become(entry.sandbox.changed(State.PAUSED, "paused on request"))
            return entry.sandbox

    async def resume(self, runtime_id: str) -> Sandbox:
        """Let its processes go on; it is ready again once its server answers. Fine for one that was not paused."""
        entry = self._entry(runtime_id)
        async with entry.pausing:
            if entry.sandbox.state.is_dead:
                raise UnknownSandbox(f"sandbox {runtime_id} is {entry.sandbox.status}; nothing is left to resume")
            if entry.sandbox.state is State.PAUSED:
                await self._freeze(entry, False)
                entry.become(entry.sandbox.changed(State.STARTING, "resumed; its server does not answer yet"))
                entry.bring_up = asyncio.create_task(self._until_ready_again(entry))
                await entry.until(lambda sandbox: sandbox.state is not State.STARTING, self.config.ready_grace_s)
            return entry.sandbox

    async def _freeze(self, entry: Entry, frozen: bool) -> None:
        """By the container's cgroup where it has one, else by stopping each of its processes."""
        if (await self.connect()).can_pause:
            await (self.engine.pause if frozen else self.engine.unpause)(entry.name)
            return
        if self.control is None:
            raise EngineError("sandboxes cannot be paused here: Podman has no cgroup for them and no warden runs")
        try:
            await (self.control.pause if frozen else self.control.resume)(entry.name, entry.holder)
        except ControlError as problem:
            raise EngineError(f"the sandbox could not be {'paused' if frozen else 'resumed'}: {problem}") from None

    async def _until_ready_again(self, entry: Entry) -> None:
        try:
            await self._until_ready(entry)
            return
        except (SandboxDied, NeverReady, EngineError):
            diagnosis = await self._diagnosis(entry)
        await self._finish_quietly(entry, diagnosis)

    # Ending.

    async def stop(self, runtime_id: str) -> None:
        """Remove the sandbox's container and free its slot; again is fine. ``EngineError`` if Podman fails at it."""
        entry = self._entry(runtime_id)
        await self._end(entry, State.STOPPED, Diagnosis("stopped on request", ""))

    async def _end(self, entry: Entry, state: State, diagnosis: Diagnosis) -> None:
        if entry.ending is None or entry.ending.done():
            entry.ending = asyncio.create_task(self._end_now(entry, state, diagnosis))
        await asyncio.shield(entry.ending)

    async def _end_now(self, entry: Entry, state: State, diagnosis: Diagnosis) -> None:
        if entry.bring_up and not entry.bring_up.done():
            entry.bring_up.cancel()
            await asyncio.wait([entry.bring_up])
        await self._finish(entry, state, diagnosis)

    async def _finish(self, entry: Entry, state: State, diagnosis: Diagnosis) -> None:
        """Say that it is dead, then remove what is left of it."""
        if not entry.sandbox.state.is_dead:
            blamed = entry.sandbox.blamed(diagnosis.sentence) if diagnosis.out_of_memory else entry.sandbox
            entry.become(blamed.changed(state, diagnosis.sentence, last_lines=diagnosis.last_lines))
            speak = log.warning if state is State.FAILED else log.debug
            if state is State.FAILED:
                self.failures.appendleft((time.monotonic(), entry.sandbox))
            wish = entry.specification
            speak("sandbox %s of session %s: %s", wish.runtime_id, wish.session_id, diagnosis.sentence)
        await self._clean(entry)

    async def _finish_quietly(self, entry: Entry, diagnosis: Diagnosis) -> None:
        """Finish as FAILED; what Podman refuses to remove now is tried again later."""
        try:
            await self._finish(entry, State.FAILED, diagnosis)
        except EngineError as problem:
            log.error("container %s is not removed yet: %s", entry.name, problem)

    async def _clean(self, entry: Entry) -> None:
        """Remove the container, then free the slot; the slot stays taken while the container may still run."""
        self._deaths.forget(entry.holder)
        if entry.has_container:
            await self._unwatch(entry)
            async with self._removers:
                await uninterrupted(self.engine.remove(entry.name))
            entry.has_container = False
        if entry.port:
            self.launcher.ports.give(entry.port)
            entry.port = None
        if entry.lease:
            lease, entry.lease = entry.lease, None
            self.admission.give(lease)

    async def _unwatch(self, entry: Entry) -> None:
        """A death that we cause is no event; stopped processes go on, so that Podman's own stop reaches them."""
        if self.control is not None and entry.holder:
            try:
                await self.control.forget(entry.name)
            except ControlError as problem:
                log.debug("the warden could not forget %s: %s", entry.name, problem)

    def _forget(self, entry: Entry) -> None:
        self._entries.pop(entry.specification.runtime_id, None)
        if self._sessions.get(entry.specification.session_id) == entry.specification.runtime_id:
            del self._sessions[entry.specification.session_id]

    def _forget_oldest_dead(self) -> None:
        dead = [entry for entry in self._entries.values() if entry.sandbox.state.is_dead and entry.is_clean]
        for entry in dead[: max(0, len(dead) - DEAD_KEPT)]:
            self._forget(entry)

    async def close(self, timeout_s: float) -> list[str]:
        """Start no more, remove everything in parallel; names of the containers left after ``timeout_s`` seconds."""
        self._closing = True
        left = [entry for entry in self._entries.values() if not (entry.is_clean and entry.sandbox.state.is_dead)]
        if left:
            log.info("stopping %d sandboxes", len(left))
            tasks = [asyncio.create_task(self._end_for_good(entry)) for entry in left]
            await asyncio.wait(tasks, timeout=timeout_s)
            _read_outcomes(tasks)
        await self._cancel_background()
        return [entry.name for entry in left if entry.has_container]

    async def _end_for_good(self, entry: Entry) -> None:
        if entry.sandbox.url is None:
            entry.problem = entry.problem or Stopping("the server is stopping and starts no more sandboxes")
        await self._end(entry, State.STOPPED, Diagnosis("the server is stopping", ""))

    async def _cancel_background(self) -> None:
        self._deaths.close()
        await self.images.close()
        tasks: list[asyncio.Task[Any]] = [task for task in (self._connecting, self._host) if task is not None]
        tasks += self._tasks
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.control is not None:
            await self.control.close()
        self.launcher.holder_profile.remove()
        if self._agent_folder is not None:
            await asyncio.to_thread(remove, self._agent_folder)

    # In the background.

    async def run(self) -> None:
        """Connect to Podman, then see to it that dead containers are noticed; ends only by cancellation."""
        self._host = self._host or asyncio.create_task(public_name())
        swept = False
        while True:
            try:
                await self.connect()
                swept = swept or await self._sweep()
                await self._look()
                await self._retry_cleaning()
                await self._reap_idle()
                self._podman_is("connected")
            except EngineError as problem:
                self._podman_is("unreachable", problem)
            await asyncio.sleep(self.config.watch_period_s)

    async def public_host(self) -> str:
        """The host name in sandbox URLs."""
        if self.config.public_host is not None:
            return self.config.public_host
        self._host = self._host or asyncio.create_task(public_name())
        return await asyncio.shield(self._host)

    async def connect(self) -> EngineFacts:
        """What Podman can do, as soon as it answers; shared by all who ask. ``EngineError`` after the deadline."""
        if self._connecting is None or (self._connecting.done() and _failed(self._connecting)):
            self._connecting = asyncio.create_task(self._connect())
        return await asyncio.shield(self._connecting)

    async def _connect(self) -> EngineFacts:
        deadline = time.monotonic() + self.config.connect_timeout_s
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                facts = await self.engine.facts()
                break
            except EngineUnreachable:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(pause_s)
                pause_s = min(LONGEST_PAUSE_S, pause_s * 1.3)
        self._podman_is("connected")
        self.facts = facts
        sentence, *self.notes = greeting(facts, self.config)
        log.info("%s", sentence)
        for note in self.notes:
            log.warning("%s", note)
        if self.config.agent_image:
            self._in_background(self._take_agent_out(self.config.agent_image))
        await self._start_control(facts)
        return facts

    async def _take_agent_out(self, image: str) -> None:
        """The agent tree of --agent-image, into a folder that lives as long as this server."""
        name = f"agent-{secrets.token_hex(8)}"
        self._agent_folder = Path(tempfile.mkdtemp(prefix="skyrl-agent-"))
        self._agent_folder.chmod(0o755)  # containers of a service under another user mount it too
        spec = ContainerSpec(name, image, ("/",), {}, "/", self.launcher.labels.of(""), container_port=1)
        try:
            await self.images.pull(image, "missing")
            await uninterrupted(self.engine.create(spec))
            try:
                self.agent.provide(await take_out(self.engine.export(name), image, self._agent_folder))
            finally:
                await uninterrupted(self.engine.remove(name))
            log.info("agent server taken out of %s", image)
        except (EngineError, NoTree, OSError) as problem:
            sentence = f"there is no agent server for sandboxes: {problem}"
            log.error("%s", sentence)
            self.agent.fail(EngineError(sentence))

    async def _start_control(self, facts: EngineFacts) -> None:
        """The warden, and its fork server as soon as there is a tree; without it sandboxes are served plainly."""
        if self.make_control is None or self.control is not None:
            return
        control = self.make_control(facts.pid, self.on_event)
        try:
            await control.start()
        except (ControlError, OSError) as problem:
            self.agent.why_exec = str(problem)
            log.warning("no warden: %s; sandboxes are neither watched nor forked, nor can they be cut off", problem)
            return
        self.launcher.control = control
        if self.agent.wants_fork:
            self._in_background(self._start_forking(control))

    async def _start_forking(self, control: Control) -> None:
        try:
            tree = await self.agent.tree()
        except EngineError:
            return
        if tree is not None:
            try:
                await control.start_fork_server(tree)
            except ControlError as problem:
                self._fork_server_is("unavailable", str(problem))

    async def _sweep(self) -> bool:
        """Remove sandboxes whose server is dead: it was killed before it could."""
        found = await self.engine.list(SERVER_LABEL)
        orphans = [state.name for state, labels in found if is_orphan(labels.get(SERVER_LABEL, ""), self.mark)]
        if orphans:
            log.warning("removing %d sandboxes of a server that was killed", len(orphans))
            await asyncio.gather(*(self.engine.remove(name) for name in orphans))
        return True

    async def _look(self) -> None:
        """Bury every sandbox whose container is dead or gone; a second witness where the kernel tells of deaths."""
        living = [entry for entry in self._entries.values() if entry.sandbox.state in {State.READY, State.PAUSED}]
        now = time.monotonic()
        if now < self._next_listing and all(entry.is_watched for entry in living):
            await self.engine.ping()
            return
        self._next_listing = now + LISTING_PERIOD_S
        listed = await self.engine.list(f"{SERVER_LABEL}={self.mark}")
        running = {state.name for state, _ in listed if state.running}
        dead = [entry for entry in living if entry.name not in running]
        await asyncio.gather(*(self._bury(entry) for entry in dead))

    async def _bury(self, entry: Entry) -> None:
        diagnosis = await self._diagnosis(entry)
        if entry.sandbox.state in {State.READY, State.PAUSED}:
            await self._end(entry, State.FAILED, diagnosis)

    def on_event(self, event: Mapping[str, Any]) -> None:
        """What the warden saw."""
        name = str(event.get("sandbox", ""))
        entry = next((entry for entry in self._entries.values() if entry.name == name), None)
        if event.get("event") == "fork_server":
            self._fork_server_is(str(event.get("state")), str(event.get("reason") or ""))
        elif entry is not None and event.get("event") == "exited":
            entry.server_exit = int(event["exit_code"])
            self._in_background(self._bury(entry))
        elif entry is not None and event.get("event") == "offender":
            entry.offence = str(event.get("reason"))
            entry.become(entry.sandbox.blamed(entry.offence))
            self._in_background(self._bury(entry))

    def _fork_server_is(self, word: str, reason: str) -> None:
        self.agent.fork_ready = word == "ready"
        self.agent.why_exec = "" if word == "ready" else f"the fork server is not to be had ({reason or word})"
        (log.info if word == "ready" else log.warning)("fork server: %s%s", word, f" ({reason})" if reason else "")

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (problem := task.exception()) is not None:
            log.error("%s", problem)

    async def _reap_idle(self) -> None:
        """Stop sandboxes in which nothing runs and nothing was asked for; what cannot be told is left alone."""
        now = time.monotonic()
        if not self.config.idle_timeout_s or self.control is None or now < self._next_idle_look:
            return
        self._next_idle_look = now + min(IDLE_LOOK_S, self.config.idle_timeout_s)
        try:
            usage = await self.control.usage()
        except ControlError:
            return
        ready = [entry for entry in self._entries.values() if entry.sandbox.state is State.READY]
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
            await self._end(entry, State.STOPPED, Diagnosis(sentence, ""))

    async def _retry_cleaning(self) -> None:
        """Try again what Podman refused to remove."""
        for entry in list(self._entries.values()):
            idle = entry.ending is None or entry.ending.done()
            working = entry.bring_up is not None and not entry.bring_up.done()
            if entry.sandbox.state.is_dead and not entry.is_clean and idle and not working:
                await self._clean(entry)

    def _podman_is(self, word: str, problem: EngineError | None = None) -> None:
        """Note whether Podman answers, and say so when that changes."""
        if word != self.podman and problem:
            log.error("%s", problem)
        elif word != self.podman and self.podman == "unreachable":
            log.info("Podman answers again")
        self.podman = word


def greeting(facts: EngineFacts, config: ServerConfig) -> list[str]:
    """What the log says once Podman answers: its version, and which limits do not bite here. Pure."""
    who = "rootless" if facts.rootless else "as root, sandboxes in a user namespace"
    lines = [f"Podman {facts.version} answers ({who})"]
    wanted = {"memory": config.memory_bytes > 0, "pids": config.pids_limit > 0, "cpu": config.cpus_per_worker > 0}
    missing = [name for name, is_wanted in wanted.items() if is_wanted and name not in facts.controllers]
    if missing:
        lines.append(
            f"limits that do NOT bite here, because Podman may not use the cgroup controllers ({', '.join(missing)}): "
            "a watchdog stops sandboxes that take too much memory, processes or disk, within 2 s; shares of CPU time "
            f"are not enforced{', only which CPUs a sandbox runs on' if config.pinning != 'none' else ''}"
        )
    if config.pinning == "docker_cpuset" and "cpuset" not in facts.controllers:
        lines.append(
            "docker_cpuset is not possible here, because Podman may not use the cgroup controller cpuset: each "
            "sandbox's processes are pinned as with taskset"
        )
    return lines


def _failed(task: asyncio.Task[Any]) -> bool:
    return task.cancelled() or task.exception() is not None


def _read_outcomes(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Log what failed; nothing is raised, because a stopping server goes on."""
    problems = [task.exception() for task in tasks if task.done() and not task.cancelled()]
    for problem in problems:
        if problem is not None and not isinstance(problem, EngineUnreachable):
            log.error("%s", problem)
    if any(isinstance(problem, EngineUnreachable) for problem in problems):
        log.warning("Podman's service has ended before this server; its owner has to remove the containers")
