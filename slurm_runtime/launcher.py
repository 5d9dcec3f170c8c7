"""From a leased slot to a running container with its server in it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from slurm_runtime import late_labels
from slurm_runtime.agent_support import AgentSupport, Start, StartPlan, decide
from slurm_runtime.config import ServerConfig
from slurm_runtime.control import Control, ControlError, ForkRefused
from slurm_runtime.entries import Entry, uninterrupted
from slurm_runtime.images import Images
from slurm_runtime.labels import Labels, Notes
from slurm_runtime.logs import log
from slurm_runtime.podman import (
    ContainerSpec,
    ContainerState,
    Engine,
    EngineError,
    EngineFacts,
    EngineUnreachable,
    ImageFacts,
    NoSuchImage,
    PortTaken,
)
from slurm_runtime.ports import Ports, Reservation
from slurm_runtime.sandbox import Sandbox, Specification, sandbox_url
from slurm_runtime.seccomp_profiles import ProfileFile, native_only, profile_in
from slurm_runtime.slots import Slots
from slurm_runtime.steps import StepTimes
from slurm_runtime.warm import Warm

PORT_TRIES = 20
FEW_PIDS = 512  # of Podman and its helpers
PIDS_OF_A_SANDBOX = 128  # an agent server with its tools has about 40


class Launcher:
    """Starts containers, a few at a time; everything that it makes is noted in the entry before it is made."""

    def __init__(
        self, config: ServerConfig, engine: Engine, images: Images, ports: Ports, agent: AgentSupport, labels: Labels
    ) -> None:
        self.config = config
        self.engine = engine
        self.images = images
        self.ports = ports
        self.agent = agent
        self.labels = labels
        self.control: Control | None = None
        self.steps = StepTimes()
        self.holder_profile = ProfileFile()
        self.agent_folder = ""  # of this server, where the agent tree was taken out of an image
        self.agent_folders: set[str] = set()  # of servers before it, which sandboxes that were taken over still use
        self._starters = asyncio.Semaphore(config.starters)
        self._seccomp: Mapping[str, Any] | None = None
        self._knows_seccomp = False
        self._said: set[str] = set()

    async def launch(self, entry: Entry, facts: EngineFacts, slots: Slots, host: str) -> None:
        """Bring the image, then the container, then its server; ``EngineError`` if one of them cannot be had.

        The URL is told as soon as there is a lease: it stands in the first answer, however long the image takes.
        """
        entry.port = entry.port or self.ports.reserve()
        entry.become(entry.sandbox.located(sandbox_url(host, entry.port.number)))
        try:
            await self._launch(entry, facts, slots, host)
        except NoSuchImage:  # somebody removed it from the store since it was last seen there
            self.images.forget(entry.specification.image)
            await self._launch(entry, facts, slots, host)

    async def discard(self, entry: Entry) -> None:
        """Remove a container whose start was cut off, and forget what was known of it."""
        if not entry.has_container:
            return
        if self.control is not None:  # the end of its processes is our doing
            with contextlib.suppress(ControlError):
                await self.control.forget(entry.name)
        await uninterrupted(self.engine.remove(entry.name))
        entry.has_container = entry.forked = False
        entry.holder = entry.server = 0

    async def _launch(self, entry: Entry, facts: EngineFacts, slots: Slots, host: str) -> None:
        warm, entry.warm = entry.warm, None
        if warm is not None and await self._wake(entry, warm, facts, slots):
            return
        with self.steps.of("image"):
            plan = await self._plan(entry, await self._image(entry))
        async with self._starters:
            entry.explain("its container is being started")
            state = await self._start_on_some_port(entry, plan, facts, slots, host)
            if plan.start is Start.FORK:
                with self.steps.of("fork"):
                    state = await self._fork(entry, plan, state, facts, slots)
            await self.watch(entry, state, facts)

    # Containers that wait for their sandbox.

    def can_prepare(self, facts: EngineFacts) -> bool:
        """Whether a container can be made before its slots are known, and its server forked into it afterwards."""
        is_bound = self.config.pinning == "docker_cpuset" and "cpuset" in facts.controllers
        return not is_bound and self.agent.fork_ready and self.control is not None

    async def prepare(self, wish: Specification, port: Reservation, slots: Slots, facts: EngineFacts) -> Warm | None:
        """Make and initialise the container of a request that nobody has made yet; None where it is not to be forked
        into. Whoever calls removes it, also after an ``EngineError`` or a cancellation.
        """
        entry = Entry(Sandbox(wish))
        entry.port = port
        image = await self.engine.image(wish.image)
        plan = await self._plan(entry, image)
        if plan.start is not Start.FORK:
            return None
        spec = replace(self._container_spec(entry, plan, ()), labels=self.labels.of(""))
        async with self._starters:
            await uninterrupted(self.engine.create(replace(spec, pids_together=self._pids_together(slots))))
            port.release()
            await uninterrupted(self.engine.init(entry.name))
            if self.config.network == "deny":
                await self._confine(entry, ())
            return Warm(wish, plan, image.id, port, await self.engine.inspect(entry.name))

    async def _wake(self, entry: Entry, warm: Warm, facts: EngineFacts, slots: Slots) -> bool:
        """Start the container that waited, and its server; False, with nothing left of it, where it cannot be used."""
        async with self._starters:
            entry.explain("its container, which waited for it, is being started")
            try:
                with self.steps.of("image"):
                    await self._check_image(warm)
                with self.steps.of("run"):
                    await self._own(entry, warm, slots)
                    await uninterrupted(self.engine.start(entry.name))
            except EngineUnreachable:
                raise
            except (EngineError, ControlError, OSError) as problem:
                log.warning("sandbox %s gets a new container, because %s", entry.specification.runtime_id, problem)
                await self.discard(entry)
                return False
            entry.holder, entry.was_warm = warm.state.pid, True
            with self.steps.of("fork"):
                state = await self._fork(entry, warm.plan, warm.state, facts, slots)
            await self.watch(entry, state, facts)
        return True

    async def _check_image(self, warm: Warm) -> None:
        """``EngineError`` if the image's name means another one by now, which no new sandbox may miss."""
        image = await self.engine.image(warm.specification.image)
        if image.id != warm.image_id:
            self.images.forget(warm.specification.image)
            raise EngineError("its image was replaced while a container waited")

    async def _own(self, entry: Entry, warm: Warm, slots: Slots) -> None:
        """What could not be known when the container was made: whose it is, and on which CPUs it runs."""
        labels = self.labels.of(entry.specification.session_id, self._notes(entry, warm.plan))
        await asyncio.to_thread(late_labels.write, warm.state.oci_config, labels)
        cpus = self._cpus(entry, slots)
        if cpus and self.control is not None:
            await self.control.pin(entry.name, warm.state.pid, cpus)

    async def _image(self, entry: Entry) -> ImageFacts:
        return await self.images.need(entry.specification.image, entry.specification.pull_policy, entry.explain)

    async def _plan(self, entry: Entry, image: ImageFacts) -> StartPlan:
        wish = entry.specification
        if not self.agent.is_wanted_by(wish):
            return StartPlan(Start.PLAIN, wish.command, wish.mounts)
        entry.explain("the agent server that is mounted into sandboxes is being prepared")
        tree = await self.agent.tree()
        can_fork = self.agent.fork_ready and self.control is not None
        plan = decide(wish, image, tree, self.agent.image_brings_it(image, wish), can_fork)
        if plan.start is Start.EXEC and self.agent.why_exec:
            self._say_once(f"agent servers are started as plain programs: {self.agent.why_exec}")
        return plan

    async def _start_on_some_port(
        self, entry: Entry, plan: StartPlan, facts: EngineFacts, slots: Slots, host: str
    ) -> ContainerState:
        """A port that another program took in the meantime is given up for another one."""
        for _ in range(PORT_TRIES):
            assert entry.port is not None
            try:
                return await self._start(entry, plan, facts, slots)
            except PortTaken:
                await self.engine.remove(entry.name)
                self.ports.give(entry.port)
                entry.port = self.ports.reserve()
                entry.become(entry.sandbox.located(sandbox_url(host, entry.port.number)))
        raise EngineError(
            f"{PORT_TRIES} ports in a row were taken by other programs; set or widen --sandbox-port-range"
        )

    async def _start(self, entry: Entry, plan: StartPlan, facts: EngineFacts, slots: Slots) -> ContainerState:
        assert entry.port is not None
        cpus = self._cpus(entry, slots)
        entry.has_container = True
        spec = replace(self._container_spec(entry, plan, cpus), pids_together=self._pids_together(slots))
        with self.steps.of("create"):
            await uninterrupted(self.engine.create(spec))
        entry.port.release()
        must_pin = bool(cpus) and not ("cpuset" in facts.controllers and self.config.pinning == "docker_cpuset")
        with self.steps.of("run"):
            if must_pin or self.config.network == "deny":
                await uninterrupted(self.engine.init(entry.name))
                await self._confine(entry, cpus if must_pin else ())
            await uninterrupted(self.engine.start(entry.name))
        with self.steps.of("inspect"):
            state = await self.engine.inspect(entry.name)
        entry.holder = state.pid
        return state

    def _cpus(self, entry: Entry, slots: Slots) -> tuple[int, ...]:
        """Those that it is pinned to; empty where it is not."""
        return slots.cpus_of(entry.lease) if entry.lease and self.config.pinning != "none" else ()

    def _pids_together(self, slots: Slots) -> int:
        """What all sandboxes may have of processes together, 0 for any number.

        Many times what they need, and so much that a fork bomb is seen to be beyond its own limit first.
        """
        if not self.config.pids_limit:
            return 0
        wanted = FEW_PIDS + PIDS_OF_A_SANDBOX * slots.total + self.config.pids_limit * 3 // 2
        _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
        return wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)

    async def _confine(self, entry: Entry, cpus: tuple[int, ...]) -> None:
        """What Podman cannot do, before the first instruction of the sandbox's program."""
        if self.control is None:
            raise EngineError("sandboxes can be neither pinned nor cut off here: the warden does not run")
        holder = (await self.engine.inspect(entry.name)).pid
        try:
            if self.config.network == "deny":
                await self.control.deny_network(entry.name, holder)
            if cpus:
                await self.control.pin(entry.name, holder, cpus)
        except ControlError as problem:
            raise EngineError(f"the sandbox could not be confined: {problem}") from None

    async def _fork(
        self, entry: Entry, plan: StartPlan, state: ContainerState, facts: EngineFacts, slots: Slots
    ) -> ContainerState:
        """The agent server, forked into the idle container; where that is refused, a container that runs it itself."""
        assert self.control is not None
        entry.forked = True
        arguments, folder = plan.arguments, entry.specification.working_dir
        try:
            profile = await self._profile(state)
            forking = self.control.fork(entry.name, state.pid, arguments, folder, profile)
            entry.server = await uninterrupted(forking)
            return state
        except ForkRefused as problem:
            self._say_once(f"an agent server is started as a plain program, because {problem}")
        except ControlError as problem:
            log.warning("an agent server is started as a plain program after all: %s", problem)
        entry.forked = False
        await self.engine.remove(entry.name)
        image = await self._image(entry)
        plain = decide(entry.specification, image, await self.agent.tree(), image_brings_it=False, fork=False)
        return await self._start(entry, plain, facts, slots)

    async def _profile(self, state: ContainerState) -> Mapping[str, Any] | None:
        """The seccomp profile that Podman gave the container; all sandboxes have the same, so it is read once."""
        if not self._knows_seccomp:
            found = await asyncio.to_thread(profile_in, state.oci_config)
            if not self._knows_seccomp:  # several starts may be the first ones: one file, or the others have no owner
                self._seccomp, self._knows_seccomp = found, True
                self.holder_profile.write(native_only(found, os.uname().machine) if found else None)
        return self._seccomp

    async def watch(self, entry: Entry, state: ContainerState, facts: EngineFacts) -> None:
        """Sample every sandbox; bound by the watchdog what no cgroup and no quota bounds."""
        if self.control is None or not state.pid:
            return
        factor, config = entry.specification.resource_factor, self.config
        memory = 0 if "memory" in facts.controllers else round(config.memory_bytes * factor)
        pids = 0 if "pids" in facts.controllers else config.pids_limit
        disk = 0 if facts.disk_quota else round(config.disk_bytes * factor)
        try:
            await self.control.watch(entry.name, entry.holder, memory, pids, disk, state.folders)
        except ControlError as problem:
            log.warning("sandbox %s is not watched: %s", entry.specification.runtime_id, problem)

    def _container_spec(self, entry: Entry, plan: StartPlan, cpus: tuple[int, ...]) -> ContainerSpec:
        assert entry.port is not None
        wish, config = entry.specification, self.config
        return ContainerSpec(
            name=wish.container_name,
            image=wish.image,
            command=plan.command,
            environment={**plan.environment, **wish.container_environment},
            working_dir=wish.working_dir,
            labels=self.labels.of(wish.session_id, self._notes(entry, plan)),
            container_port=wish.container_port,
            host_ip=config.publish_ip,
            host_port=entry.port.number,
            memory_bytes=round(config.memory_bytes * wish.resource_factor),
            cpus=config.cpus_per_worker * wish.resource_factor,
            cpuset=cpus if config.pinning == "docker_cpuset" else (),
            pids=config.pids_limit,
            disk_bytes=round(config.disk_bytes * wish.resource_factor),
            mounts=plan.mounts,
            # A container that only idles; the server that is forked into it gets the whole profile.
            seccomp_profile=self.holder_profile.path if plan.start is Start.FORK else "",
        )

    def _notes(self, entry: Entry, plan: StartPlan) -> Notes:
        """What a server after this one, killed, has to know of the sandbox."""
        wish = entry.specification
        return Notes(
            slots=tuple(sorted(entry.lease.numbers)) if entry.lease else (),
            factor=wish.resource_factor,
            dialect=wish.dialect.name,
            start=plan.start.name,
            url=entry.sandbox.url or "",
            image=wish.image,
            container_port=wish.container_port,
            agent_folder=self.agent_folder if plan.start is not Start.PLAIN else "",
        )

    def _say_once(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            log.warning("%s", sentence)
