"""How long does one step wait? As long as it may, and no cancellation is lost at its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from typing import Any, TypeVar

T = TypeVar("T")


async def within(seconds: float, work: Awaitable[T]) -> T:
    """The outcome of ``work``; ``asyncio.TimeoutError`` if it is not there after so many seconds, and it is cancelled.

    In place of ``asyncio.wait_for``, which before Python 3.12 returns where it is cancelled in the moment that the
    work ends (CPython issue 86296): a loop around it then goes on for ever, and with it the server that is to stop.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task], timeout=seconds)
    except asyncio.CancelledError:
        await _ended(task)
        raise
    if not task.done():
        await _ended(task)
    if task.cancelled():
        raise asyncio.TimeoutError
    return task.result()


async def at_once_or_within(seconds: float, work: Awaitable[T]) -> T:
    """As ``within``, but work that ends without waiting costs no task: three pieces of each request do.

    The work must not ask which task it is in: it may begin in one and go on in another.
    """
    steps = work.__await__()
    try:
        waits_for = next(steps)
    except StopIteration as done:
        outcome: T = done.value
        return outcome
    return await within(seconds, _Begun(steps, waits_for))


class _Begun(Awaitable[T]):
    """Work that has begun and waits."""

    def __init__(self, steps: Generator[Any, Any, T], waits_for: Any) -> None:
        self._steps = steps
        self._waits_for = waits_for

    def __await__(self) -> Generator[Any, Any, T]:
        waits_for = self._waits_for
        while True:
            try:
                got = yield waits_for
            except BaseException as problem:
                step: Callable[[Any], Any] = self._steps.throw
                given: Any = problem
            else:
                step, given = self._steps.send, got
            try:
                waits_for = step(given)
            except StopIteration as done:
                outcome: T = done.value
                return outcome


async def _ended(task: asyncio.Future[T]) -> None:
    """Cancel it, and wait until what it does for that is done; its error is nobody's."""
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()
