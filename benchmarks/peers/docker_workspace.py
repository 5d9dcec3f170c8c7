"""Times OpenHands' DockerWorkspace: docker_workspace.py IMAGE VOLUMES COUNT → seconds as JSON.

Runs under the agent tree's Python; ``docker`` on PATH is Podman. A start has ended when the constructor returns.
"""

import json
import sys
import time

from openhands.workspace import DockerWorkspace  # type: ignore[import-not-found]  # in the tree of the peers


def main() -> None:
    image, volumes, count = sys.argv[1], sys.argv[2].split(","), int(sys.argv[3])
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        workspace = DockerWorkspace(server_image=image, volumes=volumes, detach_logs=False)
        seconds.append(time.perf_counter() - began)
        workspace.cleanup()
    print("RESULT", json.dumps(seconds))


main()
