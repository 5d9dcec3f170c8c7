"""Drives the real legacy ``RemoteRuntime`` against a server; runs under the client's Python. Prints one JSON object.

drive_legacy.py --api URL --image IMAGE --key-file FILE SCENARIO
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ARGS: argparse.Namespace


def make(session: str, **changes: Any) -> Any:
    from openhands.core.config import (  # type: ignore[import-not-found,unused-ignore]
        OpenHandsConfig,
        SandboxConfig,
    )
    from openhands.events import EventStream  # type: ignore[import-not-found,unused-ignore]
    from openhands.llm.llm_registry import LLMRegistry  # type: ignore[import-not-found,unused-ignore]
    from openhands.runtime.impl.remote.remote_runtime import (  # type: ignore[import-not-found,unused-ignore]
        RemoteRuntime,
    )
    from openhands.storage import get_file_store  # type: ignore[import-not-found,unused-ignore]

    settings = {
        "api_key": Path(ARGS.key_file).read_text().strip(),
        "remote_runtime_api_url": ARGS.api,
        "remote_runtime_init_timeout": 180,
        "remote_runtime_api_timeout": 120,
        "remote_runtime_class": "sysbox",
        "runtime_container_image": ARGS.image,
        "timeout": 60,
    }
    config = OpenHandsConfig(
        runtime="remote",
        sandbox=SandboxConfig(**{**settings, **changes}),
        run_as_openhands=False,
        enable_browser=False,
        workspace_base=None,
    )
    events = EventStream(session, get_file_store("local", tempfile.mkdtemp()))
    return RemoteRuntime(config, events, LLMRegistry(config), sid=session, plugins=[])


def use(runtime: Any) -> dict[str, Any]:
    from openhands.events.action import (  # type: ignore[import-not-found,unused-ignore]
        CmdRunAction,
        FileReadAction,
        FileWriteAction,
    )

    found: dict[str, Any] = {}
    seen = runtime.run_action(CmdRunAction(command="echo out; (exit 3)"))
    found["command"] = [getattr(seen, "exit_code", None), "out" in str(getattr(seen, "content", ""))]
    found["write"] = type(runtime.run_action(FileWriteAction(path="/tmp/x.txt", content="payload\n"))).__name__
    found["read"] = "payload" in str(runtime.run_action(FileReadAction(path="/tmp/x.txt")).content)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "a.txt").write_text("x\n")
        runtime.copy_to(str(Path(folder, "a.txt")), "/tmp/dir")
        found["files"] = runtime.list_files("/tmp/dir")
        found["zip"] = Path(runtime.copy_from("/tmp/dir")).stat().st_size > 0
    return found


async def connected(session: str, action: Callable[[Any], Any], **changes: Any) -> Any:
    runtime = make(session, **changes)
    await runtime.connect()
    try:
        return await asyncio.get_running_loop().run_in_executor(None, action, runtime)
    finally:
        runtime.close()


def full() -> Any:
    variables = {"NO_CHANGE_TIMEOUT_SECONDS": "30"}
    return asyncio.run(connected("legacy", use, remote_runtime_resource_factor=2, runtime_startup_env_vars=variables))


def paused_and_attached() -> Any:
    def command(text: str) -> Callable[[Any], Any]:
        from openhands.events.action import CmdRunAction  # type: ignore[import-not-found,unused-ignore]

        return lambda runtime: str(runtime.run_action(CmdRunAction(command=text)).content)

    asyncio.run(connected("asleep", command("echo kept > /tmp/kept"), keep_runtime_alive=True))
    return asyncio.run(connected("asleep", command("cat /tmp/kept")))


SCENARIOS: dict[str, Callable[[], Any]] = {one.__name__: one for one in (full, paused_and_attached)}


def main() -> None:
    global ARGS
    parser = argparse.ArgumentParser()
    for name in ("--api", "--image", "--key-file"):
        parser.add_argument(name, required=True)
    parser.add_argument("scenario", choices=SCENARIOS)
    ARGS = parser.parse_args()
    import openhands.core.logger  # type: ignore[import-not-found,unused-ignore]  # noqa: F401  before it is silenced

    logging.disable(logging.CRITICAL)
    print("RESULT " + json.dumps(SCENARIOS[ARGS.scenario]()))


if __name__ == "__main__":
    main()
