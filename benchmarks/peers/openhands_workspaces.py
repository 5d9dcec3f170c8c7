"""Drives OpenHands' own workspaces: openhands_workspaces.py KIND IMAGE VOLUMES MODE COUNT, seconds as lines.

KIND docker: DockerWorkspace; ``docker`` on PATH is Podman. KIND api: APIRemoteWorkspace, on the API server at
RUNTIME_URL with the key RUNTIME_KEY. Runs under the agent tree's Python. A start has ended when the constructor
returns. MODE is one of

    starts     COUNT starts, one after the other: START lines
    commands   one start, then COUNT times the command ``true``: COMMAND lines
    many       COUNT starts at once, a thread each: START lines as they come up, counted from the first request
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from openhands.workspace import APIRemoteWorkspace, DockerWorkspace  # type: ignore[import-not-found]  # the peers' tree


def say(what: str, seconds: float) -> None:
    print(what, seconds, flush=True)


def made(kind: str, image: str, volumes: list[str]) -> Any:
    if kind == "docker":
        return DockerWorkspace(server_image=image, volumes=volumes, detach_logs=False)
    return APIRemoteWorkspace(
        runtime_api_url=os.environ["RUNTIME_URL"],
        runtime_api_key=os.environ["RUNTIME_KEY"],
        server_image=image,
        working_dir="/",
    )


def main() -> None:
    kind, image, volumes, mode, count = sys.argv[1], sys.argv[2], sys.argv[3].split(","), sys.argv[4], int(sys.argv[5])

    def start(began: float | None = None) -> Any:
        began = began or time.perf_counter()
        workspace = made(kind, image, volumes)
        say("START", time.perf_counter() - began)
        return workspace

    if mode == "many":
        began = time.perf_counter()
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(lambda _: start(began), range(count)))
        os._exit(0)  # who asked removes the containers, all at once
    if mode == "starts":
        for _ in range(count):
            start().cleanup()
        return
    workspace = start()
    for _ in range(count):
        began = time.perf_counter()
        assert workspace.execute_command("true").exit_code == 0
        say("COMMAND", time.perf_counter() - began)
    workspace.cleanup()


main()
