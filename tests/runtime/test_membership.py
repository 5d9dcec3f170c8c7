"""A server with --head, as a process: it registers, whatever becomes of the head, and says when it leaves."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from slurm_runtime.api_server import StartProblem, build_parser, check_node_name
from slurm_runtime.config import is_node_name
from slurm_runtime.membership import job_of, judged, pause_s, silent
from slurm_runtime.node_models import BEAT_S, ChangesAnswer, NodeWish
from slurm_runtime.page import moment
from tests.runtime import local_registry
from tests.runtime.commands import IMAGE
from tests.runtime.replica import Replica
from tests.runtime.stand_in_head import Told, stand_in_head
from tests.runtime.test_adoption_process import MakeLineage, lineage, ready  # noqa: F401  # a fixture
from tests.runtime.test_contract import eventually
from tests.runtime.test_metrics import samples
from tests.runtime.test_server_process import CHECKOUT, DEADLINE_S, KEY, Server, environment_for, run

MakeNode = Callable[..., Server]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[MakeNode]:
    """Start a server on the Podman in memory as a node; whatever happens it is gone afterwards."""
    with contextlib.ExitStack() as stack:

        def make(head: int | str, *flags: str, key: str = KEY, **variables: str) -> Server:
            port = stack.enter_context(local_registry.held_port())
            url = head if isinstance(head, str) else f"http://127.0.0.1:{head}"
            argv = [sys.executable, "-m", "tests.runtime.fake_server", "--host", "127.0.0.1", "--port", str(port)]
            log = tmp_path / f"node-{port}"
            with log.open("w") as stderr:
                process = subprocess.Popen(
                    [*argv, "--cpus", "4", "--head", url, *flags],
                    cwd=CHECKOUT,
                    env={**environment_for(tmp_path / "none.sock", key), **variables},
                    stdin=subprocess.DEVNULL,
                    stderr=stderr,
                    text=True,
                )
            stack.enter_context(process)
            stack.callback(process.kill)
            made = Server(process, port, log, key)
            eventually(lambda: made.answers() or process.poll() is not None, DEADLINE_S)
            return made

        yield make


def figures(server: Server) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return samples(server.request("GET", "/metrics").text)


def test_it_registers_at_once_and_again_and_its_goodbye_is_the_last_word(node: MakeNode) -> None:
    told, end = Told(), time.time() + 3600
    variables = {"SLURM_JOB_ID": "130", "SLURM_ARRAY_JOB_ID": "123", "SLURM_ARRAY_TASK_ID": "4"}
    with stand_in_head(told, KEY) as head:
        made = node(head, "--node-name", "cpu-b", "--until", str(end), "--drain-lead", "1800", **variables)
        eventually(lambda: len(told.wishes) >= 3, DEADLINE_S)
        wish = told.wishes[0]
        boot = made.request("GET", "/node").json()["boot"]
        url = f"http://127.0.0.1:{made.port}"
        assert wish == {"path": "/nodes", "name": "cpu-b", "url": url, "boot": boot, "job": "123_4", "until": end}
        NodeWish.model_validate(wish)
        assert set(told.keys) == {KEY}
        found = figures(made)
        assert (found["skyrl_registered", ()], found["skyrl_draining", ()]) == (1, 0)
        assert 0 <= found["skyrl_head_heard_seconds", ()] < DEADLINE_S
        page = made.request("GET", "/").text
        assert f"head http://127.0.0.1:{head}" in page
        assert "cpu-b" in page
        assert "not registered" not in page
        assert made.start().status_code == 201
        made.process.terminate()
        assert made.wait() == 0
        assert told.order[-1] == "DELETE"
        time.sleep(0.1)
        assert told.order.count("DELETE") == 1
    (path, key), *_ = told.goodbyes
    assert (urlsplit(path).path, key) == ("/nodes/cpu-b", KEY)
    assert parse_qs(urlsplit(path).query) == {"reason": ["its API server was told to stop"]}
    log = made.log()
    assert log.count("is registered") == 1
    assert KEY not in log
    assert KEY not in " ".join(map(str, made.process.args if isinstance(made.process.args, list) else []))


def test_a_head_that_is_away_is_tried_again_and_each_is_said_once(node: MakeNode) -> None:
    port, told = local_registry.free_port(), Told()
    made = node(port)
    eventually(lambda: "does not answer" in made.log(), DEADLINE_S)
    assert "not registered with the head" in made.request("GET", "/").text
    with stand_in_head(told, KEY, port):
        eventually(lambda: figures(made)["skyrl_registered", ()] == 1, DEADLINE_S)
    eventually(lambda: figures(made)["skyrl_registered", ()] == 0, DEADLINE_S)
    assert "it last answered" in made.request("GET", "/").text
    first = len(told.wishes)
    with stand_in_head(told, KEY, port):
        eventually(lambda: len(told.wishes) > first, DEADLINE_S)
        eventually(lambda: figures(made)["skyrl_registered", ()] == 1, DEADLINE_S)
        assert made.start().status_code == 201  # what the head does is nothing to those who come here themselves
    assert len({wish["boot"] for wish in told.wishes}) == 1
    assert made.log().count("is registered with the head") == 1
    assert made.log().count("is registered again with the head") == 1
    eventually(lambda: made.log().count("does not answer") == 3, DEADLINE_S)
    made.process.terminate()
    assert made.wait() == 0  # a head that cannot be told holds nothing up
    assert "could not be told that this node leaves" in made.log()


def test_a_head_that_refuses_the_key_is_an_error_and_is_asked_again(node: MakeNode) -> None:
    port, told = local_registry.free_port(), Told()
    with stand_in_head(told, "another key", port):
        made = node(port)
        eventually(lambda: len(told.wishes) >= 4, DEADLINE_S)
    assert told.times[3] - told.times[0] < 3 * 0.8 * BEAT_S  # what three pauses of full length take at least
    log = made.log()
    assert log.count("refuses this server's API key (401)") == 1
    assert "[ERROR]" in next(line for line in log.splitlines() if "refuses this" in line)
    assert KEY not in log
    with stand_in_head(told, KEY, port):
        eventually(lambda: figures(made)["skyrl_registered", ()] == 1, DEADLINE_S)


def test_a_head_that_hangs_holds_up_neither_requests_nor_the_end(node: MakeNode) -> None:
    told = Told()
    with stand_in_head(told, KEY, delay_s=10) as head:
        made = node(head)
        eventually(lambda: told.wishes, DEADLINE_S)
        assert made.start().status_code == 201
        made.process.terminate()
        assert made.wait() == 0
    assert "could not be told within 1 s that this node leaves" in made.log()


def test_a_registration_that_is_under_way_does_not_undo_the_goodbye(node: MakeNode) -> None:
    told = Told()
    with stand_in_head(told, KEY, delay_s=0.25) as head:
        made = node(head)
        eventually(lambda: len(told.wishes) > len(told.order), DEADLINE_S)
        made.process.terminate()
        assert made.wait() == 0
        assert told.order[-1] == "DELETE"
        assert told.order.count("POST") == len(told.wishes)


def test_a_killed_node_is_another_one_afterwards(node: MakeNode) -> None:
    told = Told()
    with stand_in_head(told, KEY) as head:
        made = node(head, "--node-name", "cpu-b")
        first = ChangesAnswer.model_validate(made.request("GET", "/changes").json())
        made.process.kill()
        made.process.wait()
        again = node(head, "--node-name", "cpu-b")
        eventually(lambda: len({wish["boot"] for wish in told.wishes}) == 2, DEADLINE_S)
        query = f"/changes?since={first.upto}&boot={first.node.boot}&wait_s=30"
        told_then = ChangesAnswer.model_validate(again.request("GET", query).json())
        assert told_then.complete
        assert told_then.node.boot == told.wishes[-1]["boot"] != first.node.boot
    assert told.goodbyes == []  # the second one is killed by the fixture


def test_it_drains_itself_before_its_end_and_leaves_with_that_reason(node: MakeNode) -> None:
    told = Told()
    with stand_in_head(told, KEY) as head:
        end = int(time.time()) + 300
        made = node(head, "--node-name", "cpu-b", "--until", str(end), "--drain-lead", "3600")
        eventually(lambda: made.request("GET", "/node").json()["draining"], DEADLINE_S)
        reason = f"its time limit is near ({moment(end)})"
        refused = made.start()
        assert (refused.status_code, refused.headers["X-SkyRL-Refused"]) == (503, "draining")
        assert reason in refused.json()["detail"]
        eventually(lambda: told.wishes, DEADLINE_S)
        made.process.terminate()
        assert made.wait() == 0
    assert parse_qs(urlsplit(told.goodbyes[0][0]).query) == {"reason": [reason]}


def test_a_long_poll_does_not_hold_up_the_end(node: MakeNode) -> None:
    told, head = Told(), Replica()
    with stand_in_head(told, KEY) as port:
        made = node(port)

        def hear(wait_s: float) -> None:
            query = f"/changes?since={head.upto}&boot={head.boot}&wait_s={wait_s}"
            head.apply(ChangesAnswer.model_validate(made.request("GET", query, timeout=40).json()))

        hear(0)
        sandbox = made.start().json()
        while sandbox["runtime_id"] not in head.living() or head.sandboxes[sandbox["runtime_id"]].pod_status != "ready":
            hear(5)
        hear(0)
        with socket.create_connection(("127.0.0.1", made.port), DEADLINE_S) as poll:
            query = f"since={head.upto}&boot={head.boot}&wait_s=30"
            poll.sendall(f"GET /changes?{query} HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\n\r\n".encode())
            assert made.answers()  # so that it has been read
            assert made.answers()
            began = time.monotonic()
            made.process.terminate()
            assert poll.recv(100).startswith(b"HTTP/1.1 200")
            assert made.wait() == 0
        assert time.monotonic() - began < 15
    assert "nothing is left" in made.log()


@pytest.mark.podman
def test_what_was_taken_over_is_told_as_all_there_is(lineage: MakeLineage) -> None:  # noqa: F811
    told = Told()
    with stand_in_head(told, KEY) as port:
        servers = lineage("--head", f"http://127.0.0.1:{port}", "--node-name", "cpu-b")
        first, head = servers.begin(), Replica()
        sandbox = ready(first, session_id="one")
        head.apply(ChangesAnswer.model_validate(first.request("GET", "/changes").json()))
        before = head.boot
        servers.kill()
        second = servers.begin("--adopt")
        query = f"/changes?since={head.upto}&boot={head.boot}&wait_s=30"
        answer = ChangesAnswer.model_validate(second.request("GET", query, timeout=40).json())
        head.apply(answer)
        assert answer.complete
        assert head.boot != before
        assert head.living() == {sandbox["runtime_id"]}
        found = head.sandboxes[sandbox["runtime_id"]]
        assert (found.url, found.session_api_key) == (sandbox["url"], sandbox["session_api_key"])
        assert answer.node.used == 1
        assert IMAGE in (answer.node.images or [])
        eventually(lambda: told.wishes[-1]["boot"] == head.boot, DEADLINE_S)


# --- the parts --------------------------------------------------------------------------------------------------------


def test_what_an_answer_of_the_head_means() -> None:
    assert judged("http://h:1", 201, "").is_good
    assert (judged("http://h:1", 403, "no").kind, judged("http://h:1", 401, "no").kind) == ("refused", "refused")
    conflict = judged("http://h:1", 409, "cpu-b is another node's name")
    assert not conflict.is_good
    assert "409: cpu-b is another node's name" in conflict.sentence
    assert judged("http://h:1", 302, "").kind == "status 302"
    assert silent("http://h:1", "refused").kind == silent("http://h:1", "nothing within 5 s").kind


def test_pauses_between_registrations_are_bounded() -> None:
    pauses = [pause_s(failures) for failures in range(1, 200)]
    assert pauses == sorted(pauses)
    assert (pause_s(0), pauses[0], pauses[-1]) == (BEAT_S, 0.1, BEAT_S)


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({}, ""),
        ({"SLURM_JOB_ID": "7"}, "7"),
        ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}, "7_2"),
    ],
)
def test_the_job_is_called_as_slurm_calls_it(environment: dict[str, str], job: str) -> None:
    assert job_of(environment) == job


@pytest.mark.parametrize(
    ("name", "fits"), [("cpu-a.cluster", True), ("", False), ("-a", False), ("a/b", False), ("a" * 257, False)]
)
def test_names_of_nodes(name: str, fits: bool) -> None:
    assert is_node_name(name) is fits


def test_a_host_whose_name_a_head_does_not_take_is_told_how_to_name_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "_no name_")
    parse = build_parser().parse_args
    with pytest.raises(StartProblem, match=r"'_no name_'.*--node-name"):
        check_node_name(parse(["--head", "http://cpu-a:8000"]))
    check_node_name(parse(["--head", "http://cpu-a:8000", "--node-name", "cpu-b"]))
    check_node_name(parse([]))  # nobody asks for its name


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--head", "cpu-a:8000"], "http://cpu-a:8000"),
        (["--head", "http://cpu-a:8000/path"], "http://cpu-a:8000"),
        (["--head", "http://user:secret@cpu-a:8000"], "is no address of a head"),
        (["--node-name", "a b"], "cannot be a node's name"),
        (["--until", "tomorrow"], "'tomorrow' is not a time in seconds since the epoch"),
        (["--until", "1e12"], "'1e12' is not a time in seconds since the epoch"),
        (["--drain-lead", "-1"], "'-1' is not a whole number"),
    ],
)
def test_a_wrong_command_line_is_2_with_a_sentence(flags: list[str], said: str, tmp_path: Path) -> None:
    ended = run(*["--port", "0", *flags], environment=environment_for(tmp_path / "s", KEY))
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
