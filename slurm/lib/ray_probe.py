"""Which nodes are in the Ray cluster? Runs under the Python that has Ray; prints a JSON line at every change.

``python -m slurm.lib.ray_probe HOST:PORT`` on a node of the cluster; ends when its standard input does. A line is a
list of ``{"name", "alive", "gpus"}``. While the cluster cannot be joined it tries again.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import sys
from typing import Any

LOOK_EVERY_S = 0.5


def look(ray: Any) -> str:
    nodes = [
        {"name": node["NodeName"], "alive": node["Alive"], "gpus": node["Resources"].get("GPU", 0.0)}
        for node in ray.nodes()
    ]
    return json.dumps(sorted(nodes, key=lambda node: str(node["name"])))


def told_to_end() -> bool:
    """Wait a little; whether standard input has ended."""
    ready, _, _ = select.select([sys.stdin], [], [], LOOK_EVERY_S)
    return bool(ready) and not os.read(sys.stdin.fileno(), 1)


def main(address: str) -> None:
    ray = importlib.import_module("ray")  # not in the suite's own environment
    seen = ""
    while not told_to_end():
        try:
            if not ray.is_initialized():
                ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            line = look(ray)
        except ConnectionError as problem:
            sys.stderr.write(f"cannot join {address} yet: {problem}\n")
            continue
        if line != seen:
            seen = line
            print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
