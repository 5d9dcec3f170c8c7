#!/usr/bin/env python3
"""The time line of a run and its six endings, beside those of the bash suite that this one is a port of.

On a real Slurm, for each ending: launch, wait for the trainer's start (which gives "launch → trainer started"), cause
the ending, and wait until neither job is in the queue any more. A job that is still there after ``--patience`` seconds
counts as staying, and is cancelled. The trainer is a shell script that waits to be told how to end.

    python benchmarks/bash_suite.py [--bash-suite FOLDER] [--patience 60] [--json]

FOLDER is ``slurm/`` of a checkout of 18jeffreyma/SkyRL; its code is no part of this project. It is run as published,
with stand-ins for what is not published with it: an API server that answers at once (in its favour), and ``uv``, which
runs the trainer. It removes ``/tmp/podman-$USER-*`` and other Podman files of its user: run it as a user without any.
Without FOLDER the figures recorded on the test cluster are shown in its place, and marked as recorded.

Exit codes: 0 every bound is kept, 1 one is missed (said on stderr).
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure
from benchmarks.launch_latency import CHECKOUT, FILE_LOOK_S, QUEUE_LOOK_S, SMALL, wait_until

LAUNCH_DEADLINE_S = 120.0
BOUND_S = 15.0  # what docs/reliability.md promises of each ending here, or less
ENDINGS = {
    "clean": "the trainer ends",
    "fails": "the trainer exits with 3",
    "killed": "the trainer is killed",
    "training cancelled": "scancel of the training job",
    "runtime cancelled": "scancel of the runtime job in mid-run",
    "runtime cancelled at start": "scancel of the runtime job as it starts",
}
TRAINER = """\
#!/bin/bash
cd "$(dirname "$0")"
touch started
while [[ ! -e end ]]; do sleep 0.05; done
read -r how < end
[[ $how == kill ]] && kill -9 $$
exit "$how"
"""
HOW = {"clean": "0", "fails": "3", "killed": "kill"}
# Stand-ins for what the bash suite needs and is not published with it.
API_SERVER = """\
#!/bin/bash
while (($#)); do [[ $1 == --port ]] && port=$2; shift; done
exec python3 -m http.server "$port" --directory "${BASH_SOURCE[0]%/*}/answers"
"""
BASH_CONF = """\
GPU_PARTITION={gpu}
CPU_PARTITION={cpu}
GPU_NODES=1
GPUS_PER_NODE=1
TRAINING_CPUS=1
TRAINING_MEMORY=1G
CPUS_FOR_RUNTIME=4
RUNTIME_MEMORY=2G
TIME_LIMIT=00:10:00
MODEL=none
DATA_DIR={folder}
TRAIN_DATA={folder}/train.parquet
VAL_DATA={folder}/validation.parquet
CHECKPOINT_DIR={folder}/checkpoints
ROLLOUT_DIR={folder}/rollouts
"""


@dataclass(frozen=True)
class Ending:
    """One run: seconds to the trainer's start, seconds from the cause to the last job's end, and who stayed."""

    what: str
    start_s: float | None
    end_s: float | None
    stayed: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"the {' and the '.join(self.stayed)} job stays" if self.stayed else f"{self.end_s:.1f} s"


# Of the suite as published, on the same four-node test cluster (Slurm 22.05), before this benchmark was written.
RECORDED_HEAD = "bash suite (recorded earlier, not run here)"
RECORDED = (
    Ending("clean", 10.9, 23.7),
    Ending("fails", None, None, ("runtime",)),
    Ending("killed", None, None, ("runtime",)),
    Ending("training cancelled", None, None, ("runtime",)),
    Ending("runtime cancelled", None, None, ("training",)),
    Ending("runtime cancelled at start", None, None, ("training",)),
)


def called(argv: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=LAUNCH_DEADLINE_S, check=False)
    if done.returncode:
        sys.exit(f"{argv[0]} failed: {(done.stderr or done.stdout).strip()[-1000:]}")
    return done.stdout


def state(job: str) -> str:
    """The job's state, empty where it is not in the queue."""
    done = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def new_folder(base: Path) -> Path:
    """A folder of one run's, with its trainer."""
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=base))
    (folder / "trainer").write_text(TRAINER)
    (folder / "trainer").chmod(0o755)
    return folder


@dataclass(frozen=True)
class Ours:
    """This suite, with its real API server and Podman."""

    base: Path
    partitions: tuple[str, str]

    def sweep(self, jobs: Sequence[str]) -> None:
        """Nothing is left."""

    def launch(self, folder: Path) -> list[str]:
        """The ids of the runtime job and of the training job."""
        cpu, gpu = self.partitions
        own = (f"SKYRL_JOBS_BASE={folder}", f"TRAINING_COMMAND={folder}/trainer")
        settings = [*SMALL, f"CPU_PARTITION={cpu}", f"GPU_PARTITION={gpu}", *own]
        words = [word for setting in settings for word in ("--set", setting)]
        said = called([str(CHECKOUT / "slurm" / "launch.py"), "--config", "dev", *words])
        return re.findall(r"^(?:runtime|training) job: (\d+)$", said, re.MULTILINE)


@dataclass(frozen=True)
class Bash:
    """The bash suite from a checkout, with stand-ins for what is not published with it."""

    base: Path
    partitions: tuple[str, str]
    checkout: Path

    def launch(self, folder: Path) -> list[str]:
        shutil.copytree(self.checkout, folder / "slurm")
        for script in [folder / "slurm" / "launch.sh", *(folder / "slurm" / "jobs").iterdir()]:
            script.chmod(0o755)
        self._stand_ins(folder)
        cpu, gpu = self.partitions
        conf = folder / "bench.conf"
        conf.write_text(BASH_CONF.format(cpu=cpu, gpu=gpu, folder=folder))
        environment = {
            **os.environ,
            "HOME": str(folder),
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "SKYRL_JOBS_BASE": str(folder / "jobs"),
            "SKYRL_PROJECT_ROOT": str(folder / "project"),
        }
        said = called([str(folder / "slurm" / "launch.sh"), "--config", str(conf)], environment)
        return list(dict.fromkeys(re.findall(r"Submitted (?:runtime|training) job: (\d+)", said)))

    def sweep(self, jobs: Sequence[str]) -> None:
        """Remove what it leaves in /tmp for each job, where the nodes share this host's."""
        user = getpass.getuser()
        for left in (Path(place) for job in jobs for place in (f"/tmp/podman-{user}-{job}", f"/tmp/{user}/{job}_0")):
            shutil.rmtree(left, ignore_errors=True)

    def _stand_ins(self, folder: Path) -> None:
        project = folder / "project"
        (project / "SkyRL" / "skyrl-agent").mkdir(parents=True)
        for place in (project / "slurm-remote-runtime", project / "SkyRL" / "slurm-remote-runtime"):
            programs = place / ".venv" / "bin"
            (programs / "answers").mkdir(parents=True)
            (programs / "answers" / "health").write_text("ok\n")
            (programs / "activate").touch()
            _program(programs / "python", API_SERVER)
        (folder / "bin").mkdir()
        _program(folder / "bin" / "uv", f"#!/bin/sh\nexec {folder}/trainer\n")


def _program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def ending(suite: Ours | Bash, what: str, patience_s: float) -> Ending:
    """One run that ends so; nothing of it stays in the queue."""
    folder = new_folder(suite.base)
    began = time.monotonic()
    jobs = dict(zip(("runtime", "training"), suite.launch(folder), strict=True))
    try:
        started = None
        if what == "runtime cancelled at start":
            wait_until(lambda: state(jobs["runtime"]) == "RUNNING", QUEUE_LOOK_S)
        else:
            started = wait_until((folder / "started").exists, FILE_LOOK_S) - began
        caused = time.monotonic()
        cause(what, folder, jobs)
        end_s = gone_after(list(jobs.values()), caused, patience_s)
        stayed = tuple(name for name, job in jobs.items() if state(job))
    finally:
        subprocess.run(["scancel", *jobs.values()], capture_output=True, check=False)
        wait_until(lambda: not any(map(state, jobs.values())), QUEUE_LOOK_S)
        suite.sweep(list(jobs.values()))
        shutil.rmtree(folder, ignore_errors=True)
    return Ending(what, started, None if stayed else end_s, stayed)


def all_endings(suite: Ours | Bash, patience_s: float) -> list[Ending]:
    return [ending(suite, what, patience_s) for what in ENDINGS]


def cause(what: str, folder: Path, jobs: Mapping[str, str]) -> None:
    if what in HOW:
        (folder / "told").write_text(f"{HOW[what]}\n")
        (folder / "told").rename(folder / "end")
    else:
        called(["scancel", jobs["training" if what.startswith("training") else "runtime"]])


def gone_after(jobs: Sequence[str], since: float, patience_s: float) -> float | None:
    """Seconds until no job was in the queue any more; None where one still is."""
    while time.monotonic() - since < patience_s:
        if not any(map(state, jobs)):
            return time.monotonic() - since
        time.sleep(QUEUE_LOOK_S)
    return None


def aims(ours: Sequence[Ending], theirs: Sequence[Ending]) -> list[measure.Aim]:
    found = [measure.Aim(f"{one.what}, s", one.end_s or float("inf"), BOUND_S) for one in ours]
    return [*found, measure.Aim("launch → trainer started, s", start_s(ours), start_s(theirs) / 2)]


def start_s(endings: Sequence[Ending]) -> float:
    """The median of the time from the launch to the trainer's start."""
    known = sorted(one.start_s for one in endings if one.start_s is not None)
    return known[len(known) // 2]


def report(ours: Sequence[Ending], theirs: Sequence[Ending], head: str) -> str:
    rows = [
        ("until both jobs are gone", "this suite", head),
        ("(launch → trainer started)", f"{start_s(ours):.1f} s", f"{start_s(theirs):.1f} s"),
    ]
    rows += [(ENDINGS[mine.what], str(mine), str(other)) for mine, other in zip(ours, theirs, strict=True)]
    return f"{measure.load()}\n\n{measure.table(rows)}"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bash-suite", type=Path, metavar="FOLDER", help="slurm/ of a checkout of 18jeffreyma/SkyRL")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds after which a job stays (%(default)s)")
    parser.add_argument("--cpu-partition", default="test")
    parser.add_argument("--gpu-partition", default="gpu_test")
    parser.add_argument("--base", type=Path, default=Path.home(), help="folder on storage shared with the nodes")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    partitions = (arguments.cpu_partition, arguments.gpu_partition)
    with contextlib.ExitStack() as stack:
        base = Path(tempfile.mkdtemp(prefix="skyrl-bench-", dir=arguments.base))
        stack.callback(shutil.rmtree, base, ignore_errors=True)
        mine = Ours(base, partitions)
        ending(mine, "clean", arguments.patience)  # makes the image once, as a user's first run does
        ours = all_endings(mine, arguments.patience)
        theirs: Sequence[Ending] = RECORDED
        if arguments.bash_suite:
            theirs = all_endings(Bash(base, partitions, arguments.bash_suite), arguments.patience)
    head = "bash suite" if arguments.bash_suite else RECORDED_HEAD
    if arguments.json:
        told = {"ours": [asdict(one) for one in ours], head: [asdict(one) for one in theirs]}
        print(json.dumps({"machine": measure.machine(), "patience_s": arguments.patience, **told}))
    else:
        print(report(ours, theirs, head))
    return measure.verdict(aims(ours, theirs))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
