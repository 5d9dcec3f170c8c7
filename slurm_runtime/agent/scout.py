"""Which modules does the agent server import only once it serves? Runs under the tree's Python; prints a JSON list.

The fork server imports them too, so that a forked server has nothing left to import. Stops by itself.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import threading
import time
import urllib.request

DEADLINE_S = 90.0


def ask(url: str, body: object = None) -> None:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        answer.read()


def exercise(port: int, before: set[str], out: int) -> None:
    """Use the server as a client would, then tell what it has imported and end the process."""
    base, end = f"http://127.0.0.1:{port}", time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        try:
            ask(base + "/ready")
            break
        except OSError:
            time.sleep(0.1)
    else:
        os._exit(1)
    for path, body in (
        ("/health", None),  # in a thread, as others are
        ("/server_info", None),
        ("/api/bash/start_bash_command", {"command": "true"}),
        ("/api/bash/execute_bash_command", {"command": "true", "timeout": 10}),
        ("/api/bash/bash_events/search?limit=10", None),
    ):
        try:
            ask(base + path, body)
        except OSError:
            continue
    found = [name for name, module in list(sys.modules.items()) if name not in before and module is not None]
    os.write(out, json.dumps(found).encode())
    os._exit(0)


def main() -> None:
    out = os.dup(1)
    os.dup2(2, 1)  # what the server prints is no value
    server = importlib.import_module("openhands.agent_server.__main__")
    importlib.import_module("openhands.agent_server.api")
    before = set(sys.modules) - {"__main__"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threading.Thread(target=exercise, args=(port, before, out), daemon=True).start()
    sys.argv = ["openhands-agent-server", "--host", "127.0.0.1", "--port", str(port)]
    server.main()


if __name__ == "__main__":
    main()
