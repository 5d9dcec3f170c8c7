"""Drives the real ``APIRemoteWorkspace`` against a server; runs under the client's Python. Prints one JSON object.

drive_sdk.py --api URL --image IMAGE [--key-file FILE] [--count N] SCENARIO
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ARGS: argparse.Namespace


def make(**changes: Any) -> Any:
    from openhands.workspace import APIRemoteWorkspace  # type: ignore[import-not-found,unused-ignore]

    settings = {
        "runtime_api_url": ARGS.api,
        "runtime_api_key": Path(ARGS.key_file).read_text().strip(),
        "server_image": ARGS.image,
        "init_timeout": 280.0,
        "startup_wait_timeout": 280.0,
        "api_timeout": 60.0,
    }
    return APIRemoteWorkspace(**{**settings, **changes})


def use(workspace: Any) -> dict[str, Any]:
    """Everything that a rollout asks of a workspace."""
    found: dict[str, Any] = {}
    done = workspace.execute_command("echo out; echo err >&2; exit 3", cwd="/tmp", timeout=20)
    found["command"] = [done.exit_code, done.stdout, done.stderr, done.timeout_occurred]
    done = workspace.execute_command("sleep 5", timeout=2)
    found["timeout"] = [done.exit_code, done.timeout_occurred]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "a.txt"), Path(folder, "b.txt")
        source.write_text("payload\n")
        found["upload"] = workspace.file_upload(str(source), "/tmp/up dir/a.txt").success
        got = workspace.file_download("/tmp/up dir/a.txt", str(target))
        found["download"] = [got.success, target.read_text() if got.success else None]
        found["missing"] = workspace.file_download("/no/such/file", str(target)).success
    steps = "git init -q /tmp/g && cd /tmp/g && git config user.email a@b && git config user.name a"
    steps += " && echo 1 > f && git add f && git commit -qm i && echo 2 > f && git diff"
    done = workspace.execute_command(steps, timeout=20)
    found["git"] = [done.exit_code, "+2" in done.stdout]
    done = workspace.execute_command("id -u; mkdir -p /swe_util/eval && echo made; touch /workspace/x && echo written")
    found["root"] = done.stdout
    found["alive"] = workspace.alive
    return found


def full() -> Any:
    with make(resource_factor=2, forward_env=["DEMO_ENV"]) as workspace:
        return {**use(workspace), "environment": workspace.execute_command("echo $DEMO_ENV").stdout}


def source_target() -> Any:
    with make(target_type="source", runtime_class=None, image_pull_policy="IfNotPresent") as workspace:
        return workspace.execute_command("echo here").stdout


def pause_resume() -> Any:
    with make() as workspace:
        workspace.execute_command("echo kept > /tmp/kept")
        workspace.pause()
        workspace.resume()
        return workspace.execute_command("cat /tmp/kept").stdout


def attach_running() -> Any:
    first = make(session_id="attached", keep_alive=True)
    first.execute_command("echo kept > /tmp/kept")
    first.cleanup()
    with make(session_id="attached") as second:
        return second.execute_command("cat /tmp/kept").stdout


def attach_paused() -> Any:
    first = make(session_id="slept", pause_on_close=True)
    first.execute_command("echo kept > /tmp/kept")
    first.cleanup()
    with make(session_id="slept") as second:
        return second.execute_command("cat /tmp/kept").stdout


def dropped() -> Any:
    workspace = make()
    answer = workspace.execute_command("echo here").stdout
    del workspace
    import gc

    gc.collect()
    return answer


def parallel() -> Any:
    def one(number: int) -> str:
        with make(session_id=f"parallel-{number}-{time.time_ns()}") as workspace:
            return str(workspace.execute_command(f"echo {number}").stdout)

    with ThreadPoolExecutor(ARGS.count) as pool:
        return list(pool.map(one, range(ARGS.count)))


SCENARIOS: dict[str, Callable[[], Any]] = {
    one.__name__: one for one in (full, source_target, pause_resume, attach_running, attach_paused, dropped, parallel)
}


def main() -> None:
    global ARGS
    parser = argparse.ArgumentParser()
    for name in ("--api", "--image", "--key-file"):
        parser.add_argument(name, required=True)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("scenario", choices=SCENARIOS)
    ARGS = parser.parse_args()
    logging.disable(logging.CRITICAL)
    print("RESULT " + json.dumps(SCENARIOS[ARGS.scenario]()))


if __name__ == "__main__":
    main()
