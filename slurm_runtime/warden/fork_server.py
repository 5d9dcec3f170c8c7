"""Imports the agent server once and forks it into containers. Runs under the agent tree's Python, in a room of its own.

One thread, no secret: whatever it holds at a fork, every sandbox holds. For each request a helper joins the container's
namespaces and forks the server there, and ends; the server's parent is then the warden, which waits for it. A request
that could not be served exactly as the plain program would is refused.

Requests and answers are lines of JSON on a socket: {"id", "holder", "arguments", "working_dir", "seccomp"} →
{"id", "pid"} or {"id", "refused"} or {"id", "error"}. The end of the socket ends it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import importlib
import json
import logging
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

sys.path.insert(0, "/opt/skyrl-warden")

from slurm_runtime.warden import confinement, first_look, immortal, pages, seccomp, ticks
from slurm_runtime.warden.syscalls import (
    PR_SET_DUMPABLE,
    PR_SET_MM,
    PR_SET_MM_MAP,
    PR_SET_NAME,
    PR_SET_PDEATHSIG,
    prctl,
)

REPORT_DEADLINE_S = 15.0
LONGEST_REQUEST = 4 << 20
PROCESS_NAME = "agent-server"
ARGUMENT_ZERO = "openhands-agent-server"

# Read while the agent server is imported, and looked up again when they are used; the first group only steers how
# text is shown, the second is made anew in every child.
FOLLOWED = frozenset({"PATH", "PWD", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "LC_MESSAGES"})
FOLLOWED |= {"TERM", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"}
MADE_ANEW = frozenset({"SESSION_API_KEY", "OH", "OH_WEB_URL", "RUNTIME_URL"})


class Refused(Exception):
    """A forked server would differ from the plain program."""


# --- What importing reads --------------------------------------------------------------------------------------------


class ReadNames:
    """The environment variables that are read while the block runs."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __enter__(self) -> ReadNames:
        kind = type(os.environ)
        self._get, self._contains = kind.__getitem__, kind.__contains__
        names, get, contains = self.names, self._get, self._contains

        def noting_get(environment: Any, name: str) -> Any:
            names.add(str(name))
            return get(environment, name)

        def noting_contains(environment: Any, name: object) -> bool:
            names.add(str(name))
            return contains(environment, name)

        kind.__getitem__, kind.__contains__ = noting_get, noting_contains  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        kind = type(os.environ)
        kind.__getitem__, kind.__contains__ = self._get, self._contains  # type: ignore[method-assign]


def differing(read: set[str], ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """The variables whose value at import is wrong for a sandbox with environment ``theirs``. Pure."""
    relevant = read - FOLLOWED - MADE_ANEW
    return sorted(name for name in relevant if ours.get(name) != theirs.get(name))


@dataclass
class Imported:
    """The agent server in this process: its modules, its configuration, and what was read to make them."""

    main: Any
    api: Any
    config: Any
    environment: Mapping[str, str]
    read: set[str] = field(default_factory=set)


@contextlib.contextmanager
def logging_kept() -> Iterator[None]:
    """Undo what the block does to logging: browser_use silences it when it is imported."""

    def loggers() -> list[logging.Logger]:
        known = logging.root.manager.loggerDict.values()
        return [logging.root, *(one for one in known if isinstance(one, logging.Logger))]

    before = {one: (one.level, list(one.handlers), one.propagate, one.disabled) for one in loggers()}
    threshold, packages = logging.root.manager.disable, set(sys.modules)
    yield
    logging.root.manager.disable = threshold
    untouched: tuple[int, list[logging.Handler], bool, bool] = (logging.NOTSET, [], True, False)
    for one in loggers():
        if one not in before and one.name.partition(".")[0] not in packages:
            continue  # of a package that came with the block: its own matter
        level, handlers, propagate, disabled = before.get(one, untouched)
        one.setLevel(level)
        one.handlers[:], one.propagate, one.disabled = handlers, propagate, disabled


def import_server(modules: list[str]) -> Imported:
    """Import all of it with the collector off, and take it out of the collector's sight, so that pages stay shared."""
    gc.disable()
    environment = dict(os.environ)
    with ReadNames() as noted:
        main = importlib.import_module("openhands.agent_server.__main__")
        api = importlib.import_module("openhands.agent_server.api")
        config = importlib.import_module("openhands.agent_server.config")
        with logging_kept():
            for name in modules:
                with contextlib.suppress(Exception):  # a module that only some machines can import
                    importlib.import_module(name)
    ticks.calm(importlib.import_module("uvicorn").Server)
    first_look.hold(getattr(sys.modules.get("openhands.agent_server.bash_service"), "BashEventService", None))
    gc.collect()
    immortal.immortalise()
    pages.fill_gaps()
    gc.freeze()
    gc.enable()
    pages.collapse()
    return Imported(main, api, config, environment, noted.names)


# --- In the child ----------------------------------------------------------------------------------------------------


def renew_settings(server: Imported) -> None:
    """Read the configuration anew. Only keys differ as a rule: then the app stays, else it is built again."""
    module = server.config
    held = module.get_default_config()
    module._default_config = None
    new = module.get_default_config()
    keys = {"session_api_keys", "secret_key"}
    same_app = held.model_dump(exclude=keys) == new.model_dump(exclude=keys)
    # In place, because routes and services hold this very object.
    held.__dict__.update(new.__dict__)
    object.__setattr__(held, "__pydantic_private__", new.__pydantic_private__)
    object.__setattr__(held, "__pydantic_fields_set__", new.__pydantic_fields_set__)
    module._default_config = held
    if not same_app:
        server.api.api = server.api.create_app(held)


class _MemoryMap(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in [
            "start_code",
            "end_code",
            "start_data",
            "end_data",
            "start_brk",
            "brk",
            "start_stack",
            "arg_start",
            "arg_end",
            "env_start",
            "env_end",
            "auxv",
        ]
    ] + [("auxv_size", ctypes.c_uint32), ("exe_fd", ctypes.c_uint32)]


_shown: list[Any] = []  # the kernel reads /proc/self/cmdline and environ from this memory


def show(arguments: list[str], environment: Mapping[str, str]) -> None:
    """Let /proc/PID/cmdline and environ tell what this process runs with. Without it they tell the parent's."""
    line = b"".join(os.fsencode(word) + b"\0" for word in arguments)
    block = b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in environment.items())
    memory = ctypes.create_string_buffer(line + block, len(line + block) + 1)
    _shown.append(memory)
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    at, brk = ctypes.addressof(memory), int(ctypes.CDLL(None).sbrk(0)) & 0xFFFFFFFFFFFFFFFF
    code = [int(fields[index]) for index in (23, 24, 42, 43, 44)]  # start_code end_code start_data end_data start_brk
    libc = ctypes.CDLL(None)
    libc.sbrk.restype = ctypes.c_void_p
    brk = libc.sbrk(0) or brk
    stack = int(fields[25])
    layout = _MemoryMap(*code, brk, stack, at, at + len(line), at + len(line), at + len(line + block), 0, 0, 0xFFFFFFFF)
    with contextlib.suppress(OSError):
        prctl(PR_SET_MM, PR_SET_MM_MAP, ctypes.addressof(layout), ctypes.sizeof(layout))


def stir() -> None:
    """Random states that children would share."""
    import random
    import tempfile

    random.seed()
    setattr(tempfile, "_name_sequence", None)  # noqa: B010
    if "numpy" in sys.modules:
        with contextlib.suppress(Exception):
            sys.modules["numpy"].random.seed()


def serve(server: Imported, arguments: list[str]) -> int:
    """Run the agent server as its program does; its exit code."""
    sys.argv = [ARGUMENT_ZERO, *arguments]
    code: Any = 0
    try:
        renew_settings(server)
        server.main.main()
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    import atexit

    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    return int(code or 0) & 0xFF


def become_server(
    server: Imported, request: Mapping[str, Any], wanted: confinement.Confinement, program: bytes | None, report: int
) -> NoReturn:
    """In the container: take on its confinement, say so by closing ``report``, run the server, end."""
    code = 1
    try:
        os.setsid()
        confinement.confine(wanted, program)
        os.chdir(request["working_dir"])
        os.environ.clear()
        os.environ.update(wanted.environment)
        show([ARGUMENT_ZERO, *request["arguments"]], wanted.environment)
        prctl(PR_SET_NAME, ctypes.addressof(ctypes.create_string_buffer(PROCESS_NAME.encode())))
        stir()
        os.close(report)
        report = -1
        code = serve(server, list(request["arguments"]))
    except confinement.Different as problem:
        os.write(report, json.dumps({"refused": str(problem)}).encode() + b"\n")
    except BaseException as problem:
        with contextlib.suppress(OSError):
            os.write(report, json.dumps({"error": f"{type(problem).__name__}: {problem}"}).encode() + b"\n")
    finally:
        os._exit(code)


# --- In the helper ---------------------------------------------------------------------------------------------------


def help_in(server: Imported, request: Mapping[str, Any], program: bytes | None, report: int) -> NoReturn:
    """Look at the container, join it, fork the server into it, end. Everything that fails is reported."""
    try:
        prctl(PR_SET_DUMPABLE, 0)  # until the server has given up all that a container's process lacks
        pid = int(request["holder"])
        wanted = confinement.read(pid)
        check(server, wanted, program)
        streams = [os.open(f"/proc/{pid}/fd/{number}", os.O_WRONLY) for number in (1, 2)]
        namespaces = confinement.namespaces_to_join(pid)
        if any(name == "user" for name, _ in namespaces):
            wanted = confinement.translated(wanted, pid)
        with open("/proc/self/cgroup", encoding="ascii") as own:
            confinement.join_cgroups(wanted.cgroups, tuple(own.read().splitlines()))
        keep_only(report, *streams, *(descriptor for _, descriptor in namespaces))
        confinement.enter(namespaces)
        streams.insert(0, os.open("/dev/null", os.O_RDONLY))
        settle(streams, report)
        child = os.fork()
        if child == 0:
            become_server(server, request, wanted, program, 3)
        os.write(3, json.dumps({"pid": child}).encode() + b"\n")
    except confinement.Gone as problem:
        fail(report, "error", problem)
    except (confinement.Different, Refused) as problem:
        fail(report, "refused", problem)
    except BaseException as problem:
        fail(report, "error", f"{type(problem).__name__}: {problem}")
    os._exit(0)


def fail(report: int, kind: str, problem: object) -> None:
    line = json.dumps({kind: str(problem)}).encode() + b"\n"
    for descriptor in {report, 3}:
        with contextlib.suppress(OSError):
            os.write(descriptor, line)
            return


def check(server: Imported, wanted: confinement.Confinement, program: bytes | None) -> None:
    """``Refused`` where the plain program would behave otherwise."""
    names = differing(server.read, server.environment, wanted.environment)
    if names:
        raise Refused(f"its variables {', '.join(names[:5])} are read while the agent server is imported")
    if wanted.seccomp == 2 and program is None:
        raise Refused("it has a seccomp filter that is not known")


def keep_only(*kept: int) -> None:
    """Close every other descriptor, standard streams included."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(name))


def settle(streams: list[int], report: int) -> None:
    """Put the standard streams on 0 to 2 and the report on 3, and close the rest."""
    high = [fcntl_dup(descriptor) for descriptor in (*streams, report)]
    for number, descriptor in enumerate(high):
        os.dup2(descriptor, number, inheritable=number < 3)
    os.closerange(4, max(high) + 1)


def fcntl_dup(descriptor: int) -> int:
    import fcntl

    return fcntl.fcntl(descriptor, fcntl.F_DUPFD, 64)


# --- In the fork server ----------------------------------------------------------------------------------------------


@dataclass
class Pending:
    """A fork that has not reported yet."""

    request_id: int
    helper: int
    deadline: float
    said: bytes = b""


class ForkServer:
    """Reads requests, forks, answers."""

    def __init__(self, server: Imported, channel: socket.socket) -> None:
        self.server = server
        self.channel = channel
        self.received = b""
        self.programs: dict[str, bytes | None] = {}
        self.pending: dict[int, Pending] = {}
        self.selector = selectors.DefaultSelector()
        self.selector.register(channel, selectors.EVENT_READ)

    def run(self) -> None:
        """Until the channel ends."""
        while True:
            for key, _ in self.selector.select(1.0 if self.pending else None):
                if key.fileobj is self.channel:
                    if not self.receive():
                        return
                else:
                    self.hear(key.fd)
            for report in [fd for fd, one in self.pending.items() if time.monotonic() > one.deadline]:
                self.finish(report, {"error": f"the fork did not report within {REPORT_DEADLINE_S:g} s"})

    def receive(self) -> bool:
        """Take what has come; False at the end."""
        piece = self.channel.recv(1 << 20)
        self.received += piece
        *lines, self.received = self.received.split(b"\n")
        for line in lines:
            self.begin(json.loads(line))
        return bool(piece) and len(self.received) < LONGEST_REQUEST

    def begin(self, request: Mapping[str, Any]) -> None:
        """Fork a helper for one request; a profile that cannot be compiled is a refusal."""
        try:
            program = self.program(request.get("seccomp"))
        except seccomp.Unsupported as problem:
            self.answer({"id": request["id"], "refused": str(problem)})
            return
        reading, writing = os.pipe()
        helper = os.fork()
        if helper == 0:
            help_in(self.server, request, program, writing)
        os.close(writing)
        self.pending[reading] = Pending(int(request["id"]), helper, time.monotonic() + REPORT_DEADLINE_S)
        self.selector.register(reading, selectors.EVENT_READ)

    def program(self, profile: Mapping[str, Any] | None) -> bytes | None:
        """The compiled filter of a profile, compiled once."""
        if profile is None:
            return None
        digest = hashlib.sha256(json.dumps(profile, sort_keys=True).encode()).hexdigest()
        if digest not in self.programs:
            self.programs[digest] = seccomp.compile_profile(profile)
        return self.programs[digest]

    def hear(self, report: int) -> None:
        """A helper's or a new server's words; the end of them means that the server is confined and runs."""
        piece = os.read(report, 1 << 16)
        self.pending[report].said += piece
        if not piece:
            said: dict[str, Any] = {}
            for line in self.pending[report].said.splitlines():
                said |= json.loads(line)
            self.finish(report, said or {"error": "the fork ended without a word"})

    def finish(self, report: int, said: Mapping[str, Any]) -> None:
        one = self.pending.pop(report)
        self.selector.unregister(report)
        os.close(report)
        with contextlib.suppress(OSError):
            os.kill(one.helper, signal.SIGKILL) if "error" in said else None
            os.waitpid(one.helper, 0)
        if "refused" in said or "error" in said:
            said = {name: value for name, value in said.items() if name != "pid"}
        self.answer({"id": one.request_id, **said})

    def answer(self, message: Mapping[str, Any]) -> None:
        self.channel.sendall(json.dumps(message).encode() + b"\n")


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ["SESSION_API_KEY"] = os.urandom(24).hex()  # so that the routes check a key; each child sets its own
    with open("/opt/skyrl-agent/agent.json", encoding="utf-8") as file:
        modules = json.load(file)["modules"]
    server = import_server(modules)
    os.environ.pop("SESSION_API_KEY")
    sys.path.remove("/opt/skyrl-warden")
    threads = len(os.listdir("/proc/self/task"))
    forks = ForkServer(server, channel)
    if threads != 1:
        forks.answer({"unavailable": f"importing the agent server started {threads - 1} threads"})
        return
    forks.answer({"ready": True})
    forks.run()


if __name__ == "__main__":
    main()
