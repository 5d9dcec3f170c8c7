"""Looks at commands of a real ``BashEventService`` with and without the held first look; prints one JSON object.

look_at_commands.py PATH_OF_THE_MODULE; runs under the Python of an agent server.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

SECONDS = 60.0  # for what must come
COMMANDS = (
    {"command": "true"},
    {"command": "echo out; echo err >&2; exit 3"},
    {"command": "sleep 0.3; echo late; exit 4"},
    {"command": "head -c 2500000 /dev/zero | tr '\\0' x"},  # several events
    {"command": "kill -9 $$"},
    {"command": "true", "cwd": "/nonexistent"},
    {"command": "echo before; sleep 30", "timeout": 1},
)


def loaded(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("first_look", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def service(first_look: Any, held: bool) -> Any:
    from openhands.agent_server.bash_service import BashEventService  # type: ignore[import-not-found,unused-ignore]

    own = type("Own", (BashEventService,), {})
    if held:
        first_look.hold(own)
    return own(bash_events_dir=Path(tempfile.mkdtemp()))


async def started(one: Any, **fields: Any) -> Any:
    from openhands.agent_server.models import ExecuteBashRequest  # type: ignore[import-not-found,unused-ignore]

    command, _ = await one.start_bash_command(ExecuteBashRequest(**fields))
    return command.id


async def looked(one: Any, name: Any) -> list[Any]:
    """What was put out so far, as one look tells it."""
    page = await one.search_bash_events(command_id__eq=name)
    found = [event for event in page.items if event.kind == "BashOutput"]
    return [
        [event.order, event.exit_code, brief(event.stdout), brief(event.stderr)]
        for event in sorted(found, key=lambda event: event.order)
    ]


def brief(text: str | None) -> str | None:
    return text if text is None or len(text) < 100 else f"{text[0]} × {len(text)}"


async def outcome(one: Any, **fields: Any) -> list[Any]:
    """As the SDK learns it: look, sleep, look again."""
    name = await started(one, **fields)
    while True:
        found = await looked(one, name)
        if any(event[1] is not None for event in found):
            return found
        await asyncio.sleep(0.01)


async def same(first_look: Any) -> list[Any]:
    """What each command's client is told, with and without the hold."""
    told = []
    for fields in COMMANDS:
        pair = [outcome(service(first_look, held), **fields) for held in (False, True)]
        told.append(await asyncio.wait_for(asyncio.gather(*pair), SECONDS))
    return told


async def holding(first_look: Any) -> dict[str, Any]:
    """Whose look waits for what, told by a command that ends when it is let go."""
    one, gate = service(first_look, True), Path(tempfile.mkdtemp()) / "gate"
    os.mkfifo(gate)
    first_look.HOLD_S = SECONDS
    name = await started(one, command=f"read word < {gate}; exit 5")
    first = asyncio.create_task(looked(one, name))
    await asyncio.sleep(0)  # it begins
    found: dict[str, Any] = {
        "later look": await looked(one, name),
        "another command": await outcome(one, command="exit 6"),
    }
    found["held"] = not first.done()
    await asyncio.to_thread(gate.write_text, "go\n")
    found["first look"] = await asyncio.wait_for(first, SECONDS)
    first_look.HOLD_S = 0.01
    name = await started(one, command=f"read word < {gate}; exit 7")
    found["look beyond the bound"] = await asyncio.wait_for(looked(one, name), SECONDS)
    await asyncio.to_thread(gate.write_text, "go\n")
    return found


async def main() -> None:
    first_look = loaded(sys.argv[1])
    told = {"same": await same(first_look), "holding": await asyncio.wait_for(holding(first_look), 2 * SECONDS)}
    print("RESULT", json.dumps(told), flush=True)


asyncio.run(main())
