"""The API server's side of the warden: starts it, asks it, starts it again when it dies, ends it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slurm_runtime.agent.tree import AgentTree
from slurm_runtime.control import ControlError, ForkRefused, OnEvent
from slurm_runtime.deadlines import within
from slurm_runtime.warden.proc import namespace_of

PROGRAM = Path(__file__).with_name("process.py")
CODE = PROGRAM.parents[2]
READY_DEADLINE_S = 20.0
FORK_DEADLINE_S = 20.0
STRAY_DEADLINE_S = 20.0
DEADLINE_S = 10.0
END_S = 2.0
RETRY_S = (0.1, 1.0, 5.0, 30.0)
LONGEST_LINE = 1 << 22


def namespaces(pid: int) -> tuple[int, ...]:
    """Those of a process that the warden joins; empty where they cannot be read."""
    found = (namespace_of(pid, "user"), namespace_of(pid, "mnt"))
    return found if all(found) else ()


class Warden:
    """Implements ``control.Control`` with the real process. ``podman_pid`` is Podman's service."""

    def __init__(self, podman_pid: int, on_event: OnEvent) -> None:
        self.podman_pid = podman_pid
        self.on_event = on_event
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Mapping[str, Any]]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._started: asyncio.Future[None] | None = None
        self._tree: AgentTree | None = None
        self._watches: dict[str, dict[str, Any]] = {}
        self._servers: dict[str, int] = {}
        self._closing = False
        self._joined: tuple[int, ...] = ()
        self._moved = asyncio.Event()

    async def start(self) -> None:
        self._started = asyncio.get_running_loop().create_future()
        self._keeper = asyncio.create_task(self._keep())
        try:
            await within(READY_DEADLINE_S, asyncio.shield(self._started))
        except asyncio.TimeoutError:
            await self.close()
            raise ControlError(f"the warden did not start within {READY_DEADLINE_S:g} s") from None
        except ControlError:
            await self.close()
            raise

    def podman_is(self, pid: int) -> None:
        """The next warden joins the namespaces of this process; the one that runs is ended if it is in others."""
        if pid == self.podman_pid:
            return
        self.podman_pid = pid
        self._moved.set()
        there = namespaces(pid)
        if self._process is not None and self._process.returncode is None and there and there != self._joined:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def start_fork_server(self, tree: AgentTree) -> None:
        self._tree = tree
        command = list(tree.python_command(()))
        await self._ask({"do": "start_fork_server", "tree": str(tree.root), "command": command}, DEADLINE_S)

    async def fork(
        self,
        sandbox: str,
        holder: int,
        arguments: Sequence[str],
        working_dir: str,
        seccomp: Mapping[str, Any] | None,
    ) -> int:
        request = {"arguments": list(arguments), "working_dir": working_dir, "seccomp": seccomp}
        answer = await self._about("fork", sandbox, holder, FORK_DEADLINE_S, **request)
        self._servers[sandbox] = int(answer["pid"])
        return self._servers[sandbox]

    async def adopt(self, sandbox: str, pid: int) -> None:
        self._servers[sandbox] = pid
        await self._ask({"do": "adopt", "sandbox": sandbox, "pid": pid}, DEADLINE_S)

    async def pause(self, sandbox: str, holder: int) -> None:
        await self._about("pause", sandbox, holder)

    async def resume(self, sandbox: str, holder: int) -> None:
        await self._about("resume", sandbox, holder)

    async def deny_network(self, sandbox: str, holder: int) -> None:
        await self._about("deny_network", sandbox, holder)

    async def pin(self, sandbox: str, holder: int, cpus: Sequence[int]) -> None:
        await self._about("pin", sandbox, holder, cpus=list(cpus))

    async def watch(
        self,
        sandbox: str,
        holder: int,
        memory_bytes: int,
        processes: int,
        disk_bytes: int,
        disk_paths: Sequence[str],
    ) -> None:
        limits = {"memory_bytes": memory_bytes, "processes": processes, "disk_bytes": disk_bytes}
        request = {**limits, "disk_paths": list(disk_paths), "holder": holder}
        self._watches[sandbox] = request
        await self._ask({"do": "watch", "sandbox": sandbox, **request}, DEADLINE_S)

    async def forget(self, sandbox: str) -> None:
        self._watches.pop(sandbox, None)
        self._servers.pop(sandbox, None)
        await self._ask({"do": "forget", "sandbox": sandbox}, DEADLINE_S)

    async def usage(self) -> Mapping[str, Mapping[str, float]]:
        answer = await self._ask({"do": "usage"}, DEADLINE_S)
        usage: Mapping[str, Mapping[str, float]] = answer["usage"]
        return usage

    async def end_stray(self, monitor: int, started: int, container: str, program: str, runtime: str) -> bool:
        request = {"monitor": monitor, "started": started, "container": container}
        request |= {"program": program, "runtime": runtime}
        answer = await self._ask({"do": "end_stray", **request}, STRAY_DEADLINE_S)
        return bool(answer["ended"])

    async def tidy_networks(self, empty_for_s: float) -> int:
        answer = await self._ask({"do": "tidy_networks", "empty_for_s": empty_for_s}, DEADLINE_S)
        return int(answer["removed"])

    async def close(self) -> None:
        self._closing = True
        if self._writer:
            self._writer.close()
        if self._process and self._process.returncode is None:
            with contextlib.suppress(asyncio.TimeoutError):
                await within(END_S, self._process.wait())
            if self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
                await self._process.wait()
        if self._keeper:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)

    # Asking.

    async def _about(
        self, verb: str, sandbox: str, holder: int, deadline_s: float = DEADLINE_S, **more: Any
    ) -> Mapping[str, Any]:
        return await self._ask({"do": verb, "sandbox": sandbox, "holder": holder, **more}, deadline_s)

    async def _ask(self, request: dict[str, Any], deadline_s: float) -> Mapping[str, Any]:
        if self._writer is None:
            raise ControlError("the warden does not run at the moment")
        number = next(self._numbers)
        self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._writer.write(json.dumps({"id": number, **request}).encode() + b"\n")
            answer = await within(deadline_s, self._waiting[number])
        except asyncio.TimeoutError:
            raise ControlError(f"the warden did not answer '{request['do']}' within {deadline_s:g} s") from None
        finally:
            self._waiting.pop(number, None)
        if "refused" in answer:
            raise ForkRefused(str(answer["refused"]))
        if "error" in answer:
            raise ControlError(str(answer["error"]))
        return answer

    # The process.

    async def _keep(self) -> None:
        """One warden after the other, until ``close``."""
        for attempt in itertools.count():
            reason = await self._live()
            if self._closing:
                return
            if self._started and not self._started.done():
                self._started.set_exception(ControlError(reason))
                return
            self.on_event({"event": "fork_server", "state": "died", "reason": reason})
            self._moved.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await within(RETRY_S[min(attempt, len(RETRY_S) - 1)], self._moved.wait())

    async def _live(self) -> str:
        """The life of one process; why it ended."""
        ours, theirs = socket.socketpair()
        self._joined = namespaces(self.podman_pid)
        with theirs:
            words = ["-I", "-S", str(PROGRAM), str(theirs.fileno()), str(self.podman_pid), str(CODE)]
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *words,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                env={"PATH": os.environ.get("PATH", os.defpath)},
                cwd="/",
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        reader, writer = await asyncio.open_connection(sock=ours, limit=LONGEST_LINE)
        reason = "the warden ended"
        try:
            async for line in reader:
                message = json.loads(line)
                if message.get("event") == "ready":
                    self._writer = writer
                    await self._catch_up()
                elif message.get("event") == "unusable":
                    reason = str(message["reason"])
                else:
                    self._heed(message)
        except (OSError, ValueError) as problem:
            reason = f"the connection to the warden broke: {problem}"
        finally:
            self._writer = None
            writer.close()
            self._fail_all(reason)
        await self._process.wait()
        return reason

    async def _catch_up(self) -> None:
        """Tell a new warden what the one before it knew; its answers are read by our caller, so none is awaited."""
        assert self._writer is not None
        again: list[dict[str, Any]] = []
        if self._tree is not None:
            command = list(self._tree.python_command(()))
            again.append({"do": "start_fork_server", "tree": str(self._tree.root), "command": command})
        again += [{"do": "adopt", "sandbox": name, "pid": pid} for name, pid in self._servers.items()]
        again += [{"do": "watch", "sandbox": name, **request} for name, request in self._watches.items()]
        for request in again:
            self._writer.write(json.dumps({"id": 0, **request}).encode() + b"\n")
        if self._started and not self._started.done():
            self._started.set_result(None)

    def _heed(self, message: Mapping[str, Any]) -> None:
        if "event" in message:
            self.on_event(message)
            return
        future = self._waiting.get(int(message.get("id") or 0))
        if future is not None and not future.done():
            future.set_result(message)

    def _fail_all(self, reason: str) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_result({"error": reason})
