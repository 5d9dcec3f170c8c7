"""A real registry on this machine (Debian's docker-registry), and one in front of it that refuses for a while."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from tests.runtime import podman_service
from tests.runtime.commands import IMAGE

PROGRAM = "docker-registry"
USER, PASSWORD = "tester", "s3cret-Planted-Word"
# bcrypt of PASSWORD, the only hash that the registry takes.
HTPASSWD = f"{USER}:$2y$05$abcdefghijklmnopqrstuuCVyEafNuLrWk1dn0AId7QDcOk4r3NYq\n"
DEADLINE_S = 10.0

CONFIG = """version: 0.1
log: {{level: warn}}
storage: {{filesystem: {{rootdirectory: "{home}/data"}}}}
http: {{addr: "{address}:{port}"}}
"""
LOGIN = 'auth: {{htpasswd: {{realm: tests, path: "{home}/htpasswd"}}}}\n'


@dataclass(frozen=True)
class Registry:
    """A running registry; ``name`` is how images name it."""

    name: str
    log_file: Path

    def requests(self, kind: str, image: str) -> int:
        """How many GETs for an image's ``manifests`` or ``blobs`` it has answered."""
        return len(re.findall(rf'"GET /v2/{image}/{kind}/\S+ HTTP/1.1" 200', self.log_file.read_text()))


def missing() -> str:
    return "" if shutil.which(PROGRAM) else PROGRAM


def free_port(address: str = "127.0.0.1") -> int:
    with socket.create_server((address, 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def held_port(address: str = "127.0.0.1") -> Iterator[int]:
    """A port that nobody else is given during the block; who sets SO_REUSEADDR, as servers do, can listen on it."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((address, 0))
        yield held.getsockname()[1]


@contextlib.contextmanager
def registry(home: Path, address: str = "127.0.0.1", port: int = 0, login: bool = False) -> Iterator[Registry]:
    """A registry with its data and log in ``home``; ``login`` makes it ask for USER and PASSWORD."""
    home.mkdir(parents=True, exist_ok=True)
    if not port:
        with held_port(address) as free, registry(home, address, free, login) as made:
            yield made
        return
    (home / "htpasswd").write_text(HTPASSWD)
    config = CONFIG + (LOGIN if login else "")
    (home / "config.yml").write_text(config.format(home=home, address=address, port=port))
    with (home / "log").open("ab") as log:
        process = subprocess.Popen([PROGRAM, "serve", str(home / "config.yml")], stdout=log, stderr=log)
    with process:
        try:
            _await(address, port, process)
            yield Registry(f"{'localhost' if address == '127.0.0.1' else address}:{port}", home / "log")
        finally:
            process.kill()


def _await(address: str, port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection((address, port), 1):
            return
        time.sleep(0.02)
    raise RuntimeError(f"{PROGRAM} does not listen on {address}:{port} (exit code {process.poll()})")


@dataclass
class Refuser:
    """What stands in front of a registry: refuses the next ``refusals`` requests for manifests, passes on the rest."""

    upstream: str
    status: int = 429
    refusals: int = 0
    delay_s: float = 0.0
    port: int = 0
    refused: int = 0
    paths: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"localhost:{self.port}"

    def refuses(self, path: str) -> bool:
        self.paths.append(path)
        if "/manifests/" not in path or not self.refusals:
            return False
        self.refusals -= 1
        self.refused += 1
        return True


REFUSAL = {"code": "TOOMANYREQUESTS", "message": "You have reached your pull rate limit."}
BODY = json.dumps({"errors": [REFUSAL]}).encode()
PASSED_ON = ("content-type", "docker-content-digest", "docker-distribution-api-version")


def _handler(refuser: Refuser) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if refuser.refuses(self.path):
                # As a registry that says when: else Podman itself first asks for half a minute, silently.
                self._answer(refuser.status, [("Content-Type", "application/json"), ("Retry-After", "0")], BODY)
                return
            began = time.monotonic()
            while "/blobs/" in self.path and time.monotonic() - began < refuser.delay_s:
                time.sleep(0.02)  # it may be told meanwhile to hurry
            self._pass_on()

        def _pass_on(self) -> None:
            with contextlib.closing(http.client.HTTPConnection(refuser.upstream, timeout=10)) as connection:
                connection.putrequest(self.command, self.path)
                for accepted in self.headers.get_all("Accept", []):
                    connection.putheader("Accept", accepted)
                connection.endheaders()
                with connection.getresponse() as reply:
                    headers = [(key, value) for key, value in reply.getheaders() if key.lower() in PASSED_ON]
                    self._answer(reply.status, headers, reply.read())

        do_HEAD = do_GET

        def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
            self.send_response(status)
            for key, value in [*headers, ("Content-Length", str(len(body)))]:
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client that was interrupted
                    self.wfile.write(body)

        def log_message(self, *_args: object) -> None:
            """Nothing: pytest's output is read by people."""

    return Handler


@contextlib.contextmanager
def refuser_before(upstream: Registry, **fields: float) -> Iterator[Refuser]:
    """A refuser on a port of its own, which passes on to ``upstream``."""
    refuser = Refuser(upstream.name, **fields)  # type: ignore[arg-type]  # numbers all
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(refuser)) as server:
        refuser.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield refuser
        finally:
            server.shutdown()
            thread.join()


def registries_conf(*insecure: str, mirrors: Mapping[str, str] = MappingProxyType({})) -> str:
    """A registries.conf that allows plain HTTP to some registries, and sets mirrors."""
    tables = [f'[[registry]]\nlocation = "{name}"\ninsecure = true' for name in insecure]
    for name, mirror in mirrors.items():
        tables += [f'[[registry]]\nlocation = "{name}"', f'[[registry.mirror]]\nlocation = "{mirror}"\ninsecure = true']
    return "\n".join([*tables, ""])


def push_new(podman: podman_service.Service, target: str, login: bool = False) -> None:
    """Put an image with a layer of its own into a registry; Podman's own store does not have it then."""
    folder = podman.home / "t"
    dockerfile = folder / "Dockerfile"
    dockerfile.write_text(f"FROM {IMAGE}\nRUN echo {target} > /layer\n")
    podman.podman("build", "--quiet", "--network=none", "--tag", target, "--file", str(dockerfile), str(folder))
    podman.podman("push", "--quiet", *(["--creds", f"{USER}:{PASSWORD}"] if login else []), target)
    podman.podman("rmi", target)
