"""Who gets the next free slots: first come, first served."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection

from slurm_runtime.slots import Lease, Slots


class Admission:
    """Leases slots in the order of asking; a large request at the front is not overtaken by small ones."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self._queue: deque[tuple[int, asyncio.Future[Lease]]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    async def lease(self, count: int) -> Lease:
        """``count`` slots, as soon as they are free; ``count`` must not exceed the total."""
        future: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        self._queue.append((count, future))
        self._grant()
        try:
            return await future
        except asyncio.CancelledError:
            self._withdraw(count, future)
            raise

    def take_these(self, numbers: Collection[int]) -> Lease | None:
        """Slots that a sandbox holds already, before anybody waits; None where they are not to be had."""
        taken = self.slots.take_these(numbers)
        if taken is None:
            return None
        self.slots, lease = taken
        return lease

    def give(self, lease: Lease) -> None:
        """Return slots; whoever waits first and fits gets them."""
        self.slots = self.slots.give(lease)
        self._grant()

    def _withdraw(self, count: int, future: asyncio.Future[Lease]) -> None:
        if future.done() and not future.cancelled():
            self.give(future.result())
        elif (count, future) in self._queue:
            self._queue.remove((count, future))
            self._grant()

    def _grant(self) -> None:
        while self._queue:
            count, future = self._queue[0]
            granted = self.slots.take(count)
            if granted is None:
                return
            self.slots, lease = granted
            self._queue.popleft()
            future.set_result(lease)
