"""All sandboxes: what clients ask of them, and the parts that do it.

What it holds at all times: no more slots leased than there are; one living sandbox for a session; a slot is free again
only once its container is gone. Reads are answered from memory and never wait for Podman.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from slurm_runtime import __version__
from slurm_runtime.admission import Admission
from slurm_runtime.adoption import Adoption
from slurm_runtime.agent_support import AgentSupport
from slurm_runtime.background import Background
from slurm_runtime.changes import Changes
from slurm_runtime.companions import Companions, MakeControl
from slurm_runtime.config import ServerConfig
from slurm_runtime.connection import Connection
from slurm_runtime.deadlines import within
from slurm_runtime.diagnostics import (
    HUNG_UP,
    NEVER_FITS,
    NO_SLOT,
    PODMAN_SILENT,
    SERVER_STOPS,
    STOPPED,
    Diagnosis,
)
from slurm_runtime.endings import Endings
from slurm_runtime.entries import Entry, NeverFits, NoRoom, StoppedEarly, Stopping, TooSlow
from slurm_runtime.failures import Failures
from slurm_runtime.images import Images
from slurm_runtime.known_images import KnownImages
from slurm_runtime.labels import Labels
from slurm_runtime.launcher import Launcher
from slurm_runtime.logs import log
from slurm_runtime.naming import PublicHost
from slurm_runtime.node import Node
from slurm_runtime.ownership import SERVER_LABEL, process_mark
from slurm_runtime.page import Failure, SandboxRow, Snapshot
from slurm_runtime.pauses import Pauses
from slurm_runtime.podman import Engine, EngineError, EngineFacts, EngineUnreachable
from slurm_runtime.ports import Ports
from slurm_runtime.register import Register
from slurm_runtime.remains import Remains
from slurm_runtime.sandbox import Dialect, Sandbox, Specification, State
from slurm_runtime.shared_images import SharedImages
from slurm_runtime.slots import Slots, units_for
from slurm_runtime.starts import Probe, Starts
from slurm_runtime.statistics import kept
from slurm_runtime.supervisor import IdleOf, Supervisor
from slurm_runtime.warm_pool import WarmPool

BEFORE_ANSWER = frozenset({State.PENDING, State.STARTING})
WITH_CONTAINER = frozenset({State.STARTING, State.READY, State.PAUSED})


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
        mark = process_mark()
        labels = Labels({**config.labels, SERVER_LABEL: mark})
        ports = Ports(config.publish_ip, config.sandbox_ports)
        self.config = config
        self.engine = engine
        self.changes = changes = Changes()
        self.node = Node(
            config.node_name or socket.gethostname(), config.until, config.drain_lead_s, changes.note_server
        )
        self.admission = Admission(slots, changes.note_server)
        shared = SharedImages(config.share_images, engine, socket.gethostname()) if config.share_images else None
        known = KnownImages(changes.note_server)
        self.images = Images(engine, config.image_archives, known=known, shared=shared)
        self.agent = agent or AgentSupport(wants_fork=False)
        self.launcher = Launcher(config, engine, self.images, ports, self.agent, labels)
        self.register = Register(changes)
        self.background = background = Background()
        self.host = PublicHost(config.public_host, background)
        self.companions = Companions(self.launcher, background, make_control, lambda event: self.supervisor.hear(event))
        self.connection = Connection(config, engine, background, self._connected, changes.note_server)
        self.failures = Failures(config.failures_file, goes_on=config.adopt)
        self.statistics = kept(config.statistics_file, config.adopt, self.launcher.steps)
        self.endings = Endings(
            self.launcher, self.connection, self.admission, background, self.failures, self.statistics
        )
        self.starts = Starts(self.launcher, self.connection, self.admission, self.endings, self.host, probe)
        self.pauses = Pauses(self.launcher, self.connection, self.starts)
        adoption = Adoption(self.launcher, self.register, self.admission, self.starts, self.endings)
        self.remains = Remains(self.launcher, self.register)
        self.supervisor = Supervisor(
            self.launcher,
            self.connection,
            self.register,
            self.endings,
            background,
            adoption,
            self.remains,
            mark,
            idle_of,
        )
        self.warm = WarmPool(self.launcher, self.connection, self.admission, self._is_starting, config.warm)
        self.admission.on_fewer_idle = self.warm.slots_changed
        self._closing = False
        for failed in self.failures.known:
            (self.register.add if failed.is_last else self.register.add_dead)(Entry(failed.sandbox))

    async def settled(self) -> bool:
        """Whether all sandboxes are known: at once, or after those of a killed server are taken over (``adopt``).

        False if that takes longer than ``adoption_patience_s``: Podman does not answer.
        """
        with contextlib.suppress(asyncio.TimeoutError):
            await within(self.config.adoption_patience_s, self.supervisor.swept.wait())
        return self.supervisor.swept.is_set() or self._closing

    async def _connected(self, facts: EngineFacts) -> None:
        """Podman answers for the first time, or its service is another one."""
        self.remains.look_again()
        self.background.start(self._list_images())
        await self.companions.start(facts)

    async def _list_images(self) -> None:
        """Beside all else: a store of hundreds of images takes its time, and no start needs to know of them."""
        try:
            self.images.known.note(await self.engine.all_images())
        except EngineError as problem:
            log.warning("which images are here already is not known: %s", problem)

    # Reading: from memory.

    def by_session(self, session_id: str) -> Sandbox:
        return self.register.of_session(session_id).sandbox

    def by_runtime(self, runtime_id: str) -> Sandbox:
        return self.register.of_runtime(runtime_id).sandbox

    def living(self) -> list[Sandbox]:
        return [entry.sandbox for entry in self.register.living()]

    def counted(self) -> dict[str, Any]:
        """The statistics of the job until now."""
        self._note_living()  # with those that were taken over
        return self.statistics.told(self.admission.slots.total)

    def snapshot(self) -> Snapshot:
        """Everything that a person wants to see of this server now."""
        now, slots, connection = time.monotonic(), self.admission.slots, self.connection
        return Snapshot(
            sandboxes=tuple(SandboxRow(entry.sandbox, now - entry.asked_at) for entry in self.register.living()),
            slots_used=slots.used,
            slots_total=slots.total,
            waiting=self.admission.waiting,
            warm=len(self.warm.waiting),
            pulls=self.images.under_way(),
            failures=tuple(Failure(sandbox, now - at) for at, sandbox in self.endings.failures),
            notes=tuple(connection.notes),
            agent=self.agent.described(),
            podman=connection.word if connection.facts is None else f"{connection.facts.version}, {connection.word}",
            node=self.node.name,
            drain_reason=self.node.reason,
            until=self.node.until,
            head=self.node.head_row(now),
            version=__version__,
        )

    # Starting.

    async def start(self, specification: Specification, waits: bool = True) -> Sandbox:
        """The sandbox of the session: the one that lives, else a new one.

        Returns once its container runs, a little later if that makes it ready; where the client's patience ends before,
        the sandbox is still PENDING, with a URL. A container that dies at once is a sandbox in state FAILED;
        ``EngineError`` means that Podman could not start one, ``NoRoom`` that no slot became free, or, unless it
        ``waits``, that none is free; ``Draining`` that none is given any more. Cancelled, because the client hung up,
        it stops the sandbox unless another client asked for it too.
        """
        entry = await self._lasting_of_session(specification.session_id)
        if self._closing:
            raise Stopping("the server is stopping and starts no more sandboxes")
        entry = entry or self._enter(specification, waits)
        entry.askers += 1
        try:
            await self._until_answerable(entry)
            await entry.until(lambda sandbox: sandbox.state is not State.STARTING, self.config.ready_grace_s)
        except asyncio.CancelledError:  # the client is gone: whoever holds its request cancels this
            self.background.start(self.hung_up(entry.specification.runtime_id))
            raise
        return entry.sandbox

    async def _lasting_of_session(self, session_id: str) -> Entry | None:
        """The session's living sandbox; one that is just being ended is waited for, and is none."""
        while (entry := self.register.living_of_session(session_id)) and entry.ending and not entry.ending.done():
            await asyncio.wait([entry.ending])
        return entry

    async def hung_up(self, runtime_id: str) -> None:
        """A client that asked for this sandbox is gone; stop it unless another one asked too."""
        entry = self.register.find(runtime_id)
        if entry is None:
            return
        entry.askers -= 1
        if entry.askers <= 0 and not entry.sandbox.state.is_dead:
            log.warning("the client of session %s hung up during /start; stopping it", entry.specification.session_id)
            await self._end(entry, Diagnosis("stopped on request", "", kind=HUNG_UP))

    def _enter(self, specification: Specification, waits: bool) -> Entry:
        """Make the sandbox known, so that clients can ask for it at once, and begin its start."""
        self.node.check()
        total = self.admission.slots.total
        if not waits and self._has_to_wait(units_for(specification.resource_factor)):
            raise NoRoom(f"{self._in_use()}, and this start was not to wait for one")
        self.statistics.note_asked()
        if units_for(specification.resource_factor) > total:
            self.statistics.note_failed(NEVER_FITS)
            raise NeverFits(
                f"resource_factor {specification.resource_factor:g} needs {units_for(specification.resource_factor)} "
                f"slots and this server has {total}; ask for less, or give the runtime job more CPUs"
            )
        entry = self._claimed(specification) or Entry(Sandbox(specification), is_new=True)
        self.register.add(entry)
        self.failures.note_again(specification.session_id)
        entry.bring_up = asyncio.create_task(self._bring_up(entry))
        return entry

    def _has_to_wait(self, units: int) -> bool:
        """Whether so many slots are not free, or will not be once those have theirs who asked before."""
        asked = (entry for entry in self.register.living() if entry.lease is None)
        ahead = sum(units_for(entry.specification.resource_factor) for entry in asked)
        slots = self.admission.slots
        return slots.used + ahead + units > slots.total >= units

    def _in_use(self) -> str:
        slots = self.admission.slots
        return f"no room: {slots.used} of {slots.total} sandbox slots are in use"

    async def _bring_up(self, entry: Entry) -> None:
        await self.starts.bring_up(entry)
        self._note_living()

    def _note_living(self) -> None:
        self.statistics.note_living(len(self.register.in_states(WITH_CONTAINER)))

    def _claimed(self, specification: Specification) -> Entry | None:
        """The sandbox in a container that waited for it, whose id and key it takes; None where none fits.

        Nobody is overtaken: whoever asked before has slots already.
        """
        claimed = self.warm.claim(specification, all(entry.lease for entry in self.register.living()))
        if claimed is None:
            return None
        warm, lease = claimed
        chosen = warm.specification
        named = replace(specification, runtime_id=chosen.runtime_id, session_api_key=chosen.session_api_key)
        entry = Entry(Sandbox(named), is_new=True)
        entry.warm, entry.lease, entry.port, entry.has_container = warm, lease, warm.port, True
        return entry

    def _is_starting(self) -> bool:
        return bool(self.register.in_states(BEFORE_ANSWER))

    async def _until_answerable(self, entry: Entry) -> None:
        """Wait until the sandbox runs or is dead, or patience ends while its image is fetched; else raise why not."""
        is_string = entry.specification.dialect is Dialect.SDK
        patience_s = self.config.string_patience_s if is_string else self.config.list_patience_s
        if not await entry.until(lambda sandbox: sandbox.state is not State.PENDING, patience_s):
            if entry.lease and entry.sandbox.url and self.connection.stands:
                return
            entry.problem = entry.problem or self._out_of_patience(entry, patience_s)
            kind = NO_SLOT if isinstance(entry.problem, NoRoom) else PODMAN_SILENT
            given_up = Diagnosis("given up: it took longer than its client waits", "", kind=kind)
            await self.endings.end(entry, State.STOPPED, given_up)
            self.register.forget(entry)
        if entry.problem:
            raise entry.problem
        if entry.sandbox.state is State.STOPPED:
            raise StoppedEarly("the sandbox was stopped before it had started")

    def _out_of_patience(self, entry: Entry, patience_s: float) -> Exception:
        if entry.lease or not self.connection.stands:
            return TooSlow(f"not started within {patience_s:g} s ({entry.sandbox.reason}); ask again")
        return NoRoom(
            f"{self._in_use()} and none became free within {patience_s:g} s; run fewer sandboxes at once, or give the "
            "runtime job more CPUs"
        )

    # Pausing and ending.

    async def pause(self, runtime_id: str) -> Sandbox:
        """Stop its processes; again is fine. ``WrongState`` if it has none, ``EngineError`` if it cannot be done."""
        return await self.pauses.pause(self.register.of_runtime(runtime_id))

    async def resume(self, runtime_id: str) -> Sandbox:
        """Let its processes go on; it is ready again once its server answers. Fine for one that was not paused."""
        return await self.pauses.resume(self.register.of_runtime(runtime_id))

    async def stop(self, runtime_id: str) -> None:
        """Remove the sandbox's container and free its slot; again is fine. ``EngineError`` if Podman fails at it."""
        await self._end(self.register.of_runtime(runtime_id), Diagnosis("stopped on request", "", kind=STOPPED))

    async def _end(self, entry: Entry, diagnosis: Diagnosis) -> None:
        await self.endings.end(entry, State.STOPPED, diagnosis)

    async def run(self) -> None:
        """Connect to Podman, then see to it that dead containers are noticed; ends only by cancellation."""
        self.warm.begin(self.background)
        self.host.look_up()
        self.background.start(self.node.drain_in_time())
        await self.supervisor.run()

    async def close(self, timeout_s: float) -> list[str]:
        """Start no more, remove everything in parallel; names of the containers left after ``timeout_s`` seconds."""
        names, warm = await asyncio.gather(self._close(timeout_s), self.warm.close(timeout_s))
        return [*names, *warm]

    async def _close(self, timeout_s: float) -> list[str]:
        self._closing = True
        self.connection.close()
        await self.supervisor.close(timeout_s)
        entries = self.register.entries()
        left = [entry for entry in entries if not (entry.is_clean and entry.sandbox.state.is_dead)]
        if left:
            log.info("stopping %d sandboxes", len(left))
            tasks = [asyncio.create_task(self._end_for_good(entry)) for entry in left]
            await asyncio.wait(tasks, timeout=timeout_s)
            _read_outcomes(tasks)
        self.endings.close()
        await self.images.close()
        await self.background.close()
        await self.companions.close()
        self.launcher.holder_profile.remove()
        self.changes.close()
        return [entry.name for entry in left if entry.has_container]

    async def _end_for_good(self, entry: Entry) -> None:
        if entry.sandbox.state is State.PENDING:  # it may have its URL already, which is known before its container is
            entry.problem = entry.problem or Stopping("the server is stopping and starts no more sandboxes")
        await self._end(entry, Diagnosis(self._why_it_stops(), "", kind=SERVER_STOPS))

    def _why_it_stops(self) -> str:
        """For clients of a head, which goes on without this node."""
        return f"node {self.node.name} left: its API server stops" if self.node.head else "the server is stopping"


def _read_outcomes(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Log what failed; nothing is raised, because a stopping server goes on."""
    problems = [task.exception() for task in tasks if task.done() and not task.cancelled()]
    for problem in problems:
        if problem is not None and not isinstance(problem, EngineUnreachable):
            log.error("%s", problem)
    if any(isinstance(problem, EngineUnreachable) for problem in problems):
        log.warning("Podman's service has ended before this server; its owner has to remove the containers")
