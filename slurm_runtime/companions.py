"""What else runs once Podman answers, and ends with the server: the warden, its fork server, an image's agent tree."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path

from slurm_runtime.agent.take_out import NoTree, remove, take_out
from slurm_runtime.background import Background
from slurm_runtime.control import Control, ControlError, Event, OnEvent
from slurm_runtime.entries import uninterrupted
from slurm_runtime.launcher import Launcher
from slurm_runtime.logs import log
from slurm_runtime.podman import ContainerSpec, EngineError, EngineFacts

FOLDER_PREFIX = "skyrl-agent-"
MakeControl = Callable[[int, OnEvent], Control]  # for the process id of Podman's service


class Companions:
    """Started by ``start``, ended by ``close``. Without a warden sandboxes are served plainly.

    ``on_event`` hears what the warden sees of sandboxes.
    """

    def __init__(
        self, launcher: Launcher, background: Background, make_control: MakeControl | None, on_event: OnEvent
    ) -> None:
        self.launcher = launcher
        self.agent = launcher.agent
        self.background = background
        self.make_control = make_control
        self.on_event = on_event
        self._agent_folder: Path | None = None

    async def start(self, facts: EngineFacts) -> None:
        """Begin; returns once the warden runs, or cannot. Again when Podman's service is another one."""
        if self.launcher.config.agent_image and self._agent_folder is None:
            self.background.start(self._take_agent_out(self.launcher.config.agent_image))
        await self._start_control(facts)

    async def close(self) -> None:
        if self.launcher.control is not None:
            await self.launcher.control.close()
        if self._agent_folder is not None:
            await asyncio.to_thread(remove, self._agent_folder)
        for folder in map(Path, self.launcher.agent_folders):
            if folder.name.startswith(FOLDER_PREFIX):
                await asyncio.to_thread(remove, folder)

    async def _take_agent_out(self, image: str) -> None:
        """The agent tree of --agent-image, into a folder that lives as long as this server."""
        name, engine = f"agent-{secrets.token_hex(8)}", self.launcher.engine
        self._agent_folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
        self.launcher.agent_folder = str(self._agent_folder)
        self._agent_folder.chmod(0o755)  # containers of a service under another user mount it too
        spec = ContainerSpec(name, image, ("/",), {}, "/", self.launcher.labels.of(""), container_port=1)
        try:
            await self.launcher.images.pull(image, "missing")
            try:  # cancelled while Podman creates it, the container is there all the same
                await uninterrupted(engine.create(spec))
                self.agent.provide(await take_out(engine.export(name), image, self._agent_folder))
            finally:
                await uninterrupted(engine.remove(name))
            log.info("agent server taken out of %s", image)
        except (EngineError, NoTree, OSError) as problem:
            sentence = f"there is no agent server for sandboxes: {problem}"
            log.error("%s", sentence)
            self.agent.fail(EngineError(sentence))

    async def _start_control(self, facts: EngineFacts) -> None:
        """The warden, and its fork server as soon as there is a tree."""
        if self.launcher.control is not None:
            self.launcher.control.podman_is(facts.pid)
            return
        if self.make_control is None:
            return
        control = self.make_control(facts.pid, self._hear)
        try:
            await control.start()
        except (ControlError, OSError) as problem:
            self.agent.why_exec = str(problem)
            log.warning("no warden: %s; sandboxes are neither watched nor forked, nor can they be cut off", problem)
            return
        self.launcher.control = control
        if self.agent.wants_fork:
            self.background.start(self._start_forking(control))

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

    def _hear(self, event: Event) -> None:
        if event.get("event") == "fork_server":
            self._fork_server_is(str(event.get("state")), str(event.get("reason") or ""))
        else:
            self.on_event(event)

    def _fork_server_is(self, word: str, reason: str) -> None:
        self.agent.fork_ready = word == "ready"
        self.agent.why_exec = "" if word == "ready" else f"the fork server is not to be had ({reason or word})"
        (log.info if word == "ready" else log.warning)("fork server: %s%s", word, f" ({reason})" if reason else "")
