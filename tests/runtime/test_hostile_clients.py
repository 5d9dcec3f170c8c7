"""Who has no key, and who has one and sends what harms: tried on a server that is a process, and on a real Podman."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import re
import socket
import stat
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tests import faults
from tests.runtime import podman_service
from tests.runtime.commands import IMAGE
from tests.runtime.conftest import CONFIG, KillablePodman, serving
from tests.runtime.server_process import server_process
from tests.runtime.test_builds import ended, post
from tests.runtime.test_server_process import KEY, Server

OTHER_KEY, MADE_UP_KEY = "the-key-of-another-run-5512", "a-made-up-key-0815"
MIB = 1 << 20

# --- 17: no key, a wrong one, another run's ---------------------------------------------------------------------------

TRIES, CLIENTS, IN_FLIGHT = 20_000, 4, 50
GROWTH_BYTES = 5 * MIB
HEADS = (
    "",
    "X-API-Key:\r\n",
    f"X-API-Key: {MADE_UP_KEY}\r\n",
    f"X-API-Key: {OTHER_KEY}\r\n",
    f"X-API-Key: {KEY}x\r\n",
    f"X-API-Key: {KEY[:-1]}\r\n",
    f"Authorization: Bearer {KEY}\r\n",
    f"X-API-Key: {MADE_UP_KEY}\r\nX-API-Key: {KEY}\r\n",
)
LINES = (
    "GET /list",
    f"GET /list?key={KEY}",
    "GET /sessions/x",
    "POST /start",
    "POST /stop",
    "GET /metrics",
)


def resident_bytes(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


def tried(port: int, tries: int) -> bytes:
    """The answers to so many requests on one connection, several of which are always under way."""
    requests = [
        f"{line} HTTP/1.1\r\nHost: x\r\n{head}Content-Length: 0\r\n\r\n".encode() for line in LINES for head in HEADS
    ]
    answers = io.BytesIO()
    with socket.create_connection(("127.0.0.1", port), 30) as connection, connection.makefile("rb") as reader:
        for begin in range(0, tries, IN_FLIGHT):
            numbers = range(begin, min(begin + IN_FLIGHT, tries))
            connection.sendall(b"".join(requests[number % len(requests)] for number in numbers))
            for _ in numbers:
                answers.write(one_answer(reader))
    return answers.getvalue()


def one_answer(reader: io.BufferedIOBase) -> bytes:
    lines = list(iter(reader.readline, b"\r\n"))
    length = next(int(line.split(b":")[1]) for line in lines if line.lower().startswith(b"content-length"))
    return b"".join(lines) + reader.read(length)


def answered(server: Server, stop: threading.Event) -> list[float]:
    """The seconds of each answer to a client with the key, asked for on one connection meanwhile."""
    connection, taken = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10), []
    while not stop.wait(0.05):
        begin = time.monotonic()
        connection.request("GET", "/list", headers={"X-API-Key": KEY})
        with connection.getresponse() as answer:
            assert answer.status == 200
            answer.read()
        taken.append(time.monotonic() - begin)
    connection.close()
    return taken


@pytest.mark.faults
def test_twenty_thousand_wrong_keys(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    nowhere = tmp_path / "none.sock"
    with (
        server_process(tmp_path / "other", nowhere, ALLHANDS_API_KEY=OTHER_KEY) as other,
        server_process(tmp_path, nowhere, "--verbose") as server,
    ):
        assert tried(other.port, 1).startswith(b"HTTP/1.1 401")
        tried(server.port, 2000)  # warms up
        before, stop = resident_bytes(server.process.pid), threading.Event()
        with ThreadPoolExecutor(CLIENTS + 1) as pool:
            valid = pool.submit(answered, server, stop)
            try:
                answers = b"".join(pool.map(lambda _: tried(server.port, TRIES // CLIENTS), range(CLIENTS)))
            finally:
                stop.set()
            taken = sorted(valid.result())
        grown = resident_bytes(server.process.pid) - before
    assert answers.count(b"HTTP/1.1 401") == TRIES
    assert answers.count(b"HTTP/1.1 ") == TRIES
    log = server.log_file.read_bytes()
    assert log.count(b"status=401") >= TRIES
    for key in (KEY, OTHER_KEY, MADE_UP_KEY):
        assert key[:12].encode() not in answers + log, "nor the most of one"
    most, slowest = taken[int(0.99 * (len(taken) - 1))], taken[-1]
    print(f"RSS grew by {grown} bytes")
    print(f"of {len(taken)} answers with the key 99 % took at most {most:.3f} s, the slowest {slowest:.3f} s")
    assert grown < GROWTH_BYTES
    assert (most < 1, slowest < 5) == (True, True), taken[-10:]
    assert faults.WRONG_KEYS in faults.CASES


# --- 16: bodies -------------------------------------------------------------------------------------------------------

BODIES = {
    "deep lists": b"[" * 500_000,
    "deep objects": b'{"a":' * 500_000,
    "deep and whole": b'{"image": "x", "environment": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "a huge number": b'{"image": "x", "resource_factor": ' + b"9" * 900_000 + b"}",
    "a huge exponent": b'{"image": "x", "resource_factor": 1e999999999}',
    "NaN": b'{"image": "x", "resource_factor": NaN}',
    "infinite": b'{"image": "x", "resource_factor": -Infinity}',
    "wrong types": b'{"image": {"a": [1]}, "command": 7, "environment": "x", "session_id": null, "working_dir": false}',
    "a wrong one of two": b'{"image": "x", "resource_factor": 1, "resource_factor": "y"}',
    "many keys": b'{"image": []' + b"".join(b', "k%d": 0' % number for number in range(60_000)) + b"}",
    "no text": bytes(range(256)) * 1000,
}
LARGE = 100 * MIB


@pytest.fixture(scope="module")
def hostile_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with server_process(folder, folder / "none.sock", "--verbose", "--enable-image-build") as server:
        yield server
    assert "Traceback" not in server.log()


@pytest.mark.faults
@pytest.mark.parametrize("path", ["/start", "/build"])
@pytest.mark.parametrize("body", BODIES)
def test_a_hostile_body_is_refused(hostile_server: Server, path: str, body: str) -> None:
    refused(hostile_server, path, BODIES[body])


@pytest.mark.faults
@pytest.mark.parametrize("path", ["/start", "/stop"])
def test_a_body_of_100_mb_is_refused_in_little_memory(hostile_server: Server, path: str) -> None:
    before = resident_bytes(hostile_server.process.pid)
    for _ in range(3):
        refused(hostile_server, path, b" " * LARGE)
    assert resident_bytes(hostile_server.process.pid) - before < LARGE // 5
    assert faults.HOSTILE_BODIES in faults.CASES


def refused(server: Server, path: str, body: bytes) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it was refused before all of it was sent
        connection.request("POST", path, body, {"X-API-Key": KEY, "Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    assert 400 <= answer.status < 500, text[:500]
    assert list(json.loads(text)) == ["detail"]
    assert len(text) < 5000
    assert server.answers()


# --- 16: archives -----------------------------------------------------------------------------------------------------

SHELL = ("$(touch new)", "; touch new;", "`touch new`", "> new")
SECRET = "what-only-the-node-knows"
LEAKED = "exit status 9"  # as a failed build's error says it, which names the command too
DOCKERFILE = f"FROM {IMAGE}\nCOPY . /got\nRUN rm /got/Dockerfile; grep -rqs {SECRET[:12]} /got && exit 9; exit 0\n"


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, target, 0o666
    info.devmajor, info.devminor = (1, 1) if kind == tarfile.CHRTYPE else (8, 0)
    return info


def members(outside: Path) -> dict[str, list[tarfile.TarInfo]]:
    """Archives by what they try; ``outside`` is a folder that Podman's user may write to."""
    out, up = str(outside), "../" * 20 + str(outside)[1:]
    return {
        "a path with ..": [member(f"{up}/file"), member(f"x/{up}/new")],
        "an absolute path": [member(f"{out}/file"), member(f"{out}/new")],
        "a symbolic link out": [member("file", tarfile.SYMTYPE, f"{out}/file"), member("all", tarfile.SYMTYPE, out)],
        "through a symbolic link": [
            member("all", tarfile.SYMTYPE, out),
            member("all/file"),
            member("all/new"),
        ],
        "up a symbolic link": [member("up", tarfile.SYMTYPE, up), member("up/file"), member("up/new")],
        "a hard link out": [member("hard", tarfile.LNKTYPE, f"{out}/file")],
        "a hard link up": [member("hard", tarfile.LNKTYPE, f"{up}/file")],
        "a hard link through a symbolic link": [
            member("all", tarfile.SYMTYPE, out),
            member("hard", tarfile.LNKTYPE, "all/file"),
        ],
        "devices": [member("memory", tarfile.CHRTYPE), member("disk", tarfile.BLKTYPE)],
        "a named pipe": [member("pipe", tarfile.FIFOTYPE)],
        "names": [member(name) for name in ("a\nb", "'\"`", "-rf", "%s%n", "\x7f", *SHELL)],
        "the Dockerfile as a link": [member("Dockerfile", tarfile.SYMTYPE, f"{out}/file")],
    }


def archive(entries: list[tarfile.TarInfo], content: str = "overwritten") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        dockerfile = tarfile.TarInfo("Dockerfile")
        dockerfile.size = len(DOCKERFILE)
        tar.addfile(dockerfile, io.BytesIO(DOCKERFILE.encode()))
        for entry in entries:
            entry.size = len(content) if entry.isreg() else 0
            tar.addfile(entry, io.BytesIO(content.encode()))
    return base64.b64encode(buffer.getvalue())


def listed(folder: Path) -> dict[str, tuple[str, int, int, int]]:
    """Every path below a folder: what is in it, its mode, its links, the time of its change."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        status = path.lstat()
        text = path.read_text() if stat.S_ISREG(status.st_mode) else ""
        found[str(path)] = (text, status.st_mode, status.st_nlink if text else 0, status.st_mtime_ns)
    return found


@pytest.mark.faults
@pytest.mark.podman
def test_hostile_archives_change_and_read_nothing_outside(
    rootless_podman: podman_service.Service,
) -> None:
    outside = rootless_podman.home / "t" / "outside"
    outside.mkdir()
    (outside / "file").write_text(SECRET)
    for path in (outside, outside / "file"):
        path.chmod(0o777)
        os.chown(path, rootless_podman.owner.pw_uid, rootless_podman.owner.pw_gid)
    before = listed(outside)
    with serving(KillablePodman(rootless_podman.socket), replace(CONFIG, build_images=True)) as api:
        for number, (what, entries) in enumerate(members(outside).items()):
            begun = post(api, f"localhost/skyrl/hostile:{number}", context=archive(entries))
            if begun.status_code == 422 and what != "names":
                print(what, begun.json()["detail"])
                assert "context may not have" in begun.json()["detail"]
                assert listed(outside) == before, what
                continue
            assert begun.status_code == 200, begun.text
            found = ended(api, begun.json()["build_id"], 120.0)
            print(what, found["status"], (found.get("error") or "")[:300])
            assert found["status"] in ({"SUCCESS"} if what == "names" else {"SUCCESS", "FAILURE"}), what
            if found["status"] == "FAILURE":
                assert found["error"], what
                assert LEAKED not in found["error"] and SECRET not in found["error"], what
            assert listed(outside) == before, what
        begun = post(api, "localhost/skyrl/hostile:control", context=archive([member("file")], SECRET))
        found = ended(api, begun.json()["build_id"], 120.0)
        assert found["status"] == "FAILURE" and LEAKED in found["error"], "an archive with the secret in it is seen"
    assert faults.HOSTILE_UPLOADS in faults.CASES
