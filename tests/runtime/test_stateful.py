"""Any order of requests and accidents: what holds of slots, of ports and of sandboxes' states at all times.

The sandboxes are those of a real manager on the fake Podman. It is asked by its clients' verbs, and looked at from
outside: what it says of each sandbox in every turn of the event loop, and which containers Podman then has.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from slurm_runtime.app import create_app
from slurm_runtime.entries import NoRoom, StoppedEarly, TooSlow, UnknownSandbox, WrongState
from slurm_runtime.heartbeats import Heartbeats
from slurm_runtime.logs import log
from slurm_runtime.manager import Manager
from slurm_runtime.models import StartRequest
from slurm_runtime.node_models import ChangesAnswer
from slurm_runtime.podman import ContainerSpec, EngineError
from slurm_runtime.ports import Ports, Reservation
from slurm_runtime.readiness import Prober
from slurm_runtime.routes_node import news
from slurm_runtime.routes_sandboxes import answer
from slurm_runtime.sandbox import NEXT_STATES, Sandbox, Specification, State
from slurm_runtime.slots import Lease, Slots, units_for
from slurm_runtime.wishes import settled
from tests.runtime.commands import EXIT, IMAGE, NOT_THERE, SERVE, SILENT
from tests.runtime.conftest import API_KEY, CONFIG
from tests.runtime.fake_podman import FakePodman
from tests.runtime.replica import Replica

DEADLINE_S = 20.0


def tried(machine: type[RuleBasedStateMachine], examples: int, steps: int) -> None:
    """Run a machine with programs that are the same each time."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=True,
            deadline=None,
            database=None,
            phases=[Phase.generate],  # what real sockets and clocks take part in cannot be made smaller
            suppress_health_check=list(HealthCheck),
        ),
    )


# --- slots ------------------------------------------------------------------------------------------------------------


class SlotsLent(RuleBasedStateMachine):
    """Slots taken and given back in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = Slots(0, 1.0)
        self.leases: list[Lease] = []

    @initialize(total=st.integers(1, 12), cpus_per_slot=st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 3.0]))
    def begin(self, total: int, cpus_per_slot: float) -> None:
        self.slots = Slots(total, cpus_per_slot, tuple(range(100, 140)))

    @rule(count=st.integers(1, 13))
    def take(self, count: int) -> None:
        taken = self.slots.take(count)
        if taken is None:
            assert self.slots.total - self.slots.used < count, "refused although so many are free"
            return
        self.slots, lease = taken
        assert len(lease.numbers) == count
        self.leases.append(lease)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        self.slots = self.slots.give(lease)

    @invariant()
    def each_slot_has_one_owner(self) -> None:
        numbers = [number for lease in self.leases for number in lease.numbers]
        assert len(numbers) == len(set(numbers)), "leased twice"
        assert set(numbers) == self.slots.taken, "lost, or free while it is leased"
        assert self.slots.taken <= set(range(self.slots.total))

    @invariant()
    def whole_cpus_have_one_owner(self) -> None:
        if self.slots.cpus_per_slot.is_integer():
            cpus = [cpu for lease in self.leases for cpu in self.slots.cpus_of(lease)]
            assert len(cpus) == len(set(cpus)) == len(self.slots.taken) * self.slots.cpus_per_slot

    def teardown(self) -> None:
        for lease in self.leases:
            self.slots = self.slots.give(lease)
        assert self.slots.used == 0


def test_slots_in_any_order() -> None:
    tried(SlotsLent, 200, 30)


# --- ports ------------------------------------------------------------------------------------------------------------


def bound(number: int) -> socket.socket | None:
    """The port, taken as another program would; None where it is in use."""
    holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        holder.bind(("127.0.0.1", number))
        holder.listen(1)
    except OSError:
        holder.close()
        return None
    return holder


def free_range(count: int) -> range:
    """So many ports side by side that nobody uses, below those that the kernel hands out."""
    for first in range(20_000, 30_000, count):
        with contextlib.ExitStack() as stack:
            found = [stack.enter_context(holder) for n in range(count) if (holder := bound(first + n)) is not None]
            if len(found) == count:
                return range(first, first + count)
    raise AssertionError("no free ports")


class PortsLent(RuleBasedStateMachine):
    """Real ports of a small range: reserved, let go for Podman, given back, and taken by other programs."""

    def __init__(self) -> None:
        super().__init__()
        self.ports = Ports("127.0.0.1", free_range(4))
        self.held: list[Reservation] = []
        self.others: list[socket.socket] = []

    @rule()
    def reserve(self) -> None:
        assert self.ports.allowed
        others = {other.getsockname()[1] for other in self.others}
        free = {*self.ports.allowed} - self.ports.taken - others
        try:
            reservation = self.ports.reserve()
        except EngineError:
            assert not free, "refused although there are free ones"
            return
        assert reservation.number in free, "lent twice"
        self.held.append(reservation)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.held[data.draw(st.integers(0, len(self.held) - 1))].release()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        self.ports.give(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule(offset=st.integers(0, 3))
    def another_program_comes(self, offset: int) -> None:
        assert self.ports.allowed
        holder = bound(self.ports.allowed[offset])
        kept = {held.number for held in self.held if held.holder is not None}
        assert holder is None or self.ports.allowed[offset] not in kept, "not held for Podman"
        self.others += [holder] if holder else []

    @precondition(lambda self: self.others)
    @rule()
    def another_program_goes(self) -> None:
        self.others.pop().close()

    @invariant()
    def each_port_has_one_owner(self) -> None:
        numbers = [reservation.number for reservation in self.held]
        assert len(numbers) == len(set(numbers))
        assert set(numbers) == self.ports.taken

    def teardown(self) -> None:
        for reservation in self.held:
            self.ports.give(reservation)
        for other in self.others:
            other.close()
        assert self.ports.allowed
        free = [holder for number in self.ports.allowed if (holder := bound(number)) is not None]
        for holder in free:
            holder.close()
        assert len(free) == len(self.ports.allowed), "a port is still bound"


def test_ports_in_any_order() -> None:
    tried(PortsLent, 200, 25)


# --- sandboxes --------------------------------------------------------------------------------------------------------

SLOTS = 3
COMMANDS = {"serve": SERVE, "exit": EXIT, "not there": NOT_THERE, "silent": SILENT}
REFUSALS = (EngineError, NoRoom, StoppedEarly, TooSlow, UnknownSandbox, WrongState)  # each has its status code
MOMENTS = st.sampled_from([0.0, 0.0, 0.0, 0.002, 0.02, 0.1])  # seconds for which the world then goes on


def act(method: str, **arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    """A call of a method of ``SandboxesUsed``."""
    return st.tuples(st.just(method), st.fixed_dictionaries(arguments))


START = act(
    "client_starts",
    session=st.sampled_from("abcde"),
    factor=st.sampled_from([1, 1, 2, 3]),
    command=st.sampled_from(["serve"] * 9 + [*COMMANDS]),
    moment_s=MOMENTS,
)
CHANGE = act(
    "clients_change",
    verbs=st.lists(st.sampled_from(["pause", "pause", "resume", "stop"]), min_size=1, max_size=3),
    back=st.integers(1, 4),
    moment_s=MOMENTS,
)
ACTS = st.one_of(
    *[START] * 5,
    *[CHANGE] * 4,
    *[act("clients_hang_up", how_many=st.integers(1, 4), moment_s=MOMENTS)] * 2,
    act("container_dies", which=st.integers(0, SLOTS), moment_s=MOMENTS),
    act("podman_refuses", creations=st.integers(0, 2), removals=st.integers(0, 3)),
    act("head_asks"),
)


@dataclass
class Moody(FakePodman):
    """A fake that refuses the next so many creations too, and takes its time for a pause."""

    refuse_creation: int = 0

    async def create(self, spec: ContainerSpec) -> None:
        if self.refuse_creation:
            self.refuse_creation -= 1
            raise EngineError("no space left on device")
        await super().create(spec)

    async def pause(self, name: str) -> None:
        await super().pause(name)
        await asyncio.sleep(self.delay_s)

    async def unpause(self, name: str) -> None:
        await super().unpause(name)
        await asyncio.sleep(self.delay_s)


@dataclass
class Witness:
    """Notes, in each turn of the event loop, what must never be seen.

    ``states`` is the last state seen of each sandbox, None for one that is not known yet.
    """

    manager: Manager
    engine: FakePodman
    states: dict[str, State | None] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)

    async def look(self) -> None:
        while True:
            for runtime_id in [*self.states]:
                self._look_at(runtime_id)
            self._look_at_all()
            await asyncio.sleep(0)

    def _look_at(self, runtime_id: str) -> None:
        before, now = self.states[runtime_id], self._state_of(runtime_id)
        if before is None:
            if now not in {None, State.PENDING}:
                self.seen.append(f"a sandbox that was unknown or forgotten is {now}")
        elif now is None:
            self.seen += [] if before.is_dead else [f"a sandbox that was {before.name} was forgotten"]
            del self.states[runtime_id]
            return
        elif now is not before and now not in NEXT_STATES[before]:
            self.seen.append(f"{before.name} → {now.name}")
        self.states[runtime_id] = now

    def _state_of(self, runtime_id: str) -> State | None:
        try:
            return self.manager.by_runtime(runtime_id).state
        except UnknownSandbox:
            return None

    def _look_at_all(self) -> None:
        specs = [container.spec for container in self.engine.containers.values()]
        cpus = [cpu for spec in specs for cpu in spec.cpuset]
        ports = [spec.host_port for spec in specs]
        sessions = [sandbox.specification.session_id for sandbox in self.manager.living()]
        used = self.manager.snapshot().slots_used
        for what, entries in (("CPU of a slot", cpus), ("port", ports), ("living sandbox of a session", sessions)):
            if len(entries) != len(set(entries)):
                self.seen.append(f"two with one {what}: {sorted(entries)}")
        if len(cpus) > used:
            self.seen.append(f"{used} slots are in use while containers have {len(cpus)}")


class Complaints(logging.Handler):
    """Keeps what the log says with a traceback."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.kept.append(f"{record.getMessage()}: {record.exc_info[1]!r}")


class SandboxesUsed(RuleBasedStateMachine):
    """A server with three slots and as many ports, its clients, and what befalls its sandboxes."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.engine = Moody(delay_s=0.001)
        self.config = replace(
            CONFIG,
            pinning="docker_cpuset",
            sandbox_ports=free_range(SLOTS),
            string_patience_s=0.2,
            list_patience_s=0.2,
            ready_grace_s=0.05,
            startup_timeout_s=1.0,
            watch_period_s=0.02,
        )
        self.prober = Prober()
        slots = Slots(SLOTS, 1.0, tuple(range(SLOTS)))
        self.manager: Manager = self.run(self.made(slots))
        self.app = create_app(self.manager, self.config, Heartbeats())
        self.witness = Witness(self.manager, self.engine)
        self.complaints = Complaints()
        log.addHandler(self.complaints)
        self.life = [self.loop.create_task(self.manager.run()), self.loop.create_task(self.witness.look())]
        self.starts: list[asyncio.Task[Sandbox]] = []
        self.requests: list[asyncio.Task[Any]] = []
        self.ids: list[str] = []
        self.head = Replica()

    async def made(self, slots: Slots) -> Manager:
        return Manager(self.config, self.engine, self.prober, slots)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, DEADLINE_S))

    def ask(self, work: Coroutine[Any, Any, Any], moment_s: float) -> asyncio.Task[Any]:
        """Begin a request, and let the world go on for a moment."""
        task = self.loop.create_task(work)
        self.requests.append(task)
        self.run(asyncio.sleep(moment_s))
        return task

    def start(self, **fields: Any) -> Coroutine[Any, Any, Sandbox]:
        wish = settled(StartRequest.model_validate({"image": IMAGE, "command": SERVE, **fields}), self.config)
        self.ids.append(wish.runtime_id)
        self.witness.states[wish.runtime_id] = None
        return self._started(wish)

    async def _started(self, wish: Specification) -> Sandbox:
        found = await self.manager.start(wish)
        if found.specification.runtime_id != wish.runtime_id:  # the session's living one
            self.witness.states.pop(wish.runtime_id, None)
        return found

    @rule(acts=st.lists(ACTS, min_size=4, max_size=16))
    def things_happen(self, acts: list[tuple[str, dict[str, Any]]]) -> None:
        for method, arguments in acts:
            getattr(self, method)(**arguments)
            self.nothing_was_seen()

    # What clients do.

    def client_starts(self, session: str, factor: int, command: str, moment_s: float) -> None:
        work = self.start(session_id=session, resource_factor=factor, command=COMMANDS[command])
        self.starts.append(self.ask(work, moment_s))

    def clients_hang_up(self, how_many: int, moment_s: float) -> None:
        """At the same moment, as all of a trainer's clients do when it ends."""
        for task in self.starts[-how_many:]:
            task.cancel()
        del self.starts[-how_many:]
        self.run(asyncio.sleep(moment_s))

    def clients_change(self, verbs: list[str], back: int, moment_s: float) -> None:
        """One sandbox, at the same moment."""
        for verb in verbs:
            change: Callable[[str], Coroutine[Any, Any, Any]] = getattr(self.manager, verb)
            if self.ids:
                self.ask(change(self.ids[-min(back, len(self.ids))]), 0)
        self.run(asyncio.sleep(moment_s))

    # What befalls them.

    def container_dies(self, which: int, moment_s: float) -> None:
        running = [name for name, container in self.engine.containers.items() if container.state.running]
        if running:
            self.run(self.engine.kill(running[which % len(running)]))
            self.run(asyncio.sleep(moment_s))

    def podman_refuses(self, creations: int, removals: int) -> None:
        self.engine.refuse_creation, self.engine.refuse_removal = creations, removals

    def head_asks(self) -> None:
        """What it knows then is what clients who ask here are told."""
        told = news(self.manager, self.head.upto, self.head.boot)
        self.head.apply(ChangesAnswer.model_validate_json(told.model_dump_json(exclude_none=True)))
        entries = self.manager.register.entries()
        assert self.head.sandboxes == {entry.specification.runtime_id: answer(entry.sandbox) for entry in entries}
        for entry in entries:
            session = entry.specification.session_id
            with contextlib.suppress(UnknownSandbox):
                newest = self.manager.by_session(session)
                assert self.head.newest[session] == newest.specification.runtime_id
        assert self.head.living() == {sandbox.specification.runtime_id for sandbox in self.manager.living()}
        assert told.node.used == self.manager.snapshot().slots_used
        assert self.head.completes == 1

    # How it comes to an end.

    @rule()
    def all_comes_to_rest(self) -> None:
        """Podman is well again, everybody has an answer, and what was paused goes on."""
        self.engine.refuse_creation = self.engine.refuse_removal = 0
        self.run(self._rest())
        self._podman_agrees()
        self.head_asks()
        paused = [sandbox for sandbox in self.manager.living() if sandbox.state is State.PAUSED]
        for sandbox in paused:
            self.ask(self.manager.resume(sandbox.specification.runtime_id), 0)
        self.run(self._rest())
        self._podman_agrees()
        for sandbox in paused:
            now = self.manager.by_runtime(sandbox.specification.runtime_id)
            assert now.state is State.READY, now.reason

    def _podman_agrees(self) -> None:
        living = self.manager.living()
        listed = self.run(self._get("/list"))
        assert {entry["runtime_id"] for entry in listed["runtimes"]} == {s.specification.runtime_id for s in living}
        assert {s.specification.container_name for s in living} == self.engine.containers.keys()
        for sandbox in living:
            container = self.engine.containers[sandbox.specification.container_name]
            assert container.state.running
            assert container.paused == (sandbox.state is State.PAUSED)
            assert sandbox.url == f"http://127.0.0.1:{container.spec.host_port}"
        assert self.manager.snapshot().waiting == 0

    async def _rest(self) -> None:
        end = time.monotonic() + DEADLINE_S / 2
        while not self._at_rest():
            assert time.monotonic() < end, f"a slot or a container is lost: {self.manager.snapshot()}, {self.engine}"
            await asyncio.sleep(0.01)

    def _at_rest(self) -> bool:
        """Nobody waits for an answer; living sandboxes, and nothing else, have containers and slots.

        What Podman has refused is tried again later, so this comes about after a while.
        """
        living = self.manager.living()
        units = sum(units_for(sandbox.specification.resource_factor) for sandbox in living)
        names = {sandbox.specification.container_name for sandbox in living}
        return (
            all(task.done() for task in self.requests)
            and all(sandbox.state in {State.READY, State.PAUSED} for sandbox in living)
            and {name for name, container in self.engine.containers.items() if container.state.running} == names
            and self.engine.containers.keys() == names
            and self.manager.snapshot().slots_used == units
        )

    async def _get(self, path: str) -> Any:
        transport = httpx.ASGITransport(self.app)
        headers = {"X-API-Key": API_KEY}
        async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=headers) as client:
            answer = await client.get(path)
            assert answer.status_code == 200
            return answer.json()

    # What holds.

    @invariant()
    def nothing_was_seen(self) -> None:
        assert self.witness.seen == []
        assert self.complaints.kept == []
        assert all(not task.done() for task in self.life), self.life

    @invariant()
    def every_refusal_is_one_that_clients_know(self) -> None:
        done = [task for task in self.requests if task.done() and not task.cancelled()]
        assert [problem for task in done if (problem := task.exception()) and not isinstance(problem, REFUSALS)] == []

    def teardown(self) -> None:
        try:
            self._all_is_stopped()
        finally:
            log.removeHandler(self.complaints)
            self.run(_ended([*self.life, *self.requests]))
            left = self.run(self.manager.close(5))
            self.run(self.prober.close())
            self.run(self.engine.close())
            self.run(asyncio.sleep(0.02))  # in which sockets close
            self.run(_ended([*asyncio.all_tasks(self.loop)]))
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()
        assert left == []
        assert self.engine.containers == {}
        assert [number for number in self.config.sandbox_ports or () if not _is_free(number)] == []

    def _all_is_stopped(self) -> None:
        """Then each slot and each port can be had again at once."""
        self.all_comes_to_rest()
        for sandbox in self.manager.living():
            self.run(self.manager.stop(sandbox.specification.runtime_id))
        self.all_comes_to_rest()
        assert self.engine.containers == {}
        for number in range(SLOTS):
            self.ask(self.start(session_id=f"last-{number}"), 0)
        self.run(self._rest())
        assert len(self.manager.living()) == SLOTS, "a slot or a port is lost"
        self.nothing_was_seen()
        self.every_refusal_is_one_that_clients_know()


async def _ended(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _is_free(number: int) -> bool:
    holder = bound(number)
    if holder is None:
        return False
    holder.close()
    return True


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # sockets of the fake's containers
def test_sandboxes_in_any_order() -> None:
    tried(SandboxesUsed, 40, 5)
