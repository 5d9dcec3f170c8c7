"""A Podman in memory that keeps the promises of ``Engine``: the contract tests run on it and on real ones alike."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from slurm_runtime.podman import (
    BadArchive,
    ContainerSpec,
    ContainerState,
    EngineError,
    EngineFacts,
    EngineUnreachable,
    ImageFacts,
    NoSuchContainer,
    NoSuchImage,
    PortTaken,
    PullFailed,
    ignored,
)
from tests.runtime import commands


@dataclass
class FakeContainer:
    """A container: its specification, its state, and the server behind its port."""

    spec: ContainerSpec
    state: ContainerState
    log: str = ""
    server: asyncio.AbstractServer | None = None
    paused: bool = False

    def end(self, exit_code: int) -> None:
        self.state = replace(self.state, running=False, status="exited", exit_code=exit_code)
        if self.server:
            self.server.close()

    @property
    def pages(self) -> dict[str, str]:
        """What the server of ``commands.SERVE`` shows."""
        environment = "".join(f"{name}={value}\n" for name, value in self.spec.environment.items())
        return {
            "/health": '"OK"\n',
            "/ready": '"OK"\n',
            "/env": environment,
            "/cwd": self.spec.working_dir + "\n",
            "/uid": "0\n",
            "/workspace": "yes\n",
            "/status": "NoNewPrivs:\t1\nCapEff:\t00000000000404fb\n",
            "/uid_map": "0 100000 65536\n",
        }


@dataclass
class FakePodman:
    """Each start takes ``delay_s``, a pull ``pull_delay_s`` more; removal fails ``refuse_removal`` times.

    Removal of a container in ``unremovable`` fails with what stands there, until it is taken out of it. The first pulls
    fail with ``refusals``; ``archives`` says which image a file holds.
    """

    delay_s: float = 0.0
    pull_delay_s: float = 0.0
    refuse_removal: int = 0
    unremovable: dict[str, EngineError] = field(default_factory=dict)
    ports_taken_by_others: set[int] = field(default_factory=set)
    images: set[str] = field(default_factory=lambda: {commands.IMAGE, commands.IMAGE_WITH_ENTRYPOINT})
    registry: set[str] = field(default_factory=set)
    containers: dict[str, FakeContainer] = field(default_factory=dict)
    pulls: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    archives: dict[Path, str] = field(default_factory=dict)
    loads: list[Path] = field(default_factory=list)
    removals: list[str] = field(default_factory=list)
    away: bool = False  # its service is gone: nothing is answered
    clock: Iterator[int] = field(default_factory=itertools.count)
    under_way: int = 0
    most_under_way: int = 0

    def _answers(self) -> None:
        if self.away:
            raise EngineUnreachable("no Podman service listens on the fake's socket")

    async def facts(self) -> EngineFacts:
        self._answers()
        return EngineFacts("fake", rootless=True, controllers=frozenset({"memory", "cpu", "cpuset"}))

    async def ping(self) -> None:
        self._answers()

    async def pull(self, image: str, policy: str, on_line: Callable[[str], None] = ignored) -> None:
        self.pulls.append(image)
        on_line(f"Trying to pull {image}...")
        on_line("Copying blob sha256:0123")
        await asyncio.sleep(self.delay_s + self.pull_delay_s)
        if self.refusals:
            raise PullFailed(f"Podman could not pull {image}: {self.refusals.pop(0)}")
        if image not in self.registry:
            raise PullFailed(f"Podman could not pull {image}: not in the fake registry")
        self.images.add(image)

    async def load(self, archive: Path) -> tuple[str, ...]:
        self.loads.append(archive)
        await asyncio.sleep(self.delay_s)
        if archive not in self.archives:
            raise BadArchive(f"{archive} holds no image that Podman can take: unexpected EOF")
        self.images.add(self.archives[archive])
        return (self.archives[archive],)

    async def save(self, image: str, target: Path) -> None:
        target.write_bytes(b"archive")
        self.archives[target] = image

    async def remove_image(self, name: str) -> None:
        self.images.discard(name)

    async def create(self, spec: ContainerSpec) -> None:
        self._answers()
        if spec.image not in self.images:
            raise NoSuchImage(f"{spec.image}: image not known")
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        await asyncio.sleep(self.delay_s)
        self.under_way -= 1
        state = ContainerState(
            spec.name,
            running=False,
            status="created",
            exit_code=0,
            host_port=spec.host_port,
            variables=dict(spec.environment),
            created=f"{next(self.clock):09}",
        )
        self.containers[spec.name] = FakeContainer(spec, state)

    async def init(self, name: str) -> None:
        self._container(name)

    async def image(self, name: str) -> ImageFacts:
        if name not in self.images:
            raise NoSuchImage(f"{name}: image not known")
        return ImageFacts(f"sha256:{name}", "2026-01-01T00:00:00Z", 1 << 20)

    async def all_images(self) -> tuple[str, ...]:
        self._answers()
        return tuple(sorted(self.images))

    async def build(
        self, context: Path, tag: str, on_line: Callable[[str], None], arguments: Mapping[str, str] | None = None
    ) -> None:
        if not context.is_file():
            raise EngineError(f"no build context {context}")
        for line in ("STEP 1/1: FROM scratch", f"COMMIT {tag}"):
            on_line(line)
            await asyncio.sleep(self.delay_s)
        if b"fail" in context.read_bytes():
            raise EngineError(f"Podman could not build {tag}: asked to fail")
        self.images.add(tag)

    async def export(self, name: str) -> AsyncIterator[bytes]:
        self._container(name)
        yield b""

    async def pause(self, name: str) -> None:
        container = self._container(name)
        container.paused = True
        container.state = replace(container.state, status="paused")

    async def unpause(self, name: str) -> None:
        container = self._container(name)
        container.paused = False
        container.state = replace(container.state, status="running")

    async def start(self, name: str) -> None:
        container = self._container(name)
        if container.spec.host_port in self.ports_taken_by_others:
            raise PortTaken("bind: address already in use")
        command = list(container.spec.command or ())
        if command == commands.NOT_THERE:
            raise EngineError("exec: /bin/nonesuch: no such file or directory")
        await self._publish(container)
        if command[:-1] == commands.SERVE[:-1]:
            return
        if command == commands.EXIT:
            container.log = "last words\n"
            container.end(3)
        elif command == commands.CHATTY:
            container.log = "0123456789\n" * 100 + "in pieces"
            container.end(4)
        elif container.server:
            container.server.close()

    async def _publish(self, container: FakeContainer) -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError):  # a probe given up
                request = (await reader.readuntil(b"\r\n\r\n")).decode()
                while container.paused:
                    await asyncio.sleep(0.01)
                body = container.pages.get(request.split()[1])
                head = "200 OK" if body is not None else "404 Not Found"
                length = len(body or "")
                writer.write(
                    f"HTTP/1.1 {head}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body or ''}".encode()
                )
                await writer.drain()

        container.server = await asyncio.start_server(answer, "0.0.0.0", container.spec.host_port)
        port = container.server.sockets[0].getsockname()[1]
        container.state = replace(container.state, running=True, status="running", host_port=port)

    async def inspect(self, name: str) -> ContainerState:
        return self._container(name).state

    async def exists(self, name: str) -> bool:
        self._answers()
        return name in self.containers

    async def list(self, label: str) -> list[tuple[ContainerState, Mapping[str, str]]]:
        self._answers()
        name, equals, value = label.partition("=")
        return [
            (container.state, container.spec.labels)
            for container in self.containers.values()
            if name in container.spec.labels and (not equals or container.spec.labels[name] == value)
        ]

    async def logs(self, name: str, lines: int) -> str:
        return "".join(self._container(name).log.splitlines(keepends=True)[-lines:])

    async def remove(self, name: str) -> None:
        self._answers()
        self.removals.append(name)
        if self.refuse_removal:
            self.refuse_removal -= 1
            raise EngineError("device or resource busy")
        if name in self.unremovable:
            raise self.unremovable[name]
        container = self.containers.pop(name, None)
        if container:
            container.end(137)

    async def close(self) -> None:
        for container in self.containers.values():
            container.end(137)

    async def kill(self, name: str) -> None:
        """What the tests do to a container from outside."""
        self._container(name).end(137)

    def _container(self, name: str) -> FakeContainer:
        self._answers()
        if name not in self.containers:
            raise NoSuchContainer(f"no container with name {name}")
        return self.containers[name]
