"""The command line and the process: flags become a configuration, the app is served, the exit code says how it ended.

Exit codes: 0 stopped and nothing is left; 2 the command line is wrong; 70 a fault of this server; 71 this machine lacks
something (Podman's socket, a folder); 75 some containers could not be removed in time; 98 the port is taken; 128 + N
a second signal N forced the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import getpass
import os
import re
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from slurm_runtime import __version__
from slurm_runtime.agent.tree import AgentTree, default_cache, load, newest
from slurm_runtime.config import ServerConfig, is_loopback, is_node_name, parse_label, parse_memory, parse_port_range
from slurm_runtime.logs import log, setup
from slurm_runtime.podman import how_to_start, socket_path
from slurm_runtime.registry_login import auth_file, doubts
from slurm_runtime.slots import Slots, share_out

if TYPE_CHECKING:
    import uvicorn

    from slurm_runtime.manager import Manager
    from slurm_runtime.membership import Membership

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_INTERNAL = 70  # EX_SOFTWARE
EXIT_ENVIRONMENT = 71  # EX_OSERR
EXIT_LEFT_BEHIND = 75  # EX_TEMPFAIL
EXIT_PORT_TAKEN = 98  # EADDRINUSE
EXIT_SIGNAL_BASE = 128

STOPPING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
BACKLOG = 2048
KEEP_ALIVE_S = 75  # the SDK's polls are up to 10 s apart on one connection
YEAR_10000 = 253402300800  # from which on there is no date
LEAST_IDLE_S = 600  # as long as a client's longest command
GOODBYE_FIRST_S = 0.5  # for the head of a node that stops, before sandboxes are removed
DEATH_S = 0.05  # from the closing of a killed owner's pipe to the signal of its death: nobody is to hear a goodbye
LAST_ANSWERS_S = 2  # for requests that are being answered when the server stops


class StartProblem(Exception):
    """The server cannot start; ``str()`` says why and what to do."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def build_parser() -> argparse.ArgumentParser:
    """The command line. Every flag of the bash suite's call is here."""
    parser = argparse.ArgumentParser(
        prog="python -m slurm_runtime.api_server",
        description="Serve Podman sandboxes over the OpenHands remote runtime API.",
        epilog=(
            "Podman's service is found by DOCKER_HOST=unix:///path, else at $XDG_RUNTIME_DIR/podman/podman.sock. "
            "Exit codes: 0 stopped, nothing left; 2 wrong command line; 71 something is missing on this machine; "
            "70 a fault of this server; 75 containers were left behind; 98 the port is taken; "
            "128+N a second signal N forced the end."
        ),
    )
    parser.add_argument("--version", action="version", version=f"slurm_runtime {__version__}")
    parser.add_argument("--verbose", action="store_true", help="debug lines, and one line for each request")
    _add_listening(parser.add_argument_group("listening"))
    _add_key(parser.add_argument_group("API key (X-API-Key); without these flags ALLHANDS_API_KEY, else a new key"))
    _add_sandboxes(parser.add_argument_group("sandboxes"))
    _add_agent(parser.add_argument_group("agent server, for images that bring none"))
    _add_images(parser.add_argument_group("images"))
    _add_node(parser.add_argument_group("a node of a head"))
    _add_life(parser.add_argument_group("starting and stopping"))
    return parser


def _add_listening(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--host", default="0.0.0.0", help="address to listen on (default: %(default)s)")
    group.add_argument(
        "--port", type=port_number, default=8000, help="port to listen on, 0 for a free one (default: 8000)"
    )
    group.add_argument(
        "--fd", type=int, metavar="N", help="serve on this inherited, listening socket instead of --host and --port"
    )
    group.add_argument(
        "--public-host",
        metavar="NAME",
        help="host name in sandbox URLs (default: this node's full name if it resolves)",
    )
    group.add_argument(
        "--sandbox-port-range",
        type=_by(parse_port_range),
        metavar="A-B",
        help="publish sandboxes on these ports (default: any free port)",
    )


def _add_key(group: argparse._ArgumentGroup) -> None:
    which = group.add_mutually_exclusive_group()
    which.add_argument("--api-key-file", type=Path, metavar="FILE", help="file that holds the key, mode 0600")
    which.add_argument(
        "--disable-auth",
        action="store_true",
        help="ask for no key: whoever reaches the port can run programs as you",
    )


def _add_sandboxes(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--container-image", metavar="IMAGE", help="image of sandboxes whose request names none")
    add("--cpus", type=_count, metavar="N", help="CPUs to share out (default: those this process may use)")
    add(
        "--cpus-per-worker",
        type=positive,
        default=1.0,
        metavar="N",
        help="CPUs of a sandbox, may be a fraction (default: 1)",
    )
    add(
        "--memory-per-worker",
        type=_by(parse_memory),
        default=parse_memory("4G"),
        metavar="SIZE",
        help="memory of a sandbox, such as 16G (default: 4G)",
    )
    add(
        "--build-reserved-cpus",
        type=_natural,
        default=0,
        metavar="N",
        help="CPUs that no sandbox gets, for image builds (default: 0)",
    )
    add("--max-sandboxes", type=_count, metavar="N", help="at most so many at once (MAX_PARALLEL_AGENTS)")
    add(
        "--cpu-pinning-method",
        choices=["docker_cpuset", "taskset", "none"],
        default="none",
        help="docker_cpuset pins each sandbox to its CPUs where Podman may (default: none)",
    )
    add(
        "--label",
        type=_by(parse_label),
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="label of every container; repeatable",
    )
    add(
        "--pids-limit",
        type=_natural,
        default=ServerConfig.pids_limit,
        metavar="N",
        help="processes and threads of a sandbox, 0 for any number (default: %(default)s)",
    )
    add(
        "--disk-per-worker",
        type=_by(parse_memory),
        default=0,
        metavar="SIZE",
        help="disk that a sandbox may fill, such as 20G (default: no limit)",
    )
    add(
        "--network",
        choices=["private", "deny"],
        default=None,
        help="private: a network of its own with a way out; deny: no way out, the published port still answers "
        "(default: the environment's NETWORK, else private)",
    )
    add(
        "--allow-mount",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="requests may mount what lies below it (runtime_mounts); repeatable (default: nothing)",
    )


def _add_agent(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    which = group.add_mutually_exclusive_group()
    which.add_argument("--agent-dir", type=Path, metavar="DIR", help="an agent tree (default: the newest of the cache)")
    which.add_argument(
        "--agent-image", metavar="IMAGE", help="an image to take the agent tree out of, once on each node"
    )
    add(
        "--agent-start",
        choices=["fork", "exec"],
        default=None,
        help="fork: from a process that has imported it already; exec: as a plain program "
        "(default: the environment's AGENT_START, else fork)",
    )


def _add_images(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--enable-image-build", action="store_true", help="serve /build: clients may build images here")
    add(
        "--registry-prefix",
        default="localhost/skyrl",
        metavar="NAME",
        help="what the names of built images begin with (default: %(default)s)",
    )
    add(
        "--image-archives",
        type=Path,
        metavar="DIR",
        help="a folder of image archives, as prebuild_images writes them, looked into before a registry is asked",
    )
    add(
        "--share-images",
        type=Path,
        metavar="DIR",
        help="a folder in which nodes of one head leave images for each other",
    )
    add(
        "--registry-auth-file",
        type=Path,
        metavar="FILE",
        help="logins for registries, as 'podman login --authfile FILE' writes them "
        "(default: the environment's REGISTRY_AUTH_FILE, else those that Podman finds by itself)",
    )


def _add_node(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--head",
        type=_head_url,
        metavar="URL",
        help="register with the head at http://HOST:PORT, with this server's own key, for as long as it runs",
    )
    add("--node-name", type=_node_name, metavar="NAME", help="name of this node (default: the host's name)")
    add(
        "--until",
        type=_epoch,
        metavar="EPOCH",
        help="when this node ends, in seconds since the epoch (default: not known)",
    )
    add(
        "--drain-lead",
        type=_natural,
        default=0,
        metavar="S",
        help="seconds before --until from which on no new sandboxes are taken (default: 0)",
    )


def _add_life(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--starters",
        type=_count,
        default=ServerConfig.starters,
        metavar="N",
        help="containers that are started at the same time (default: %(default)s)",
    )
    add(
        "--warm",
        type=_natural,
        default=ServerConfig.warm,
        metavar="N",
        help="containers that wait, initialised, for sandboxes like the last ones, no more than idle slots "
        "(default: %(default)s)",
    )
    add(
        "--idle-timeout",
        type=_natural,
        default=0,
        metavar="S",
        help="stop a sandbox in which nothing has run for so many seconds, at least 600 (default: 0, never)",
    )
    add(
        "--worker-startup-timeout",
        type=positive,
        default=600.0,
        metavar="S",
        help="seconds until a sandbox that does not answer has failed (default: 600)",
    )
    add(
        "--stop-timeout",
        type=positive,
        default=5.0,
        metavar="S",
        help="seconds for removing all sandboxes at the end (default: 5)",
    )
    add(
        "--adopt",
        action="store_true",
        help="take over the sandboxes of a server of the same job that was killed, instead of removing them: same "
        "ids, URLs and keys",
    )
    add(
        "--failures-file",
        type=Path,
        metavar="FILE",
        help="where to note which sandboxes failed, and why, for the next server with --adopt (default: nowhere)",
    )
    add(
        "--statistics-file",
        type=Path,
        metavar="FILE",
        help="where to keep counts of starts, ends and requests as JSON; a server with --adopt goes on with them "
        "(default: nowhere)",
    )
    add(
        "--stop-with-stdin",
        action="store_true",
        help="stop at the end of standard input, and ignore SIGTERM, SIGINT and SIGHUP: for a parent that stops its "
        "children in order, or dies",
    )


def _by(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """``parse`` as an argparse type whose complaint is shown."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as problem:
            raise argparse.ArgumentTypeError(str(problem)) from None

    return convert


def _number(text: str, kind: Callable[[str], Any], allowed: Callable[[Any], bool], wanted: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not allowed(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


def port_number(text: str) -> Any:
    return _number(text, int, lambda value: 0 <= value < 65536, "a port (0 to 65535)")


def _count(text: str) -> Any:
    return _number(text, int, lambda value: value > 0, "a whole number above 0")


def _natural(text: str) -> Any:
    return _number(text, int, lambda value: value >= 0, "a whole number, 0 or more")


def positive(text: str) -> Any:
    return _number(text, float, lambda value: 0 < value < float("inf"), "a number above 0")


def _epoch(text: str) -> Any:
    return _number(text, float, lambda value: 0 < value < YEAR_10000, "a time in seconds since the epoch")


def _head_url(text: str) -> str:
    if not re.fullmatch(r"http://[^/\s@?#]+:\d{1,5}/?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no address of a head; write it like http://cpu-a:8000")
    return text.rstrip("/")


def _node_name(text: str) -> str:
    if not is_node_name(text):
        wanted = "letters, digits, dots, underscores and dashes, the first a letter or digit"
        raise argparse.ArgumentTypeError(f"{text[:80]!r} cannot be a node's name: it takes {wanted}")
    return text


def config_from(args: argparse.Namespace, environment: Mapping[str, str], user: str) -> ServerConfig:
    """The configuration that flags and environment ask for, still without its key. Pure."""
    public_host = args.public_host
    if public_host is None and args.fd is None and is_loopback(args.host):
        public_host = args.host
    return ServerConfig(
        adopt=args.adopt,
        failures_file=args.failures_file,
        statistics_file=args.statistics_file,
        default_image=args.container_image,
        public_host=public_host,
        cpus_per_worker=args.cpus_per_worker,
        memory_bytes=args.memory_per_worker,
        pinning=args.cpu_pinning_method,
        startup_timeout_s=args.worker_startup_timeout,
        sandbox_ports=args.sandbox_port_range,
        labels=labels_for(environment, user, dict(args.label)),
        pids_limit=args.pids_limit,
        disk_bytes=args.disk_per_worker,
        warm=args.warm,
        network=args.network or one_of(environment, "NETWORK", "private", "deny"),
        agent_start=args.agent_start or one_of(environment, "AGENT_START", "fork", "exec"),
        agent_image=args.agent_image,
        agent_dir=args.agent_dir,
        agent_cache=default_cache(environment),
        allowed_mounts=tuple(folder.resolve() for folder in args.allow_mount),
        image_archives=args.image_archives,
        share_images=args.share_images,
        registry_auth_file=auth_file(args.registry_auth_file, environment),
        registry_prefix=args.registry_prefix,
        build_images=args.enable_image_build,
        idle_timeout_s=float(args.idle_timeout and max(args.idle_timeout, LEAST_IDLE_S)),
        starters=args.starters,
        node_name=args.node_name or socket.gethostname(),
        until=args.until,
        drain_lead_s=args.drain_lead,
    )


def one_of(environment: Mapping[str, str], name: str, usual: str, other: str) -> str:
    """The word in a variable, ``usual`` where it is unset or empty; ``StartProblem`` for any other. Pure."""
    word = environment.get(name) or usual
    if word not in {usual, other}:
        raise StartProblem(f"{name}={word} is neither {usual} nor {other}", EXIT_USAGE)
    return word


def agent_tree(config: ServerConfig) -> AgentTree | None:
    """The agent tree to mount: the one that was named, else the newest of the cache; None where there is none.

    ``StartProblem`` if the named one cannot be used. Not for --agent-image, whose tree is taken out later.
    """
    if config.agent_dir is not None:
        try:
            return load(config.agent_dir)
        except ValueError as problem:
            raise StartProblem(f"--agent-dir: {problem}", EXIT_USAGE) from None
    found = newest(config.agent_cache) if config.agent_cache else None
    if found is None:
        log.info(
            "no agent server to mount: images have to bring their own; make one with "
            "'python -m slurm_runtime.agent build' (looked for in %s)",
            config.agent_cache,
        )
    return found


def check_image_sources(args: argparse.Namespace, config: ServerConfig) -> None:
    """``StartProblem`` for an auth file or a folder of archives that cannot be used; warnings for what is unsafe.

    An auth file that only the environment names may be meant for another machine, so it fails no more than pulls.
    """
    if config.image_archives is not None and not config.image_archives.is_dir():
        raise StartProblem(f"--image-archives {config.image_archives} is no folder on this machine", EXIT_USAGE)
    if config.registry_auth_file is not None:
        try:
            for doubt in doubts(config.registry_auth_file):
                log.warning("%s", doubt)
        except (OSError, ValueError) as problem:
            if args.registry_auth_file is not None:
                raise StartProblem(f"--registry-auth-file: {problem}", EXIT_USAGE) from None
            log.warning("REGISTRY_AUTH_FILE: %s; until then no image can be pulled", problem)


def labels_for(environment: Mapping[str, str], user: str, extra: Mapping[str, str]) -> dict[str, str]:
    """Labels of every container: the Slurm job (empty outside of one), the user, and ``extra``, which wins. Pure."""
    return {"skyrl.job": environment.get("SLURM_JOB_ID", ""), "skyrl.owner": user, **extra}


def check_node_name(args: argparse.Namespace) -> None:
    """``StartProblem`` where the host's own name, by default the node's, is none that a head takes."""
    if args.head is not None and not is_node_name(args.node_name or socket.gethostname()):
        sentence = f"this host's name, {socket.gethostname()!r}, cannot be a node's: name one with --node-name"
        raise StartProblem(sentence, EXIT_USAGE)


def slots_from(args: argparse.Namespace, usable: Sequence[int]) -> tuple[Slots, str]:
    """The slots of this machine and the sentence about them; ``usable`` are the CPU ids of this process. Pure."""
    cpus = args.cpus or len(usable)
    return share_out(usable, cpus, args.build_reserved_cpus, args.cpus_per_worker, args.max_sandboxes)


def listening_socket(args: argparse.Namespace) -> socket.socket:
    """The socket to serve on; ``StartProblem`` where there is none to be had."""
    listening = _inherited_socket(args.fd) if args.fd is not None else _bound_socket(args.host, args.port)
    # Accepted connections inherit it. asyncio sets it only on sockets that name their protocol, which --fd's may not,
    # and without it each answer on a kept connection waits 40 ms for an acknowledgement.
    with contextlib.suppress(OSError):
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _inherited_socket(number: int) -> socket.socket:
    try:
        inherited = socket.socket(fileno=number)
        is_listening = inherited.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as problem:
        raise StartProblem(f"--fd {number} is not a socket: {problem.strerror}", EXIT_USAGE) from None
    if not is_listening:
        raise StartProblem(f"--fd {number} is a socket that does not listen", EXIT_USAGE)
    return inherited


def _bound_socket(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as problem:
        raise StartProblem(f"--host {host} is no address of this machine: {problem.strerror}", EXIT_USAGE) from None
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        bound.listen(BACKLOG)
    except OSError as problem:
        bound.close()
        sentence = f"cannot listen on {host}:{port}: {problem.strerror}; choose another --port, or 0 for a free one"
        raise StartProblem(sentence, EXIT_PORT_TAKEN) from None
    return bound


def podman_path(environment: Mapping[str, str], uid: int) -> Path:
    """Podman's socket. It may be missing still where DOCKER_HOST names it; the usual one must be there."""
    try:
        path = socket_path(environment, uid)
    except ValueError as problem:
        raise StartProblem(str(problem), EXIT_USAGE) from None
    if not environment.get("DOCKER_HOST") and not path.exists():
        raise StartProblem(how_to_start(path), EXIT_ENVIRONMENT)
    return path


@contextlib.contextmanager
def api_key(args: argparse.Namespace, environment: Mapping[str, str], port: int) -> Iterator[str | None]:
    """The key that clients must send, None if any client may; a generated one lives as long as the block."""
    from slurm_runtime.credentials import generated_key, key_folder, read_key_file

    try:
        if args.disable_auth:
            log.warning("--disable-auth: whoever reaches this port can run programs as %s", getpass.getuser())
            yield None
        elif args.api_key_file is not None:
            yield read_key_file(args.api_key_file)
        elif environment.get("ALLHANDS_API_KEY"):
            yield environment["ALLHANDS_API_KEY"]
        else:
            with generated_key(key_folder(environment, os.getuid()), port) as (key, path):
                log.info("no API key was given; a new one is in %s", path)
                print(path, flush=True)
                yield key
    except ValueError as problem:
        raise StartProblem(str(problem), EXIT_USAGE) from None
    except OSError as problem:
        raise StartProblem(f"the API key's file cannot be written: {problem}", EXIT_ENVIRONMENT) from None


@dataclass
class StopWish:
    """Who asked the server to stop, and how it is told: by signals, or by the end of standard input."""

    loop: asyncio.AbstractEventLoop
    event: asyncio.Event
    signals_seen: int = 0

    def on_signal(self, number: int) -> None:
        self.signals_seen += 1
        if self.signals_seen > 1:
            log.error("%s again: ending at once; sandboxes may be left", signal.Signals(number).name)
            os._exit(EXIT_SIGNAL_BASE + number)
        log.info("%s: stopping", signal.Signals(number).name)
        self.event.set()

    def heed_signals(self) -> None:
        for number in STOPPING_SIGNALS:
            self.loop.add_signal_handler(number, self.on_signal, number)

    def heed_stdin(self) -> None:
        """A thread, because standard input may be a file, which the event loop cannot watch."""
        threading.Thread(target=self._read_stdin, daemon=True).start()

    def _read_stdin(self) -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        time.sleep(DEATH_S)
        log.info("stopping, as the owner asks (standard input is closed)")
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped already
            self.loop.call_soon_threadsafe(self.event.set)


async def serve(
    args: argparse.Namespace,
    config: ServerConfig,
    listening: socket.socket,
    podman: Path,
    slots: Slots,
    tree: AgentTree | None,
) -> int:
    """Serve until told to stop, then remove all sandboxes; the exit code."""
    from slurm_runtime.agent_support import AgentSupport
    from slurm_runtime.app import create_app
    from slurm_runtime.heartbeats import Heartbeats
    from slurm_runtime.manager import Manager
    from slurm_runtime.podman import Podman
    from slurm_runtime.readiness import Prober
    from slurm_runtime.statistics import StatisticsFile
    from slurm_runtime.warden.client import Warden

    wish = StopWish(asyncio.get_running_loop(), asyncio.Event())
    wish.heed_stdin() if args.stop_with_stdin else wish.heed_signals()
    engine, prober = Podman(podman, config.registry_auth_file), Prober()
    agent = AgentSupport(config.agent_start == "fork")
    if config.agent_image is None:
        agent.provide(tree)
    manager = Manager(config, engine, prober, slots, agent, Warden, prober.idle_s)
    app = create_app(manager, config, Heartbeats())
    server = http_server(app)
    membership = membership_of(args, config, manager, listening)
    try:
        with StatisticsFile(config.statistics_file, manager.counted) as statistics:
            manager.background.start(statistics.keep())
            if membership:
                membership.begin()
            return await _serve_until(wish.event, server, listening, manager, args.stop_timeout, membership)
    finally:
        await app.state.builds.close()
        await prober.close()
        await engine.close()


def membership_of(
    args: argparse.Namespace, config: ServerConfig, manager: Manager, listening: socket.socket
) -> Membership | None:
    """What keeps this server known to its head; None where it has none."""
    from slurm_runtime.membership import Membership, job_of
    from slurm_runtime.sandbox import sandbox_url

    if args.head is None:
        return None
    port = listening.getsockname()[1]

    async def own_url() -> str:
        return sandbox_url(await manager.host.name(), port)

    return Membership(args.head, config.api_key, manager.node, own_url, job_of(os.environ))


def http_server(app: Any) -> uvicorn.Server:
    import uvicorn

    class Server(uvicorn.Server):
        """uvicorn without its own signal handling: ours stops the sandboxes first."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,  # the guard writes its own line for each request
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=LAST_ANSWERS_S,
        backlog=BACKLOG,
        server_header=False,
    )
    return Server(config)


async def _serve_until(
    stop: asyncio.Event,
    server: uvicorn.Server,
    listening: socket.socket,
    manager: Manager,
    stop_timeout_s: float,
    membership: Membership | None,
) -> int:
    """Requests are answered until the sandboxes are gone: clients read 503 on /start meanwhile, not a reset."""
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    watching = asyncio.create_task(manager.run())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([serving, watching, stopped], return_when=asyncio.FIRST_COMPLETED)
    on_request = stopped.done()
    watching.cancel()
    async with _goodbye_first(membership) as spent_s:
        left = await manager.close(max(0.0, stop_timeout_s - spent_s))
    server.should_exit = True
    outcomes = await asyncio.gather(serving, watching, return_exceptions=True)
    stopped.cancel()
    if not on_request:
        log.error("the server ended by itself, a fault of it: %s", [repr(outcome) for outcome in outcomes])
        return EXIT_INTERNAL
    if left:
        log.warning("not removed within %g s: %s", stop_timeout_s, ", ".join(left))
        return EXIT_LEFT_BEHIND
    log.info("stopped; nothing is left")
    return EXIT_OK


def run(args: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """The server's life; ``StartProblem`` if it cannot begin."""
    podman = podman_path(environment, os.getuid())
    check_node_name(args)
    slots, slots_sentence = slots_from(args, sorted(os.sched_getaffinity(0)))
    with listening_socket(args) as listening:
        host, port = listening.getsockname()[:2]
        with api_key(args, environment, port) as key:
            log.info("serving on http://%s:%d, Podman at %s", f"[{host}]" if ":" in host else host, port, podman)
            log.info("%s", slots_sentence)
            config = replace(config_from(args, environment, getpass.getuser()), api_key=key)
            check_image_sources(args, config)
            tree = None if config.agent_image else agent_tree(config)
            return asyncio.run(serve(args, config, listening, podman, slots, tree))


@contextlib.asynccontextmanager
async def _goodbye_first(membership: Membership | None) -> AsyncIterator[float]:
    """Tell the head before sandboxes are removed, which it would else hear of as stopped without a reason; the seconds.

    A head that does not answer is waited for during the removal.
    """
    began = time.monotonic()
    leaving = [asyncio.create_task(membership.leave())] if membership else []
    if leaving:
        await asyncio.wait(leaving, timeout=GOODBYE_FIRST_S)
    try:
        yield time.monotonic() - began
    finally:
        await asyncio.gather(*leaving)


def allow_many_files() -> None:
    """Connections and descriptors for each of hundreds of sandboxes are more than the usual soft limit of 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run_process(args: argparse.Namespace, life: Callable[[argparse.Namespace, Mapping[str, str]], int]) -> NoReturn:
    """The process of a server around its ``life``, which the head has too: signals, log, limits, exit code."""
    if args.stop_with_stdin:  # before anything slow: scancel reaches all processes of a job at once
        for number in STOPPING_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    setup(args.verbose)
    allow_many_files()
    try:
        code = life(args, os.environ)
    except StartProblem as problem:
        log.error("%s", problem)
        code = problem.exit_code
    except KeyboardInterrupt:  # before the event loop heeds signals
        code = EXIT_SIGNAL_BASE + signal.SIGINT
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Parse, serve, exit."""
    run_process(build_parser().parse_args(argv), run)


if __name__ == "__main__":
    main()
