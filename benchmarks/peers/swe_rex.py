"""Drives SWE-ReX: swe_rex.py IMAGE VOLUMES MODE COUNT, seconds as lines.

Runs under the agent tree's Python. A start has ended when ``DockerDeployment.start`` returns. MODE is one of

    starts     COUNT starts, one after the other: START lines
    commands   one start, then COUNT times the command ``true``: COMMAND lines of ``execute``, and SESSION lines of
               ``run_in_session`` where the image has a bash
    many       COUNT starts at once, a thread with an event loop each, as SWE-agent runs its batches: START lines as
               they come up, counted from the first request
"""

import asyncio
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from swerex.deployment.docker import DockerDeployment  # type: ignore[import-not-found]  # in the tree of the peers
from swerex.runtime.abstract import (  # type: ignore[import-not-found]  # in the tree of the peers
    BashAction,
    Command,
    CreateBashSessionRequest,
)


def say(what: str, seconds: float) -> None:
    print(what, seconds, flush=True)


async def start(image: str, volumes: list[str], began: float | None = None) -> Any:
    words = [word for volume in volumes for word in ("-v", volume)]
    deployment = DockerDeployment(image=image, container_runtime="podman", docker_args=words, pull="never")
    began = began or time.perf_counter()
    await deployment.start()
    say("START", time.perf_counter() - began)
    return deployment


async def commands(image: str, volumes: list[str], count: int) -> None:
    deployment = await start(image, volumes)
    runtime = deployment.runtime
    for _ in range(count):
        began = time.perf_counter()
        assert (await runtime.execute(Command(command=["true"]))).exit_code == 0
        say("COMMAND", time.perf_counter() - began)
    if (await runtime.execute(Command(command=["sh", "-c", "command -v bash"]))).exit_code == 0:
        await runtime.create_session(CreateBashSessionRequest())
        for _ in range(count):
            began = time.perf_counter()
            assert (await runtime.run_in_session(BashAction(command="true"))).exit_code == 0
            say("SESSION", time.perf_counter() - began)
    await deployment.stop()


async def starts(image: str, volumes: list[str], count: int) -> None:
    for _ in range(count):
        await (await start(image, volumes)).stop()


def many(image: str, volumes: list[str], count: int) -> None:
    began = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda _: asyncio.run(start(image, volumes, began)), range(count)))
    os._exit(0)  # who asked removes the containers, all at once


def main() -> None:
    image, volumes, mode, count = sys.argv[1], sys.argv[2].split(","), sys.argv[3], int(sys.argv[4])
    if mode == "many":
        many(image, volumes, count)
    asyncio.run({"starts": starts, "commands": commands}[mode](image, volumes, count))


main()
