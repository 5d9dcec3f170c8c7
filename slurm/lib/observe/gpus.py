"""How busy are a training's GPUs? nvidia-smi tells, as a step in the training job, or on the host of a local run."""

from __future__ import annotations

import re
from dataclasses import dataclass

from slurm.lib.observe.run_files import printable
from slurm.lib.observe.run_view import JobView, Stage
from slurm.lib.observe.unknown import Unknown
from slurm.lib.processes import Completed
from slurm.lib.scheduler import Slurm

ASK_S = 20.0  # a step begins within a second or two; nvidia-smi takes up to some seconds where it wakes the cards
FIELDS = "index,name,utilization.gpu,memory.used,memory.total"
COMMAND = (  # one line a card, with the node before it
    "sh",
    "-c",
    f'nvidia-smi --query-gpu={FIELDS} --format=csv,noheader,nounits | sed "s/^/$(hostname), /"',
)


@dataclass(frozen=True)
class Gpu:
    """A card: ``busy_percent`` of the last moment, memory in MiB; None is what nvidia-smi does not say, as of MIG."""

    node: str
    index: int
    name: str
    busy_percent: int | None
    used_mib: int | None
    total_mib: int | None


def parse(text: str) -> tuple[Gpu, ...]:
    """The cards in the output of ``COMMAND``, by node and number."""
    rows = [[cell.strip() for cell in printable(line).split(",")] for line in text.splitlines()]
    found = [
        Gpu(node, index, name, *map(_number, figures))
        for node, number, name, *figures in (row for row in rows if len(row) == 6)
        if (index := _number(number)) is not None
    ]
    return tuple(sorted(found, key=lambda gpu: (gpu.node, gpu.index)))


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\d{1,9}", text, re.ASCII) else None


def ask(slurm: Slurm, job: JobView, *, is_het: bool) -> tuple[Gpu, ...] | Unknown:
    """What the cards of a training job do now; ``is_het`` where its runtime is a part of the same job."""
    if job.stage is not Stage.RUNNING:
        return Unknown("its training does not run")
    on_slurm = job.job_id.isdigit()
    answer = slurm.in_job(job.job_id, COMMAND, ASK_S, is_het=is_het) if on_slurm else slurm.here(COMMAND, ASK_S)
    return parse(answer.stdout) or Unknown(_why(answer))


def _why(answer: Completed) -> str:
    """The last thing that was said; srun's own line about the exit code says nothing."""
    lines = [line.strip() for line in printable(answer.stderr).splitlines() if line.strip()]
    told = [line for line in lines if not re.match(r"srun: (error: \S+: task \d+: Exited|Terminating|Force)", line)]
    return f"nvidia-smi does not tell: {(told or lines or ['it printed nothing'])[-1]}"
