"""Why did a sandbox die: exit code, out of memory, the last lines of its log."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from slurm_runtime.podman import (
    BadArchive,
    ContainerState,
    Engine,
    EngineError,
    EngineSilent,
    EngineUnreachable,
    NoSuchImage,
    PullFailed,
)

LAST_LINES = 50
LAST_BYTES = 16384
KILLED = 128 + signal.SIGKILL  # the exit code of a process that SIGKILL ended
SETTLE_S, SETTLE_PAUSE_S = 2.0, 0.02  # until Podman knows what the kernel has told


# What deaths are counted as; of few kinds, so that thousands of them make a short table.
PROGRAM_ENDED = "its program ended"
MEMORY, PROCESSES, DISK = "out of memory", "too many processes", "too much disk"
NO_ANSWER, NO_IMAGE = "its server did not answer in time", "its image could not be had"
PODMAN_REFUSED, PODMAN_SILENT = "Podman refused", "Podman did not answer"
NO_SLOT, STOPPED, IDLE, HUNG_UP = "no slot became free in time", "stopped on request", "idle", "its client hung up"
SERVER_STOPS, SERVER_KILLED = "the API server stopped", "the API server was killed"
NEVER_FITS, FAULT = "it needs more slots than there are", "an internal error"


@dataclass(frozen=True)
class Diagnosis:
    """A sentence for people, the evidence, and what statistics count it as."""

    sentence: str
    last_lines: str
    out_of_memory: bool = False
    exit_code: int = 0
    kind: str = PROGRAM_ENDED

    @property
    def counted_as(self) -> str:
        return MEMORY if self.out_of_memory else self.kind


def kind_of(problem: Exception) -> str:
    """What a failure of Podman's is counted as. Pure."""
    if isinstance(problem, NoSuchImage | PullFailed | BadArchive):
        return NO_IMAGE
    return PODMAN_SILENT if isinstance(problem, EngineSilent | EngineUnreachable) else PODMAN_REFUSED


def kind_of_offence(offence: str) -> str:
    """What a death by the watchdog is counted as. Pure."""
    return PROCESSES if "processes" in offence else MEMORY if "memory" in offence else DISK


OUT_OF_MEMORY = "the sandbox was killed because it used more memory than it may (out of memory)"


def explain(state: ContainerState) -> str:
    """A sentence for how a container ended."""
    if state.out_of_memory:
        return OUT_OF_MEMORY
    if state.running:
        return f"its container is {state.status}"
    return ended_with(state.exit_code)


def ended_with(exit_code: int) -> str:
    """The sentence for an exit code."""
    return f"the sandbox's program ended with exit code {exit_code}{_signal_name(exit_code)}"


def _signal_name(exit_code: int) -> str:
    try:
        return f" ({signal.Signals(exit_code - 128).name})" if exit_code > 128 else ""
    except ValueError:
        return ""


def never() -> bool:
    return False


async def _settled(engine: Engine, name: str, is_due: Callable[[], bool]) -> ContainerState:
    end = time.monotonic() + SETTLE_S
    while (state := await engine.inspect(name)).running and is_due() and time.monotonic() < end:
        await asyncio.sleep(SETTLE_PAUSE_S)
    return state


async def diagnose(engine: Engine, name: str, is_due: Callable[[], bool] = never) -> Diagnosis:
    """What can be learned of a container; a probe that fails says so and hides nothing else.

    ``EngineUnreachable`` goes up: ask again. ``is_due`` says whether Podman's word of how it ended is to be waited for:
    its first process is gone, and Podman learns that a moment later, or never while the disk is full.
    """
    try:
        state = await _settled(engine, name, is_due)
    except EngineUnreachable:
        raise
    except EngineError as problem:
        return Diagnosis(f"its container is gone: {problem}", "", kind=kind_of(problem))
    try:
        lines = await engine.logs(name, LAST_LINES)
    except EngineUnreachable:
        raise
    except EngineError as problem:
        lines = f"(its log cannot be read: {problem})"
    return Diagnosis(explain(state), lines[-LAST_BYTES:].strip(), state.out_of_memory, state.exit_code)


def judged(
    found: Diagnosis, offence: str | None, server_exit: int | None, kernel_killed: bool, memory_bites: bool
) -> Diagnosis:
    """Why a sandbox died, from what its container shows and from what else is known. Pure.

    ``offence`` is why the watchdog stopped it, ``server_exit`` the exit code of a forked server. ``kernel_killed``: the
    kernel counts a process of its cgroup that it killed for memory; ``memory_bites``: it enforces a limit at all.
    """
    if offence:
        return Diagnosis(f"the sandbox was stopped: {offence}", found.last_lines, kind=kind_of_offence(offence))
    code = found.exit_code if server_exit is None else server_exit
    if code == KILLED and kernel_killed:
        return Diagnosis(OUT_OF_MEMORY, found.last_lines, out_of_memory=True)
    if code == KILLED and not found.out_of_memory and memory_bites:
        # Podman misses it where an init runs in the container: the kernel kills the init's child.
        sentence = f"{ended_with(code)}, most likely because it used more memory than it may (out of memory)"
        return Diagnosis(sentence, found.last_lines, out_of_memory=True)
    return found if server_exit is None else Diagnosis(ended_with(code), found.last_lines)


def killed_for_memory(pid: int) -> bool:
    """Whether the kernel has killed a process of this one's cgroup because of its memory limit."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in {"", "memory"} and path != "/":
                return _kills(controllers, path)
    return False


def _kills(controllers: str, path: str) -> bool:
    """Both versions of cgroups count them, each in its own place."""
    place = f"/memory{path}/memory.oom_control" if controllers else f"{path}/memory.events"
    text = Path(f"/sys/fs/cgroup{place}").read_text(encoding="utf-8")
    return re.search(r"^oom_kill [1-9]", text, re.MULTILINE) is not None
