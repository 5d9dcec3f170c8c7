"""The warden's process: joins Podman's namespaces, forks servers into containers, pauses, confines and watches them.

Started as ``python -I process.py FD PODMAN_PID CODE``; requests and answers are lines of JSON on the inherited socket
FD (see ``client``). It ends when that socket does, and its fork server with it; servers in containers live on. One
thread, standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, sys.argv[3] if len(sys.argv) > 3 else "")

from slurm_runtime.warden import network, room
from slurm_runtime.warden.killing import end_container
from slurm_runtime.warden.proc import members, namespace_of, signal_all
from slurm_runtime.warden.remains import ENDED, STILL_THERE, Networks, Stray, end_stray, environment_of, in_a_child
from slurm_runtime.warden.syscalls import PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG, new_session_keyring, prctl, setns
from slurm_runtime.warden.watchdog import Watchdog

MOUNTED_CODE = "/opt/skyrl-warden/slurm_runtime/warden/fork_server.py"
LONGEST_LINE = 4 << 20
RETRY_S = (0.1, 1.0, 5.0, 30.0)  # before a fork server that died is started again
IMPORT_DEADLINE_S = 120.0
Request = Mapping[str, Any]


class Failure(Exception):
    """A request cannot be served."""


def join_podman(pid: int) -> bool:
    """Become root of the user namespace that Podman's service lives in; False, with nothing done, if it is our own."""
    theirs = namespace_of(pid, "user")
    if not theirs:
        raise ProcessLookupError(f"its service, process {pid}, has ended")
    if theirs == namespace_of(os.getpid(), "user"):
        return False
    descriptors = [os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY) for kind in ("user", "mnt")]
    for descriptor in descriptors:
        setns(descriptor)
        os.close(descriptor)
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    return True


def networks_of(environment: Mapping[str, str], is_rootless: bool) -> Networks:
    """Those that a rootless Podman keeps; root's lie where anybody on the machine may keep some."""
    folder = environment.get("XDG_RUNTIME_DIR") if is_rootless else None
    return Networks(Path(folder) / "netns" if folder else None)


class Lines:
    """Lines of JSON on a socket."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self._received = b""

    def receive(self) -> list[Any] | None:
        """The messages that have come whole; None at the end."""
        try:
            piece = self.channel.recv(1 << 20)
        except OSError:
            return None
        self._received += piece
        *lines, self._received = self._received.split(b"\n")
        if not piece or len(self._received) > LONGEST_LINE:
            return None
        return [json.loads(line) for line in lines]

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message; a partner that is gone is noticed when reading."""
        with contextlib.suppress(OSError):
            self.channel.sendall(json.dumps(message).encode() + b"\n")


@dataclass
class Imports:
    """The fork server: its process, its socket, whether it has imported the agent server."""

    pid: int
    lines: Lines
    deadline: float
    ready: bool = False


class Warden:
    """Serves one API server; ``environment`` is that of Podman's service."""

    def __init__(self, owner: Lines, code: Path, networks: Networks, environment: Mapping[str, str]) -> None:
        self.owner = owner
        self.code = code
        self.networks = networks
        self.environment = environment
        self.watchdog = Watchdog()
        self.selector = selectors.DefaultSelector()
        self.tree: Mapping[str, Any] | None = None
        self.imports: Imports | None = None
        self.deaths = 0
        self.again_at: float | None = None
        self.servers: dict[int, str] = {}  # process id of a forked server → its sandbox
        self.asked: dict[int, Request] = {}  # forks that the fork server has not answered yet
        self.exits: dict[int, int] = {}  # ends of processes that no answer has named yet
        self.enders: dict[int, Request] = {}  # children that end a stray → what asked for it
        self.verbs: dict[str, Callable[[Request], dict[str, Any] | None]] = {
            "start_fork_server": self.start_fork_server,
            "fork": self.fork,
            "pause": self.pause,
            "resume": self.resume,
            "deny_network": self.deny_network,
            "pin": self.pin,
            "watch": self.watch,
            "adopt": self.adopt,
            "forget": self.forget,
            "usage": self.usage,
            "end_stray": self.end_stray,
            "tidy_networks": self.tidy_networks,
        }

    def run(self) -> None:
        """Until the owner's socket ends."""
        reading, writing = os.pipe()
        for descriptor in (reading, writing):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.selector.register(reading, selectors.EVENT_READ)
        self.selector.register(self.owner.channel, selectors.EVENT_READ)
        while True:
            for key, _ in self.selector.select(self.wait_s()):
                if key.fileobj is self.owner.channel:
                    if not self.hear_owner():
                        return
                elif key.fileobj == reading:
                    os.read(reading, 4096)
                else:
                    self.hear_fork_server()
            self.reap()
            self.bark()
            self.revive()

    def wait_s(self) -> float | None:
        waits = [self.watchdog.wait_s()]
        if self.again_at is not None:
            waits.append(max(0.0, self.again_at - time.monotonic()))
        if self.imports and not self.imports.ready:
            waits.append(1.0)
        known = [wait for wait in waits if wait is not None]
        return min(known) if known else None

    def hear_owner(self) -> bool:
        requests = self.owner.receive()
        for request in requests or ():
            self.answer(request)
        return requests is not None

    def answer(self, request: Request) -> None:
        """Serve one request; every fault becomes an answer."""
        try:
            answer = self.verbs[request["do"]](request)
        except (Failure, network.NetworkProblem) as problem:
            answer = {"error": str(problem)}
        except (OSError, KeyError, TypeError, ValueError) as problem:
            answer = {"error": f"{request.get('do')}: {problem}"}
        if answer is not None:
            self.owner.send({"id": request.get("id"), **answer})

    # The fork server.

    def start_fork_server(self, request: Request) -> dict[str, Any]:
        """Begin the import; an event says when it is done."""
        self.tree = request
        if self.imports is None:
            self._start()
        elif self.imports.ready:
            self.owner.send({"event": "fork_server", "state": "ready", "reason": ""})
        return {"ok": True}

    def _start(self) -> None:
        assert self.tree is not None
        ours, theirs = socket.socketpair()
        command = (*self.tree["command"], MOUNTED_CODE)
        with theirs:
            pid = room.start(command, Path(self.tree["tree"]), self.code, theirs)
        self.imports = Imports(pid, Lines(ours), time.monotonic() + IMPORT_DEADLINE_S)
        self.selector.register(ours, selectors.EVENT_READ)

    def hear_fork_server(self) -> None:
        if self.imports is None:
            return
        answers = self.imports.lines.receive()
        if answers is None:
            self._drop("it ended")
            return
        for answer in answers:
            if answer.get("ready"):
                self.imports.ready, self.deaths = True, 0
                self.owner.send({"event": "fork_server", "state": "ready", "reason": ""})
            elif "unavailable" in answer:
                self.tree = None
                self._drop(str(answer["unavailable"]), "unavailable")
                return
            else:
                self._forked(answer)

    def _forked(self, answer: Mapping[str, Any]) -> None:
        """A fork is done: note whose process it is; it may have ended already."""
        request = self.asked.pop(answer["id"], None)
        if request is None:
            return
        if "pid" in answer:
            pid = int(answer["pid"])
            self.servers[pid] = request["sandbox"]
            if request["sandbox"] in self.watchdog.watched:
                self.watchdog.watched[request["sandbox"]].server = pid
            answer = {**answer, "ok": True}
        self.owner.send(answer)
        for pid in [pid for pid in self.exits if pid in self.servers]:
            self._tell_exit(pid, self.exits.pop(pid))

    def _drop(self, reason: str, state: str = "died") -> None:
        """The fork server is gone: its open requests fail, and it is started again after a while."""
        assert self.imports is not None
        gone, self.imports = self.imports, None
        self.selector.unregister(gone.lines.channel)
        gone.lines.channel.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(gone.pid, signal.SIGKILL)
        for number in list(self.asked):
            del self.asked[number]
            self.owner.send({"id": number, "error": f"the fork server is gone: {reason}"})
        self.owner.send({"event": "fork_server", "state": state, "reason": reason})
        self.again_at = time.monotonic() + RETRY_S[min(self.deaths, len(RETRY_S) - 1)]
        self.deaths += 1

    def revive(self) -> None:
        if self.imports and not self.imports.ready and time.monotonic() > self.imports.deadline:
            self._drop(f"it did not import the agent server within {IMPORT_DEADLINE_S:g} s")
        if self.again_at is not None and time.monotonic() >= self.again_at:
            self.again_at = None
            if self.tree is not None and self.imports is None:
                self._start()

    def fork(self, request: Request) -> None:
        """Hand the request on; the answer follows."""
        if self.imports is None or not self.imports.ready:
            raise Failure("the fork server is not ready")
        self.asked[request["id"]] = request
        kept = {name: request[name] for name in ("id", "holder", "arguments", "working_dir", "seccomp")}
        self.imports.lines.send(kept)

    # The ends of processes.

    def reap(self) -> None:
        """Wait for all that has ended: a pid namespace cannot go while one of its processes is a zombie of ours."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            code = 128 - code if code < 0 else code
            if pid in self.enders:
                self._stray_ended(self.enders.pop(pid), code)
            elif pid in self.servers:
                self._tell_exit(pid, code)
            elif self.imports is None or pid != self.imports.pid:
                self._note(pid, code)

    def _note(self, pid: int, code: int) -> None:
        """Keep it for an answer that is still on its way, if one is."""
        if self.asked:
            self.exits[pid] = code
        else:
            self.exits.clear()

    def _tell_exit(self, pid: int, code: int) -> None:
        self.owner.send({"event": "exited", "sandbox": self.servers.pop(pid), "exit_code": code})

    # Containers.

    @staticmethod
    def _namespace(request: Request) -> int:
        found = namespace_of(int(request["holder"]))
        if not found or found == namespace_of(os.getpid()):
            raise Failure(f"the container of {request['sandbox']} does not run")
        return found

    def pause(self, request: Request) -> dict[str, Any]:
        if not signal_all(self._namespace(request), signal.SIGSTOP, "Tt"):
            raise Failure("its processes did not stop within 5 s")
        return {"ok": True}

    def resume(self, request: Request) -> dict[str, Any]:
        if not signal_all(self._namespace(request), signal.SIGCONT, "RSDI"):
            raise Failure("its processes did not go on within 5 s")
        return {"ok": True}

    def deny_network(self, request: Request) -> dict[str, Any]:
        own = namespace_of(os.getpid(), "net")
        if namespace_of(int(request["holder"]), "net") in {0, own}:
            raise Failure("the container has no network namespace of its own")
        network.deny(int(request["holder"]))
        return {"ok": True}

    def pin(self, request: Request) -> dict[str, Any]:
        for pid in members(self._namespace(request)):
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                for thread in os.listdir(f"/proc/{pid}/task"):
                    os.sched_setaffinity(int(thread), request["cpus"])
        return {"ok": True}

    def watch(self, request: Request) -> dict[str, Any]:
        limits = {name: int(request.get(name) or 0) for name in ("memory_bytes", "processes", "disk_bytes")}
        self.watchdog.add(request["sandbox"], int(request["holder"]), limits, tuple(request.get("disk_paths") or ()))
        for pid, name in self.servers.items():
            if name == request["sandbox"]:
                self.watchdog.watched[name].server = pid
        return {"ok": True}

    def adopt(self, request: Request) -> dict[str, Any]:
        """Know the server of a sandbox that an earlier warden forked; nobody can tell its exit code any more."""
        self.servers.setdefault(int(request["pid"]), request["sandbox"])
        return {"ok": True}

    def forget(self, request: Request) -> dict[str, Any]:
        """Its end is the owner's doing from now on. Stopped processes go on, so that they can be ended politely."""
        self.watchdog.watched.pop(request["sandbox"], None)
        for pid in [pid for pid, name in self.servers.items() if name == request["sandbox"]]:
            del self.servers[pid]
        return {"ok": True}

    def usage(self, request: Request) -> dict[str, Any]:
        del request
        return {"ok": True, "usage": self.watchdog.report()}

    def end_stray(self, request: Request) -> None:
        """In a child, since it may take seconds, in which forks and the watchdog must not wait; the answer follows."""
        container, runtime = str(request["container"]), str(request["runtime"])
        stray = Stray(int(request["monitor"]), int(request["started"]), container, str(request["program"]))
        self.enders[in_a_child(lambda: end_stray(stray, runtime, self.environment))] = request

    def _stray_ended(self, request: Request, code: int) -> None:
        problem = f"the processes of container {str(request['container'])[:12]} did not end"
        answer = {"ok": True, "ended": code == ENDED} if code < STILL_THERE else {"error": problem}
        self.owner.send({"id": request.get("id"), **answer})

    def tidy_networks(self, request: Request) -> dict[str, Any]:
        return {"ok": True, "removed": self.networks.tidy(float(request["empty_for_s"]))}

    def bark(self) -> None:
        """Stop who takes more than it may."""
        for name, one, reason in self.watchdog.look():
            self.owner.send(
                {"event": "offender", "sandbox": name, "reason": reason}
            )  # it sees the death too: why, first
            end_container(one.holder, one.namespace)
            if one.leaves_no_room and one.folders.paths:
                one.folders.empty()


def main() -> None:
    descriptor, podman = int(sys.argv[1]), int(sys.argv[2])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # the owner decides when it ends
        signal.signal(number, signal.SIG_IGN)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    owner = Lines(socket.socket(fileno=descriptor))
    os.set_inheritable(descriptor, False)
    try:
        is_rootless = join_podman(podman)
        environment = environment_of(podman)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # taking on other ids has cleared it
    except OSError as problem:
        owner.send({"event": "unusable", "reason": f"Podman's namespaces cannot be joined: {problem}"})
        return
    with contextlib.suppress(OSError):  # no quota left: what is forked may make no call that uses it
        new_session_keyring()
    owner.send({"event": "ready"})
    code, networks = Path(sys.argv[3]) / "slurm_runtime", networks_of(environment, is_rootless)
    Warden(owner, code, networks, environment).run()


if __name__ == "__main__":
    main()
