"""A run directory as a day of VERL on GPUs would leave it, made up: two attempts, samples, statistics."""

from __future__ import annotations

import json
import math
import random
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

BEGIN = 1_796_000_000.0
CUT, AGAIN = 0.45, 8  # where the first attempt is interrupted, and the steps after its last checkpoint
BOUNDS = [round(0.001 * 1.1**power, 6) for power in range(146)]


@dataclass(frozen=True)
class Attempt:
    """Its jobs, when they were submitted and started, its steps, how it ended."""

    runtime: str
    training: str
    submitted: float
    runtime_starts: float
    training_starts: float
    steps: range
    exit_code: int
    reason: str

    @property
    def first_step(self) -> float:
        return max(self.training_starts + 7, self.runtime_starts + 96) + 280


def make_long_run(folder: Path, steps: int) -> Path:
    """The run in a new folder; returns that."""
    folder.mkdir(parents=True)
    chance = random.Random(4)
    cut = int(steps * CUT)
    before = "stopped at its checkpoint before the time limit"
    first = Attempt("501", "502", BEGIN, BEGIN + 65, BEGIN + 1900, range(1, cut + AGAIN + 1), 75, before)
    ended = _write(folder, first, steps, chance)
    rest = range(cut + 1, steps + 1)
    second = Attempt("503", "504", BEGIN + 2000, ended + 900, ended + 2100, rest, 0, "the trainer ended")
    last = _write(folder, second, steps, chance)
    (folder / "run.json").write_text(_record(first, ended, ["/home/ada/SkyRL/slurm/config/swe-7b.conf"]))
    (folder / "run_503.json").write_text(_record(second, last, []))
    following = {"runtime": "503", "training": "504"}
    for number, attempt, successor in ((1, first, following), (2, second, {})):
        jobs = {"runtime": attempt.runtime, "training": attempt.training}
        told = {"schema": 1, "attempt": number, "jobs": jobs, "checkpoint": "", "successor": successor}
        (folder / f"attempt_{number}.json").write_text(json.dumps(told))
    flag = {"schema": 1, "job_id": "504", "runtime_job_id": "503", "host": "gpu-03", "time": _utc(last - 9)}
    flag |= {"exit_code": 0, "reason": second.reason, "ended": "completed", "server": ""}
    (folder / "training_complete.flag").write_text(json.dumps(flag))
    return folder


def _utc(moment: float) -> str:
    return datetime.fromtimestamp(moment, timezone.utc).isoformat(timespec="seconds")


def _stamp(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(moment))


def _record(attempt: Attempt, ended: float, configs: list[str]) -> str:
    words = f"training job {attempt.training} is complete: {attempt.reason} (exit code {attempt.exit_code})"
    ends = {
        "runtime": {"exit_code": 0, "reason": words, "said_by": "runtime", "time": _utc(ended)},
        "training": {
            "exit_code": attempt.exit_code,
            "reason": attempt.reason,
            "said_by": "training",
            "time": _utc(ended - 9),
        },
    }
    ids = {"runtime": attempt.runtime, "training": attempt.training}
    jobs = {kind: {"id": job_id, "ended": ends[kind]} for kind, job_id in ids.items()}
    settings = {"SKYRL_BACKEND": "slurm", "RESTARTS": "3"}
    told = {"schema": 1, "created": _utc(attempt.submitted), "user": "ada", "host": "login1", "pairing": "jobs"}
    return json.dumps({**told, "config_files": configs, "settings": settings, "jobs": jobs})


def _write(folder: Path, attempt: Attempt, steps: int, chance: random.Random) -> float:
    """The files of an attempt's jobs; returns when its runtime job ended."""
    told = [_step(number, steps, number == attempt.steps[0], chance) for number in attempt.steps]
    ended = attempt.first_step + sum(seconds for _line, seconds in told) + 12
    logs = {
        f"training_{attempt.training}.out": [*_training(attempt), *(line for line, _s in told), _last(attempt, ended)],
        f"runtime_{attempt.runtime}.out": list(_runtime(folder, attempt, ended)),
        f"training_{attempt.training}.err": [],
        f"runtime_{attempt.runtime}.err": [],
        f"usage_training_{attempt.training}.jsonl": list(_samples(attempt, "training", ended, chance)),
        f"usage_runtime_{attempt.runtime}.jsonl": list(_samples(attempt, "runtime", ended, chance)),
        f"sandbox_statistics_{attempt.runtime}.json": [_statistics(len(attempt.steps) * 16, ended, chance)],
    }
    for name, lines in logs.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines))
    return ended


def _training(attempt: Attempt) -> Iterator[str]:
    at, ready = attempt.training_starts, attempt.first_step - 280
    job = attempt.training
    yield f"{_stamp(at)} [INFO] training job {job} on gpu-03, coordination directory /home/ada/.skyrl_jobs/x"
    yield f"{_stamp(at + 6)} [INFO] waiting up to 600 s for the runtime in /home/ada/.skyrl_jobs/x"
    yield f"{_stamp(ready)} [INFO] runtime server at http://cpu-07:40001 answers and takes the key"
    yield f"{_stamp(ready + 8)} [INFO] starting Ray on 2 nodes"
    yield f"{_stamp(ready + 42)} [INFO] starting the trainer in /home/ada/SkyRL/skyrl-agent"
    yield f"{_stamp(ready + 70)},013\tINFO worker.py:2012 -- Connected to Ray cluster."


def _last(attempt: Attempt, ended: float) -> str:
    words = f"training job {attempt.training} ends with exit code {attempt.exit_code}: {attempt.reason}"
    return f"{_stamp(ended - 9)} [INFO] {words}"


def _runtime(folder: Path, attempt: Attempt, ended: float) -> Iterator[str]:
    at, job = attempt.runtime_starts, attempt.runtime
    yield f"{_stamp(at)} [INFO] runtime job {job} on cpu-07, coordination directory {folder}"
    yield f"{_stamp(at + 4)} [INFO] serving on http://0.0.0.0:40001, Podman at /tmp/skyrl-1000-{job}/podman.sock"
    yield f"{_stamp(at + 9)} [INFO] sandbox image docker.io/swe/agent:latest"
    yield f"{_stamp(at + 95)} [INFO] API server ready at http://cpu-07:40001"
    yield f"{_stamp(ended - 8)} [INFO] stopping everything: training job {attempt.training} is complete"
    yield f"{_stamp(ended)} [INFO] runtime job {job} ends: training job {attempt.training} is complete"


def _step(number: int, steps: int, is_first: bool, chance: random.Random) -> tuple[str, float]:
    """VERL's line about a step, and its length."""
    parts = {
        "gen": 150 + 40 * chance.random() + 15 * number / steps + (120 if is_first else 0),
        "reward": 30 + 15 * chance.random(),
        "old_log_prob": 18 + 2 * chance.random(),
        "ref": 14 + chance.random(),
        "update_actor": 70 + 5 * chance.random(),
        **({"save_checkpoint": 45.0} if number % 20 == 0 else {}),
    }
    total = sum(parts.values()) + 5
    score = 0.62 / (1 + math.exp(-(number - steps * 0.35) / (steps / 8))) + chance.gauss(0, 0.035)
    figures = {"actor/entropy": 1.25, "critic/score/mean": f"np.float64({max(0.0, score)})"}
    figures |= {f"timing_s/{name}": seconds for name, seconds in parts.items()}
    figures |= {"timing_s/agent_loop/slowest/total": parts["gen"], "timing_s/step": total, "perf/time_per_step": total}
    words = " - ".join(f"{name}:{value}" for name, value in figures.items())
    return f"(TaskRunner pid=4711) step:{number} - {words}", total


def _samples(attempt: Attempt, kind: str, ended: float, chance: random.Random) -> Iterator[str]:
    is_training = kind == "training"
    begin = attempt.training_starts if is_training else attempt.runtime_starts
    cpus, limit = (48, 480) if is_training else (64, 256)
    every, used = max(30.0, (ended - begin) / 1500), 0.0
    for number in range(int((ended - begin) / every)):
        at = begin + number * every
        busy = at > attempt.first_step
        wave = abs(math.sin(at / 4000))
        share = 0.12 + 0.05 * chance.random() if is_training else 0.15 + (0.4 * wave if busy else 0)
        memory = (220 if busy else 40) + chance.random() if is_training else 60 + (70 * wave if busy else 0)
        used += share * cpus * every
        told = {"schema": 1, "at": at, "node": "gpu-03" if is_training else "cpu-07", "cpus": cpus, "cpu_s": used}
        sizes = {"memory_bytes": memory * 2**30, "memory_limit_bytes": limit * 2**30}
        yield json.dumps({**told, **sizes, "gpus": _gpus(busy, chance) if is_training else []})


def _gpus(busy: bool, chance: random.Random) -> list[dict[str, object]]:
    share = [chance.choice([97, 95, 60, 30]) if busy else 0 for _ in range(8)]
    sizes = {"name": "NVIDIA H100 80GB HBM3", "used_mib": 61_000 if busy else 1000, "total_mib": 81_559}
    return [{"index": index, "busy_percent": percent, **sizes} for index, percent in enumerate(share)]


def _statistics(count: int, at: float, chance: random.Random) -> str:
    took = sorted(chance.lognormvariate(-0.6, 0.45) for _ in range(count))
    places = Counter(bisect_left(BOUNDS, seconds) for seconds in took)
    buckets: list[tuple[float, int]] = []
    for place in sorted(places):
        buckets.append((BOUNDS[place], places[place] + (buckets[-1][1] if buckets else 0)))
    quantiles = {f"p{share}": took[int(share / 100 * (count - 1))] for share in (50, 90, 99)}
    failed = {"image not found": 4, "no answer within 60 s": 3}
    told = {
        "schema": 1,
        "at": at,
        "starts": {"asked": count + 7, "succeeded": count, "failed": failed},
        "start_seconds": {"count": count, "sum": sum(took), **quantiles, "max": took[-1], "buckets": buckets},
        "steps": {},
        "peak_living": 60,
        "slots": 64,
        "ended": {"deleted by the client": count - 2, "killed: out of memory": 2},
        "requests": {"count": 30 * count, "p50": 0.01, "p99": 0.2},
    }
    return json.dumps(told)
