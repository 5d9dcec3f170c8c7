"""Does the small RL loop learn from what sandboxes really do, and from nothing else?

The API server here is a small one of this file; its sandboxes are real: busybox httpd processes of this machine that
run the loop's own start script. Only the container around them is missing (see test_busybox_image.py for that).
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from shell_rl import commands, errors, learner, pool, report, sandbox, tasks, train
from shell_rl.checkpoint import Checkpoint, Settings, load, save
from shell_rl.interruption import Interruption
from shell_rl.learner import Score
from shell_rl.policy import Policy, advantages, softmax
from shell_rl.sandbox_program import OUTPUT_BYTES, Execution, parse_reply, start_script

ROOT = Path(__file__).resolve().parent.parent
KEY = "key-of-the-test"
BUSYBOX = shutil.which("busybox")
needs_busybox = pytest.mark.skipif(BUSYBOX is None, reason="needs busybox (apt-get install busybox-static)")

# --- a small API server with real sandboxes ---------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class ConstantSandbox(BaseHTTPRequestHandler):
    """A sandbox that runs nothing and always says the same: exit code 0 and ``stdout``."""

    stdout = b""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = b"0 %d 0\n" % len(self.stdout) + self.stdout
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@dataclass
class Runtime:
    runtime_id: str
    port: int
    stop: Callable[[], None]
    status: str = "running"


@dataclass
class FakeApi:
    """What the loop needs of the remote runtime API, with a record of what it did."""

    folder: Path
    capacity: int = 100
    constant: bytes | None = None
    pod_status: str = "ready"
    slow_start: threading.Event | None = None
    runtimes: dict[str, Runtime] = field(default_factory=dict)
    admitted: int = 0
    started: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    requests: list[dict[str, object]] = field(default_factory=list)
    url: str = ""

    def alive(self) -> list[Runtime]:
        with self.lock:
            return [runtime for runtime in self.runtimes.values() if runtime.status == "running"]

    def start(self, body: dict[str, object]) -> tuple[int, dict[str, object]]:
        with self.lock:
            if self.admitted >= self.capacity:
                return 503, {"detail": f"all {self.capacity} slots are in use"}
            self.admitted += 1
        port = free_port()
        stop = self._process(body, port) if self.constant is None else self._constant(port)
        with self.lock:
            self.started += 1
            runtime = Runtime(f"runtime-{self.started}", port, stop)
            self.runtimes[str(body["session_id"])] = runtime
            self.requests.append(body)
        if self.slow_start:
            self.slow_start.wait(30)
        return 201, self.describe(str(body["session_id"]), runtime)

    def _process(self, body: dict[str, object], port: int) -> Callable[[], None]:
        command = body["command"]
        assert isinstance(command, list) and command[:2] == ["/bin/sh", "-c"]
        script = str(command[2])
        home = Path(tempfile.mkdtemp(dir=self.folder))
        environment = {"PATH": os.environ["PATH"], "TMPDIR": str(home), "SESSION_API_KEY": "of-the-sandbox"}
        assert "-p 60000 " in script
        local = script.replace("-p 60000 ", f"-p 127.0.0.1:{port} ")
        process = subprocess.Popen(["/bin/sh", "-c", local], cwd="/", env=environment, start_new_session=True)
        wait_for(lambda: answers(port))

        def stop() -> None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)

        return stop

    def _constant(self, port: int) -> Callable[[], None]:
        handler = type("Constant", (ConstantSandbox,), {"stdout": self.constant})
        server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

        def stop() -> None:
            server.shutdown()
            server.server_close()

        return stop

    def describe(self, session_id: str, runtime: Runtime) -> dict[str, object]:
        return {
            "runtime_id": runtime.runtime_id,
            "session_id": session_id,
            "url": f"http://127.0.0.1:{runtime.port}",
            "session_api_key": "of-the-sandbox",
            "status": runtime.status,
            "pod_status": self.pod_status,
            "pod_logs": "the last words",
        }

    def stop(self, runtime_id: object) -> tuple[int, dict[str, object]]:
        for runtime in self.alive():
            if runtime.runtime_id == runtime_id:
                with self.lock:
                    runtime.status = "stopped"
                    self.admitted -= 1
                runtime.stop()
        return 200, {}

    def handle(self, method: str, path: str, body: dict[str, object]) -> tuple[int, dict[str, object]]:
        if method == "POST" and path == "/start":
            return self.start(body)
        if method == "POST" and path == "/stop":
            return self.stop(body["runtime_id"])
        session_id = path.removeprefix("/sessions/")
        with self.lock:
            runtime = self.runtimes.get(session_id)
        return (200, self.describe(session_id, runtime)) if runtime else (404, {"detail": "no such session"})


@contextmanager
def serving(api: FakeApi) -> Iterator[FakeApi]:
    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
            right = self.headers["X-API-Key"] == KEY
            status, reply = api.handle(self.command, self.path, body) if right else (401, {"detail": "wrong key"})
            data = json.dumps(reply).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass  # the client is gone

        do_GET = do_POST = _answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    api.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()
        for runtime in api.alive():
            runtime.stop()


@pytest.fixture
def api(tmp_path: Path) -> Iterator[FakeApi]:
    (tmp_path / "sandboxes").mkdir()
    with serving(FakeApi(tmp_path / "sandboxes")) as fake:
        yield fake


@pytest.fixture
def run(api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setenv("SANDBOX_REMOTE_RUNTIME_API_URL", api.url)
    monkeypatch.setenv("ALLHANDS_API_KEY", KEY)
    for name in ("CONTAINER_IMAGE", "CHECKPOINT_DIR", "ROLLOUT_DIR", "SKYRL_COORD_DIR"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: str, output: str = "out") -> int:
        return train.main(["--output", str(tmp_path / output), *arguments])

    return call


def summary(tmp_path: Path, output: str = "out") -> dict[str, object]:
    value = json.loads((tmp_path / output / "summary.json").read_text())
    assert isinstance(value, dict)
    return value


def without_times(path: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]


# --- policy and grammar -----------------------------------------------------------------------------------------


def every_action(prefix: commands.Action = ()) -> Iterator[commands.Action]:
    if not commands.count(prefix):
        yield prefix
    for index in range(commands.count(prefix)):
        yield from every_action((*prefix, index))


def test_softmax_is_a_distribution_even_for_huge_logits() -> None:
    assert softmax([1000.0, 1000.0]) == [0.5, 0.5]
    assert sum(softmax([-5.0, 0.1, 3.0])) == pytest.approx(1.0)


def test_equal_rewards_teach_nothing() -> None:
    policy = Policy(commands.count)
    policy.reinforce("t", [(0, 0, 0, 0), (1, 1, 1, 1)], [1.0, 1.0], 1.0)
    assert all(value == 0.0 for row in policy.logits().values() for value in row)
    assert advantages([0.0, 1.0]) == [-1.0, 1.0]


def test_the_rewarded_action_becomes_likelier_and_others_do_not() -> None:
    policy = Policy(commands.count)
    policy.reinforce("t", [(1, 0, 0, 0), (2, 0, 0, 0)], [1.0, 0.0], 1.0)
    before = 1 / len(commands.VERBS)
    chances = policy.probabilities("t", ())
    assert chances[1] > before > chances[2]
    assert policy.probabilities("other", ()) == [before] * len(commands.VERBS)


def test_the_update_follows_the_gradient_of_the_log_probability() -> None:
    def objective(logit: float) -> float:  # advantages of [1, 0] are 1 and -1
        chances = Policy(commands.count, {"t": [logit, 0, 0, 0, 0, 0]}).probabilities("t", ())
        return (math.log(chances[0]) - math.log(chances[1])) / 2

    policy = Policy(commands.count, {"t": [0.3, 0, 0, 0, 0, 0]})
    policy.reinforce("t", [(0, 0, 0, 0), (1, 0, 0, 0)], [1.0, 0.0], 1.0)
    slope = (objective(0.3 + 1e-5) - objective(0.3 - 1e-5)) / 2e-5
    assert policy.logits()["t"][0] - 0.3 == pytest.approx(slope, abs=1e-6)


def test_the_grammar_has_no_command_twice_and_no_escape() -> None:
    said = [commands.render(action) for action in every_action()]
    assert len(said) == len(set(said)) > 100
    assert not any(word in command for command in said for word in (";", "rm ", "&", "`"))


# --- tasks ------------------------------------------------------------------------------------------------------


def locally(script: str) -> Execution:
    """Run a script as a sandbox would, without one."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [str(BUSYBOX), "sh", "-c", script], cwd=folder, capture_output=True, stdin=subprocess.DEVNULL, text=True
        )
    return Execution(done.returncode, done.stdout, done.stderr)


def locally_all(scripts: Sequence[str]) -> list[Execution]:
    with ThreadPoolExecutor(2) as workers:
        return list(workers.map(locally, scripts))


@needs_busybox
def test_every_task_can_be_solved_and_most_commands_do_not_solve_it() -> None:
    world, actions = tasks.make_world(random.Random("world")), list(every_action())
    executions = locally_all([tasks.script(world, commands.render(action), "mark") for action in actions])
    for task in tasks.TASKS:
        rewards = [tasks.reward(task, world, tasks.observe(execution, "mark")) for execution in executions]
        assert 1 <= rewards.count(1.0) <= len(actions) / 20, task.name
        assert sum(rewards) / len(rewards) < 0.1, task.name


def test_answers_differ_between_worlds() -> None:
    worlds = [tasks.make_world(random.Random(f"w{n}")) for n in range(20)]
    for task in tasks.TASKS:
        assert len({tuple(task.answer(world)) for world in worlds}) > 10, task.name


def seen(stdout: str, result_file: str | None = None, exit_code: int = 0) -> tasks.Observation:
    return tasks.Observation(exit_code, stdout, result_file)


def test_rewards_are_for_the_answer_not_for_the_exit_code() -> None:
    world = tasks.make_world(random.Random(1))
    by_name = {task.name: task for task in tasks.TASKS}
    ordered = "".join(f"{n}\n" for n in sorted(world.numbers, reverse=True))
    for task in tasks.TASKS:
        assert tasks.reward(task, world, None) == 0.0
        assert tasks.reward(task, world, seen("")) == 0.0
        assert tasks.reward(task, world, seen("", "")) == 0.0
    sort = by_name["sort-numbers"]
    assert tasks.reward(sort, world, seen(ordered)) == 1.0
    assert tasks.reward(sort, world, seen(ordered, exit_code=1)) == 0.0
    assert tasks.reward(sort, world, seen("", ordered)) == tasks.PARTIAL
    unsorted = "".join(f"{n}\n" for n in sorted(world.numbers))
    assert 0 < tasks.reward(sort, world, seen(unsorted)) <= tasks.PARTIAL
    unique = "".join(f"{line}\n" for line in sorted(set(world.log)))
    assert tasks.reward(by_name["save-unique"], world, seen("", unique)) == 1.0
    assert tasks.reward(by_name["save-unique"], world, seen(unique)) == tasks.PARTIAL


def test_output_without_the_mark_is_no_observation_and_failed_setup_is_an_error() -> None:
    assert tasks.observe(Execution(0, "5\n", ""), "mark") is None
    assert tasks.observe(Execution(3, "5\n\nmark\n", ""), "mark") == seen("5\n", None, 3)
    assert tasks.observe(Execution(0, "\nmark\nfile\nx\n", ""), "mark") == seen("", "x\n")
    with pytest.raises(errors.SandboxDied, match="No space left"):
        tasks.observe(Execution(tasks.SETUP_FAILED, "", "cat: No space left"), "mark")


@needs_busybox
@pytest.mark.parametrize("seed", [0, 7])
def test_the_loop_learns_with_a_simulated_sandbox(seed: int) -> None:
    policy = Policy(commands.count)
    untrained = learner.score(learner.evaluate(policy, locally_all, seed, 8))
    for step in range(1, 26):
        learner.train_step(policy, locally_all, seed, step, 16, train.LEARNING_RATE)
    trained = learner.score(learner.evaluate(policy, locally_all, seed, 8))
    assert train.has_learned(untrained.reward, trained.reward, 3.0)


# --- the program in the sandbox ---------------------------------------------------------------------------------


@pytest.fixture
def one(api: FakeApi) -> Iterator[sandbox.Sandbox]:
    client = sandbox.RuntimeApi(api.url, KEY, "image")
    try:
        yield client.start("one", threading.Event())
    finally:
        client.stop("one")


@needs_busybox
def test_a_script_runs_in_a_fresh_folder_that_is_removed(one: sandbox.Sandbox, api: FakeApi) -> None:
    first = one.run("pwd; ls -A; echo x > left; echo to-stderr >&2; exit 3")
    assert first.exit_code == 3 and first.stderr == "to-stderr\n"
    folder = Path(first.stdout.strip())
    assert first.stdout == f"{folder}\n" and not folder.exists()
    assert one.run("ls -A").stdout == ""


@needs_busybox
def test_the_sandbox_keeps_its_key_from_commands_and_its_door_shut(one: sandbox.Sandbox) -> None:
    assert "of-the-sandbox" not in one.run("env; cat /proc/self/environ").stdout
    for headers in ({}, {"X-Session-API-Key": "guess"}, {"X-Session-API-Key": ""}):
        stranger = replace(one.door, headers=headers)
        assert stranger.request("POST", "/cgi-bin/run", b"echo hello").status == 403
    assert one.door.request("GET", "/alive").body == b'{"status":"ok"}\n'
    assert {one.door.request("GET", path).status for path in ("/health", "/ready")} == {200}


@needs_busybox
def test_long_output_is_cut_and_what_a_script_leaves_running_is_killed(one: sandbox.Sandbox) -> None:
    long = one.run("yes | head -c 200000")
    assert (long.exit_code, len(long.stdout)) == (0, OUTPUT_BYTES)
    pid = one.run("sleep 300 >/dev/null 2>&1 & echo $!").stdout.strip()
    wait_for(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2])


@needs_busybox
def test_a_script_has_a_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = start_script().replace("-s KILL 10", "-s KILL 1")
    assert script != start_script()
    monkeypatch.setattr(sandbox, "start_command", lambda: ["/bin/sh", "-c", script])
    with serving(FakeApi(tmp_path)) as fake:
        client = sandbox.RuntimeApi(fake.url, KEY, "image")
        assert client.start("s", threading.Event()).run("sleep 60").exit_code == 137
        client.stop("s")


@pytest.mark.parametrize("body", [b"", b"OK\n", b"<html>", b"0 5 0\nabc", b"0 0 0\nabc", b"0 0\n"])
def test_other_answers_are_not_mistaken_for_executions(body: bytes) -> None:
    with pytest.raises(ValueError):
        parse_reply(body)


# --- the whole loop ---------------------------------------------------------------------------------------------


@needs_busybox
def test_it_learns_in_real_sandboxes_and_leaves_none(
    api: FakeApi, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--steps", "25", "--sandboxes", "3") == 0
    result = summary(tmp_path)
    assert json.loads(capsys.readouterr().out) == result
    assert result["learned"] and float(str(result["ratio"])) >= 3
    assert result["commands_run"] == (2 * 32 + 25 * 16) * len(tasks.TASKS)
    assert result["resumed_from"] is None
    lines = without_times(tmp_path / "out" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 26))
    assert (tmp_path / "out" / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert api.started == 3 and api.alive() == []
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert KEY not in "".join(path.read_text(errors="replace") for path in files)


@pytest.mark.parametrize("stdout", [b"", b"42\n", b"./conf/site/settings.cfg\n"])
def test_sandboxes_that_always_say_the_same_are_found_out(
    stdout: bytes, api: FakeApi, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api.constant = stdout
    assert run("--steps", "3") == errors.EXIT_DID_NOT_LEARN
    assert summary(tmp_path)["learned"] is False
    assert "did not learn" in capsys.readouterr().err
    assert api.alive() == []


@needs_busybox
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    short = ("--min-gain", "0", "--rollouts", "6", "--seed", "4")
    run("--steps", "6", *short, output="whole")
    run("--steps", "3", *short, "--sandboxes", "2", output="parts")
    with (parts / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "reward": 9}\n{"step": 5, "rew')  # what a kill after the checkpoint leaves
    run("--steps", "6", *short, "--resume", output="parts")
    assert summary(tmp_path, "parts")["resumed_from"] == 3
    assert "Resuming from step 3" in capsys.readouterr().err
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert without_times(whole / name) == without_times(parts / name)
    assert (
        json.loads((whole / "checkpoint.json").read_text())["logits"]
        == (json.loads((parts / "checkpoint.json").read_text())["logits"])
    )
    same = {"untrained_reward", "trained_reward", "ratio"}
    assert {k: summary(tmp_path, "whole")[k] for k in same} == {k: summary(tmp_path, "parts")[k] for k in same}


@needs_busybox
def test_a_dead_sandbox_is_replaced_and_its_scripts_repeated(api: FakeApi) -> None:
    client, interruption = sandbox.RuntimeApi(api.url, KEY, "image"), Interruption()
    with pool.SandboxPool(client, 2, interruption) as sandboxes:
        assert [e.stdout for e in sandboxes.run_all(["echo 1", "echo 2"])] == ["1\n", "2\n"]
        for runtime in api.alive():
            runtime.stop()
        got = sandboxes.run_all([f"echo {n}" for n in range(20)])
        assert [execution.stdout for execution in got] == [f"{n}\n" for n in range(20)]
    for runtime in api.runtimes.values():
        runtime.stop = lambda: None
    assert api.started > 2


def test_sandboxes_that_answer_nonsense_end_the_run(
    api: FakeApi, run: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    api.constant = b""
    monkeypatch.setattr(ConstantSandbox, "do_POST", lambda self: self.send_error(502))
    assert run("--steps", "3") == errors.EXIT_UNAVAILABLE
    assert "answered wrongly" in capsys.readouterr().err
    assert api.alive() == []


@needs_busybox
def test_it_goes_on_with_the_sandboxes_that_there_is_room_for(
    api: FakeApi, run: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "ROOM_SECONDS", 0.1)
    api.capacity = 1
    assert run("--steps", "1", "--rollouts", "2", "--min-gain", "0") == errors.EXIT_DID_NOT_LEARN
    assert api.started == 1 and api.alive() == []
    assert "Going on with at most" in capsys.readouterr().err


def test_no_room_at_all_wrong_key_and_failed_sandboxes_are_said_in_a_sentence(
    api: FakeApi, run: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "ROOM_SECONDS", 0.1)
    monkeypatch.setattr(sandbox, "REACH_SECONDS", 0.1)
    api.constant, api.pod_status = b"", "failed"
    assert run() == errors.EXIT_UNAVAILABLE
    assert "the last words" in capsys.readouterr().err and api.alive() == []
    api.capacity = 0
    assert run() == errors.EXIT_UNAVAILABLE
    assert "all 0 slots are in use" in capsys.readouterr().err
    monkeypatch.setenv("ALLHANDS_API_KEY", "another")
    assert run() == errors.EXIT_UNAVAILABLE
    assert "refuses the key" in (text := capsys.readouterr().err) and "another" not in text
    monkeypatch.setenv("SANDBOX_REMOTE_RUNTIME_API_URL", f"http://127.0.0.1:{free_port()}")
    assert run() == errors.EXIT_UNAVAILABLE
    assert "refused" in capsys.readouterr().err


def process(api: FakeApi, output: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "SANDBOX_REMOTE_RUNTIME_API_URL": api.url, "ALLHANDS_API_KEY": KEY}
    command = [sys.executable, "-m", "shell_rl.train", "--output", str(output), *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@needs_busybox
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_sandboxes_and_keeps_the_work(
    number: signal.Signals, code: int, api: FakeApi, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with process(api, output, "--steps", "500", "--rollouts", "4") as child:
        wait_for(lambda: (output / "metrics.jsonl").exists() and len((output / "metrics.jsonl").read_text()) > 500)
        child.send_signal(number)
        out, err = child.communicate(timeout=30)
    assert child.returncode == code and f"Stopped by {number.name}" in err and out == ""
    assert api.started == 4 and api.alive() == []
    saved = load(output / "checkpoint.json")
    assert saved is not None and saved.step == len((output / "metrics.jsonl").read_text().splitlines())


def test_a_signal_while_start_hangs_stops_the_half_started_sandboxes(api: FakeApi, tmp_path: Path) -> None:
    api.constant, api.slow_start = b"", threading.Event()
    with process(api, tmp_path / "out") as child:
        wait_for(lambda: api.started == 4)
        child.send_signal(signal.SIGTERM)
        wait_for(lambda: api.alive() == [])
        api.slow_start.set()
        _, err = child.communicate(timeout=30)
    assert child.returncode == 143, err


# --- command line, checkpoint, report ---------------------------------------------------------------------------


def test_what_is_missing_in_the_environment_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SANDBOX_REMOTE_RUNTIME_API_URL", raising=False)
    monkeypatch.setenv("ALLHANDS_API_KEY", KEY)
    assert train.main([]) == 2
    assert "SANDBOX_REMOTE_RUNTIME_API_URL must be set" in capsys.readouterr().err
    monkeypatch.setenv("SANDBOX_REMOTE_RUNTIME_API_URL", "not a url")
    assert train.main(["--output", "/dev/null/x"]) == 2
    assert KEY not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "output"),
    [
        ({}, "shell_rl"),
        ({"SKYRL_COORD_DIR": "/c"}, "/c/shell_rl"),
        ({"SKYRL_COORD_DIR": "/c", "CHECKPOINT_DIR": "/k"}, "/k"),
    ],
)
def test_where_results_go(extra: dict[str, str], output: str) -> None:
    options = train.read_options([], {"SANDBOX_REMOTE_RUNTIME_API_URL": "http://h", "ALLHANDS_API_KEY": KEY, **extra})
    assert options.output == options.rollout_dir == Path(output)
    assert KEY not in repr(options)


def a_checkpoint(step: int, seed: int = 0) -> Checkpoint:
    settings = Settings(seed, 16, train.LEARNING_RATE, train.EVALUATION_ROLLOUTS)
    return Checkpoint(settings.fingerprint(), seed, step, 5, 1.5, Score(0.1, {"t": 0.1}, 0.0, 5), {"t": [0.1, 1 / 3]})


def test_a_checkpoint_comes_back_exactly(tmp_path: Path) -> None:
    save(tmp_path / "c.json", a_checkpoint(3))
    assert load(tmp_path / "c.json") == a_checkpoint(3)
    assert load(tmp_path / "none.json") is None
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 99}', '{"version": 1, "step": 2}', "\x00"])
def test_a_broken_checkpoint_is_refused_with_a_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(errors.UsageError, match="--no-resume"):
        load(tmp_path / "c.json")


def test_which_checkpoints_are_resumed(tmp_path: Path) -> None:
    environment = {
        "SANDBOX_REMOTE_RUNTIME_API_URL": "http://h",
        "ALLHANDS_API_KEY": KEY,
        "CHECKPOINT_DIR": str(tmp_path),
    }

    def found(*arguments: str) -> Checkpoint | None:
        return train.find_checkpoint(train.read_options(arguments, environment))

    assert found() is None
    with pytest.raises(errors.UsageError, match="no checkpoint"):
        found("--resume")
    save(tmp_path / "checkpoint.json", a_checkpoint(3))
    assert found() == found("--resume") == a_checkpoint(3)
    assert found("--no-resume") is None and found("--seed", "1") is None and found("--steps", "2") is None
    with pytest.raises(errors.UsageError, match="other settings"):
        found("--resume", "--seed", "1")
    (tmp_path / "summary.json").write_text("{}")
    assert found() is None and found("--resume") == a_checkpoint(3)


def test_luck_and_standstill_are_not_learning() -> None:
    assert train.has_learned(0.02, 0.9, 3.0)
    assert train.has_learned(0.0, 0.9, 3.0)
    assert not train.has_learned(0.0, 0.0, 3.0)
    assert not train.has_learned(0.01, 0.04, 3.0)
    assert not train.has_learned(0.4, 0.9, 3.0)


def test_the_sparkline_spans_its_range() -> None:
    assert report.sparkline([0.0, 0.5, 1.0]) == "▁▅█"
