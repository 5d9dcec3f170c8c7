"""What a sandbox has, and what another one tries to get of it: a program for the Python of an agent tree in both.

``hold`` keeps SECRET of the environment in each place where a sandbox can keep something, until it is killed.
``steal GOALS`` (JSON) tries to get it from there and prints, as JSON, what each try brought or what refused it.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import socket
import sys
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORM = re.compile(r"secret-[0-9a-f]{32}")
FILES = ("/workspace/secret", "/tmp/secret", "/dev/shm/secret")
LOOPBACK_PORT, ABSTRACT, SOCKET, SHARED_KEY = 5511, "\0skyrl-secret", "/tmp/socket", 4711
REACHED = "reached"  # what a try brings that can bring no secret
ASK = {"command": f"cat {FILES[0]}", "timeout": 10}
PATIENCE_S = 10


def hold(secret: bytes) -> None:
    for path in FILES:
        Path(path).write_bytes(secret)
    ctypes.memmove(attached(shared(0o1666)), secret, len(secret))
    places: tuple[tuple[int, Any], ...] = (
        (socket.AF_INET, ("127.0.0.1", LOOPBACK_PORT)),
        (socket.AF_UNIX, ABSTRACT),
        (socket.AF_UNIX, SOCKET),  # the last one: who sees it knows that all is there
    )
    servers = [listening(*place) for place in places]
    for server in servers:
        threading.Thread(target=serve, args=(server, secret)).start()


def shared(mode: int) -> int:
    """The number of the shared memory; negative if there is none and ``mode`` does not make it."""
    return int(ctypes.CDLL(None).shmget(SHARED_KEY, 4096 if mode else 0, mode))


def attached(number: int) -> int:
    libc = ctypes.CDLL(None)
    libc.shmat.restype = ctypes.c_void_p
    return int(libc.shmat(number, None, 0))


def listening(family: int, address: Any) -> socket.socket:
    server = socket.socket(family)
    server.bind(address)
    server.listen()
    return server


def serve(server: socket.socket, secret: bytes) -> None:
    while True:
        client, _ = server.accept()
        with client:
            client.sendall(secret)


def asks(url: str, key: str = "") -> str:
    """Have an agent server read the secret."""
    headers = {"Content-Type": "application/json", "X-Session-API-Key": key}
    path = "/api/bash/execute_bash_command"
    request = urllib.request.Request(url + path, json.dumps(ASK).encode(), headers)
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        return str(answer.read().decode())


def subscribes(url: str, key: str = "") -> str:
    """The same over the agent server's WebSocket, which opens for everybody and then wants the key."""
    from websockets.sync.client import connect  # type: ignore[import-not-found]  # the agent tree has it

    with connect(url.replace("http", "ws", 1) + "/sockets/bash-events", open_timeout=PATIENCE_S) as events:
        if key:
            events.send(json.dumps({"type": "auth", "session_api_key": key}))
        events.send(json.dumps(ASK))
        said = ""
        while not FORM.search(said):
            said += str(events.recv(timeout=PATIENCE_S))
        return said


def looks(url: str) -> str:
    with urllib.request.urlopen(f"{url}/server_info", timeout=PATIENCE_S):
        return REACHED


def reads(pattern: str) -> str:
    found = [content(path) for path in Path("/").glob(pattern.lstrip("/"))]
    return "".join(found) if found else "no such file"


def content(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError as problem:  # of a process that has just ended, too
        return str(problem.strerror)


def hears(family: int, address: Any) -> str:
    with socket.socket(family) as client:
        client.settimeout(PATIENCE_S)
        client.connect(address)
        return client.recv(100).decode()


def shares() -> str:
    number = shared(0)
    return ctypes.string_at(attached(number)).decode() if number >= 0 else "no such memory"


def signals(pid: int) -> str:
    os.kill(pid, 0)
    return REACHED


def tries(url: str, key: str, loopback: str, workspace: str, pid: int) -> dict[str, Callable[[], str]]:
    """Each try by its name: on a server at ``url`` with a key, a folder and a process as the node knows them."""
    return {
        "its server, without a key": lambda: asks(url),
        "its server, with the key": lambda: asks(url, key),
        "its server's events, without a key": lambda: subscribes(url),
        "its server's events, with the key": lambda: subscribes(url, key),
        "its server, at the node's loopback": lambda: asks(f"http://{loopback}:{url.rpartition(':')[2]}", key),
        "its server, at its own loopback": lambda: asks("http://127.0.0.1:60000", key),
        "what its server tells everybody": lambda: looks(url),
        "a port of its own loopback": lambda: hears(socket.AF_INET, ("127.0.0.1", LOOPBACK_PORT)),
        "its abstract socket": lambda: hears(socket.AF_UNIX, ABSTRACT),
        "a socket among its files": lambda: hears(socket.AF_UNIX, SOCKET),
        "its /workspace": lambda: reads(FILES[0]),
        "its /tmp": lambda: reads(FILES[1]),
        "its /dev/shm": lambda: reads(FILES[2]),
        "its /workspace, where the node has it": lambda: reads(f"{workspace}/secret"),
        "its root, by its process": lambda: reads(f"/proc/{pid}/root{FILES[0]}"),
        "its environment": lambda: reads("/proc/[0-9]*/environ"),
        "its process": lambda: signals(pid),
        "its shared memory": shares,
    }


def outcome(attempt: Callable[[], str]) -> str:
    """The secret if it was brought, else whatever was said instead."""
    try:
        said = attempt()
    except Exception as problem:
        said = f"{type(problem).__name__}: {problem}"
    found = FORM.search(said)
    return found[0] if found else said[:300]


if __name__ == "__main__":
    if sys.argv[1] == "hold":
        hold(os.environ["SECRET"].encode())
    else:
        print(json.dumps({name: outcome(attempt) for name, attempt in tries(**json.loads(sys.argv[2])).items()}))
