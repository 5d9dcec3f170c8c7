"""The only door to child processes: run one to its end, or own one for the length of a ``with`` block.

A child that we own leads a session of its own, dies with its owner (PR_SET_PDEATHSIG), and is stopped in stages:
asked, waited for, killed with its whole process group, reaped.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from slurm.lib.errors import EnvironmentProblem, WaitTimeout
from slurm.lib.logs import log
from slurm.lib.signals import SignalNotes
from slurm.lib.under_way import under_way

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
CHECK_EVERY_S = 0.2
ATTACHED_GRACE_S = 2.0  # for a command on our own terminal, from being asked to being killed


@cache
def _libc() -> Any:
    """The C library. To be had before a fork, after which nothing may be imported; 1 ms, felt in commands that look."""
    import ctypes

    return ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Completed:
    """How a command ended: its exit code, and everything it printed."""

    argv: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str

    @property
    def ok(self) -> bool:
        return self.returncode == 0

    @property
    def complaint(self) -> str:
        """What the command said on stderr (else on stdout, else its exit code), in one line."""
        text = self.stderr.strip() or self.stdout.strip() or f"exit code {self.returncode}"
        return "; ".join(" ".join(line.split()) for line in text.splitlines() if line.strip())


def run(
    argv: Sequence[str],
    *,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    check: Callable[[], None] | None = None,
    said: str | None = None,
) -> Completed:
    """Run a command to its end; a failing exit code is a result, not an error. ``said`` is its standard input.

    Raises ``EnvironmentProblem`` if it cannot be started and ``WaitTimeout`` after ``timeout_s`` seconds. ``check``
    runs a few times a second and may raise the reason to end the wait. In both cases the command is killed. One that a
    thread waits for that is not waited for itself ends with the process. With SKYRL_DEBUG each command is a line of the
    log.
    """
    begin = time.monotonic()
    words = " ".join(argv)[:200]
    try:
        with under_way(lambda: _started(argv, environment, cwd, said), _kill_group) as process, process:
            try:
                out, err = _communicate(process, timeout_s, check, said)
            except BaseException:
                _kill_group(process)
                raise
    except WaitTimeout as problem:
        raise WaitTimeout(f"{argv[0]}: {problem}: {words}") from None
    log.debug("ran for %.2f s, exit code %d: %s", time.monotonic() - begin, process.returncode, words)
    return Completed(tuple(argv), process.returncode, out, err)


def _started(
    argv: Sequence[str], environment: Mapping[str, str] | None, cwd: Path | None, said: str | None
) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL if said is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=None if environment is None else dict(environment),
            cwd=cwd,
            start_new_session=True,  # a terminal's Ctrl-C must not end sbatch between taking a job and naming it
        )
    except FileNotFoundError as problem:
        raise EnvironmentProblem(f"{argv[0]}: not found ({problem.strerror}); is it on PATH?") from None
    except OSError as problem:  # such as an environment that is too large for any command
        raise EnvironmentProblem(f"cannot start {argv[0]}: {problem.strerror}") from None


def _kill_group(process: subprocess.Popen[str]) -> None:
    """Kill the leader of a session with all in its group: a site's sbatch may be a script that calls the real one.

    Of a leader that has ended and was not waited for the number is still ours, and what it left may hold our pipe.
    """
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def first_bytes(
    argv: Sequence[str], most: int, *, timeout_s: float, environment: Mapping[str, str], cwd: Path
) -> bytes | None:
    """The first ``most`` bytes that a command prints; None where it cannot be started, fails, or takes too long.

    It is killed once that much is there, and after ``timeout_s`` seconds.
    """
    nothing = subprocess.DEVNULL

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            list(argv),
            cwd=cwd,
            env=dict(environment),
            stdin=nothing,
            stdout=subprocess.PIPE,
            stderr=nothing,  # in our own session: a terminal's Ctrl-C is to end it
        )

    try:
        with under_way(start, _kill_tree) as process, process:
            return _first_bytes(process, most, timeout_s)
    except (OSError, WaitTimeout):
        return None


def _first_bytes(process: subprocess.Popen[bytes], most: int, timeout_s: float) -> bytes | None:
    end = time.monotonic() + timeout_s
    try:
        text = _read_until_its_end(process, most, end)
        if len(text) < most and process.wait(max(0.0, end - time.monotonic())) != 0:
            return None
        return text
    except subprocess.TimeoutExpired:
        return None
    finally:
        _kill_tree(process)


def _read_until_its_end(process: subprocess.Popen[bytes], most: int, end: float) -> bytes:
    """What it prints until it has ended; what it leaves in the background may hold the pipe for longer."""
    assert process.stdout
    text, poller = bytearray(), select.poll()
    poller.register(process.stdout, select.POLLIN)
    while len(text) < most:
        has_ended = process.poll() is not None
        if poller.poll(0 if has_ended else CHECK_EVERY_S * 1000):
            chunk = os.read(process.stdout.fileno(), most - len(text))
            if not chunk:
                break
            text += chunk
        elif has_ended:
            break
        elif time.monotonic() > end:
            raise subprocess.TimeoutExpired(process.args, 0.0)
    return bytes(text)


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a command of our own session that runs, with all that descends from it."""
    if process.returncode is None:
        for pid in descendants({process.pid}) | {process.pid}:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def _communicate(
    process: subprocess.Popen[str], timeout_s: float, check: Callable[[], None] | None, said: str | None
) -> tuple[str, str]:
    end = time.monotonic() + timeout_s
    while True:
        left = end - time.monotonic()
        try:
            return process.communicate(said, timeout=max(0.0, left if check is None else min(CHECK_EVERY_S, left)))
        except subprocess.TimeoutExpired:
            if time.monotonic() >= end:
                raise WaitTimeout(f"no answer within {timeout_s:g} s") from None
            said = None  # it is kept, and must not be given twice
        if check is not None:
            check()


def living_fields(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on (proc(5)); None for no process, or only a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot, or None if there is none (or only a zombie).

    With it a pid means the same process for ever, however often the number is used again.
    """
    fields = living_fields(pid)
    return None if fields is None else int(fields[19])


def own_age_s() -> float:
    """Seconds since this process started: not since its last ``exec``, and whatever clocks are set meanwhile."""
    up_s = float(Path("/proc/uptime").read_text().split()[0])
    return up_s - (start_ticks(os.getpid()) or 0) / os.sysconf("SC_CLK_TCK")


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, so that none leaves this process's tree."""
    _libc().prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(roots: set[int]) -> set[int]:
    """All living processes that descend from ``roots``, without these."""
    parents = {pid: parent for pid in pids() if (parent := _parent(pid)) is not None}
    found = set(roots)
    while more := {pid for pid, parent in parents.items() if parent in found and pid not in found}:
        found |= more
    return found - roots


def pids() -> list[int]:
    """The numbers of all processes of this host, as far as this one sees them."""
    return [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()]


def _parent(pid: int) -> int | None:
    fields = living_fields(pid)
    return None if fields is None else int(fields[1])


def kill_descendants(spared: set[int], deadline_s: float = 2.0) -> None:
    """Kill what descends from this process, but ``spared`` and their descendants; returns once it has ended.

    It is not reaped: its parent may be a thread of ours that waits for it, to which a command whose end somebody else
    has taken looks like one that succeeded. What no one waits for is a zombie until this process ends.
    """
    end = time.monotonic() + deadline_s
    while doomed := descendants({os.getpid()}) - spared - descendants(spared):
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > end:
            return
        time.sleep(0.02)


@dataclass(frozen=True)
class ChildSpec:
    """What to start: command, environment, folder, where its streams go and what becomes of it with its owner."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    name: str
    cwd: Path | None = None
    stdin_pipe: bool = False
    stdout: IO[bytes] | int | None = None
    stderr: IO[bytes] | int | None = None
    pass_fds: tuple[int, ...] = ()
    death_signal: int = signal.SIGKILL  # 0: none, for what outlives its owner's death and then ends by itself
    ignores_stops: bool = False  # from its first moment; for a child whose owner stops it in another way


def ignore_stops() -> None:
    """Ignore the signals by which a scheduler or a terminal stops every process of a job at once."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


class Child:
    """A process that we own; ``with Child(spec) as child`` has stopped and reaped it afterwards."""

    def __init__(self, spec: ChildSpec, stop_grace_s: float = 3.0) -> None:
        self.spec = spec
        self.stop_grace_s = stop_grace_s
        self._copiers: list[threading.Thread] = []
        _libc()  # before the fork
        try:
            self.process = subprocess.Popen(
                list(spec.argv),
                env=dict(spec.environment),
                cwd=spec.cwd,
                stdin=subprocess.PIPE if spec.stdin_pipe else subprocess.DEVNULL,
                stdout=spec.stdout,
                stderr=spec.stderr,
                pass_fds=spec.pass_fds,
                start_new_session=True,
                preexec_fn=self._before_exec,
            )
        except FileNotFoundError as problem:
            gone = spec.cwd is not None and str(problem.filename) == str(spec.cwd)
            what = f"the folder {spec.cwd} is not there" if gone else f"{spec.argv[0]} not found; is it on PATH?"
            raise EnvironmentProblem(f"cannot start {spec.name}: {what}") from None
        except OSError as problem:
            raise EnvironmentProblem(f"cannot start {spec.name} ({spec.argv[0]}): {problem.strerror}") from None

    def _before_exec(self) -> None:
        _libc().prctl(PR_SET_PDEATHSIG, self.spec.death_signal, 0, 0, 0)
        if self.spec.ignores_stops:
            ignore_stops()

    def __repr__(self) -> str:
        return f"{self.spec.name} (pid {self.pid}, exit code {self.process.returncode})"

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; 128 + N after signal N, as shells count."""
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code

    def send(self, number: int) -> None:
        """Send a signal to its whole process group; nothing happens if it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def wait(self, timeout_s: float) -> bool:
        """True once it has ended, False if it still runs after ``timeout_s`` seconds."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def copy_stderr(self, *sinks: Callable[[bytes], object]) -> None:
        """Hand each line of the child's stderr (a pipe) to every sink until its end."""
        assert self.process.stderr
        self._copiers.append(copy_lines(self.process.stderr, sinks))

    def stop(self, grace_s: float | None = None) -> None:
        """Ask, wait ``grace_s`` seconds, kill the process group, reap, have its last lines copied."""
        if self.process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        if self.exit_code is None:
            self.send(signal.SIGTERM)
            self.wait(self.stop_grace_s if grace_s is None else grace_s)
        self.kill()

    def kill(self) -> None:
        """Kill the process group, reap, have its last lines copied."""
        self.send(signal.SIGKILL)
        self.process.wait()
        for copier in self._copiers:
            copier.join(1.0)  # a grandchild may hold the pipe open


def attached(
    argv: Sequence[str],
    environment: Mapping[str, str],
    notes: SignalNotes,
    *,
    ask_by: int = signal.SIGTERM,
    leaves_interrupts: bool = False,
    on_stderr: Callable[[IO[bytes]], object] | None = None,
) -> int:
    """Run a command on this process's own streams, or terminal, to its end; its exit code, 128 + N after signal N.

    A stopping signal ends it, by ``ask_by`` and then SIGKILL, and is raised as ``Interrupted``. With
    ``leaves_interrupts`` SIGINT is the command's alone: a terminal gives it to both. ``on_stderr`` reads its stderr to
    the end, in a thread; else that is ours.
    """
    libc = _libc()
    before = signal.signal(signal.SIGINT, lambda *_: None) if leaves_interrupts else None  # not SIG_IGN: inherited
    try:
        process = subprocess.Popen(
            list(argv),
            env=dict(environment),
            stderr=subprocess.PIPE if on_stderr else None,
            preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),
        )
    except OSError as problem:
        raise EnvironmentProblem(f"cannot start {argv[0]}: {problem.strerror}; is it on PATH?") from None
    else:
        reader = threading.Thread(target=on_stderr, args=(process.stderr,), daemon=True) if on_stderr else None
        if reader:
            reader.start()
        code = _ended_or_stopped(process, notes, ask_by)
        if reader:
            reader.join(ATTACHED_GRACE_S)
        return code if code >= 0 else 128 - code
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


def _ended_or_stopped(process: subprocess.Popen[bytes], notes: SignalNotes, ask_by: int) -> int:
    """The exit code of a process that is waited for until a stopping signal comes."""
    try:
        while (code := _waited(process, CHECK_EVERY_S)) is None:
            notes.check()
    except BaseException:
        process.send_signal(ask_by)
        if _waited(process, ATTACHED_GRACE_S) is None:
            process.kill()
            process.wait()
        raise
    return code


def _waited(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(seconds)
    return None


def how_it_ended(exit_code: int, last_words: str) -> str:
    """How a process ended, as the end of a sentence. What one that was killed had said is not about its end."""
    if exit_code == 128 + signal.SIGKILL:
        return f"exit code {exit_code} (SIGKILL: somebody killed it, or the kernel, for want of memory)"
    return f"exit code {exit_code}: {last_words or 'without a word'}"


def copy_lines(source: IO[bytes], sinks: Sequence[Callable[[bytes], object]]) -> threading.Thread:
    """A started thread that hands each line of ``source`` to every sink until its end."""

    def pump() -> None:
        with source:
            for line in source:
                for sink in sinks:
                    sink(line)

    thread = threading.Thread(target=pump, daemon=True)
    thread.start()
    return thread


def write_through(stream: IO[str]) -> Callable[[bytes], None]:
    """A sink that writes bytes to a text stream's descriptor at once; a full disk loses lines, not the child."""

    def write(line: bytes) -> None:
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
            while line:
                line = line[os.write(stream.fileno(), line) :]

    return write
