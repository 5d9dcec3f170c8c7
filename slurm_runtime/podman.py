"""The only door to Podman: its REST API over the unix socket, one typed method per verb.

Errors carry Podman's own words. Every call has a deadline. Works from Podman 4.0 on; tried on 4.3.1.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import stat
import struct
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

from slurm_runtime import registry_login
from slurm_runtime.sandbox import Mount

if TYPE_CHECKING:
    import aiohttp

API = "http://podman/v4.0.0/libpod"  # the oldest version with all that is used here
SOCKET_PATH_LIMIT = 107  # sun_path of Linux, without its NUL

KEY_QUOTA = (
    "each container takes one of the keys that the kernel grants a user (/proc/sys/kernel/keys/maxkeys, often 200): "
    "set keyring=false in the section [containers] of containers.conf, as a runtime job does, or run fewer sandboxes"
)
# Enough for package managers and for servers that drop their privileges; nothing that reaches beyond the sandbox.
CAPABILITIES = (
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "NET_BIND_SERVICE",
    "SETGID",
    "SETUID",
    "SYS_CHROOT",
)
LOG_BYTES = 1 << 20  # a chatty sandbox must fill neither the node's disk nor this server's memory
WORKSPACE = "/workspace"
USER_NAMESPACE_SIZE = 65536
USER_NAMESPACE_START = 0x70000000  # above the ranges that shadow-utils and systemd hand out
INIT_PROGRAMS = ("/usr/libexec/podman/catatonit", "/usr/lib/podman/catatonit", "/usr/libexec/catatonit/catatonit")

QUICK_S = 10.0  # verbs that only read
SLOW_S = 120.0  # create, start and remove wait for each other's storage locks
PULL_S = 3600.0
LOAD_S = 1800.0  # an archive of many gigabytes from shared storage
BUILD_S = 1800.0  # as long as the legacy client asks after a build
TAR = {"Content-Type": "application/x-tar"}
# Podman's own cleanup of a container that has just died holds its mounts a moment longer: "device or resource busy".
REMOVE_TRIES, REMOVE_PAUSE_S = 6, 0.05


class EngineError(Exception):
    """Podman refused; ``str()`` is a sentence with its words."""


class EngineUnreachable(EngineError):
    """Nobody listens on Podman's socket."""


class EngineBroke(EngineUnreachable):
    """Podman's service went away in the middle of a call: whether that was done is not known."""


class EngineSilent(EngineError):
    """Podman did not answer within the deadline."""


class NoSuchImage(EngineError):
    """The image is not in the local store."""


class PullFailed(EngineError):
    """The image could not be pulled."""


class BadArchive(EngineError):
    """An archive holds no image that Podman can take."""


class NoSuchContainer(EngineError):
    """No container has this name."""


class PortTaken(EngineError):
    """The host port is in use."""


@dataclass(frozen=True)
class EngineFacts:
    """What this Podman can do.

    ``controllers`` are the cgroup controllers that it may use: a limit without its controller does not bite.
    ``private_network`` is the network mode to ask for. ``pid`` is the process behind
    the socket, 0 where there is none, ``uid`` the user whose it is. ``disk_quota`` says that the store's file system
    can bound a container's disk; ``graph_root`` is where that store lies. ``monitor`` and ``runtime`` are the programs
    that it starts containers with: conmon, and runc or crun.
    """

    version: str
    rootless: bool
    controllers: frozenset[str]
    private_network: str = "slirp4netns"
    has_init: bool = False
    cgroup_version: str = "v2"
    disk_quota: bool = False
    pid: int = 0
    uid: int = -1
    graph_root: str = ""
    monitor: str = ""
    runtime: str = ""

    @property
    def can_pause(self) -> bool:
        """A rootless container has a cgroup that can be frozen only from version 2 on."""
        return not self.rootless or self.cgroup_version == "v2"


@dataclass(frozen=True)
class ContainerSpec:
    """One container to create.

    ``host_port`` 0 lets Podman choose. ``memory_bytes``, ``cpus`` and ``cpuset`` are limits, 0 or empty for none.
    ``seccomp_profile`` is a file, empty for Podman's own profile. ``pids_together`` bounds the processes and threads of
    all of a user's containers, 0 for none: where no cgroup bounds those of each, it keeps a fork bomb from the node.
    """

    name: str
    image: str
    command: tuple[str, ...] | None
    environment: Mapping[str, str]
    working_dir: str
    labels: Mapping[str, str]
    container_port: int
    host_ip: str = ""
    host_port: int = 0
    memory_bytes: int = 0
    cpus: float = 0.0
    cpuset: tuple[int, ...] = ()
    pids: int = 0
    pids_together: int = 0
    disk_bytes: int = 0
    mounts: tuple[Mount, ...] = ()
    seccomp_profile: str = ""


@dataclass(frozen=True)
class ContainerState:
    """A container as Podman sees it.

    ``host_port`` is None until one is known; ``pid`` is its first process, 0 where it does not run. ``folders`` are
    where its own files lie on this machine, ``oci_config`` its runtime's configuration file. ``variables`` is its
    environment, ``created`` when it was made (ISO 8601); a list of containers tells neither.
    """

    name: str
    running: bool
    status: str
    exit_code: int
    out_of_memory: bool = False
    host_port: int | None = None
    pid: int = 0
    folders: tuple[str, ...] = ()
    oci_config: str = ""
    variables: Mapping[str, str] = field(default_factory=dict, repr=False)  # the sandbox's key is among them
    created: str = ""


@dataclass(frozen=True)
class ImageFacts:
    """An image in the store.

    ``digest`` is its manifest's, ``created`` an ISO 8601 time; ``layers`` are the folders that its files lie in,
    ``variables`` the names of the environment variables that it sets.
    """

    id: str
    created: str
    size_bytes: int
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    user: str = ""
    layers: tuple[str, ...] = ()
    variables: frozenset[str] = frozenset()
    digest: str = ""


def ignored(_line: str) -> None:
    """For those who do not want to hear of progress."""


class Engine(Protocol):
    """What the manager asks of Podman; the tests' fake keeps the same promises."""

    async def facts(self) -> EngineFacts:
        """What this Podman can do; ``EngineUnreachable`` while nobody listens. Of another service it is asked anew."""
        ...

    async def ping(self) -> None:
        """Return if Podman answers; else ``EngineError``. ``EngineBroke`` if it is another service than before."""
        ...

    async def pull(self, image: str, policy: str, on_line: Callable[[str], None] = ignored) -> None:
        """Bring an image into the store by policy ``always``, ``missing`` or ``never``; else ``PullFailed``."""
        ...

    async def load(self, archive: Path) -> tuple[str, ...]:
        """Bring the images of an archive into the store; their full names. ``BadArchive`` if there are none."""
        ...

    async def save(self, image: str, target: Path) -> None:
        """Write an image of the store into an archive; ``OSError`` where that cannot be written."""
        ...

    async def remove_image(self, name: str) -> None:
        """Take a name from the store, and what only it needed; done already is fine."""
        ...

    async def create(self, spec: ContainerSpec) -> None:
        """Make a container; ``NoSuchImage`` if its image is not in the store."""
        ...

    async def init(self, name: str) -> None:
        """Prepare it, its first process included, without running its program; ``start`` may follow."""
        ...

    async def start(self, name: str) -> None:
        """Start it; ``PortTaken`` if its host port was."""
        ...

    async def pause(self, name: str) -> None:
        """Freeze all its processes."""
        ...

    async def unpause(self, name: str) -> None:
        """Let them go on."""
        ...

    async def image(self, name: str) -> ImageFacts:
        """An image of the store, or ``NoSuchImage``."""
        ...

    async def all_images(self) -> tuple[str, ...]:
        """The full names of all images of the store."""
        ...

    async def build(
        self, context: Path, tag: str, on_line: Callable[[str], None], arguments: Mapping[str, str] | None = None
    ) -> None:
        """Build the image ``tag`` from a tar.gz with a Dockerfile, or ``EngineError`` with the last lines."""
        ...

    def export(self, name: str) -> AsyncIterator[bytes]:
        """The files of a container as a tar stream."""
        ...

    async def inspect(self, name: str) -> ContainerState:
        """Its state, or ``NoSuchContainer``."""
        ...

    async def exists(self, name: str) -> bool:
        """Whether there is a container with this name or id, in whatever state; no start or removal is waited for."""
        ...

    async def list(self, label: str) -> list[tuple[ContainerState, Mapping[str, str]]]:
        """State and labels of all containers that carry ``label`` (``NAME`` or ``NAME=VALUE``)."""
        ...

    async def logs(self, name: str, lines: int) -> str:
        """The last lines of its output and error stream."""
        ...

    async def remove(self, name: str) -> None:
        """Kill and remove it with its volume; done already is fine."""
        ...

    async def close(self) -> None:
        """Give up all connections."""
        ...


def socket_path(environment: Mapping[str, str], uid: int) -> Path:
    """Where Podman's service listens: DOCKER_HOST, else the user's usual socket. ``ValueError`` with what to do."""
    docker_host = environment.get("DOCKER_HOST", "")
    if docker_host:
        if not docker_host.startswith("unix://"):
            raise ValueError(f"DOCKER_HOST={docker_host}: only a unix socket is served (unix:///path/to/podman.sock)")
        path = Path(docker_host.removeprefix("unix://"))
    elif uid == 0:
        path = Path("/run/podman/podman.sock")
    else:
        path = Path(environment.get("XDG_RUNTIME_DIR") or f"/run/user/{uid}") / "podman" / "podman.sock"
    if len(os.fsencode(path)) > SOCKET_PATH_LIMIT:
        raise ValueError(f"{path} is longer than the {SOCKET_PATH_LIMIT} bytes that Linux allows a socket")
    return path


def how_to_start(path: Path) -> str:
    return (
        f"no Podman service listens on {path}; start one with 'podman system service --time=0 unix://{path} &' "
        f"and set DOCKER_HOST=unix://{path}"
    )


def free_id_range(uid_map: str) -> int | None:
    """First of 65536 host ids for containers of a Podman that runs as root; None where this namespace has too few.

    ``uid_map`` is the text of /proc/self/uid_map.
    """
    ends = [int(line.split()[0]) + int(line.split()[2]) for line in uid_map.splitlines() if line.strip()]
    highest = max(ends, default=0)
    if highest >= USER_NAMESPACE_START + USER_NAMESPACE_SIZE:
        return USER_NAMESPACE_START
    return highest - USER_NAMESPACE_SIZE if highest >= 2 * USER_NAMESPACE_SIZE else None


def create_body(
    spec: ContainerSpec, facts: EngineFacts, id_range: int | None, hard_limits: Mapping[str, int]
) -> dict[str, Any]:
    """The body of a create call. Pure.

    ``id_range`` and ``hard_limits`` (rlimit name → the service's hard limit) matter to a Podman that runs as root. A
    rootless one is in a user namespace already and lowers its default limits itself; only what is asked for beyond
    them, ``pids_together``, is lowered here.
    """
    port: dict[str, Any] = {"container_port": spec.container_port, "protocol": "tcp"}
    if spec.host_ip:
        port["host_ip"] = spec.host_ip
    if spec.host_port:
        port["host_port"] = spec.host_port
    body: dict[str, Any] = {
        "name": spec.name,
        "image": spec.image,
        "env": dict(spec.environment),
        "labels": dict(spec.labels),
        "work_dir": spec.working_dir,
        "create_working_dir": True,
        "portmappings": [port],
        "no_new_privileges": True,
        "cap_drop": ["ALL"],
        "cap_add": list(CAPABILITIES),
        "log_configuration": {"driver": "k8s-file", "size": LOG_BYTES},
        "restart_policy": "no",
        "systemd": "false",
        "init": facts.has_init,
        "volumes": [{"Dest": WORKSPACE}],  # bare task images have no such folder, and agent servers write there
        "user": "0:0",  # clients install tools into /usr/local/bin, whatever user the image names
    }
    # Never the host's network, whatever containers.conf says.
    body["netns"] = {"nsmode": facts.private_network}
    # What forwards the published port connects from inside the sandbox. With a source port that the kernel chose it
    # can meet itself on the server's own port before the server listens, which then finds its port taken.
    body["sysctl"] = {"net.ipv4.ip_local_reserved_ports": str(spec.container_port)}
    if spec.seccomp_profile:
        body["seccomp_profile_path"] = spec.seccomp_profile
    if spec.mounts:
        body["mounts"] = [_mount(mount) for mount in spec.mounts]
    if spec.disk_bytes and facts.disk_quota:
        body["storage_opts"] = {"size": str(spec.disk_bytes)}
    if spec.command is not None:
        # An empty entry point: the clients' commands name the program, often the image's entry point itself.
        body |= {"entrypoint": [], "command": list(spec.command)}
    limits = _resource_limits(spec, facts.controllers)
    if limits:
        body["resource_limits"] = limits
    if facts.rootless:
        bounded = spec.pids_together and "pids" not in facts.controllers
        # Podman lowers its own limit, often to 32768; beyond it a container of hundreds of slots could not start.
        most = min(spec.pids_together, hard_limits.get("NPROC", spec.pids_together))
        hard_limits = {"NPROC": most} if bounded else {}
    if hard_limits:
        body["r_limits"] = [{"type": name, "soft": limit, "hard": limit} for name, limit in hard_limits.items()]
    if not facts.rootless and id_range is not None:
        mapping = [{"container_id": 0, "host_id": id_range, "size": USER_NAMESPACE_SIZE}]
        body |= {"userns": {"nsmode": "private"}, "idmappings": {"UIDMap": mapping, "GIDMap": mapping}}
    return body


def _mount(mount: Mount) -> dict[str, Any]:
    options = ["rbind", "ro" if mount.read_only else "rw", "nosuid", "nodev"]
    return {"type": "bind", "source": mount.source, "destination": mount.target, "options": options}


def _resource_limits(spec: ContainerSpec, controllers: frozenset[str]) -> dict[str, Any]:
    """Only limits that bite: others are refused by some versions and ignored by the rest."""
    limits: dict[str, Any] = {}
    if spec.memory_bytes and "memory" in controllers:
        limits["memory"] = {"limit": spec.memory_bytes}
    cpu: dict[str, Any] = {}
    if spec.cpus and "cpu" in controllers:
        cpu |= {"period": 100_000, "quota": max(1000, round(spec.cpus * 100_000))}
    if spec.cpuset and "cpuset" in controllers:
        cpu["cpus"] = ",".join(map(str, spec.cpuset))
    if cpu:
        limits["cpu"] = cpu
    if spec.pids and "pids" in controllers:
        limits["pids"] = {"limit": spec.pids}
    return limits


def parse_facts(info: Mapping[str, Any], init_programs: Sequence[str]) -> EngineFacts:
    """The facts in an answer of ``/info``."""
    host = info["host"]
    rootless = bool(host["security"]["rootless"])
    version = str((info.get("version") or {}).get("Version", "unknown"))
    store = info.get("store") or {}
    backing = str((store.get("graphStatus") or {}).get("Backing Filesystem", ""))
    return EngineFacts(
        version=version,
        rootless=rootless,
        controllers=frozenset(host.get("cgroupControllers") or ()),
        private_network=private_network(host, version, rootless),
        has_init=any(Path(program).is_file() for program in init_programs),
        cgroup_version=str(host.get("cgroupVersion", "v2")),
        disk_quota=backing == "xfs" and has_project_quota(str(store.get("graphRoot", "/"))),
        graph_root=str(store.get("graphRoot") or ""),
        monitor=str((host.get("conmon") or {}).get("path") or ""),
        runtime=str((host.get("ociRuntime") or {}).get("path") or ""),
    )


def private_network(host: Mapping[str, Any], version: str, rootless: bool) -> str:
    """The mode that gives a container a network of its own without anything of the host's that must be cleaned up.

    Podman's own choice where it is rootless: pasta from version 5 on, slirp4netns before. A bridge needs firewall rules
    that outlive a killed job, and 0.2 s more; it is left where there is nothing else.
    """
    wanted = ("pasta", "slirp4netns") if rootless and not version.startswith("4.") else ("slirp4netns",)
    return next((name for name in wanted if (host.get(name) or {}).get("executable")), "bridge")


def has_project_quota(folder: str, mountinfo: str | None = None) -> bool:
    """Whether the file system that holds ``folder`` is mounted with project quotas."""
    text = Path("/proc/self/mountinfo").read_text(encoding="utf-8") if mountinfo is None else mountinfo
    best, options = "", ""
    for line in text.splitlines():
        mount, tail = line.split()[4], line.rpartition(" - ")[2].split()
        if len(mount) >= len(best) and f"{folder}/".startswith(f"{mount.rstrip('/')}/"):
            best, options = mount, tail[2] if len(tail) > 2 else ""
    return bool({"prjquota", "pquota"} & set(options.split(",")))


def parse_frames(stream: bytes) -> str:
    """The text in a multiplexed log: frames of an 8-byte header (stream, length) and their content."""
    pieces, at = [], 0
    while at + 8 <= len(stream):
        length = int.from_bytes(stream[at + 4 : at + 8], "big")
        pieces.append(stream[at + 8 : at + 8 + length])
        at += 8 + length
    return b"".join(pieces).decode("utf-8", "replace").replace("\0", "")


def parse_inspect(answer: Mapping[str, Any]) -> ContainerState:
    state = answer["State"]
    bindings = [
        binding
        for found in ((answer.get("NetworkSettings") or {}).get("Ports") or {}).values()
        for binding in found or ()
    ]
    return ContainerState(
        name=str(answer.get("Name", "")),
        running=state["Status"] in {"running", "paused"},
        status=str(state["Status"]),
        exit_code=int(state.get("ExitCode") or 0),
        out_of_memory=bool(state.get("OOMKilled")),
        host_port=int(bindings[0]["HostPort"]) if bindings else None,
        pid=int(state.get("Pid") or 0),
        folders=_own_folders(answer),
        oci_config=str(answer.get("OCIConfigPath") or ""),
        variables=dict(entry.partition("=")[::2] for entry in (answer.get("Config") or {}).get("Env") or ()),
        created=str(answer.get("Created") or ""),
    )


def _own_folders(answer: Mapping[str, Any]) -> tuple[str, ...]:
    """The writable layer and the volumes of a container."""
    upper = ((answer.get("GraphDriver") or {}).get("Data") or {}).get("UpperDir")
    volumes = [mount["Source"] for mount in answer.get("Mounts") or () if mount.get("Type") == "volume"]
    return tuple(filter(None, (upper, *volumes)))


def parse_image(answer: Mapping[str, Any]) -> ImageFacts:
    """The facts in an answer of ``/images/NAME/json``."""
    config = answer.get("Config") or {}
    data = (answer.get("GraphDriver") or {}).get("Data") or {}
    layers = ":".join(filter(None, (data.get("UpperDir"), data.get("LowerDir"))))
    return ImageFacts(
        id=str(answer.get("Id", "")),
        created=str(answer.get("Created", "")),
        size_bytes=int(answer.get("Size") or 0),
        entrypoint=tuple(config.get("Entrypoint") or ()),
        command=tuple(config.get("Cmd") or ()),
        user=str(config.get("User") or ""),
        layers=tuple(layers.split(":")) if layers else (),
        variables=frozenset(entry.partition("=")[0] for entry in config.get("Env") or ()),
        digest=str(answer.get("Digest") or ""),
    )


def parse_listed(entry: Mapping[str, Any]) -> tuple[ContainerState, Mapping[str, str]]:
    names = entry.get("Names") or [""]
    status = str(entry.get("State", "unknown"))
    state = ContainerState(
        name=str(names[0]),
        running=status in {"running", "paused"},
        status=status,
        exit_code=int(entry.get("ExitCode") or 0),
    )
    return state, entry.get("Labels") or {}


def error_for(status: int, words: str) -> EngineError:
    """Podman's answer as an exception. Words are looked at only where its status code says no more than 500."""
    if status == 404 and "container" in words:
        return NoSuchContainer(words)
    if "image not known" in words or "no such image" in words:
        return NoSuchImage(words)
    if "unable to create session key" in words:
        return EngineError(f"{words}; {KEY_QUOTA}")
    if "address already in use" in words or "port is already allocated" in words:
        return PortTaken(words)
    return EngineError(words)


class Podman:
    """Podman behind its socket; connections are made when they are needed and kept.

    ``auth_file`` holds the logins for registries, None for those that Podman finds by itself.
    """

    def __init__(self, path: Path, auth_file: Path | None = None) -> None:
        self.path = path
        self.auth_file = auth_file
        self._session: aiohttp.ClientSession | None = None
        self._facts: EngineFacts | None = None
        self._socket_id: tuple[int, ...] | None = None
        self._id_range: int | None = None
        self._hard_limits: Mapping[str, int] = {}

    async def facts(self) -> EngineFacts:
        if self._facts is None:
            self._socket_id = self._check_socket()
            found = shutil.which("catatonit")
            info = await self._ask("GET", "/info", QUICK_S)
            facts = parse_facts(info, (*INIT_PROGRAMS, *([found] if found else [])))
            try:
                pid, uid = _service(self.path)
                limits = Path(f"/proc/{pid}/limits").read_text(encoding="ascii")
            except (ConnectionError, FileNotFoundError, ProcessLookupError) as problem:
                raise EngineBroke(f"Podman's service ended after its first answer: {problem}") from None
            facts = replace(facts, pid=pid, uid=uid)
            if not facts.rootless:
                self._id_range = free_id_range(Path("/proc/self/uid_map").read_text(encoding="ascii"))
            self._hard_limits = parse_limits(limits)
            self._facts = facts
        return self._facts

    async def ping(self) -> None:
        async with self._call("GET", "/_ping", QUICK_S) as answer:
            await answer.read()
        if self._facts is not None and self._check_socket() != self._socket_id:
            self._facts = None
            raise EngineBroke("Podman's service was started again")

    async def pull(self, image: str, policy: str, on_line: Callable[[str], None] = ignored) -> None:
        query = f"/images/pull?reference={quote(image, safe='')}&policy={policy}"
        try:
            headers = await asyncio.to_thread(registry_login.headers, self.auth_file)
        except ValueError as problem:
            raise PullFailed(f"Podman was not asked for {image}: {problem}") from None
        try:
            async with self._call("POST", query, PULL_S, headers=headers) as answer:
                async for line in answer.content:
                    self._heed_pull_line(image, line, on_line)
        except (NoSuchImage, NoSuchContainer) as problem:
            raise PullFailed(f"image {image} is not to be had: {problem}") from None

    @staticmethod
    def _heed_pull_line(image: str, line: bytes, on_line: Callable[[str], None]) -> None:
        report = json.loads(line) if line.strip() else {}
        if report.get("error"):
            raise PullFailed(f"Podman could not pull {image}: {report['error']}")
        if report.get("stream"):
            on_line(str(report["stream"]).strip())

    async def load(self, archive: Path) -> tuple[str, ...]:
        try:
            with archive.open("rb") as file:
                async with self._call("POST", "/images/load", LOAD_S, data=file, headers=TAR) as answer:
                    names = json.loads(await answer.read()).get("Names") or ()
        except OSError as problem:
            raise BadArchive(f"{archive} cannot be read: {problem.strerror or problem}") from None
        except EngineError as problem:
            # A broken connection may be the archive's fault; where it is not, whoever asks next is told.
            if isinstance(problem, (EngineUnreachable, EngineSilent)) and not isinstance(problem, EngineBroke):
                raise
            words = " ".join(str(problem).split())[:300]
            raise BadArchive(f"{archive} holds no image that Podman can take: {words}") from None
        return tuple(map(str, names))

    async def save(self, image: str, target: Path) -> None:
        # An OCI archive keeps layers compressed, in 2.5 times less space than Docker's; to write and to read it takes
        # 1.5 to 2 times as long.
        query = f"/images/{quote(image, safe='')}/get?format=oci-archive"
        with target.open("wb") as file:
            async with self._call("GET", query, LOAD_S) as answer:
                async for piece in answer.content.iter_chunked(1 << 20):
                    await asyncio.to_thread(file.write, piece)

    async def remove_image(self, name: str) -> None:
        with contextlib.suppress(NoSuchImage):
            await self._ask("DELETE", f"/images/{quote(name, safe='')}", SLOW_S)

    async def create(self, spec: ContainerSpec) -> None:
        body = create_body(spec, await self.facts(), self._id_range, self._hard_limits)
        await self._ask("POST", "/containers/create", SLOW_S, body)

    async def init(self, name: str) -> None:
        await self._ask("POST", f"/containers/{name}/init", SLOW_S)

    async def start(self, name: str) -> None:
        await self._ask("POST", f"/containers/{name}/start", SLOW_S)

    async def pause(self, name: str) -> None:
        await self._ask("POST", f"/containers/{name}/pause", SLOW_S)

    async def unpause(self, name: str) -> None:
        await self._ask("POST", f"/containers/{name}/unpause", SLOW_S)

    async def image(self, name: str) -> ImageFacts:
        return parse_image(await self._ask("GET", f"/images/{quote(name, safe='')}/json", QUICK_S))

    async def all_images(self) -> tuple[str, ...]:
        found = await self._ask("GET", "/images/json", SLOW_S)
        return tuple(name for entry in found or () for name in entry.get("Names") or ())

    async def build(
        self, context: Path, tag: str, on_line: Callable[[str], None], arguments: Mapping[str, str] | None = None
    ) -> None:
        query = f"/build?t={quote(tag, safe='')}&dockerfile=Dockerfile&rm=true&forcerm=true&layers=true"
        query += f"&buildargs={quote(json.dumps(dict(arguments)))}" if arguments else ""
        last: deque[str] = deque(maxlen=20)
        with context.open("rb") as file:
            async with self._call("POST", query, BUILD_S, data=file, headers=TAR) as answer:
                async for line in answer.content:
                    self._heed_build_line(tag, line, last, on_line)

    @staticmethod
    def _heed_build_line(tag: str, line: bytes, last: deque[str], on_line: Callable[[str], None]) -> None:
        report = json.loads(line) if line.strip() else {}
        words = str(report.get("stream") or "").rstrip()
        if words:
            last.append(words)
            on_line(words)
        if report.get("error"):
            problem = report["error"] if isinstance(report["error"], str) else report.get("errorDetail")
            raise EngineError(f"Podman could not build {tag}: {problem}; its last lines: {' | '.join(last)}")

    async def export(self, name: str) -> AsyncIterator[bytes]:
        async with self._call("GET", f"/containers/{name}/export", PULL_S) as answer:
            async for piece in answer.content.iter_chunked(1 << 20):
                yield piece

    async def inspect(self, name: str) -> ContainerState:
        return parse_inspect(await self._ask("GET", f"/containers/{name}/json", QUICK_S))

    async def exists(self, name: str) -> bool:
        try:
            await self._ask("GET", f"/containers/{name}/exists", QUICK_S)
            return True
        except NoSuchContainer:
            return False

    async def list(self, label: str) -> list[tuple[ContainerState, Mapping[str, str]]]:
        filters = quote(json.dumps({"label": [label]}))
        return [
            parse_listed(entry)
            for entry in await self._ask("GET", f"/containers/json?all=true&filters={filters}", QUICK_S)
        ]

    async def logs(self, name: str, lines: int) -> str:
        # All of it: with `tail` Podman 4.3.1 drops pieces of a line that was written in several.
        async with self._call("GET", f"/containers/{name}/logs?stdout=true&stderr=true", QUICK_S) as answer:
            text = parse_frames(await answer.read())
        return "".join(text.splitlines(keepends=True)[-lines:])

    async def remove(self, name: str) -> None:
        # Podman 4 reads `volumes` here, later ones `v`; without it each sandbox would leave its volume behind.
        query = f"/containers/{name}?force=true&timeout=0&v=true&volumes=true"
        pause_s = REMOVE_PAUSE_S
        for last_try in (*[False] * (REMOVE_TRIES - 1), True):
            try:
                await self._ask("DELETE", query, SLOW_S)
                return
            except NoSuchContainer:
                return
            except (EngineUnreachable, EngineSilent):
                raise
            except EngineError:
                if last_try:
                    raise
            await asyncio.sleep(pause_s)
            pause_s *= 2

    async def close(self) -> None:
        if self._session:
            await self._session.close()

    def _check_socket(self) -> tuple[int, ...]:
        """What tells the socket's file from that of a later service."""
        try:
            found = self.path.stat()
        except OSError:
            raise EngineUnreachable(how_to_start(self.path)) from None
        if not stat.S_ISSOCK(found.st_mode):
            raise EngineUnreachable(how_to_start(self.path))
        return (found.st_dev, found.st_ino, found.st_ctime_ns)

    async def _ask(self, method: str, path: str, timeout_s: float, body: object = None) -> Any:
        async with self._call(method, path, timeout_s, body) as answer:
            text = await answer.read()
            return json.loads(text) if text.strip() else None

    @asynccontextmanager
    async def _call(
        self,
        method: str,
        path: str,
        timeout_s: float,
        body: object = None,
        data: IO[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer with a good status; everything else becomes an ``EngineError``."""
        import aiohttp  # 0.1 s: the server answers /health before it talks to Podman

        if self._session is None:
            # No limit of connections here: the manager bounds what is under way, and reads must not queue behind it.
            self._session = aiohttp.ClientSession(connector=aiohttp.UnixConnector(path=str(self.path), limit=0))
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            content: Any = {"json": body} if data is None else {"data": data}
            async with self._session.request(method, API + path, timeout=timeout, headers=headers, **content) as answer:
                if answer.status >= 400:
                    raise error_for(answer.status, _words(await answer.read()))
                yield answer
        except (aiohttp.ClientConnectorError, FileNotFoundError):
            self._facts = None  # of a service that is gone: its process is another one
            raise EngineUnreachable(how_to_start(self.path)) from None
        except asyncio.TimeoutError:  # another class on Python 3.10
            raise EngineSilent(f"Podman did not answer {method} {path.split('?')[0]} within {timeout_s:g} s") from None
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as problem:
            self._facts = None
            raise EngineBroke(f"the connection to Podman broke: {problem or type(problem).__name__}") from None
        except aiohttp.ClientError as problem:
            raise EngineError(f"the connection to Podman broke: {problem or type(problem).__name__}") from None


def _words(body: bytes) -> str:
    """Podman's message in an error's body."""
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode("utf-8", "replace").strip() or "no reason given"


def parse_limits(text: str) -> dict[str, int]:
    """The hard limits in a /proc/PID/limits, by the names that Podman wants, at most its own default of 2**20."""
    rows = {"NOFILE": "Max open files", "NPROC": "Max processes"}
    found = {name: re.search(rf"^{row}\s+\S+\s+(\S+)", text, re.MULTILINE) for name, row in rows.items()}
    most = 1 << 20
    return {name: min(most, int(m[1])) if m and m[1].isdigit() else most for name, m in found.items()}


def _service(path: Path) -> tuple[int, int]:
    """The process that made the socket, and its user.

    Its limits are handed down, its namespaces are the containers' parents.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        pid, uid, _ = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid), int(uid)
