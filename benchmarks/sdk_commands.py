"""Times commands through OpenHands' own client: sdk_commands.py URL COUNT → seconds as JSON; the key on standard input.

Runs under the agent tree's Python.
"""

import json
import sys
import time
from collections.abc import Callable

import httpx
from openhands.sdk.workspace import RemoteWorkspace  # type: ignore[import-not-found]  # in the tree


def timed(work: Callable[[], object], count: int) -> list[float]:
    """Seconds of each call; the first is not counted."""
    seconds = []
    for _ in range(count + 1):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def run(workspace: RemoteWorkspace, command: str, code: int) -> None:
    done = workspace.execute_command(command)
    if done.exit_code != code:
        sys.exit(f"{command} ended with {done.exit_code}: {done.stderr}")


def main() -> None:
    url, count, key = sys.argv[1], int(sys.argv[2]), sys.stdin.read().strip()
    workspace = RemoteWorkspace(host=url, working_dir="/", api_key=key)
    with httpx.Client(base_url=url, trust_env=False) as client:
        found = {
            "true": timed(lambda: run(workspace, "true", 0), count),
            "sleep 0.08": timed(lambda: run(workspace, "sleep 0.08", 0), count),
            "sleep 0.25": timed(lambda: run(workspace, "sleep 0.25", 0), count),
            "health": timed(lambda: client.get("/health").raise_for_status(), count),
        }
    print("RESULT", json.dumps(found))


main()
