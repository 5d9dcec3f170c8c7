"""How busy are the GPUs of this job at the moment? nvidia-smi tells; one that hangs is left alone for a while."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slurm.lib.errors import SuiteError
from slurm.lib.processes import run

PATIENCE_S = 5.0
QUIET_S = 600.0  # after one that did not answer: each is a process that waits in the driver
# `timeout` ends it also where this process is killed; one that not even SIGKILL ends is then nobody's to wait for.
COMMAND = (
    "timeout",
    "--signal=KILL",
    f"{PATIENCE_S:g}",
    "nvidia-smi",
    "--query-gpu=index,uuid,utilization.gpu,memory.used,memory.total,name",
    "--format=csv,noheader,nounits",
)


def parse(text: str, visible: str | None) -> list[dict[str, Any]]:
    """The cards of the job in the output of ``COMMAND``; ``visible`` is CUDA_VISIBLE_DEVICES, None for all.

    None of them for MIG slices: nvidia-smi tells only of whole cards, which others use too. Pure.
    """
    rows = [[cell.strip() for cell in line.split(",", 5)] for line in text.splitlines()]
    return [
        {
            "index": int(index),
            "name": name,
            "busy_percent": _number(busy),
            "used_mib": _number(used),
            "total_mib": _number(total),
        }
        for index, uuid, busy, used, total, name in (row for row in rows if len(row) == 6)
        if re.fullmatch(r"\d{1,4}", index, re.ASCII) and (visible is None or _is_named(index, uuid, visible))
    ]


def _is_named(index: str, uuid: str, visible: str) -> bool:
    """CUDA takes the beginning of a UUID, too."""
    names = [name.strip() for name in visible.split(",")]
    return index in names or any(len(name) > 4 and uuid.startswith(name) for name in names)


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\d{1,9}", text, re.ASCII) else None


@dataclass
class Gpus:
    """The cards of a job with this environment; ``wanted`` is false where it has none."""

    environment: Mapping[str, str]
    wanted: bool
    quiet_until: float = 0.0

    def look(self) -> list[dict[str, Any]]:
        """What they do now; empty where nvidia-smi does not say."""
        if not self.wanted or time.monotonic() < self.quiet_until:
            return []
        try:
            answer = run(COMMAND, timeout_s=PATIENCE_S + 2.0, environment=self.environment)
        except SuiteError:
            answer = None
        if answer is None or not answer.ok:
            self.quiet_until = time.monotonic() + QUIET_S
            return []
        return parse(answer.stdout, self.environment.get("CUDA_VISIBLE_DEVICES"))
