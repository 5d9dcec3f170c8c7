"""What did a job use of what it had: CPUs, memory, GPUs? From its own samples, else from Slurm's accounting."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from slurm.lib.observe.run_files import printable
from slurm.lib.scheduler import AccountedUse

SCHEMA = 1
MOST = 2.0**62  # no figure of ours is as large


@dataclass(frozen=True)
class GpuSample:
    """A card at one moment; None is what nvidia-smi did not say."""

    index: int
    name: str = ""
    busy_percent: float | None = None
    used_mib: float | None = None
    total_mib: float | None = None


@dataclass(frozen=True)
class UsageSample:
    """What the processes of a job on one node had used by one moment, ``at`` in epoch seconds of that node's clock.

    ``cpu_s`` are CPU seconds since the job's start, ``cpus`` the CPUs that the job has there. None is not known.
    """

    at: float
    node: str
    cpu_s: float | None = None
    cpus: float | None = None
    memory_bytes: float | None = None
    memory_limit_bytes: float | None = None
    gpus: tuple[GpuSample, ...] = ()


@dataclass(frozen=True)
class Usage:
    """How well a job used what it had, over ``span_s`` seconds. None is not known.

    ``cpu_share`` of all its CPUs, 0 to 1. Memory is that of the node where most of it was used, with the limit there.
    ``gpu_busy_share`` is the mean over all samples and cards, ``gpu_memory_peak_mib`` that of the fullest card.
    ``source``: ``samples`` or ``sacct``.
    """

    source: str
    span_s: float | None = None
    cpus: float | None = None
    cpu_share: float | None = None
    memory_peak_bytes: float | None = None
    memory_limit_bytes: float | None = None
    gpus: int | None = None
    gpu_busy_share: float | None = None
    gpu_memory_peak_mib: float | None = None
    gpu_memory_total_mib: float | None = None


def read_usage(text: str) -> tuple[UsageSample, ...]:
    """The samples in a file of ours, by time; lines that are half, damaged or of another schema say nothing."""
    found = [sample for line in text.split("\n") if (sample := _sample(line)) is not None]
    return tuple(sorted(found, key=lambda sample: sample.at))


def _sample(line: str) -> UsageSample | None:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        return None
    if (at := _figure(data.get("at"))) is None:
        return None
    gpus = data.get("gpus")
    return UsageSample(
        at,
        _text(data.get("node")),
        _figure(data.get("cpu_s")),
        _figure(data.get("cpus")),
        _figure(data.get("memory_bytes")),
        _figure(data.get("memory_limit_bytes")),
        tuple(gpu for one in (gpus if isinstance(gpus, list) else []) if (gpu := _gpu(one)) is not None),
    )


def _gpu(data: object) -> GpuSample | None:
    if not isinstance(data, dict) or (index := _figure(data.get("index"))) is None:
        return None
    figures = (_figure(data.get(name)) for name in ("busy_percent", "used_mib", "total_mib"))
    return GpuSample(int(index), _text(data.get("name")), *figures)


def _figure(value: object) -> float | None:
    """A number that can be one of ours; JSON as Python reads it has NaN, too."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value < MOST else None  # NaN is not


def _text(value: object) -> str:
    return " ".join(printable(value).split())[:200] if isinstance(value, str) else ""


def efficiency(samples: Sequence[UsageSample]) -> Usage:
    """What the samples of one job, of one node or several, say together."""
    nodes: dict[str, list[UsageSample]] = {}
    for sample in sorted(samples, key=lambda sample: sample.at):
        nodes.setdefault(sample.node, []).append(sample)
    spans = {node: rows[-1].at - rows[0].at for node, rows in nodes.items()}
    cpus = {node: _most(row.cpus for row in rows) for node, rows in nodes.items()}
    memory = max((_memory(rows) for rows in nodes.values()), key=lambda pair: pair[0] or 0.0, default=(None, None))
    cards = [card for sample in samples for card in sample.gpus]
    busy = [card.busy_percent for card in cards if card.busy_percent is not None]
    return Usage(
        "samples",
        span_s=max(spans.values(), default=None),
        cpus=_sum(cpus.values()),
        cpu_share=_cpu_share(nodes.values(), cpus.values()),
        memory_peak_bytes=memory[0],
        memory_limit_bytes=memory[1],
        gpus=len({(sample.node, card.index) for sample in samples for card in sample.gpus}) if samples else None,
        gpu_busy_share=min(1.0, sum(busy) / len(busy) / 100) if busy else None,
        gpu_memory_peak_mib=_most(card.used_mib for card in cards),
        gpu_memory_total_mib=_most(card.total_mib for card in cards),
    )


def _cpu_share(nodes: Iterable[Sequence[UsageSample]], cpus: Iterable[float | None]) -> float | None:
    """Of all nodes together; a job that was requeued begins at 0 CPU seconds again."""
    used, held = 0.0, 0.0
    for rows, has in zip(nodes, cpus, strict=True):
        known = [(row.at, row.cpu_s) for row in rows if row.cpu_s is not None]
        if has is None or not known:
            return None
        used += sum(max(0.0, after - before) for (_, before), (_, after) in pairwise(known))
        held += has * (known[-1][0] - known[0][0])
    return _share(used, held)


def _memory(rows: Sequence[UsageSample]) -> tuple[float | None, float | None]:
    """Peak and limit of a node."""
    return _most(row.memory_bytes for row in rows), _most(row.memory_limit_bytes for row in rows)


def from_sacct(rows: Iterable[AccountedUse]) -> Usage:
    """What accounting says of one job; its allocation is the row without a step.

    The memory of steps that ran at the same time is not added up: the largest step counts.
    """
    rows = tuple(rows)
    job = next((row for row in rows if not row.step), None)
    if job is None:
        return Usage("sacct")
    held = None if job.elapsed_s is None or job.cpus is None else job.elapsed_s * job.cpus
    busy = _most(row.gpu_busy_percent for row in rows)
    return Usage(
        "sacct",
        span_s=job.elapsed_s,
        cpus=job.cpus,
        cpu_share=None if job.cpu_s is None else _share(job.cpu_s, held),
        memory_peak_bytes=_most(row.memory_peak_bytes for row in rows),
        memory_limit_bytes=job.memory_bytes,
        gpus=job.gpus,
        gpu_busy_share=None if busy is None else min(1.0, busy / 100),
        gpu_memory_peak_mib=_most(row.gpu_memory_mib for row in rows),
    )


def _share(used: float, held: float | None) -> float | None:
    """A share of what was held; clocks and counters of two kinds may differ by a little."""
    return min(1.0, used / held) if held and math.isfinite(held) else None


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _sum(values: Iterable[float | None]) -> float | None:
    """None where one of them is not known."""
    known = list(values)
    return sum(value for value in known if value is not None) if known and None not in known else None
