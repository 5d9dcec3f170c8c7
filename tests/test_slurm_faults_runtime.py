"""Faults of the runtime job's own parts: its API server and its Podman service are killed while sandboxes live."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from shell_rl.errors import SandboxDied, SandboxesUnavailable
from shell_rl.sandbox import RuntimeApi, Sandbox
from slurm.lib.processes import living_fields
from slurm.lib.runtime_client import Answer, RuntimeClient
from tests import faults, lying_image
from tests.conftest import NothingLeft, OrdinaryUser
from tests.faults import Case, released, runtime_processes, within
from tests.runs import Run, launch, monitored, podman_ps, storage_of, until
from tests.runtime.podman_service import server_pid

pytestmark = [pytest.mark.slurm, pytest.mark.podman, pytest.mark.faults]

IMAGE = "localhost/skyrl-busybox:latest"
SETTINGS = ("CPU_SBATCH_ARGS=--nodelist=cpu-a", "GPUS_PER_NODE=0")
SERVER, SERVICE = "slurm_runtime.api_server", "podman system service"
FEW = 2  # requests of one client that were being answered as the server died
# A trainer with three sandboxes, each with a file of its own. One is paused; once the file "go" is there they are used
# again, by what the API says of their sessions.
TRAINER = """TRAINING_COMMAND="$SKYRL_PYTHON" - <<'END'
import json, os, sys, threading, time
sys.path.insert(0, os.environ["SKYRL_CODE_DIR"])
from shell_rl.sandbox import RuntimeApi, Sandbox
api = RuntimeApi(*(os.environ[n] for n in ("SANDBOX_REMOTE_RUNTIME_API_URL", "ALLHANDS_API_KEY", "CONTAINER_IMAGE")))
def ask(method, path, body=None):
    reply = api._door.request(method, path, json.dumps(body).encode() if body else None)
    assert reply.status == 200, reply
    return json.loads(reply.body)
sandboxes = [api.start(f"s{n}", threading.Event()) for n in range(3)]
for n, sandbox in enumerate(sandboxes):
    assert sandbox.run(f"echo {n} > /tmp/mine").exit_code == 0
ask("POST", "/pause", {"runtime_id": sandboxes[2].runtime_id})
def described(session):
    said = ask("GET", f"/sessions/{session}")
    return [said[name] for name in ("runtime_id", "url", "session_api_key")]
before = [described(f"s{n}") for n in range(3)]
open("started", "w").close()
while not os.path.exists("go"):
    time.sleep(0.1)
assert [described(f"s{n}") for n in range(3)] == before
assert ask("GET", "/sessions/s2")["status"] == "paused"
ask("POST", "/resume", {"runtime_id": sandboxes[2].runtime_id})
said = [sandbox.run("cat /tmp/mine").stdout for sandbox in sandboxes]
assert said == ["0\\n", "1\\n", "2\\n"], said
fourth = api.start("s3", threading.Event())
assert fourth.run("echo $((6 * 7))").stdout == "42\\n"
for n in range(4):
    api.stop(f"s{n}")
assert ask("GET", "/list")["runtimes"] == []
END"""


@pytest.fixture(autouse=True)
def clean(nothing_left: NothingLeft) -> None:
    """Every test here ends with nothing left on any node."""


def server_of(run: Run) -> RuntimeClient:
    return RuntimeClient(run.text("runtime_url.txt").strip(), run.text("runtime_api_key.txt").strip())


# --- 2: the training ends while its runtime still starts --------------------------------------------------------------


def test_a_runtime_that_loads_its_image_sees_its_training_end(
    user: OrdinaryUser, checkout: Path, jobs_base: Path, nothing_left: NothingLeft
) -> None:
    """The load of an image, large enough to be seen, is stopped by a signal: so it takes as long as any."""
    archive, image = jobs_base / "large.tar", "localhost/large:latest"
    lying_image.write_large(archive, image, 400)
    own = (f"CONTAINER_IMAGE={image}", f"IMAGE_ARCHIVE={archive}")
    run = launch(user, checkout, jobs_base, "TRAINING_COMMAND=true", *own, *SETTINGS)
    end = time.monotonic() + 60
    while not (loads := [pid for pid, words in user.processes().items() if "load --quiet --input" in words]):
        assert time.monotonic() < end and not run.text("runtime_ready.flag"), "the load was not seen"
        time.sleep(0.002)
    os.kill(loads[0], signal.SIGSTOP)
    run.wait_for_text("training", "waiting up to")
    user.run(["scancel", run.jobs["training"]])
    released(run, nothing_left, faults.CANCELLED_EARLY)
    assert not run.text("runtime_ready.flag")
    assert run.exit_code("runtime") == "0"


@contextlib.contextmanager
def asked_all_the_time(server: RuntimeClient, sandboxes: int) -> Iterator[list[Answer]]:
    """A client asks for the list during the block, each time on a new connection: what was not the whole list."""
    others: list[Answer] = []
    end = threading.Event()

    def ask() -> None:
        while not end.wait(0.02):
            answer = server.check_key()
            listed = answer.body.get("runtimes") if isinstance(answer.body, dict) else None
            if not isinstance(listed, list) or len(listed) != sandboxes:
                others.append(answer)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield others
    finally:
        end.set()
        thread.join()


# --- 4: the API server ------------------------------------------------------------------------------------------------


def test_a_server_that_is_killed_comes_back_with_its_sandboxes(
    user: OrdinaryUser, checkout: Path, jobs_base: Path
) -> None:
    run = launch(user, checkout, jobs_base, TRAINER, *SETTINGS)
    until("its sandboxes", lambda: (run.directory / "started").exists() or run.completion, 60)
    server = server_of(run)
    (pid,) = runtime_processes(user, run, SERVER)
    with asked_all_the_time(server, sandboxes=3) as refused:
        begin = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        while not server.health().ok:
            assert time.monotonic() - begin < faults.SERVER_KILLED.bound_s, run.log("runtime")
        assert server.check_key().ok  # its list is answered once the sandboxes are taken over
        within(faults.SERVER_KILLED, time.monotonic() - begin)
    assert len(refused) <= FEW, refused
    (second,) = runtime_processes(user, run, SERVER)
    assert second != pid
    user.run(["touch", str(run.directory / "go")])
    run.wait_over(seconds=60)
    assert run.completion["exit_code"] == 0, run.log("training") + run.log("training", "err")
    assert run.exit_code("runtime") == "0"
    assert "exit code 137" in run.log("runtime")
    assert faults.SERVER_KILLED.reads in run.log("runtime")


# --- 5: the Podman service, and both too often ------------------------------------------------------------------------


@dataclass(frozen=True)
class Client:
    """A user of a run's sandboxes who looks after two of them."""

    run: Run
    api: RuntimeApi
    sandboxes: tuple[Sandbox, ...]

    @staticmethod
    def of(run: Run) -> Client:
        server = server_of(run)
        api = RuntimeApi(server.url, server.key or "", IMAGE)
        sandboxes = tuple(api.start(f"old{number}", threading.Event()) for number in range(2))
        assert all(sandbox.run(f"echo {sandbox.runtime_id} > /tmp/mine").exit_code == 0 for sandbox in sandboxes)
        return Client(run, api, sandboxes)

    def old_ones_are_whole(self) -> bool:
        """Whether the sandboxes run commands and have kept their files."""
        return all(each.run("cat /tmp/mine").stdout.strip() == each.runtime_id for each in self.sandboxes)

    def starts(self, session: str) -> bool:
        """Whether a new sandbox runs a command; a client tries again what the server could not do."""
        try:
            return self.api.start(session, threading.Event()).run("echo $((6 * 7))").stdout == "42\n"
        except (SandboxesUnavailable, SandboxDied):
            return False


def service_processes(user: OrdinaryUser, run: Run) -> tuple[list[int], int]:
    """The processes of a Podman service, and the one that serves.

    The first service of a store is two processes, the outer of which waits for the inner; one after it is one. What it
    forks for a moment bears its name too, so the socket tells.
    """
    serves = server_pid(storage_of(run, user.uid) / "podman.sock")
    waits = int((living_fields(serves) or ["", "0"])[1])
    found = runtime_processes(user, run, SERVICE)
    assert serves in found
    return [pid for pid in (waits, serves) if pid in found], serves


def is_sound(storage: Path, living: int) -> bool:
    """Whether Podman runs so many containers, one process watches each, and runc's notes are about these alone."""
    running = podman_ps(storage / "podman.sock")
    noted = {entry.name for entry in (storage / "run" / "runc").iterdir()}
    watched = sorted(monitored(storage).values())
    return len(running) == living and watched == sorted(running) and noted == running


def kill_service(user: OrdinaryUser, run: Run, client: Client, case: Case) -> None:
    """Kill one of the processes of the Podman service, and wait until it is back and a new sandbox runs a command.

    One that is being started meanwhile, whose first processes are there already, gets there too; what the dead service
    had made of it is gone then. Until the death of the waiting process is seen, the other one goes on serving.
    """
    storage = storage_of(run, user.uid)
    pids, serves = service_processes(user, run)
    doomed = serves if case is faults.INNER_KILLED else next(pid for pid in pids if pid != serves)
    before = run.log("runtime").count(case.reads)
    with ThreadPoolExecutor(1) as pool:
        living = set(monitored(storage))
        under_way = pool.submit(client.starts, f"before{doomed}")
        until("a start", lambda: set(monitored(storage)) - living, 60, 0.01)
        begin = time.monotonic()
        os.kill(doomed, signal.SIGKILL)
        until("the recovery", lambda: run.log("runtime").count(case.reads) > before, case.bound_s)
        assert client.old_ones_are_whole()
        within(case, time.monotonic() - begin)
        until("a new sandbox", lambda: client.starts(f"after{doomed}"), 60)
        assert under_way.result(timeout=60)
        nobodys = "monitors of living sandboxes alone"
        until(nobodys, lambda: is_sound(storage, living=len(living) + 2), faults.CUT_START.bound_s)
        within(faults.CUT_START, time.monotonic() - begin)
    assert client.old_ones_are_whole()
    assert not set(pids) & set(runtime_processes(user, run, SERVICE)), "nothing of the dead one is left"


def test_a_podman_service_that_is_killed_comes_back_but_not_for_the_third_time(
    user: OrdinaryUser, checkout: Path, jobs_base: Path, nothing_left: NothingLeft
) -> None:
    run = launch(user, checkout, jobs_base, "TRAINING_COMMAND=echo trainer started; exec sleep 300", *SETTINGS)
    run.wait_for_text("training", "trainer started", 60)
    client = Client.of(run)
    kill_service(user, run, client, faults.OUTER_KILLED)
    kill_service(user, run, client, faults.INNER_KILLED)
    assert run.log("runtime").count(faults.RECOVERED) == 2
    assert not run.is_over("training")
    os.kill(runtime_processes(user, run, SERVER)[0], signal.SIGKILL)
    released(run, nothing_left, faults.THREE_CRASHES)
    assert run.exit_code("runtime") == "71"
    assert run.completion["exit_code"] == 69
