"""Times SWE-ReX: swe_rex.py IMAGE VOLUMES COUNT → seconds as JSON.

Runs under the agent tree's Python. A start has ended when ``DockerDeployment.start`` returns.
"""

import asyncio
import json
import sys
import time

from swerex.deployment.docker import DockerDeployment  # type: ignore[import-not-found]  # in the tree of the peers


async def one(image: str, volumes: list[str]) -> float:
    words = [word for volume in volumes for word in ("-v", volume)]
    deployment = DockerDeployment(image=image, container_runtime="podman", docker_args=words, pull="never")
    began = time.perf_counter()
    await deployment.start()
    seconds = time.perf_counter() - began
    await deployment.stop()
    return seconds


async def main() -> None:
    image, volumes, count = sys.argv[1], sys.argv[2].split(","), int(sys.argv[3])
    print("RESULT", json.dumps([await one(image, volumes) for _ in range(count)]))


asyncio.run(main())
