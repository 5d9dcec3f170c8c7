#!/usr/bin/env python3
"""What a launch costs beside Slurm itself.

Measures, on a real Slurm, from ``exec`` of launch.py to the trainer's start and from the trainer's end to both jobs
gone, and in turn the same for an empty pair of jobs (two ``sbatch``, one waiting for the other's start). What is
printed is the difference of the medians: what this suite adds. Times are taken on this host alone, by looking for
files in the jobs base and at squeue, so that no two clocks are compared.

    python benchmarks/launch_latency.py [--config dev] [--runs 5] [--set KEY=VALUE …] [--json]
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
FILE_LOOK_S, QUEUE_LOOK_S, DEADLINE_S = 0.01, 0.03, 600.0
TRAINER_S = 1.0  # how long the trainer of a round runs
# Small enough for any test partition; the default image needs no registry.
SMALL = (
    "CPUS_FOR_RUNTIME=4",
    "RUNTIME_MEMORY=2G",
    "TRAINING_CPUS=1",
    "TRAINING_MEMORY=1G",
    "GPUS_PER_NODE=1",
    "CPUS_PER_WORKER=1",
    "MEMORY_PER_WORKER=256M",
    "TIME_LIMIT=00:10:00",
    "CONTAINER_IMAGE=localhost/skyrl-busybox:latest",
    "CHECKPOINT_DIR=",
    "ROLLOUT_DIR=",
)


@dataclass(frozen=True)
class Round:
    """Seconds from the start of the launch to the trainer's start, and from its end to both jobs gone."""

    start_s: float
    end_s: float


def wait_until(condition: Callable[[], object], every_s: float) -> float:
    """The moment (``time.monotonic``) at which the condition was first seen to hold."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > DEADLINE_S:
            sys.exit(f"gave up after {DEADLINE_S:g} s; is the queue busy?")
        time.sleep(every_s)
    return time.monotonic()


def output(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(argv)} failed: {done.stderr.strip()}")
    return done.stdout


def gone(job_ids: Sequence[str]) -> bool:
    done = subprocess.run(["squeue", "-h", "-j", ",".join(job_ids)], capture_output=True, text=True, check=False)
    return not done.stdout.strip()


def trainer(folder: Path) -> str:
    """A trainer that shows when it starts and ends."""
    started, ended = shlex.quote(str(folder / "started")), shlex.quote(str(folder / "ended"))
    return f"touch {started}; sleep {TRAINER_S:g}; touch {ended}"


def timed(begin: float, folder: Path, job_ids: Sequence[str]) -> Round:
    started = wait_until((folder / "started").exists, FILE_LOOK_S)
    ended = wait_until((folder / "ended").exists, FILE_LOOK_S)
    return Round(started - begin, wait_until(lambda: gone(job_ids), QUEUE_LOOK_S) - ended)


def empty_pair(base: Path, arguments: argparse.Namespace) -> Round:
    """Two jobs that do nothing but wait for each other, as the suite's do."""
    folder = Path(tempfile.mkdtemp(prefix="empty-", dir=base))
    stop = shlex.quote(str(folder / "ended"))
    common = ["sbatch", "--parsable", "--output=/dev/null", "--no-requeue"]
    waiting = f"while [ ! -e {stop} ]; do sleep 0.05; done"
    begin = time.monotonic()
    first = output(*common, "--hold", "-p", arguments.cpu_partition, "-c4", "--mem=2G", "--wrap", waiting).strip()
    gpu = ["-p", arguments.gpu_partition, "--gres=gpu:1", "--mem=1G", f"--dependency=after:{first}"]
    second = output(*common, *gpu, "--wrap", trainer(folder)).strip()
    output("scontrol", "release", first)
    return timed(begin, folder, [first, second])


def launch(base: Path, arguments: argparse.Namespace) -> Round:
    """A launch with the real server and Podman, and a trainer that does nothing."""
    folder = Path(tempfile.mkdtemp(prefix="launch-", dir=base))
    settings = [*SMALL, f"SKYRL_JOBS_BASE={base}", f"TRAINING_COMMAND={trainer(folder)}", *arguments.set]
    words = [word for setting in settings for word in ("--set", setting)]
    begin = time.monotonic()
    report = output(str(CHECKOUT / "slurm" / "launch.py"), "--config", arguments.config, *words)
    return timed(begin, folder, re.findall(r"^(?:runtime|training) job: (\d+)$", report, re.MULTILINE))


def summary(pairs: Sequence[Round], launches: Sequence[Round]) -> dict[str, float]:
    """Medians in seconds, and what the suite adds."""
    values = {
        f"{name}_{what}": statistics.median(asdict(item)[what] for item in rounds)
        for name, rounds in (("pair", pairs), ("launch", launches))
        for what in ("start_s", "end_s")
    }
    added = {f"added_{what}": values[f"launch_{what}"] - values[f"pair_{what}"] for what in ("start_s", "end_s")}
    return {name: round(value, 3) for name, value in (values | added).items()}


def table(values: dict[str, float], runs: int) -> str:
    rows = [("", "empty pair", "launch", "added")]
    for label, what in (("launch → trainer started", "start_s"), ("trainer ended → jobs gone", "end_s")):
        pair, suite, added = (f"{values[f'{name}_{what}']:.2f} s" for name in ("pair", "launch", "added"))
        rows.append((label, pair, suite, added))
    lines = [f"{row[0]:<26}{row[1]:>12}{row[2]:>12}{row[3]:>12}" for row in rows]
    return "\n".join([*lines, f"medians of {runs}"])


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="What a launch costs beside Slurm itself.")
    parser.add_argument("--config", default="dev")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--cpu-partition", default="test")
    parser.add_argument("--gpu-partition", default="gpu_test")
    parser.add_argument("--base", type=Path, default=Path.home(), help="folder on storage shared with the nodes")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    base = Path(tempfile.mkdtemp(prefix="skyrl-bench-", dir=arguments.base))
    try:
        launch(base, arguments)  # makes the image once, as a user's first run does
        rounds = [(empty_pair(base, arguments), launch(base, arguments)) for _ in range(arguments.runs)]
    finally:
        shutil.rmtree(base, ignore_errors=True)
    values = summary([pair for pair, _ in rounds], [run for _, run in rounds])
    print(json.dumps(values) if arguments.json else table(values, arguments.runs))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
