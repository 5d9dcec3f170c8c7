"""What a sandbox can do to others: code that nobody trusts tries it from the inside, on the node of a real run."""

from __future__ import annotations

import json
import re
import shlex
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests import cluster as test_cluster
from tests import faults
from tests.conftest import NothingLeft, OrdinaryUser
from tests.faults import runtime_processes, within
from tests.runs import Run, launch, until

pytestmark = [pytest.mark.slurm, pytest.mark.podman, pytest.mark.faults]

SERVES = "mkdir -p /w; echo ok > /w/health; exec httpd -f -p 60000 -h /w"
# Each line of the report is "what was tried: done", or what refused it.
TRIES = """
mkdir -p /w
try() { name=$1; shift; if said=$("$@" 2>&1); then echo "$name: done"; else echo "$name: $(echo $said)"; fi; }
ask() {
    { printf "$3 HTTP/1.0\\r\\n$4\\r\\n"; sleep 1; } | nc -w 5 $1 $2 > /w/answer 2>&1
    head -n 1 /w/answer; grep -q " 200 " /w/answer
}
sees() { ls -d $1; }
writes() { echo "$2" > "$1"; }
knows() { cat /proc/*/environ | tr '\\0' '\\n' | grep -E "$1" || { echo nothing; return 1; }; }
{
try "the API without a key" ask $NODE $PORT "GET /list"
try "the API with the sandbox's own key" ask $NODE $PORT "GET /list" "X-API-Key: $SESSION_API_KEY\\r\\n"
try "a start without a key" ask $NODE $PORT "POST /start" "Content-Length: 0\\r\\n"
try "the node's own loopback" ask 10.0.2.2 $PORT "GET /health"
try "the run's directory" sees $RUN
try "the home of the user" sees $USERS_HOME
try "Podman's socket and storage" sees $STORAGE
try "munge and Slurm" sees "/run/munge /run/skyrl-test-cluster /var/spool/slurmd"
try "a process of the node" kill -0 $PID
try "the job's environment" knows "^(SLURM|SKYRL|ALLHANDS|HOME=$USERS_HOME)|$KEY"
try "the kernel's settings" writes /proc/sys/kernel/hostname x
try "the kernel's commands" writes /proc/sysrq-trigger h
try "a mount" mount -t tmpfs tmpfs /w
try "a device" mknod /tmp/disk b 8 0
try "the node's namespaces" nsenter -t 1 -m true
try "a neighbour whose server asks for no key" ask $NODE $NEIGHBOUR "GET /health"
} > /w/report
"""
REFUSED = {
    "the API without a key": "401",
    "the API with the sandbox's own key": "401",
    "a start without a key": "401",
    "the node's own loopback": "can't connect",
    "the run's directory": "No such file",
    "the home of the user": "No such file",
    "Podman's socket and storage": "No such file",
    "munge and Slurm": "No such file",
    "a process of the node": "No such process",
    "the job's environment": "nothing",
    "the kernel's settings": "Read-only file system",
    "the kernel's commands": "can't create",
    "a mount": "ermi",  # Permission denied, or Operation not permitted
    "a device": "Operation not permitted",
    "the node's namespaces": "Operation not permitted",
}
OPEN = "a neighbour whose server asks for no key"  # as docs/security.md says


@pytest.fixture(autouse=True)
def clean(nothing_left: NothingLeft) -> None:
    """Every test here ends with nothing left on any node."""


def started(run: Run, session: str, script: str) -> dict[str, Any]:
    """A sandbox that runs a shell script."""
    body = {
        "image": "localhost/skyrl-busybox:latest",
        "session_id": session,
        "working_dir": "/",
        "command": ["/bin/sh", "-c", script],
    }
    headers = {"X-API-Key": run.text("runtime_api_key.txt").strip(), "Content-Type": "application/json"}
    url = run.text("runtime_url.txt").strip()
    request = urllib.request.Request(f"{url}/start", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(json.load(answer))


def report(sandbox: dict[str, Any]) -> dict[str, str]:
    """What the sandbox was told, once it has tried everything."""
    until("the report", lambda: _page(sandbox), 40)
    return dict(line.split(": ", 1) for line in _page(sandbox).splitlines())


def _page(sandbox: dict[str, Any]) -> str:
    try:
        with urllib.request.urlopen(f"{sandbox['url']}/report", timeout=10) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


def port_of(url: str) -> str:
    return url.strip().rpartition(":")[2]


def test_a_sandbox_that_attacks_is_refused(user: OrdinaryUser, checkout: Path, jobs_base: Path) -> None:
    settings = ("TRAINING_COMMAND=sleep 300", "CPU_SBATCH_ARGS=--nodelist=cpu-a", "GPUS_PER_NODE=0")
    run = launch(user, checkout, jobs_base, *settings)
    try:
        attack(user, run)
    finally:
        user.run(["scancel", *run.jobs.values()])
        run.wait_over(seconds=20)
    assert faults.SANDBOX_ATTACKS in faults.CASES


def attack(user: OrdinaryUser, run: Run) -> None:
    """Have a sandbox of the run try everything, and compare what it was told."""
    until("the API server", lambda: run.text("runtime_ready.flag"), 40)
    pid = runtime_processes(user, run, "slurm_runtime.api_server")[0]
    neighbour = started(run, "neighbour", SERVES)
    goals = {
        "NODE": test_cluster.NODES["cpu-a"],  # a static busybox cannot look a name up
        "PORT": port_of(run.text("runtime_url.txt")),
        "RUN": str(run.directory),
        "USERS_HOME": str(user.home),
        "STORAGE": f"/tmp/skyrl-{user.uid}-{run.jobs['runtime']}",
        "PID": str(pid),
        "KEY": run.text("runtime_api_key.txt")[:12],
        "NEIGHBOUR": port_of(neighbour["url"]),
    }
    for there in (goals["RUN"], goals["USERS_HOME"], goals["STORAGE"], f"/proc/{pid}"):
        assert Path(there).exists(), "what is tried for is there, outside"
    said = report(started(run, "attacker", f"{_assigned(goals)}\n{TRIES}\n{SERVES}"))
    assert said.pop(OPEN) == "done"
    assert said.keys() == REFUSED.keys()
    assert not {name: word for name, word in said.items() if REFUSED[name] not in word}, said


def _assigned(goals: dict[str, str]) -> str:
    return "\n".join(f"{name}={shlex.quote(value)}" for name, value in goals.items())


# --- 6: one sandbox takes what is everybody's -------------------------------------------------------------------------

# As a trainer would meet them: in one run, with the suite's own flags, without a limit of the disk. The trainer
# prints how long each took until it had failed, until the neighbour did all again, and why it failed.
OFFENCES = {
    "memory": ("exec dd if=/dev/zero of=/dev/null bs=700M count=100000", "out of memory"),
    "bomb": ("while :; do (bomb() { bomb | bomb & }; while :; do bomb; done); sleep 0.1; done", "can't fork|processes"),
    "disk": ("head -c 9000000000 /dev/zero > /workspace/big; sleep 100", "of the node's disk, more than any other"),
}
NEIGHBOUR = """
mkdir -p /w/cgi-bin; echo ok > /w/health
printf '#!/bin/sh\\necho\\nhead -c 2000000 /dev/zero > /workspace/some && cat /w/health\\n' > /w/cgi-bin/work
chmod +x /w/cgi-bin/work; exec httpd -f -p 60000 -h /w
"""
TRAINER = """
import json, os, sys, time, urllib.request
url, key = os.environ["SANDBOX_REMOTE_RUNTIME_API_URL"], os.environ["ALLHANDS_API_KEY"]
def ask(path, body=None):
    headers = {"X-API-Key": key, "Content-Type": "application/json"}
    request = urllib.request.Request(url + path, body and json.dumps(body).encode(), headers)
    return json.load(urllib.request.urlopen(request, timeout=60))
def start(session, script):
    return ask("/start", {"image": os.environ["CONTAINER_IMAGE"], "session_id": session, "working_dir": "/",
                          "command": ["/bin/sh", "-c", script]})
def works():
    try:
        return b"ok" in urllib.request.urlopen(neighbour["url"] + "/cgi-bin/work", timeout=1).read()
    except OSError:
        return False
def until(condition):
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() < begin + 30, "waited in vain"
        time.sleep(0.05)
    return time.monotonic() - begin
offences, script = json.load(open(sys.argv[1]))
neighbour, said = start("neighbour", script), {}
until(works)
for name, (program, _) in offences.items():
    start(name, program)
    failed = until(lambda: ask("/sessions/" + name)["pod_status"] == "failed")
    said[name] = [failed, until(works), ask("/sessions/" + name)["pod_logs"]]
print("said:" + json.dumps(said), flush=True)
"""


def test_a_run_outlives_sandboxes_that_take_everything(user: OrdinaryUser, checkout: Path, jobs_base: Path) -> None:
    files = {"trainer.py": TRAINER, "offences.json": json.dumps([OFFENCES, NEIGHBOUR])}
    for name, text in files.items():
        (jobs_base / name).write_text(text)
    command = f'TRAINING_COMMAND="$SKYRL_PYTHON" {jobs_base}/trainer.py {jobs_base}/offences.json'
    disk = ("-t", "tmpfs", "-o", "size=600m,mode=1777", "tmpfs")
    with test_cluster.mounted("cpu-a", test_cluster.LOCAL_DISK, *disk):
        scratch = f"LOCAL_SCRATCH={test_cluster.LOCAL_DISK}"
        run = launch(user, checkout, jobs_base, command, scratch, "CPU_SBATCH_ARGS=--nodelist=cpu-a", "GPUS_PER_NODE=0")
        run.wait_over(seconds=120)
    assert run.completion["exit_code"] == 0, run.log("training") + run.log("training", "err")
    said = json.loads(next(line for line in run.log("training").splitlines() if line.startswith("said:"))[5:])
    for name, (_, words) in OFFENCES.items():
        assert re.search(words, said[name][2]), said
    within(faults.BAD_NEIGHBOURS, max(failed + recovered for failed, recovered, _ in said.values()))
