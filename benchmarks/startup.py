#!/usr/bin/env python3
"""What launch.py itself costs a person who waits for its answer.

Measures, in turn, a bare ``python -c pass`` of the same interpreter, ``launch.py --help``, one ``squeue``, and
``launch.py status`` of the newest runs below SKYRL_JOBS_BASE. Printed is the fastest of several rounds, since whatever
else the machine does only adds, and how that compares with what is promised: --help in at most 3 times the bare Python,
status in at most that and 1.5 times one squeue.

    python benchmarks/startup.py [--runs 10] [--rounds 25] [--json]

Exit codes: 0 what is promised is kept, 1 it is not.

Where no Slurm answers, status of what ended and of local runs is measured beside the bare Python alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

LAUNCH = Path(__file__).resolve().parent.parent / "slurm" / "launch.py"
HELP_RATIO, SQUEUE_RATIO = 3.0, 1.5


def seconds(argv: Sequence[str]) -> float:
    """How long a command took, its output read to the end."""
    begin = time.perf_counter()
    done = subprocess.run(argv, capture_output=True, check=False)
    taken = time.perf_counter() - begin
    if done.returncode:
        sys.exit(f"{' '.join(argv)}: exit code {done.returncode}\n{done.stderr.decode()}")
    return taken


def newest_runs(count: int) -> list[str]:
    """The names of the newest runs below SKYRL_JOBS_BASE."""
    told = subprocess.run([sys.executable, str(LAUNCH), "list", "--json"], capture_output=True, check=True)
    return [run["run"] for run in json.loads(told.stdout)["runs"]][:count]


def commands(runs: Sequence[str]) -> dict[str, list[str]]:
    """What is measured, by name."""
    python, launch = sys.executable, str(LAUNCH)
    found = {"python": [python, "-c", "pass"], "help": [python, launch, "--help"]}
    question = ["squeue", "-h", "--all", "-t", "all", f"--user={os.getuid()}"]
    if shutil.which("squeue") and subprocess.run(question, capture_output=True, check=False).returncode == 0:
        found["squeue"] = question
    return {**found, "status": [python, launch, "status", *runs]} if runs else found


def fastest(argvs: Mapping[str, Sequence[str]], rounds: int) -> dict[str, float]:
    """Seconds of each command at its fastest, measured in turn; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in argvs}
    for number in range(rounds + 1):
        for name, argv in argvs.items():
            taken = seconds(argv)
            if number:
                times[name].append(taken)
    return {name: min(found) for name, found in times.items()}


def verdicts(found: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Each promise: what was measured, and what is allowed."""
    allowed = HELP_RATIO * found["python"]
    told = {
        "help": {"measured_s": found["help"], "allowed_s": allowed, "times_python": found["help"] / found["python"]}
    }
    if "status" in found:
        asked = found.get("squeue", 0.0)
        beside = (found["status"] - allowed) / asked if asked else 0.0
        limit = allowed + SQUEUE_RATIO * asked
        told["status"] = {"measured_s": found["status"], "allowed_s": limit, "squeues_beside_python": beside}
    return told


def exit_code(told: Mapping[str, Mapping[str, float]]) -> int:
    """1 where a promise is not kept."""
    return int(any(promise["measured_s"] > promise["allowed_s"] for promise in told.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=10, help="runs that status shows (%(default)s)")
    parser.add_argument("--rounds", type=int, default=25, help="times that each command is measured (%(default)s)")
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    arguments = parser.parse_args()
    runs = newest_runs(arguments.runs)
    found = fastest(commands(runs), arguments.rounds)
    told = verdicts(found)
    if arguments.json:
        print(json.dumps({"runs": len(runs), "fastest_s": found, "promises": told}, indent=2))
        return exit_code(told)
    for name, taken in found.items():
        what = f"{name} of {len(runs)} runs" if name == "status" else name
        print(f"{what:20} {taken * 1000:7.1f} ms  {taken / found['python']:5.2f} × python")
    for name, promise in told.items():
        kept = "kept" if promise["measured_s"] <= promise["allowed_s"] else "NOT kept"
        print(f"{name}: at most {promise['allowed_s'] * 1000:.1f} ms: {kept}")
    return exit_code(told)


if __name__ == "__main__":
    sys.exit(main())
