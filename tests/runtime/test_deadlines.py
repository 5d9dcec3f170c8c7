"""Waits with a deadline: their outcomes, and that a cancellation at any moment ends them."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

import slurm_runtime
from slurm_runtime.deadlines import within

LONG_S = 60.0
PACKAGE = Path(slurm_runtime.__file__).parent


async def told(word: str) -> str:
    await asyncio.sleep(0)
    return word


def test_the_outcome_is_that_of_the_work() -> None:
    async def refuse() -> None:
        raise ValueError("no")

    assert asyncio.run(within(LONG_S, told("done"))) == "done"
    with pytest.raises(ValueError, match="no"):
        asyncio.run(within(LONG_S, refuse()))


def test_too_slow_work_is_cancelled_and_its_end_awaited() -> None:
    ended = []

    async def slow() -> None:
        try:
            await asyncio.sleep(LONG_S)
        finally:
            await asyncio.sleep(0)
            ended.append(True)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(within(0.01, slow()))
    assert ended == [True]


def test_work_that_is_shielded_goes_on() -> None:
    async def live() -> str:
        work = asyncio.create_task(asyncio.sleep(0.05, "late"))
        with contextlib.suppress(asyncio.TimeoutError):
            await within(0.001, asyncio.shield(work))
        return await work

    assert asyncio.run(live()) == "late"


async def _looping(wait: Callable[[Awaitable[str]], Awaitable[str]], ticks: int) -> bool:
    """Whether a loop around ``wait`` ends if it is cancelled so many rounds of the event loop after its work is done.

    The work ends and the cancellation comes as they do when an API server stops while the warden answers it.
    """
    answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    nothing_more = asyncio.Event()

    async def work() -> None:
        await wait(answer)
        await nothing_more.wait()

    task = asyncio.create_task(work())
    await asyncio.sleep(0.01)
    answer.set_result("answered")
    for _ in range(ticks):
        await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=0.2)
    nothing_more.set()
    await asyncio.wait([task])
    return bool(done)


@pytest.mark.parametrize("ticks", range(5))
def test_no_cancellation_is_lost_at_the_end_of_the_work(ticks: int) -> None:
    assert asyncio.run(_looping(lambda answer: within(LONG_S, answer), ticks))


def test_the_server_waits_in_no_other_way() -> None:
    """``asyncio.wait_for`` loses cancellations before Python 3.12. Agent servers, which are killed, may use it."""
    own = [path for path in PACKAGE.rglob("*.py") if path.name not in {"ticks.py", "deadlines.py"}]
    assert len(own) > 50
    assert [path.name for path in own if re.search(r"\bwait_for\(", path.read_text())] == []
