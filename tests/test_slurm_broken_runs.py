"""Six runs, each broken in another way, as their user looks at them: with ``status``, ``logs`` and ``report`` alone.

What these print has to hold the cause of each. ``tests/broken-runs FOLDER`` keeps it, for somebody who knows neither
the code nor the faults to name cause and remedy (docs/runs.md tells what was asked and answered).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import cluster as test_cluster
from tests.conftest import OrdinaryUser, fresh_folder, leaving_nothing
from tests.runs import Run, launch, until

pytestmark = [pytest.mark.slurm, pytest.mark.podman]

KEEP = os.environ.get("SKYRL_BROKEN_RUNS", "")  # a folder for what the commands print
COMMANDS = ("status", "logs", "report")
SMALL = ("CPUS_FOR_RUNTIME=2", "RUNTIME_MEMORY=2G", "GPUS_PER_NODE=0")
ON_A = ("CPU_SBATCH_ARGS=--nodelist=cpu-a", "GPU_SBATCH_ARGS=--nodelist=gpu-a")
ON_B = ("CPU_SBATCH_ARGS=--nodelist=cpu-b", "GPU_SBATCH_ARGS=--nodelist=gpu-b")
STEPS = """for step in 1 2 3; do echo "Step $step/40: mean reward 0.$step"; sleep 1; done"""
# Reads its data as a user's own trainer does; the file has other columns than it expects.
READS_DATA = """TRAINING_COMMAND="$SKYRL_PYTHON" - <<'END'
import csv, io

ROWS = list(csv.DictReader(io.StringIO("question,answer\\n1+1,2\\n")))


def prompts(rows):
    return [row["prompt"] for row in rows]


print(f"read {len(ROWS)} rows of train.csv", flush=True)
prompts(ROWS)
END"""

# Goes on whatever a sandbox's start gives, as agents' loops do, and ends well: nothing was learned.
SWALLOWS = """TRAINING_COMMAND="$SKYRL_PYTHON" - <<'END'
import json, os, urllib.request

url, key = os.environ["SANDBOX_REMOTE_RUNTIME_API_URL"], os.environ["ALLHANDS_API_KEY"]


def reward(step):
    body = {"image": "localhost/task-0231:lates", "session_id": f"s{step}", "command": ["true"], "working_dir": "/"}
    headers = {"X-API-Key": key, "Content-Type": "application/json"}
    try:
        urllib.request.urlopen(urllib.request.Request(url + "/start", json.dumps(body).encode(), headers), timeout=60)
        return 1.0
    except OSError:
        return 0.0


for step in range(1, 5):
    print(f"Step {step}/4: mean reward {reward(step)}", flush=True)
END"""


@dataclass
class Broken:
    """The runs, by what is wrong with each."""

    user: OrdinaryUser
    checkout: Path
    base: Path
    runs: dict[str, Run] = field(default_factory=dict)

    def begin(self, fault: str, *settings: str) -> Run:
        words = (*SMALL, *settings)
        self.runs[fault] = launch(self.user, self.checkout, self.base, *words, options=("--no-check",))
        return self.runs[fault]

    def call(self, command: str, fault: str) -> subprocess.CompletedProcess[str]:
        argv = [str(self.checkout / "slurm" / "launch.py"), command, str(self.runs[fault].directory)]
        return self.user.run(argv, env={"SKYRL_JOBS_BASE": str(self.base)}, timeout=60)

    def text(self, fault: str) -> str:
        """What the commands print of a run, one after the other."""
        return "\n".join(self.shown(command, fault) for command in COMMANDS)

    def shown(self, command: str, fault: str) -> str:
        done = self.call(command, fault)
        assert done.returncode == 0, done.stderr
        return f"$ ./slurm/launch.py {command} {self.runs[fault].directory.name}\n{done.stdout}{done.stderr}"


def small_disk() -> contextlib.AbstractContextManager[None]:
    tmpfs = ("-t", "tmpfs", "-o", "size=200m,mode=1777", "tmpfs")
    return test_cluster.mounted("cpu-a", test_cluster.LOCAL_DISK, *tmpfs)


@contextlib.contextmanager
def drained(node: str) -> Iterator[None]:
    """No job begins on a node, as its administrator wishes."""
    argv = ["scontrol", "update", f"NodeName={node}"]
    environment = test_cluster.environment()
    subprocess.run([*argv, "State=DRAIN", "Reason=new disks on Monday"], env=environment, check=True)
    try:
        yield
    finally:
        subprocess.run([*argv, "State=RESUME"], env=environment, check=True)


def break_runs(made: Broken) -> None:
    """All but the one that waits: begun at once, since most of it is waiting."""
    limited = made.begin("time limit", *ON_A, f"TRAINING_COMMAND={STEPS}; exec sleep 600")
    made.begin("image", *ON_A, SWALLOWS)
    made.begin("data", *ON_A, READS_DATA)
    with test_cluster.isolate("cpu-b", "gpu-b"), small_disk():
        made.begin("network", *ON_B, f"TRAINING_COMMAND={STEPS}")
        made.begin("disk", *ON_A, f"TRAINING_COMMAND={STEPS}", f"LOCAL_SCRATCH={test_cluster.LOCAL_DISK}")
        limited.wait_for_text("training", "Step 3/40", 60)
        test_cluster.set_time_limit(limited.jobs["training"], 1)
        for run in made.runs.values():
            run.wait_over(seconds=150)  # Slurm looks for time limits every 30 s


@pytest.fixture(scope="module")
def broken(user: OrdinaryUser, checkout: Path) -> Iterator[Broken]:
    with leaving_nothing(user):
        made = Broken(user, checkout, fresh_folder(user, "broken"))
        break_runs(made)
        with drained("cpu-b"):
            waits = made.begin("drained", "CPU_SBATCH_ARGS=--nodelist=cpu-b", f"TRAINING_COMMAND={STEPS}")
            until("Slurm's reason", lambda: "cpu-b" in waits.shown("runtime", "%r"), 60)
            yield made
            assert made.user.run(["scancel", *waits.jobs.values()]).returncode == 0


CAUSES: dict[str, tuple[str, ...]] = {
    "image": ("mean reward 0.0", "4 of 4 starts failed", "localhost/task-0231:lates"),
    "disk": ("200M are free", str(test_cluster.LOCAL_DISK), "LOCAL_SCRATCH"),
    "network": ("cpu-b", "cannot be reached from gpu-b", "RUNTIME_PORT_RANGE"),
    "data": ("KeyError: 'prompt'",),
    "time limit": ("the time limit", "step 3 of 40", "RESTARTS=N"),
    "drained": ("PENDING", "cpu-b"),
}


@pytest.mark.parametrize("fault", CAUSES)
def test_what_the_commands_print_holds_the_cause(broken: Broken, fault: str) -> None:
    text = broken.text(fault)
    if KEEP:
        Path(KEEP).mkdir(parents=True, exist_ok=True)
        (Path(KEEP) / f"{list(CAUSES).index(fault) + 1}.txt").write_text(text)
    assert [cause for cause in CAUSES[fault] if cause not in text] == []
