"""Several sandboxes at once: who runs which script, and what happens when a sandbox dies."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType

from shell_rl.errors import SandboxDied, SandboxesUnavailable, ShellRlError
from shell_rl.interruption import Interruption
from shell_rl.sandbox import RuntimeApi, Sandbox
from shell_rl.sandbox_program import Execution

log = logging.getLogger("shell_rl")

REPLACEMENTS = 3  # a worker gets this many new sandboxes after its first, in a whole run
ATTEMPTS = 3  # a script is tried on this many sandboxes before the run gives up
CLOSE_SECONDS = 20.0
POLL_SECONDS = 0.1


@dataclass
class _Job:
    script: str
    attempts: int = 0
    result: Execution | None = None


@dataclass
class _State:
    """What the workers and the caller share, under one condition."""

    condition: threading.Condition = field(default_factory=threading.Condition)
    waiting: deque[_Job] = field(default_factory=deque)
    sessions: set[str] = field(default_factory=set)
    workers: int = 0
    error: ShellRlError | None = None


def _join(threads: Sequence[threading.Thread], seconds: float) -> None:
    """Wait for all of the threads, ``seconds`` altogether."""
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


class SandboxPool:
    """Up to ``size`` sandboxes, started when the ``with`` block is entered and stopped when it is left.

    Scripts run as soon as one sandbox is ready. Where the server has no room for all, the run goes on with those it
    got. A sandbox that dies is replaced and its script repeated, a bounded number of times.
    """

    def __init__(self, api: RuntimeApi, size: int, interruption: Interruption) -> None:
        self._api = api
        self._interruption = interruption
        self._state = _State(workers=size)
        self._closing = threading.Event()
        # Daemons: a thread that hangs in a request must not keep the process from ending once its sandbox is stopped.
        self._threads = [threading.Thread(target=self._work, daemon=True, name=f"sandbox-{n}") for n in range(size)]

    def __enter__(self) -> SandboxPool:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        with self._state.condition:
            self._state.condition.notify_all()
        _join(self._threads, CLOSE_SECONDS / 20)
        self._stop_remaining()
        _join(self._threads, CLOSE_SECONDS)

    def _stop_remaining(self) -> None:
        """Stop the sandboxes whose workers are still held up, in a /start perhaps."""
        with self._state.condition:
            sessions = tuple(self._state.sessions)
        stoppers = [threading.Thread(target=self._api.stop, args=(session,), daemon=True) for session in sessions]
        for stopper in stoppers:
            stopper.start()
        _join(stoppers, CLOSE_SECONDS)

    def run_all(self, scripts: Sequence[str]) -> list[Execution]:
        """Run the scripts, several at once, each in a fresh directory; results in the order of the scripts.

        :raises SandboxesUnavailable: no sandbox is left, or a script broke several
        :raises Interrupted: a signal asked for an end
        """
        jobs = [_Job(script) for script in scripts]
        with self._state.condition:
            self._state.waiting.extend(jobs)
            self._state.condition.notify_all()
            while any(job.result is None for job in jobs):
                self._interruption.check()
                if self._state.error is not None:
                    raise self._state.error
                self._state.condition.wait(POLL_SECONDS)
        return [job.result for job in jobs if job.result is not None]

    def _work(self) -> None:
        """A worker's life: a sandbox, scripts, a new sandbox where the old one died."""
        try:
            for _ in range(1 + REPLACEMENTS):
                try:
                    with self._sandbox() as sandbox:
                        log.info("Sandbox %s is ready at %s.", sandbox.runtime_id, sandbox.door.address)
                        return self._serve(sandbox)
                except SandboxDied as error:
                    log.warning("%s It is replaced.", error)
                    last: ShellRlError = error
            self._give_up(last)
        except ShellRlError as error:
            self._give_up(error)
        except BaseException as error:
            # Whatever it is, the caller must not wait for a worker that no longer exists.
            self._give_up(SandboxesUnavailable(f"A fault of shell_rl: {error!r}"))
            raise
        return None

    def _give_up(self, error: ShellRlError) -> None:
        with self._state.condition:
            self._state.workers -= 1
            left = self._state.workers
            if left == 0:
                self._state.error = error
            self._state.condition.notify_all()
        if left and not self._closing.is_set():
            log.warning("Going on with at most %d sandboxes: %s", left, error)

    @contextmanager
    def _sandbox(self) -> Iterator[Sandbox]:
        session_id = f"shell-rl-{uuid.uuid4()}"
        with self._state.condition:
            self._state.sessions.add(session_id)
        try:
            yield self._api.start(session_id, self._closing)
        finally:
            self._api.stop(session_id)
            with self._state.condition:
                self._state.sessions.discard(session_id)

    def _next_job(self) -> _Job | None:
        with self._state.condition:
            while not self._state.waiting and not self._closing.is_set():
                self._state.condition.wait()
            return None if self._closing.is_set() else self._state.waiting.popleft()

    def _serve(self, sandbox: Sandbox) -> None:
        while (job := self._next_job()) is not None:
            try:
                result = sandbox.run(job.script)
            except SandboxDied as error:
                self._repeat(job, error)
                raise
            with self._state.condition:
                job.result = result
                self._state.condition.notify_all()

    def _repeat(self, job: _Job, error: SandboxDied) -> None:
        job.attempts += 1
        with self._state.condition:
            if job.attempts < ATTEMPTS:
                self._state.waiting.appendleft(job)
            else:
                self._state.error = SandboxesUnavailable(f"One script broke {ATTEMPTS} sandboxes; the last: {error}")
            self._state.condition.notify_all()
