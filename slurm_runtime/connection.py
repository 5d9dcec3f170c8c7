"""Does Podman answer, and what can it do? Found out once for all who ask, and said when it changes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from slurm_runtime.background import Background
from slurm_runtime.config import ServerConfig
from slurm_runtime.deadlines import within
from slurm_runtime.logs import log
from slurm_runtime.podman import Engine, EngineError, EngineFacts, EngineUnreachable

T = TypeVar("T")

TRIES = 3  # of one piece of work under which Podman's service goes away: it may be the work that ends it
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.01, 0.5  # between attempts


class Connection:
    """The connection to Podman's service.

    ``word`` is connecting, connected or unreachable; ``facts`` and ``notes`` (which limits do not bite) are there once
    it has answered. ``on_connected`` is awaited then, before anybody gets the facts; again when another service answers
    after the first one went away. ``on_word`` hears of each change of ``word``.
    """

    def __init__(
        self,
        config: ServerConfig,
        engine: Engine,
        background: Background,
        on_connected: Callable[[EngineFacts], Awaitable[None]],
        on_word: Callable[[], object] = lambda: None,
    ) -> None:
        self.config = config
        self.engine = engine
        self.background = background
        self.on_connected = on_connected
        self.on_word = on_word
        self.word = "connecting"
        self.facts: EngineFacts | None = None
        self.notes: list[str] = []
        self._connecting: asyncio.Task[EngineFacts] | None = None
        self._lost = False
        self._closing = False

    @property
    def stands(self) -> bool:
        return self.word == "connected"

    async def ready(self) -> EngineFacts:
        """What Podman can do, as soon as it answers; shared by all who ask. ``EngineError`` after the deadline."""
        task = self._connecting
        if task is None or (task.done() and (self._lost or _failed(task))):
            task = self._connecting = self.background.own(self._connect())
        return await asyncio.shield(task)

    async def patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        """The outcome of ``work``, done again if Podman's service goes away under it and another one answers.

        ``work`` must be fit for that. ``EngineUnreachable`` if none answers within ``outage_s``, or the server stops.
        """
        for tries_left in reversed(range(TRIES)):
            try:
                return await work()
            except EngineUnreachable as problem:
                self.fails(problem)
                if not tries_left or not await self._is_back():
                    raise
        raise AssertionError("the last try returns or raises")

    async def _is_back(self) -> bool:
        if self._closing:
            return False
        try:
            await within(self.config.outage_s, self.ready())
        except (EngineError, asyncio.TimeoutError):
            return False
        return True

    def close(self) -> None:
        """Wait for Podman no more: its owner may have ended it before this server."""
        self._closing = True

    async def _connect(self) -> EngineFacts:
        facts = await self._first_answer()
        self.answers()
        is_first, self.facts, self._lost = self.facts is None, facts, False
        sentence, *self.notes = greeting(facts, self.config)
        if is_first:
            log.info("%s", sentence)
            for note in self.notes:
                log.warning("%s", note)
        await self.on_connected(facts)
        return facts

    async def _first_answer(self) -> EngineFacts:
        patience_s = self.config.connect_timeout_s if self.facts is None else self.config.outage_s
        deadline = time.monotonic() + patience_s
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                return await self.engine.facts()
            except EngineUnreachable:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(pause_s)
                pause_s = min(LONGEST_PAUSE_S, pause_s * 1.3)

    def answers(self) -> None:
        """Note that Podman answers, and say so if it did not before."""
        if self.word == "unreachable":
            log.info("Podman answers again")
        self._be("connected")

    def fails(self, problem: EngineError) -> None:
        """Note that Podman does not answer, and say why when that begins."""
        if self.word != "unreachable":
            log.error("%s", problem)
        self._be("unreachable")
        self._lost = self._lost or isinstance(problem, EngineUnreachable)

    def _be(self, word: str) -> None:
        changed, self.word = word != self.word, word
        if changed:
            self.on_word()


def _failed(task: asyncio.Task[Any]) -> bool:
    return task.cancelled() or task.exception() is not None


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
