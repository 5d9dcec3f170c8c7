"""The kernel tells when a process ends: tried on real processes."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from slurm_runtime.deaths import Deaths

DEADLINE_S = 5.0


def scene(play: Callable[[Deaths, asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    async def live() -> None:
        deaths = Deaths()
        try:
            await asyncio.wait_for(play(deaths, asyncio.Event()), DEADLINE_S)
        finally:
            deaths.close()

    asyncio.run(live())


@pytest.fixture
def sleeper() -> Any:
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # names alone


def test_an_end_is_told_once(sleeper: subprocess.Popen[bytes]) -> None:
    async def play(deaths: Deaths, told: asyncio.Event) -> None:
        before = open_files()
        assert deaths.watch(sleeper.pid, told.set)
        await asyncio.sleep(0.05)
        assert not told.is_set()
        sleeper.kill()
        await told.wait()
        assert open_files() == before

    scene(play)


def test_what_is_forgotten_is_not_told(sleeper: subprocess.Popen[bytes]) -> None:
    async def play(deaths: Deaths, told: asyncio.Event) -> None:
        assert deaths.watch(sleeper.pid, told.set)
        deaths.forget(sleeper.pid)
        sleeper.kill()
        sleeper.wait()
        await asyncio.sleep(0.1)
        assert not told.is_set()

    scene(play)


def test_a_process_that_has_ended_already_is_told(sleeper: subprocess.Popen[bytes]) -> None:
    async def play(deaths: Deaths, told: asyncio.Event) -> None:
        sleeper.kill()
        sleeper.wait()
        assert deaths.watch(sleeper.pid, told.set)
        await told.wait()

    scene(play)


def test_an_old_kernel_and_a_container_without_a_process_are_said(
    sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play(deaths: Deaths, told: asyncio.Event) -> None:
        assert not deaths.watch(0, told.set)
        monkeypatch.delattr(os, "pidfd_open")
        assert not deaths.watch(sleeper.pid, told.set)

    scene(play)
