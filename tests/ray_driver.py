"""A trainer that only looks: what does a driver find in the Ray cluster of its run? Runs under the Python with Ray.

Prints ``DRIVER {…}`` and ends, or with ``hold`` stays until it is ended. The GPUs are counted as VERL counts them
before it makes its resource pool (verl 0.5.0, ``ResourcePoolManager._check_resource_available``), and taken as it takes
them: one placement group for each node, with one bundle for each GPU.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import time
from typing import Any


def main(nodes: int, gpus: int, hold: bool) -> None:
    ray: Any = importlib.import_module("ray")
    groups: Any = importlib.import_module("ray.util.placement_group")
    strategies: Any = importlib.import_module("ray.util.scheduling_strategies")
    ray.init(log_to_driver=False)  # without an address, as VERL does
    available = ray._private.state.available_resources_per_node()
    pool = [groups.placement_group([{"CPU": 1, "GPU": 1}] * gpus, strategy="STRICT_PACK") for _ in range(nodes)]
    ray.get([group.ready() for group in pool], timeout=60)

    def look() -> tuple[str, str, str, str]:
        names = ("SANDBOX_REMOTE_RUNTIME_API_URL", "ALLHANDS_API_KEY", "CUDA_VISIBLE_DEVICES")
        url, key, devices = (os.environ.get(name, "") for name in names)
        return socket.gethostname(), url, str(len(key)), devices

    remote = ray.remote(num_cpus=1, num_gpus=1)(look)
    waiting = [
        remote.options(
            scheduling_strategy=strategies.PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
        ).remote()
        for group in pool
        for index in range(gpus)
    ]
    found = {
        "host": socket.gethostname(),
        "address": os.environ["RAY_ADDRESS"],
        "gpus": sorted(node.get("GPU", 0) for node in available.values()),
        "workers": sorted(ray.get(waiting, timeout=60)),
    }
    print("DRIVER", json.dumps(found), flush=True)
    while hold:
        time.sleep(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] == ["hold"])
