"""Who gets the next free slots: first come, first served."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection

from slurm_runtime.slots import Lease, Slots


def nothing() -> None:
    """For those who do not want to hear of it."""


class Admission:
    """Leases slots in the order of asking; a large request at the front is not overtaken by small ones.

    ``on_change`` hears of each change of ``slots`` and ``waiting``.
    """

    def __init__(self, slots: Slots, on_change: Callable[[], object] = lambda: None) -> None:
        self.slots = slots
        self._on_change = on_change
        self._queue: deque[tuple[int, asyncio.Future[Lease]]] = deque()
        self.on_fewer_idle: Callable[[], None] = nothing  # called when slots may have been leased, or are waited for

    @property
    def waiting(self) -> int:
        return len(self._queue)

    async def lease(self, count: int) -> Lease:
        """``count`` slots, as soon as they are free; ``count`` must not exceed the total."""
        future: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        self._queue.append((count, future))
        self._grant()
        self._on_change()
        try:
            return await future
        except asyncio.CancelledError:
            self._withdraw(count, future)
            raise

    def lease_now(self, count: int) -> Lease | None:
        """``count`` slots if they are free and nobody waits for any."""
        granted = None if self._queue else self.slots.take(count)
        if granted is None:
            return None
        self.slots, lease = granted
        self.on_fewer_idle()
        return lease

    def take_these(self, numbers: Collection[int]) -> Lease | None:
        """Slots that a sandbox holds already, before anybody waits; None where they are not to be had."""
        taken = self.slots.take_these(numbers)
        if taken is None:
            return None
        self.slots, lease = taken
        self._on_change()
        return lease

    def give(self, lease: Lease) -> None:
        """Return slots; whoever waits first and fits gets them."""
        self.slots = self.slots.give(lease)
        self._grant()
        self._on_change()

    def _withdraw(self, count: int, future: asyncio.Future[Lease]) -> None:
        if future.done() and not future.cancelled():
            self.give(future.result())
        elif (count, future) in self._queue:
            self._queue.remove((count, future))
            self._grant()
            self._on_change()

    def _grant(self) -> None:
        while self._queue:
            count, future = self._queue[0]
            if future.cancelled():  # its asker has been cancelled too and has not yet run to withdraw it
                self._queue.popleft()
                continue
            granted = self.slots.take(count)
            if granted is None:
                break
            self.slots, lease = granted
            self._queue.popleft()
            future.set_result(lease)
        self.on_fewer_idle()
