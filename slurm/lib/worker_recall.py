"""The end of a runtime's worker arrays: they are the runtime job's, which takes them out of the queue as it ends.

Whatever the reason. A worker that runs sees the end of the run by itself; so where that was planned it gets a moment to
end in order. Where the body of the runtime job is killed, or its node lost, the training job takes what is pending out
of the queue; where there is no training, that starts, and sees at once that there is nothing to join.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType

from slurm.lib.job_context import JobContext
from slurm.lib.logs import log
from slurm.lib.run_record import WorkerArray, workers_of
from slurm.lib.runs import stranger
from slurm.lib.scheduler import JobState, Slurm
from slurm.lib.worker_steps import IN_ORDER_S

ASK_S = 5.0  # whose an array is; Slurm's KillWait may be running
MOST_S = 12.0  # from the end of the run to that of a busy node's worker, as long as Slurm answers
PATIENCE_S = 10.0  # with a Slurm that is silent


@dataclass
class Recall:
    """Ends this runtime job's worker arrays at the end of its block, or from ``begin`` on in the background."""

    job: JobContext
    _thread: threading.Thread | None = field(default=None, init=False)

    def __enter__(self) -> Recall:
        return self

    def begin(self, *, as_planned: bool) -> None:
        """Start, while this job stops everything else."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, args=(as_planned,), daemon=True)
            self._thread.start()

    def __exit__(self, _kind: type[BaseException] | None, _fault: object, _trace: TracebackType | None) -> None:
        self.begin(as_planned=False)
        assert self._thread is not None
        self._thread.join(IN_ORDER_S + PATIENCE_S)
        if self._thread.is_alive():
            log.warning("Slurm does not answer; workers that are pending start later, and end at once")

    def _work(self, as_planned: bool) -> None:
        slurm = self.job.scheduler
        if not isinstance(slurm, Slurm):
            return
        with contextlib.suppress(OSError):  # a directory that is gone names none
            ids = own_arrays(self.job, self.job.job_id, slurm)
            if ids and as_planned:
                slurm.cancel_pending(*ids, timeout_s=ASK_S)
                self._await_end(ids, slurm)
            complaint = slurm.cancel(ids, timeout_s=ASK_S) if ids else None
            if complaint:
                log.warning("the workers %s could not be cancelled: %s", " ".join(ids), complaint)

    @staticmethod
    def _await_end(ids: list[str], slurm: Slurm) -> None:
        """Wait until they have ended in order: a worker of a busy node is not to be called cancelled."""
        begin = time.monotonic()
        while (waited := time.monotonic() - begin) < MOST_S:
            states = {status.state for status in slurm.statuses(ids, ASK_S).values()}
            if all(state.is_final for state in states) or (waited > IN_ORDER_S and JobState.UNKNOWN in states):
                return
            time.sleep(0.5)


def withdraw(job: JobContext, runtime_job_id: str) -> None:
    """Take the workers out of the queue that wait for a runtime job which is gone, and could not do so itself."""
    slurm = job.scheduler
    if not isinstance(slurm, Slurm):
        return
    with contextlib.suppress(OSError):
        ids = own_arrays(job, runtime_job_id, slurm)
        complaint = slurm.cancel_pending(*ids, timeout_s=ASK_S) if ids else None
        if complaint:
            log.warning("the workers %s may still wait in the queue: %s", " ".join(ids), complaint)


def own_arrays(job: JobContext, runtime_job_id: str, slurm: Slurm) -> list[str]:
    """The ids of a runtime job's worker arrays, the last first; without those that Slurm says are another run's."""
    arrays = reversed(workers_of(job.directory, runtime_job_id))
    return [array.job_id for array in arrays if _is_own(array, job, slurm)]


def _is_own(array: WorkerArray, job: JobContext, slurm: Slurm) -> bool:
    whose = stranger(array.job_id, job.directory, slurm, ASK_S)
    if whose:
        log.warning("a record here names the workers %s, which %s; they stay", array.job_id, whose)
    return not whose
