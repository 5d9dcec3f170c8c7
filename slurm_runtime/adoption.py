"""Which sandboxes of a server that was killed can the next one take over, and how? (``--adopt``)

``decide`` is pure: from what Podman and /proc tell of a container to what is to be done. ``Adoption`` looks and acts.
"""

from __future__ import annotations

import asyncio
import enum
import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from slurm_runtime import late_labels
from slurm_runtime.admission import Admission
from slurm_runtime.agent_support import Start
from slurm_runtime.control import ControlError
from slurm_runtime.diagnostics import SERVER_KILLED
from slurm_runtime.endings import Endings
from slurm_runtime.entries import Entry
from slurm_runtime.labels import JOB_LABEL, SESSION_LABEL, Notes, read
from slurm_runtime.launcher import Launcher
from slurm_runtime.logs import log
from slurm_runtime.podman import ContainerState, EngineError, EngineFacts, EngineSilent, EngineUnreachable
from slurm_runtime.register import Register
from slurm_runtime.sandbox import CONTAINER_PREFIX, SESSION_KEY_VARIABLE, Dialect, Sandbox, Specification, State
from slurm_runtime.starts import Starts
from slurm_runtime.warden.proc import Scanner, namespace_of, stat_of

ANSWER_S = 1.0  # for the first answer of a sandbox: one that takes longer is waited for beside requests
STOPPED_LETTERS = "Tt"
NEVER_RAN = frozenset({"configured", "created", "initialized"})


@dataclass(frozen=True)
class Process:
    """One process of a container: its parent, the letter of its state, when it started (ticks since boot)."""

    pid: int
    parent: int
    state: str
    started: int


@dataclass(frozen=True)
class Found:
    """A container of a dead server: what Podman tells of it, and its processes."""

    state: ContainerState
    labels: Mapping[str, str]
    processes: tuple[Process, ...] = ()


class Fate(enum.Enum):
    """What is done with a container."""

    RUNNING = "its processes run: it is taken over, and ready once its server answers"
    PAUSED = "its processes are stopped: it is taken over paused"
    LOST = "it is removed, and its session is told why"
    FOREIGN = "it is removed: nobody can ask for it"


@dataclass(frozen=True)
class Decision:
    """What is done with one container and, where it is lost, why. ``server`` is a forked server's process, else 0."""

    found: Found
    fate: Fate
    reason: str = ""
    specification: Specification | None = None
    notes: Notes | None = None
    server: int = 0


HALF_MADE = "its start was cut off when the API server was killed; start it again"
NO_SERVER = "its agent server was gone when the API server was started again; start it again"
NOT_ALONE = "a later sandbox of the same session was found when the API server was started again"
NO_SLOTS = "its slots are not to be had on the API server that was started again"


def decide(found: Iterable[Found], job: str, slots: int) -> list[Decision]:
    """What is done with each container of a dead server, in the order in which they were made. Pure.

    Taken over are those of ``job`` whose slots are among the first ``slots``, each slot and each session once; of two
    the one that was made later.
    """
    decisions: list[Decision] = []
    sessions: set[str] = set()
    taken: set[int] = set()
    for one in sorted(found, key=lambda one: one.state.created, reverse=True):
        decision = _alone(one, job)
        if decision.notes and decision.fate in {Fate.RUNNING, Fate.PAUSED}:
            wanted = frozenset(decision.notes.slots)
            if one.labels[SESSION_LABEL] in sessions:
                decision = _lost(decision, NOT_ALONE)
            elif not wanted or taken & wanted or not wanted <= frozenset(range(slots)):
                decision = _lost(decision, NO_SLOTS)
            else:
                taken |= wanted
                sessions.add(one.labels[SESSION_LABEL])
        decisions.append(decision)
    return decisions[::-1]


def _alone(one: Found, job: str) -> Decision:
    """The decision about a container as if there were no other."""
    notes = read(one.labels)
    key = one.state.variables.get(SESSION_KEY_VARIABLE, "")
    session_id = one.labels.get(SESSION_LABEL, "")
    named = one.state.name.startswith(CONTAINER_PREFIX) and session_id and key
    if notes is None or not named or one.labels.get(JOB_LABEL, "") != job:
        return Decision(one, Fate.FOREIGN)
    whole = Decision(one, Fate.RUNNING, "", specification_of(one, notes, session_id, key), notes)
    if not one.state.running:
        return _lost(whole, HALF_MADE if one.state.status in NEVER_RAN else "")
    server = forked_server(one) if notes.start == Start.FORK.name else 0
    if notes.start == Start.FORK.name and not server:
        return _lost(whole, NO_SERVER)
    fate = Fate.PAUSED if is_paused(one, server) else Fate.RUNNING
    return Decision(one, fate, "", whole.specification, notes, server)


def _lost(decision: Decision, reason: str) -> Decision:
    return Decision(decision.found, Fate.LOST, reason, decision.specification, decision.notes)


def specification_of(one: Found, notes: Notes, session_id: str, key: str) -> Specification:
    """What is known of a client's request once its sandbox runs: enough to answer, not to start it again. Pure."""
    return Specification(
        runtime_id=one.state.name.removeprefix(CONTAINER_PREFIX),
        session_id=session_id,
        session_api_key=key,
        image=notes.image,
        command=None,
        working_dir="/",
        environment={},
        resource_factor=notes.factor,
        pull_policy="never",
        dialect=Dialect[notes.dialect],
        container_port=notes.container_port,
    )


def forked_server(one: Found) -> int:
    """The process that was forked into a container: the oldest whose parent is outside of it; 0 for none. Pure."""
    inside = {process.pid for process in one.processes}
    others = [process for process in one.processes if process.pid != one.state.pid and process.parent not in inside]
    return min(others, key=lambda process: process.started).pid if others else 0


def is_paused(one: Found, server: int) -> bool:
    """Whether its server holds still: frozen by its cgroup, or stopped by a signal. Pure.

    Not every process is looked at, since a program inside may stop its own children.
    """
    if one.state.status == "paused":
        return True
    children = [process for process in one.processes if process.parent == one.state.pid]
    program = min(children, key=lambda process: process.started, default=None)
    serving = {one.state.pid, server or (program.pid if program else 0)}
    return any(process.state in STOPPED_LETTERS for process in one.processes if process.pid in serving)


def processes_of(states: Collection[ContainerState]) -> dict[str, tuple[Process, ...]]:
    """The processes of running containers, by name; one pass over /proc for all of them."""
    namespaces = {state.name: namespace_of(state.pid) for state in states if state.pid}
    usage = Scanner().scan({namespace for namespace in namespaces.values() if namespace})
    return {
        name: tuple(filter(None, map(_process, usage[namespace].pids)))
        for name, namespace in namespaces.items()
        if namespace
    }


def _process(pid: int) -> Process | None:
    fields = stat_of(pid)
    return Process(pid, int(fields[1]), fields[0], int(fields[19])) if fields else None


class Adoption:
    """Takes over the sandboxes of a dead server: same ids, URLs, keys, slots and ports."""

    def __init__(
        self,
        launcher: Launcher,
        register: Register,
        admission: Admission,
        starts: Starts,
        endings: Endings,
    ) -> None:
        self.engine = launcher.engine
        self.launcher = launcher
        self.register = register
        self.admission = admission
        self.starts = starts
        self.endings = endings

    async def adopt(self, orphans: Sequence[tuple[ContainerState, Mapping[str, str]]], facts: EngineFacts) -> None:
        """Take over what can be; the register knows those and the lost ones afterwards, the rest is left to sweep.

        ``EngineError`` before anything was changed: try again.
        """
        began = time.monotonic()
        looked = await asyncio.gather(*(self._inspected(state, labels) for state, labels in orphans))
        found = [one for one in looked if one is not None]
        processes = await asyncio.to_thread(processes_of, [one.state for one in found])
        seen = [Found(one.state, one.labels, processes.get(one.state.name, ())) for one in found]
        decisions = decide(seen, self.launcher.labels.job, self.admission.slots.total)
        await asyncio.gather(*(self._do(decision, facts) for decision in decisions if decision.specification))
        _say(decisions, time.monotonic() - began)

    async def _inspected(self, state: ContainerState, labels: Mapping[str, str]) -> Found | None:
        """One that Podman cannot describe is left to the sweep, and holds up no other."""
        try:
            state = await self.engine.inspect(state.name)
            return Found(state, {**labels, **await asyncio.to_thread(late_labels.read, state.oci_config)})
        except (EngineUnreachable, EngineSilent):
            raise
        except EngineError as problem:
            log.warning("container %s cannot be taken over: %s", state.name, problem)
            return None

    async def _do(self, decision: Decision, facts: EngineFacts) -> None:
        assert decision.specification is not None
        assert decision.notes is not None
        if decision.fate is Fate.LOST:
            await self._bury(decision)
            return
        entry = self._entered(decision)
        state = decision.found.state
        if entry.server and self.launcher.control is not None:
            try:
                await self.launcher.control.adopt(entry.name, entry.server)
            except ControlError as problem:
                log.warning("the warden does not know the agent server of %s: %s", entry.name, problem)
        await self.launcher.watch(entry, state, facts)
        if entry.sandbox.state is State.STARTING:
            await self._first_answer(entry)

    def _entered(self, decision: Decision) -> Entry:
        """An entry with all that the sandbox holds; no await, so that nobody sees one that is half made."""
        wish, notes, state = decision.specification, decision.notes, decision.found.state
        assert wish is not None
        assert notes is not None
        is_paused = decision.fate is Fate.PAUSED
        reason = "paused; its API server was started again" if is_paused else "its server does not answer yet"
        entry = Entry(Sandbox(wish, State.PAUSED if is_paused else State.STARTING, reason, notes.url))
        entry.lease = self.admission.take_these(notes.slots)
        entry.port = self.launcher.ports.adopt(state.host_port or 0)
        entry.askers = 1  # its client: one who asks again and hangs up does not take it away
        entry.has_container = True
        entry.holder, entry.server = state.pid, decision.server
        entry.forked = bool(decision.server)
        entry.asked_at = _asked_at(state.pid)
        self.launcher.agent_folders.update({notes.agent_folder} - {""})
        self.register.add(entry)
        self.endings.watch(entry)
        return entry

    async def _first_answer(self, entry: Entry) -> None:
        """Ready if it answers at once, as it does unless it is busy or was just being started."""
        entry.bring_up = asyncio.create_task(self.starts.bring_back(entry))
        await entry.until(lambda sandbox: sandbox.state is not State.STARTING, ANSWER_S)

    async def _bury(self, decision: Decision) -> None:
        """A record that says why, and a container that the supervisor removes."""
        assert decision.specification is not None
        diagnosis = await self.endings.learned(decision.found.state.name)
        reason = decision.reason or f"{diagnosis.sentence}, while no API server was there"
        entry = Entry(Sandbox(decision.specification))
        failed = entry.sandbox.changed(State.FAILED, reason, last_lines=diagnosis.last_lines)
        entry.become(failed.blamed(diagnosis.sentence) if diagnosis.out_of_memory else failed)
        entry.has_container = True
        if self.register.living_of_session(entry.specification.session_id):
            self.register.add_dead(entry)
        else:
            self.register.add(entry)
        self.endings.note_failure(entry.sandbox)
        self.endings.statistics.note_ended(SERVER_KILLED if decision.reason else diagnosis.counted_as)


def _asked_at(holder: int) -> float:
    """When a container's first process began, by the monotonic clock: what its client waited before is not known."""
    fields = stat_of(holder)
    if not fields:
        return time.monotonic()
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - max(0.0, age_s)


def _say(decisions: Sequence[Decision], seconds: float) -> None:
    kept = [one for one in decisions if one.fate in {Fate.RUNNING, Fate.PAUSED}]
    paused = sum(one.fate is Fate.PAUSED for one in kept)
    sentence = "%d sandboxes of the server that was killed are taken over, %d of them paused, in %.2f s"
    log.info(sentence, len(kept), paused, seconds)
    for one in decisions:
        if one.fate is Fate.LOST and one.specification:
            wish = one.specification
            reason = one.reason or "it had ended"
            log.warning("sandbox %s of session %s is not taken over: %s", wish.runtime_id, wish.session_id, reason)
