"""What is measured during a run on a real Slurm with real Podman: compared with what the kernel and the trainer say."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from slurm.lib.observe.sandbox_statistics import read_statistics
from slurm.lib.observe.usage import efficiency, from_sacct, read_usage
from slurm.lib.scheduler import Slurm
from tests import cluster
from tests.runs import Run, User, launch, until

pytestmark = [pytest.mark.slurm, pytest.mark.podman]

MARK = "skyrl-burns-here"
BURNT_S, BY_A_CHILD_S = 4.0, 2.0
OVERHEAD_S = 20.0  # CPU time of the job's body, its shells and Pythons; some 3 s here
# Two sandboxes start, one of which computes without end, a third cannot; then the trainer and a child of it compute,
# and it waits for one more sample of each job: nobody waits for the last look, which may be missing.
TRAINER = f"""TRAINING_COMMAND="$SKYRL_PYTHON" - <<'END'
import glob, json, os, resource, time, urllib.error, urllib.request
url, key = os.environ["SANDBOX_REMOTE_RUNTIME_API_URL"], os.environ["ALLHANDS_API_KEY"]
def ask(path, body=None):
    headers = {{"X-API-Key": key, "Content-Type": "application/json"}}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url + path, data, headers), timeout=120) as answer:
        return json.load(answer)
def start(session, image, more=""):
    shell = "mkdir -p /w; echo ok > /w/health; " + more + "exec httpd -f -p 60000 -h /w"
    body = {{"image": image, "session_id": session, "working_dir": "/", "command": ["/bin/sh", "-c", shell]}}
    made = ask("/start", body)
    while ask("/sessions/" + session)["pod_status"] != "ready":
        time.sleep(0.2)
    return made
def burn(seconds):
    while time.process_time() < seconds:
        pass
image = os.environ["CONTAINER_IMAGE"]
start("burns", image, "sh -c 'while :; do :; done' {MARK} & ")
stopped = start("stopped", image)
try:
    start("nowhere", "localhost/nonesuch:1")
except urllib.error.HTTPError as problem:
    print("refused", problem.code)
ask("/stop", {{"runtime_id": stopped["runtime_id"]}})
child = os.fork()
burn({BY_A_CHILD_S} if not child else {BURNT_S})
if not child:
    os._exit(0)
os.waitpid(child, 0)
def samples():
    return {{path: len(open(path).readlines()) for path in glob.glob("usage_*.jsonl")}}
before, end = samples(), time.monotonic() + 60
while time.monotonic() < end and any(count <= before.get(path, 0) for path, count in samples().items()):
    time.sleep(0.5)
used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
with open("used.json", "w") as file:
    json.dump(sum(one.ru_utime + one.ru_stime for one in used), file)
END"""


@pytest.fixture(autouse=True)
def clean(user: User, nothing_left: Callable[[], None]) -> None:
    """Every test here ends with nothing left on any node (the fixture checks at its end)."""


def burnt_in_the_sandbox() -> float:
    """CPU seconds of the loop in the sandbox so far, as the kernel says; 0 where it does not run."""
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
            if MARK.encode() in words:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                return (int(fields[11]) + int(fields[12])) / 100
        except OSError:
            continue
    return 0.0


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_a_run_used(accounting: None, user: User, checkout: Path, jobs_base: Path) -> None:
    run = launch(user, checkout, jobs_base, TRAINER)
    seen: list[tuple[float, float]] = []  # what the sandbox had burnt by when

    def over() -> bool:
        if not run.completion:
            burnt_s = burnt_in_the_sandbox()
            seen.append((time.time(), burnt_s))
        return run.is_over("training") and run.is_over("runtime")

    until("the end of the run", over, 240)
    assert run.completion["exit_code"] == 0, run.log("training")[-3000:] + run.log("training", "err")[-3000:]
    used_s = json.loads(run.text("used.json"))
    assert used_s >= BURNT_S + BY_A_CHILD_S - 0.1
    check_samples(run, used_s, seen)
    check_statistics(run)
    check_accounting(run, user, used_s)


def check_samples(run: Run, used_s: float, seen: list[tuple[float, float]]) -> None:
    """The trainer's time and its child's are there, and the sandbox's; and not much more."""
    path = run.directory / f"usage_training_{run.jobs['training']}.jsonl"
    assert mode(path) == 0o600
    samples = read_usage(path.read_text())
    assert len(samples) == len(path.read_text().splitlines()) >= 2
    usage = efficiency(samples)
    assert (usage.cpus, usage.memory_limit_bytes) == (2.0, 4 * 2**30)
    assert usage.span_s and usage.cpu_share
    held_s = 2 * usage.span_s
    assert used_s - 0.5 <= usage.cpu_share * held_s <= used_s + OVERHEAD_S
    assert usage.memory_peak_bytes and 2**23 < usage.memory_peak_bytes < 2**32
    assert usage.gpus == 0  # no nvidia-smi here
    path = run.directory / f"usage_runtime_{run.jobs['runtime']}.jsonl"
    runtime = read_usage(path.read_text())
    assert mode(path) == 0o600 and len(runtime) >= 2
    in_the_sandbox_s = max(burnt_s for at, burnt_s in seen if at < runtime[-1].at - 1)
    assert in_the_sandbox_s > 0.5
    assert (runtime[-1].cpu_s or 0) >= in_the_sandbox_s - 0.1
    assert efficiency(runtime).cpus == 8.0


def check_statistics(run: Run) -> None:
    """What the API server counted is what the trainer did."""
    path = run.directory / f"sandbox_statistics_{run.jobs['runtime']}.json"
    assert mode(path) == 0o600
    found = read_statistics(path.read_text())
    assert found
    assert (found.starts.asked, found.starts.succeeded) == (3, 2)
    assert found.starts.failed == {"its image could not be had": 1}
    assert found.ended == {"stopped on request": 1, "the API server stopped": 1}
    assert (found.peak_living, found.slots, found.start_seconds.count) == (2, 8, 2)
    assert found.start_seconds.max and 0 < (found.start_seconds.p50 or 0) <= found.start_seconds.max
    assert found.requests.count >= 6
    assert found.steps["create"].count >= 2


def check_accounting(run: Run, user: User, used_s: float) -> None:
    """Slurm's accounts say about the same; they know an ended job some seconds before all is known of it."""
    slurm = Slurm(cluster.environment())
    training = run.jobs["training"]

    def known() -> bool:
        rows = slurm.use([training], "2020-01-01T00:00:00").get(training, [])
        return any(row.step == "batch" and row.memory_peak_bytes for row in rows) and bool(from_sacct(rows).cpu_share)

    until("the training job in the accounts", known, 60)
    usage = from_sacct(slurm.use(list(run.jobs.values()), "2020-01-01T00:00:00")[training])
    assert (usage.source, usage.cpus, usage.memory_limit_bytes, usage.gpus) == ("sacct", 2, 4 * 2**30, 1)
    assert usage.span_s and usage.cpu_share
    assert used_s - 1.0 <= usage.cpu_share * usage.span_s * 2 <= used_s + OVERHEAD_S
    assert usage.memory_peak_bytes and 2**23 < usage.memory_peak_bytes < 2**32
    assert slurm.use([training], "2036-01-01T00:00:00") == {}  # an older job with this id is not believed
