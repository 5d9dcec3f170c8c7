"""Runs one scenario of a driver that was written for the recording stub against a real server.

run_shared_driver.py DRIVER --api URL --image IMAGE --key-file FILE SCENARIO; under the client's Python.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("driver", type=Path)
    for name in ("--api", "--image", "--key-file"):
        parser.add_argument(name, required=True)
    parser.add_argument("scenario")
    args = parser.parse_args()
    spec = importlib.util.spec_from_file_location("driver", args.driver)
    assert spec and spec.loader
    driver = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(driver)
    run(driver, args)


def run(driver: Any, args: argparse.Namespace) -> None:
    """Only what names the stub is replaced: its control channel, its image and key, and its limits of seconds."""
    key, plain = Path(args.key_file).read_text().strip(), driver.make
    is_legacy = hasattr(driver, "asyncio")
    wishes: dict[str, Any] = {"init_timeout": 280.0, "startup_wait_timeout": 280.0, "server_image": args.image}
    wishes |= {"runtime_api_key": key}
    if is_legacy:
        wishes = {"api_key": key, "runtime_container_image": args.image, "remote_runtime_init_timeout": 180}
        wishes |= {"remote_runtime_api_timeout": 120}
    driver.API, driver.ctl = args.api, lambda *_: []
    driver.make = lambda *words, **changes: plain(*words, **{**wishes, **changes})
    if is_legacy:
        import openhands.core.logger  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    logging.disable(logging.CRITICAL)
    result = driver.asyncio.run(driver.run(args.scenario)) if is_legacy else driver.run(args.scenario)
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
