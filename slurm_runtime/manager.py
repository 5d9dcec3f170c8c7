"""All sandboxes: admits, starts, finds, stops, sweeps.

What it holds at all times: no more slots leased than there are; one living sandbox for a session; a slot is free again
only once its container is gone. Reads are answered from memory and never wait for Podman.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from slurm_runtime.admission import Admission
from slurm_runtime.config import ServerConfig
from slurm_runtime.diagnostics import Diagnosis, diagnose
from slurm_runtime.images import Images
from slurm_runtime.logs import log
from slurm_runtime.naming import public_name
from slurm_runtime.ownership import SERVER_LABEL, is_orphan, process_mark
from slurm_runtime.podman import (
    ContainerSpec,
    Engine,
    EngineError,
    EngineFacts,
    EngineUnreachable,
    NoSuchImage,
    PortTaken,
)
from slurm_runtime.sandbox import Dialect, Sandbox, Specification, State, sandbox_url
from slurm_runtime.slots import Lease, Slots, units_for

T = TypeVar("T")
Probe = Callable[[str, Dialect], Awaitable[bool]]

SESSION_LABEL = "skyrl.session"
DEAD_KEPT = 1000  # records of dead sandboxes, for clients that still ask
PORT_TRIES = 20
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.01, 0.5  # between probes of a sandbox that is not ready
LOOK_PERIOD_S = 0.2  # between looks whether such a sandbox still lives


class UnknownSandbox(Exception):
    """No sandbox has this runtime id or session id."""


class NoRoom(Exception):
    """No slot became free in time."""


class NeverFits(Exception):
    """More slots were asked for than there are."""


class TooSlow(Exception):
    """The container could not be started within the patience of the client."""


class StoppedEarly(Exception):
    """Somebody stopped the sandbox before it had started."""


class Stopping(Exception):
    """The server is on its way down."""


class SandboxDied(Exception):
    """The container ended before its server answered."""


class NeverReady(Exception):
    """The sandbox's server did not answer in time."""


class Entry:
    """One sandbox with what belongs to it while it lives: its lease, its port, the tasks that work on it."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.lease: Lease | None = None
        self.host_port: int | None = None
        self.has_container = False
        self.askers = 0
        self.problem: Exception | None = None
        self.bring_up: asyncio.Task[None] | None = None
        self.ending: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    @property
    def specification(self) -> Specification:
        return self.sandbox.specification

    @property
    def is_clean(self) -> bool:
        """Nothing of it is left: no container, no slot."""
        return self.lease is None and not self.has_container

    def become(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self._changed.set()
        self._changed = asyncio.Event()

    async def until(self, reached: Callable[[Sandbox], bool], timeout_s: float) -> bool:
        """Wait for a change that satisfies ``reached``; False if there was none within ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while not reached(self.sandbox):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)
        return True


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Finish ``work`` even when cancelled: Podman would go on with it, and what it made must be known."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()
        raise


class Manager:
    """The sandboxes of one server. ``run`` it in the background; ``close`` removes everything."""

    def __init__(self, config: ServerConfig, engine: Engine, probe: Probe, slots: Slots) -> None:
        self.config = config
        self.engine = engine
        self.probe = probe
        self.admission = Admission(slots)
        self.images = Images(engine)
        self.mark = process_mark()
        self.podman = "connecting"
        self._entries: dict[str, Entry] = {}
        self._sessions: dict[str, str] = {}
        self._starters = asyncio.Semaphore(config.starters)
        self._removers = asyncio.Semaphore(config.removers)
        self._connecting: asyncio.Task[EngineFacts] | None = None
        self._host: asyncio.Task[str] | None = None
        self._closing = False
        self._port_turn = -1

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

    def _entry(self, runtime_id: str) -> Entry:
        if runtime_id not in self._entries:
            raise UnknownSandbox(f"no sandbox with runtime_id {runtime_id!r}")
        return self._entries[runtime_id]

    # Starting.

    async def start(self, specification: Specification) -> Sandbox:
        """The sandbox of the session: the one that lives, else a new one.

        Returns once its URL is known, a little later if that makes it ready. A container that dies at once is a
        sandbox in state FAILED; ``EngineError`` means that Podman could not start one, ``NoRoom`` and ``TooSlow``
        that patience ran out.
        """
        if self._closing:
            raise Stopping("the server is stopping and starts no more sandboxes")
        entry = self._living_entry(specification.session_id) or self._enter(specification)
        entry.askers += 1
        await self._until_answerable(entry)
        await entry.until(lambda sandbox: sandbox.state is not State.STARTING, self.config.ready_grace_s)
        return entry.sandbox

    async def hung_up(self, runtime_id: str) -> None:
        """A client that asked for this sandbox is gone; stop it unless another one asked too."""
        entry = self._entry(runtime_id)
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
        """Wait until the sandbox has a URL or is dead; raise what kept it from getting one."""
        is_string = entry.specification.dialect is Dialect.SDK
        patience_s = self.config.string_patience_s if is_string else self.config.list_patience_s
        if not await entry.until(lambda sandbox: sandbox.url is not None or sandbox.state.is_dead, patience_s):
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
        name = entry.specification.container_name
        try:
            await self.connect()
            entry.lease = await self.admission.lease(units_for(entry.specification.resource_factor))
            url = await self._run_container(entry)
            entry.become(entry.sandbox.changed(State.STARTING, "its server does not answer yet", url=url))
            await self._until_ready(entry, url)
            return
        except EngineError as problem:
            entry.problem = problem
            diagnosis = Diagnosis(str(problem), "")
        except SandboxDied:
            diagnosis = await diagnose(self.engine, name)
        except NeverReady as problem:
            diagnosis = Diagnosis(str(problem), (await diagnose(self.engine, name)).last_lines)
        except Exception as fault:  # a fault of ours must not leave a client polling a sandbox that nobody starts
            log.exception("the start of sandbox %s failed unexpectedly", entry.specification.runtime_id)
            entry.problem = fault
            diagnosis = Diagnosis("an internal error; the server's log has the details", "")
        await self._finish_quietly(entry, diagnosis)

    async def _run_container(self, entry: Entry) -> str:
        """Create and start the container; its URL. An image that is not here is pulled first."""
        policy = entry.specification.pull_policy
        if policy == "always":
            await self._fetch(entry)
        try:
            return await self._launch(entry)
        except NoSuchImage as problem:
            if policy != "missing":
                raise EngineError(f"image {entry.specification.image} is not here: {problem}") from None
        await self._fetch(entry)
        return await self._launch(entry)

    async def _fetch(self, entry: Entry) -> None:
        image, policy = entry.specification.image, entry.specification.pull_policy
        entry.become(entry.sandbox.explained(f"image {image} is being pulled"))
        await self.images.pull(image, policy)

    async def _launch(self, entry: Entry) -> str:
        """One of the few starts under way at once; a taken port is tried again with another one."""
        async with self._starters:
            entry.become(entry.sandbox.explained("its container is being started"))
            for _ in range(PORT_TRIES):
                entry.host_port = self._free_port()
                try:
                    return await self._try_container(entry)
                except PortTaken:
                    await self.engine.remove(entry.specification.container_name)
        raise EngineError(
            f"{PORT_TRIES} ports in a row were taken by other programs; set or widen --sandbox-port-range"
        )

    async def _try_container(self, entry: Entry) -> str:
        name = entry.specification.container_name
        entry.has_container = True
        await uninterrupted(self.engine.create(self._container_spec(entry)))
        await uninterrupted(self.engine.start(name))
        state = await self.engine.inspect(name)
        if state.host_port is None:
            raise EngineError(f"Podman published no port for container {name}")
        entry.host_port = state.host_port
        return sandbox_url(await self.public_host(), state.host_port)

    def _container_spec(self, entry: Entry) -> ContainerSpec:
        assert entry.lease is not None
        wish, config = entry.specification, self.config
        return ContainerSpec(
            name=wish.container_name,
            image=wish.image,
            command=wish.command,
            environment=wish.container_environment,
            working_dir=wish.working_dir,
            labels={**config.labels, SERVER_LABEL: self.mark, SESSION_LABEL: wish.session_id},
            container_port=wish.container_port,
            host_ip=config.publish_ip,
            host_port=entry.host_port or 0,
            memory_bytes=round(config.memory_bytes * wish.resource_factor),
            cpus=config.cpus_per_worker * wish.resource_factor,
            cpuset=self.admission.slots.cpus_of(entry.lease) if config.pin_cpus else (),
        )

    def _free_port(self) -> int | None:
        """A port of the range that no living sandbox has, the least recently tried first; None for Podman's choice."""
        if self.config.sandbox_ports is None:
            return None
        taken = {entry.host_port for entry in self._entries.values() if not entry.is_clean}
        ports = self.config.sandbox_ports
        self._port_turn += 1
        for step in range(len(ports)):
            port = ports[(self._port_turn + step) % len(ports)]
            if port not in taken:
                self._port_turn += step
                return port
        raise EngineError(f"all {len(ports)} ports of --sandbox-port-range are in use; widen it")

    async def _until_ready(self, entry: Entry, url: str) -> None:
        deadline = time.monotonic() + self.config.startup_timeout_s
        pause_s, next_look = FIRST_PAUSE_S, time.monotonic() + LOOK_PERIOD_S
        while not await self.probe(url, entry.specification.dialect):
            if time.monotonic() > next_look:
                await self._still_running(entry)
                next_look = time.monotonic() + LOOK_PERIOD_S
            if time.monotonic() > deadline:
                raise NeverReady(f"its server did not answer at {url} within {self.config.startup_timeout_s:g} s")
            await asyncio.sleep(pause_s)
            pause_s = min(LONGEST_PAUSE_S, pause_s * 1.3)
        entry.become(entry.sandbox.changed(State.READY, f"its server answers at {url}"))
        log.debug(
            "sandbox %s of session %s is ready at %s",
            entry.specification.runtime_id,
            entry.specification.session_id,
            url,
        )

    async def _still_running(self, entry: Entry) -> None:
        state = await self.engine.inspect(entry.specification.container_name)
        if not state.running:
            raise SandboxDied

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
            entry.become(entry.sandbox.changed(state, diagnosis.sentence, last_lines=diagnosis.last_lines))
            speak = log.warning if state is State.FAILED else log.debug
            wish = entry.specification
            speak("sandbox %s of session %s: %s", wish.runtime_id, wish.session_id, diagnosis.sentence)
        await self._clean(entry)

    async def _finish_quietly(self, entry: Entry, diagnosis: Diagnosis) -> None:
        """Finish as FAILED; what Podman refuses to remove now is tried again later."""
        try:
            await self._finish(entry, State.FAILED, diagnosis)
        except EngineError as problem:
            log.error("container %s is not removed yet: %s", entry.specification.container_name, problem)

    async def _clean(self, entry: Entry) -> None:
        """Remove the container, then free the slot; the slot stays taken while the container may still run."""
        if entry.has_container:
            async with self._removers:
                await uninterrupted(self.engine.remove(entry.specification.container_name))
            entry.has_container = False
        if entry.lease:
            lease, entry.lease = entry.lease, None
            self.admission.give(lease)

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
        return [entry.specification.container_name for entry in left if entry.has_container]

    async def _end_for_good(self, entry: Entry) -> None:
        if entry.sandbox.url is None:
            entry.problem = entry.problem or Stopping("the server is stopping and starts no more sandboxes")
        await self._end(entry, State.STOPPED, Diagnosis("the server is stopping", ""))

    async def _cancel_background(self) -> None:
        await self.images.close()
        tasks = [task for task in (self._connecting, self._host) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

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
        for sentence in greeting(facts, self.config):
            log.info("%s", sentence)
        return facts

    async def _sweep(self) -> bool:
        """Remove sandboxes whose server is dead: it was killed before it could."""
        found = await self.engine.list(SERVER_LABEL)
        orphans = [state.name for state, labels in found if is_orphan(labels.get(SERVER_LABEL, ""), self.mark)]
        if orphans:
            log.warning("removing %d sandboxes of a server that was killed", len(orphans))
            await asyncio.gather(*(self.engine.remove(name) for name in orphans))
        return True

    async def _look(self) -> None:
        """Bury every ready sandbox whose container is dead or gone."""
        ready = [entry for entry in self._entries.values() if entry.sandbox.state is State.READY]
        if not ready:
            return
        listed = await self.engine.list(f"{SERVER_LABEL}={self.mark}")
        running = {state.name for state, _ in listed if state.running}
        dead = [entry for entry in ready if entry.specification.container_name not in running]
        await asyncio.gather(*(self._bury(entry) for entry in dead))

    async def _bury(self, entry: Entry) -> None:
        diagnosis = await diagnose(self.engine, entry.specification.container_name)
        if entry.sandbox.state is State.READY:
            await self._end(entry, State.FAILED, diagnosis)

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
    wanted = [("memory", config.memory_bytes > 0), ("cpu", config.cpus_per_worker > 0), ("cpuset", config.pin_cpus)]
    missing = [name for name, is_wanted in wanted if is_wanted and name not in facts.controllers]
    if missing:
        names = ", ".join(missing)
        lines.append(
            f"limits that have no effect here, because Podman may not use the cgroup controllers ({names}): "
            "sandboxes can take more than their share"
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
