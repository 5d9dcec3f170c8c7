"""What a sandbox can do to others: code that nobody trusts tries it from the inside, on the node of a real run."""

from __future__ import annotations

import json
import re
import secrets
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from slurm_runtime.agent.tree import AgentTree
from tests import cluster as test_cluster
from tests import faults, sandbox_secrets
from tests.conftest import NothingLeft, OrdinaryUser
from tests.faults import runtime_processes, within
from tests.runs import Run, launch, until
from tests.runtime import agent_tree
from tests.runtime.agent_tree import ASK_FOR_KEYRING, COMMAND
from tests.runtime.test_contract import command
from tests.sandbox_secrets import REACHED

pytestmark = [pytest.mark.slurm, pytest.mark.podman, pytest.mark.faults]

PROGRAM = Path(sandbox_secrets.__file__).read_text(encoding="utf-8")
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

# What refuses a sandbox that tries to get at another one's secret (tests/sandbox_secrets.py), with a key of its own.
KEPT = {
    "its server, without a key": "401",
    "its server, with the key": "401",
    "its server's events, without a key": "Authentication failed",
    "its server's events, with the key": "Authentication failed",
    "its server, at the node's loopback": "unreachable",
    "its server, at its own loopback": "can't open '/workspace/secret'",  # there is the thief's own
    "a port of its own loopback": "refused",
    "its abstract socket": "refused",
    "a socket among its files": "No such file",
    "its /workspace": "no such file",
    "its /tmp": "no such file",
    "its /dev/shm": "no such file",
    "its /workspace, where the node has it": "no such file",
    "its root, by its process": "no such file",
    "its environment": "container=podman",  # there is the thief's own
    "its process": "No such process",
    "its shared memory": "no such memory",
}
KEYLESS = {name for name in KEPT if "without a key" in name}
TOLD = "what its server tells everybody"  # as docs/security.md says


@pytest.fixture(autouse=True)
def clean(nothing_left: NothingLeft) -> None:
    """Every test here ends with nothing left on any node."""


def ask(run: Run, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """An answer of the run's API to who has its key."""
    headers = {"X-API-Key": run.text("runtime_api_key.txt").strip(), "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(run.text("runtime_url.txt").strip() + path, data, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(json.load(answer))


def started(run: Run, session: str, program: str | list[str], **more: Any) -> dict[str, Any]:
    """A sandbox that runs a program, or the agent server."""
    image = {"image": "localhost/skyrl-busybox:latest", "working_dir": "/"}
    return ask(run, "/start", {**image, "session_id": session, "command": program, **more})


def script(text: str) -> list[str]:
    return ["/bin/sh", "-c", text]


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
    tree = agent_tree.tests_tree()
    settings = ("TRAINING_COMMAND=sleep 300", "CPU_SBATCH_ARGS=--nodelist=cpu-a", "GPUS_PER_NODE=0")
    run = launch(user, checkout, jobs_base, *settings, f"AGENT_DIR={tree.root}")
    try:
        until("the API server", lambda: run.text("runtime_ready.flag"), 40)
        attack(user, run)
        attack_another(user, run, tree)
    finally:
        user.run(["scancel", *run.jobs.values()])
        run.wait_over(seconds=20)
    assert faults.SANDBOX_ATTACKS in faults.CASES


def attack(user: OrdinaryUser, run: Run) -> None:
    """Have a sandbox of the run try everything, and compare what it was told."""
    pid = runtime_processes(user, run, "slurm_runtime.api_server")[0]
    neighbour = started(run, "neighbour", script(SERVES))
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
    said = report(started(run, "attacker", script(f"{_assigned(goals)}\n{TRIES}\n{SERVES}")))
    assert said.pop(OPEN) == "done"
    assert said.keys() == REFUSED.keys()
    assert not {name: word for name, word in said.items() if REFUSED[name] not in word}, said


def agent(run: Run, session: str, **more: Any) -> dict[str, Any]:
    """A sandbox with the agent server that serves."""
    sandbox = started(run, session, COMMAND, **more)
    until("the agent server", lambda: ask(run, f"/sessions/{session}")["pod_status"] == "ready", 120)
    return sandbox


def attack_another(user: OrdinaryUser, run: Run, tree: AgentTree) -> None:
    """Have a sandbox of the run try to get at what another one has.

    What refuses it is no accident: each try brings the secret from inside of the other one, from the node, or, where it
    is a key that lacks, with that key.
    """
    secret = f"secret-{secrets.token_hex(16)}"
    victim, thief = agent(run, "victim", environment={"SECRET": secret}), agent(run, "thief")
    goals = {"url": victim["url"], "loopback": "10.0.2.2", **held(user, run, tree, victim)}

    def brought(sandbox: dict[str, Any], owner: dict[str, Any]) -> dict[str, str]:
        words = steal(goals, owner, tree.python_command(("-c", PROGRAM)))
        return dict(json.loads(command(sandbox, shlex.join(words), 60)["stdout"]))

    own, keyed = brought(thief, thief), brought(thief, victim)
    assert own.pop(TOLD) == REACHED
    assert own.keys() == KEPT.keys()
    assert not {name: word for name, word in own.items() if KEPT[name] not in word}, own
    ask_for_keyring = shlex.join(tree.python_command(("-c", ASK_FOR_KEYRING)))
    assert command(thief, ask_for_keyring)["stdout"] == agent_tree.REFUSED
    command(thief, "(sleep 0.2; kill -9 -1) > /dev/null 2>&1 &")
    until("its end by its own hand", lambda: ask(run, "/sessions/thief")["pod_status"] == "failed", 10)

    inside, program = brought(victim, victim), tree.python_command(("-c", PROGRAM), at=tree.root)
    words = steal({**goals, "loopback": "127.0.0.1"}, victim, program)
    outside = json.loads(test_cluster.on_node("cpu-a", *words))
    got = {name for tries in (inside, outside, keyed) for name, word in tries.items() if word in {secret, REACHED}}
    assert got - {TOLD} == KEPT.keys() - KEYLESS, (inside, outside, keyed)
    assert subprocess.check_output([sys.executable, "-c", ASK_FOR_KEYRING], text=True).startswith("True")


def held(user: OrdinaryUser, run: Run, tree: AgentTree, victim: dict[str, Any]) -> dict[str, Any]:
    """Have a sandbox hold its SECRET; where the node has its workspace, and the process that holds it."""
    words = shlex.join(tree.python_command(("-c", PROGRAM, "hold")))
    command(victim, f"setsid {words} > /tmp/log 2>&1 & until [ -e /tmp/socket ]; do sleep 0.1; done")
    pid = next(pid for pid, line in user.processes().items() if line.strip().endswith(" hold"))
    storage = Path(f"/tmp/skyrl-{user.uid}-{run.jobs['runtime']}")
    return {"workspace": str(next(storage.glob("**/_data/secret")).parent), "pid": pid}


def steal(goals: dict[str, Any], owner: dict[str, Any], program: Sequence[str]) -> tuple[str, ...]:
    """The command that tries to get at the secret, with the key of a sandbox."""
    return (*program, "steal", json.dumps({**goals, "key": owner["session_api_key"]}))


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
