"""What a job uses, noted while it runs: a line every half minute, in the run directory.

It is nobody's duty: the shared directory may be full, slow or gone, and nvidia-smi may hang. So threads do it that no
one waits for. Whoever ends the job says so by ``close``, which has a last look taken, and goes on at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slurm.lib.api_server_child import statistics_file
from slurm.lib.coordination import host_name, write_atomically
from slurm.lib.job_context import JobContext
from slurm.lib.logs import log
from slurm.lib.podman_storage import PodmanStorage, processes_of
from slurm.lib.signals import SignalNotes
from slurm.lib.usage_cgroup import JobCgroup, cpu_s, memory_bytes, memory_limit_bytes, own_cgroup
from slurm.lib.usage_gpus import Gpus
from slurm.lib.usage_processes import Ledger, Process, of_job

SCHEMA = 1
SAMPLE_S = 30.0
PUBLISH_S = 60.0
ROOM = 1_000_000  # bytes of a file of samples
STEP = ROOM // 8  # after each of these the distance doubles: a day's samples, a month's, fit


class Background:
    """Does ``work`` in a thread: at once, every so many seconds, and for a last time once it is closed.

    ``work`` is told whether it is the last time. What it raises is said once, and so is a thread that cannot be had.
    It ends with the process, if not before.
    """

    def __init__(self, name: str, work: Callable[[bool], None], every_s: Callable[[], float]) -> None:
        self._name, self._work, self._every_s = name, work, every_s
        self._end = threading.Event()
        self._said = False

    def __enter__(self) -> Background:
        try:
            threading.Thread(target=self._run, name=self._name, daemon=True).start()
        except RuntimeError as problem:  # there are as many as this user, or this job, may have
            log.warning("%s: %s", self._name, problem)
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Have it done for the last time; nobody waits for that."""
        self._end.set()

    def _run(self) -> None:
        self._do(is_last=False)
        while not self._end.wait(self._every_s()):
            self._do(is_last=False)
        self._do(is_last=True)

    def _do(self, *, is_last: bool) -> None:
        try:
            self._work(is_last)
        except Exception as problem:  # whatever it is, the job goes on
            if not self._said:
                log.info("%s: %s", self._name, problem)
            self._said = True


@dataclass
class SampleFile:
    """The file of a job's samples, which stays open: on a slow share each opening takes seconds."""

    path: Path
    size: int = 0
    _descriptor: int | None = None
    _is_torn: bool = False

    @property
    def distance_s(self) -> float:
        """Seconds to the next sample: more and more, so that the file stays small however long the job runs."""
        return float(SAMPLE_S * 2 ** (self.size // STEP))

    def append(self, line: str) -> None:
        """Add a line; beyond ``ROOM`` nothing. ``OSError`` where it cannot be written, perhaps for now."""
        data = (b"\n" if self._is_torn else b"") + line.encode() + b"\n"
        if self._descriptor is None:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            self._descriptor = os.open(self.path, flags, 0o600)
            self.size = os.fstat(self._descriptor).st_size  # of a job that Slurm has requeued
        if self.size + len(data) > ROOM:
            return
        written = os.write(self._descriptor, data)
        self.size += written
        self._is_torn = written < len(data)


@dataclass
class Sampler:
    """What a job uses on this node. ``others`` are processes of it that do not descend from its body."""

    job: JobContext
    gpus: Gpus
    others: Callable[[], Iterable[int]] = tuple
    cgroup: JobCgroup = field(default_factory=JobCgroup)
    ledger: Ledger = field(default_factory=Ledger)

    def look(self, is_last: bool) -> dict[str, Any]:
        """One sample; the last one does without the GPUs, whose work is over."""
        used_s, memory = cpu_s(self.cgroup), memory_bytes(self.cgroup)
        if used_s is None or memory is None:
            processes = of_job(self.job.job_id, self.others)
            used_s = self._counted(processes) if used_s is None else used_s
            memory = sum(one.memory_bytes for one in processes) if memory is None else memory
        return {
            "schema": SCHEMA,
            "at": round(time.time(), 2),
            "node": host_name(),
            "cpus": allocated_cpus(self.job),
            "cpu_s": round(used_s, 2),
            "memory_bytes": memory,
            "memory_limit_bytes": memory_limit_bytes(self.cgroup) or allocated_memory(self.job),
            "gpus": [] if is_last else self.gpus.look(),
        }

    def _counted(self, processes: Iterable[Process]) -> float:
        self.ledger = self.ledger.after(processes)
        return self.ledger.total_s


def allocated_cpus(job: JobContext) -> int | None:
    """The CPUs that the job has on this node, None where Slurm does not say; of a local run those that it may use."""
    if job.is_local:
        return len(os.sched_getaffinity(0))
    said = [job.environment.get(name, "") for name in ("SLURM_CPUS_ON_NODE", "SLURM_CPUS_PER_TASK")]
    return next((int(text) for text in said if text.isdigit()), None)


def allocated_memory(job: JobContext) -> int | None:
    """Bytes that Slurm gave the job on this node; None where it does not say, or where the job may use all."""
    if job.is_local:
        return None
    mib = [job.environment.get(name, "") for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU")]
    per_node, per_cpu = (int(text) if text.isdigit() else 0 for text in mib)
    return (per_node or per_cpu * (allocated_cpus(job) or 0)) * 2**20 or None


@contextlib.contextmanager
def sampled(
    job: JobContext, kind: str, notes: SignalNotes, storage: PodmanStorage | None = None
) -> Iterator[Background]:
    """The job's use is noted from here until the end of the block, or until what is yielded is closed before.

    A job that a signal ends has no last sample: Slurm gives it seconds, in which a busy node has other things to do.
    """
    gpus = Gpus(job.environment, kind == "training" and job.settings.gpus_per_node > 0)
    cgroup = JobCgroup() if job.is_local else own_cgroup()  # a local run may be part of any job
    sampler = Sampler(job, gpus, (lambda: processes_of(storage)) if storage else tuple, cgroup)
    file = SampleFile(job.directory.usage(kind, job.job_id))

    def work(is_last: bool) -> None:
        if not is_last or notes.stop_signal is None:
            file.append(json.dumps(sampler.look(is_last), separators=(",", ":")))

    background = Background("what this job uses is not noted", work, lambda: file.distance_s)
    with background if job.settings.usage_samples else contextlib.nullcontext():
        yield background


@contextlib.contextmanager
def published_statistics(job: JobContext, storage: PodmanStorage) -> Iterator[None]:
    """The API server's counts are copied from this node into the run directory, where they changed, and at the end.

    The block should end after the server, and before the storage is removed.
    """
    source, last = statistics_file(storage), [""]
    target = job.directory.sandbox_statistics(job.job_id)
    final: list[str] = []

    def work(is_last: bool) -> None:
        text = final[0] if is_last else _text(source)
        if text and text != last[0]:
            write_atomically(target, text, 0o600)
            last[0] = text

    with Background("the sandboxes' statistics are not published", work, lambda: PUBLISH_S):
        try:
            yield
        finally:
            final.append(_text(source))  # now, since it goes with the storage


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""
