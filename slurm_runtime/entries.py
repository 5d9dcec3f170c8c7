"""What the manager holds of one sandbox, and what can go wrong with it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from slurm_runtime.deadlines import within
from slurm_runtime.ports import Reservation
from slurm_runtime.sandbox import Sandbox, Specification
from slurm_runtime.slots import Lease
from slurm_runtime.warm import Warm

T = TypeVar("T")


class UnknownSandbox(Exception):
    """No sandbox has this runtime id or session id."""


class NoRoom(Exception):
    """No slot became free in time."""


class NeverFits(Exception):
    """More slots were asked for than there are."""


class TooSlow(Exception):
    """Podman did not answer within the patience of the client."""


class StoppedEarly(Exception):
    """Somebody stopped the sandbox before it had started."""


class WrongState(Exception):
    """The sandbox cannot do this in the state that it is in."""


class Stopping(Exception):
    """The server is on its way down."""


class Draining(Exception):
    """The node takes no new sandboxes; those that are there go on."""


class SandboxDied(Exception):
    """The container ended before its server answered."""


class NeverReady(Exception):
    """The sandbox's server did not answer in time."""


def unheard() -> None:
    """For an entry that nobody knows yet, or any more."""


class Entry:
    """One sandbox with what belongs to it while it lives: its lease, its port, the tasks that work on it.

    ``holder`` is the container's first process; ``is_watched`` says that the kernel tells of its end, ``has_ended``
    that it has told. ``forked`` says that its server was forked into it, so that the container does not end with its
    server; ``server`` is then the server's process, ``server_ended`` that it is gone, ``server_exit`` its exit code
    where that is known. ``is_new``: this server starts it, and has not taken it over. ``on_change`` hears of each
    change of ``sandbox``.
    """

    def __init__(self, sandbox: Sandbox, *, is_new: bool = False) -> None:
        self.sandbox = sandbox
        self.is_new = is_new
        self.on_change: Callable[[], None] = unheard
        self.lease: Lease | None = None
        self.port: Reservation | None = None
        self.warm: Warm | None = None  # the container that waited for it, until its start begins
        self.was_warm = False  # it runs in such a one
        self.has_container = False
        self.holder = 0
        self.is_watched = False
        self.has_ended = False
        self.forked = False
        self.server = 0
        self.server_ended = False
        self.server_exit: int | None = None
        self.knows_server_exit = asyncio.Event()
        self.offence: str | None = None
        self.askers = 0
        self.asked_at = time.monotonic()
        self.busy_at = self.asked_at
        self.ready_at: float | None = None
        self.problem: Exception | None = None
        self.bring_up: asyncio.Task[None] | None = None
        self.ending: asyncio.Task[None] | None = None
        self.pausing = asyncio.Lock()
        self._changed = asyncio.Event()

    @property
    def specification(self) -> Specification:
        return self.sandbox.specification

    @property
    def name(self) -> str:
        """The container's name."""
        return self.sandbox.specification.container_name

    @property
    def awaits_verdict(self) -> bool:
        """It has ended, and only Podman can tell how: the watchdog did not stop it."""
        return self.has_ended and self.offence is None

    @property
    def is_clean(self) -> bool:
        """Nothing of it is left: no container, no slot."""
        return self.lease is None and not self.has_container

    def become(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.on_change()
        self._changed.set()
        self._changed = asyncio.Event()

    def explain(self, reason: str) -> None:
        """Say what it waits for."""
        self.become(self.sandbox.explained(reason))

    async def until(self, reached: Callable[[Sandbox], bool], timeout_s: float) -> bool:
        """Wait for a change that satisfies ``reached``; False if there was none within ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while not reached(self.sandbox):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            with contextlib.suppress(asyncio.TimeoutError):
                await within(left, self._changed.wait())
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
