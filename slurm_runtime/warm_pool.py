"""Who keeps containers waiting for the next sandboxes, hands them out, and gives them up? (``--warm N``)

What holds: no more warm containers than idle slots; none is made while sandboxes are being started; and whatever is
wrong with one, the sandbox is started as without it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from slurm_runtime.admission import Admission
from slurm_runtime.background import Background
from slurm_runtime.connection import Connection
from slurm_runtime.control import ControlError
from slurm_runtime.entries import uninterrupted
from slurm_runtime.launcher import Launcher
from slurm_runtime.logs import log
from slurm_runtime.podman import EngineError, EngineFacts
from slurm_runtime.ports import Reservation
from slurm_runtime.sandbox import Specification
from slurm_runtime.slots import Lease, units_for
from slurm_runtime.warm import Warm, compared, fits, shape_of, units_of, wanted

RETRY_S = 5.0  # between removals that Podman refuses
QUIET_S = 0.3  # after the last request: by then a burst has begun its starts


class WarmPool:
    """The warm containers of one server, at most ``most``. ``is_busy`` says whether sandboxes are being started."""

    def __init__(
        self,
        launcher: Launcher,
        connection: Connection,
        admission: Admission,
        is_busy: Callable[[], bool],
        most: int,
    ) -> None:
        self.launcher = launcher
        self.connection = connection
        self.admission = admission
        self.is_busy = is_busy
        self.most = most
        self.waiting: list[Warm] = []
        self._leaving: dict[str, asyncio.Task[None]] = {}  # by the names of containers that are being removed
        self._recent: deque[Specification] = deque(maxlen=most)
        self._asked_at = 0.0
        self._stir = asyncio.Event()
        self._making = ""  # the name of the container that is being made
        self._closing = False
        self._filling: asyncio.Task[None] | None = None

    def claim(self, wish: Specification, may: bool) -> tuple[Warm, Lease] | None:
        """A warm container that fits and the slots for it, if both are there at once; they are the caller's then.

        Unless it ``may``, the request is only noted, so that containers like its own wait for those after it.
        """
        if not self.most:
            return None
        self._note(wish)
        if not may:
            return None
        found = next((warm for warm in self.waiting if fits(warm, wish)), None)
        if found is None:
            return None
        self.waiting.remove(found)
        lease = self.admission.lease_now(units_for(wish.resource_factor))
        if lease is None:
            self.waiting.append(found)
            return None
        return found, lease

    def _note(self, wish: Specification) -> None:
        self._asked_at = time.monotonic()
        if self.launcher.agent.is_wanted_by(wish) and wish.pull_policy != "always":
            self._recent.appendleft(wish)
        self._stir.set()

    def slots_changed(self) -> None:
        """Give up at once those that have no idle slot any more."""
        while self.waiting and units_of(self.waiting) > self._idle():
            self._give_up(self.waiting.pop(0))
        self._stir.set()

    def _idle(self) -> int:
        slots, ports = self.admission.slots, self.launcher.ports.allowed
        free = 0 if self.admission.waiting else slots.total - slots.used
        return free if ports is None else min(free, len(ports) - slots.total)  # no sandbox lacks a port for a warm one

    # Filling.

    def begin(self, background: Background) -> None:
        """Keep what should wait, until ``close``."""
        if self.most:
            self._filling = background.own(self._fill())

    async def _fill(self) -> None:
        while True:
            await self._stir.wait()
            self._stir.clear()
            try:
                while await self._changed_one():
                    pass
            except EngineError as problem:  # Podman does not answer: whoever asks next wakes us again
                log.debug("no container is made in advance: %s", problem)

    async def _changed_one(self) -> bool:
        """Make one container, or begin to remove what is not wanted; False if all is as it should be."""
        facts = await self._quiet()
        if not self.launcher.can_prepare(facts):
            return False
        wishes = wanted(list(self._recent), self.most, self._idle())
        surplus, missing = compared(self.waiting, wishes)
        for warm in surplus:
            self.waiting.remove(warm)
            self._give_up(warm)
        if missing:
            await self._make(missing[0], facts)
        return bool(missing)

    async def _quiet(self) -> EngineFacts:
        """Wait until Podman answers, no sandbox is being started, and none was asked for a moment ago."""
        facts = await self.connection.ready()
        while (left_s := self._asked_at + QUIET_S - time.monotonic()) > 0 or self.is_busy():
            await asyncio.sleep(max(left_s, QUIET_S))
        return facts

    async def _make(self, wish: Specification, facts: EngineFacts) -> None:
        """One container like that of ``wish``. Where that cannot be, it is not tried again before somebody asks."""
        key = secrets.token_urlsafe(32)
        template = replace(wish, session_id="", runtime_id=secrets.token_hex(8), session_api_key=key)
        self._making = template.container_name
        try:
            warm = await self._made(template, facts)
        except (EngineError, ControlError, OSError) as problem:
            log.warning("no container waits for the next sandbox of %s: %s", wish.image, problem)
            warm = None
        finally:
            self._making = ""
        if warm is None:
            kept = [one for one in self._recent if shape_of(one) != shape_of(wish)]
            self._recent = deque(kept, maxlen=self.most)
            return
        self.waiting.append(warm)
        self.slots_changed()

    async def _made(self, wish: Specification, facts: EngineFacts) -> Warm | None:
        """The container, or None where its sandbox would not be forked into it; nothing is left of a failure."""
        port = self.launcher.ports.reserve()
        try:
            warm = await self.launcher.prepare(wish, port, self.admission.slots, facts)
        except BaseException:
            self._give_up_container(wish.container_name, port)
            raise
        if warm is None:
            self.launcher.ports.give(port)
        return warm

    # Ending.

    def _give_up(self, warm: Warm) -> None:
        self._give_up_container(warm.specification.container_name, warm.port)

    def _give_up_container(self, name: str, port: Reservation) -> None:
        self._leaving[name] = asyncio.create_task(self._remove(name, port))

    async def _remove(self, name: str, port: Reservation) -> None:
        """Until it is gone; what Podman refuses is tried again as long as this server runs."""
        said = False
        while not await self._is_removed(name, said):
            said = True
            if self._closing:
                return
            await asyncio.sleep(RETRY_S)
        self.launcher.ports.give(port)
        del self._leaving[name]

    async def _is_removed(self, name: str, said: bool) -> bool:
        try:
            await self.connection.patiently(lambda: uninterrupted(self.launcher.engine.remove(name)))
        except EngineError as problem:
            if not said:
                log.error("container %s, which waited for a sandbox, is not removed yet: %s", name, problem)
            return False
        return True

    async def close(self, timeout_s: float) -> list[str]:
        """Make no more and remove all; the names of those that are left after ``timeout_s`` seconds."""
        self._closing, self.most = True, 0
        began = time.monotonic()
        if self._filling is not None:
            self._filling.cancel()
            await asyncio.wait([self._filling], timeout=timeout_s)
        while self.waiting:
            self._give_up(self.waiting.pop())
        if self._leaving:
            tasks = list(self._leaving.values())
            await asyncio.wait(tasks, timeout=max(0.0, began + timeout_s - time.monotonic()))
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return [*self._leaving, *filter(None, [self._making])]
