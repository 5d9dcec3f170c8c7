"""What a run of the real VERL with the tiny model has left: read from its log and its folders."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from slurm.lib.checkpoints import TRACKER


def steps(log: str) -> list[int]:
    """The steps that VERL has told of."""
    return [int(number) for number in re.findall(r" step:(\d+) - ", log)]


def saved_step(checkpoints: Path) -> int:
    """The step that VERL will resume from."""
    return int((checkpoints / TRACKER).read_text())


def notes(checkpoints: Path, event: str) -> dict[int, str]:
    """Step → hash of the weights, as they were after each save or load."""
    lines = [json.loads(line) for line in (checkpoints / "weights.jsonl").read_text().splitlines()]
    return {int(n["checkpoint"].rpartition("_")[2]): n["sha256"] for n in lines if n["event"] == event}


def sandboxes(directory: Path) -> set[str]:
    """The sandboxes that the API server's log says were ready; it says so with SKYRL_DEBUG=1."""
    log = "".join(path.read_text() for path in directory.glob("runtime_*.out"))
    log += "".join(path.read_text() for path in directory.glob("runtime_*.err"))
    return set(re.findall(r"sandbox (\S+) of session local-verl-\S+ is ready", log))


def rollouts(directory: Path) -> list[dict[str, Any]]:
    """What VERL wrote down of each rollout."""
    files = sorted((directory / "rollouts" / "train").glob("*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]
