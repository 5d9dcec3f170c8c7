"""A head over several servers on fakes: who gets which start, and what happens when nodes drain, leave or are lost."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from slurm_runtime.head.answers import Known
from slurm_runtime.head.config import HeadConfig
from slurm_runtime.head.link import CutOff, Link
from tests.runtime.commands import IMAGE, SERVE, SILENT
from tests.runtime.conftest import API_KEY, CONFIG, Api, serving
from tests.runtime.fake_podman import FakePodman
from tests.runtime.fleet import HEAD_CONFIG, HeadApi, head_over, url_of
from tests.runtime.test_contract import eventually, session, started
from tests.runtime.wire import Wire, wire_to

SILENCE_S = 4.0  # in place of 15: long enough for a healthy node on a busy machine
MakeNode = Callable[..., Api]
MakeHead = Callable[..., HeadApi]


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as held:
        yield held


@pytest.fixture
def make_node(stack: contextlib.ExitStack) -> MakeNode:
    def make(name: str, slots: int = 2, engine: FakePodman | None = None, **changes: Any) -> Api:
        return stack.enter_context(serving(engine or FakePodman(), replace(CONFIG, node_name=name, **changes), slots))

    return make


@pytest.fixture
def make_head(stack: contextlib.ExitStack) -> MakeHead:
    def make(*nodes: Api, config: HeadConfig = HEAD_CONFIG, **changes: Any) -> HeadApi:
        return stack.enter_context(head_over(nodes, replace(config, **changes)))

    return make


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as threads:
        yield threads


def node_of(head: HeadApi, sandbox: dict[str, Any]) -> str:
    """The name of the node that has a sandbox."""
    [name] = [node.manager.node.name for node in head.nodes if node.manager.register.find(sandbox["runtime_id"])]
    return name


def wired(stack: contextlib.ExitStack, head: HeadApi, node: Api) -> Wire:
    """A node that has joined over a wire of its own."""
    wire = stack.enter_context(wire_to(node.client.base_url.port or 0))
    assert head.join(node, url=wire.url).status_code == 200
    head.nodes.append(node)
    eventually(lambda: head.states()[node.manager.node.name] == "ready")
    return wire


def in_line(head: HeadApi, pool: ThreadPoolExecutor, name: str, **fields: Any) -> Future[httpx.Response]:
    """A start that waits at the head."""
    before = head.client.get("/nodes").json()["waiting"]
    asked = pool.submit(lambda: head.start(**{"image": IMAGE, "command": SERVE, "session_id": name, **fields}))
    eventually(lambda: head.client.get("/nodes").json()["waiting"] == before + 1)
    return asked


# Placement.


def test_starts_spread_over_the_nodes_and_their_urls_lead_straight_to_the_sandboxes(
    make_node: MakeNode, make_head: MakeHead
) -> None:
    head = make_head(make_node("cpu-a"), make_node("cpu-b"))
    sandboxes = [started(head) for _ in range(4)]
    assert sorted(node_of(head, sandbox) for sandbox in sandboxes) == ["cpu-a", "cpu-a", "cpu-b", "cpu-b"]
    assert all(httpx.get(f"{one['url']}/health", trust_env=False).status_code == 200 for one in sandboxes)
    told = head.client.get("/nodes").json()
    assert [(node["name"], node["slots"], node["used"], node["sandboxes"]) for node in told["nodes"]] == [
        ("cpu-a", 2, 2, 2),
        ("cpu-b", 2, 2, 2),
    ]
    assert (told["slots"], told["used"], told["waiting"]) == (4, 4, 0)


def test_a_start_goes_where_its_image_is(make_node: MakeNode, make_head: MakeHead) -> None:
    theirs = "localhost/built:1"
    nodes = [make_node("cpu-a", 8), make_node("cpu-b", 4, FakePodman(images={IMAGE, theirs}))]
    head = make_head(*nodes)
    nodes[1].manager.images.known.note([theirs])
    eventually(lambda: head.client.get("/nodes").json()["nodes"][1]["images"])
    assert [node_of(head, started(head, image=theirs)) for _ in range(3)] == ["cpu-b"] * 3


def test_a_session_that_lives_is_found_on_its_node(make_node: MakeNode, make_head: MakeHead) -> None:
    head = make_head(make_node("cpu-a", 1), make_node("cpu-b", 1))
    first = started(head, session_id="mine")
    started(head, session_id="other")
    assert head.start(image=IMAGE, command=SERVE, session_id="mine").json()["runtime_id"] == first["runtime_id"]


def test_the_same_session_at_once_is_one_sandbox_on_one_node(
    make_node: MakeNode, make_head: MakeHead, pool: ThreadPoolExecutor
) -> None:
    nodes = [make_node(name, 8, FakePodman(delay_s=0.1)) for name in ("cpu-a", "cpu-b")]
    head = make_head(*nodes)
    asked = [pool.submit(lambda: head.start(image=IMAGE, command=SERVE, session_id="one")) for _ in range(8)]
    assert len({one.result().json()["runtime_id"] for one in asked}) == 1
    assert len(head.names()) == 1


def test_more_than_any_node_has_is_refused_with_the_largest_number(make_node: MakeNode, make_head: MakeHead) -> None:
    head = make_head(make_node("cpu-a", 2), make_node("cpu-b", 3))
    answer = head.start(image=IMAGE, command=SERVE, resource_factor=4)
    assert answer.status_code == 422
    assert "the largest node has 3" in answer.json()["detail"]
    assert head.start(image=IMAGE, command=SERVE, resource_factor=3).status_code == 201


def test_a_wrong_field_is_refused_in_the_words_of_a_server(make_node: MakeNode, make_head: MakeHead) -> None:
    node = make_node("cpu-a")
    head = make_head(node)
    for fields in ({"image": IMAGE, "session_id": "a/b"}, {"image": 7 * [1]}, {"image": IMAGE, "command": "'"}):
        theirs, ours = node.client.post("/start", json=fields), head.client.post("/start", json=fields)
        assert (ours.status_code, ours.json()) == (theirs.status_code, theirs.json())
    assert head.client.post("/start", content=b"{").status_code == 422


# The line.


def test_a_start_waits_for_the_first_node_and_says_so(
    make_node: MakeNode, make_head: MakeHead, pool: ThreadPoolExecutor
) -> None:
    head = make_head()
    asked = in_line(head, pool, "early")
    assert "waits for a node" in session(head, "early")["events"][0]
    assert head.client.get("/health").json() == {"status": "ok", "podman": "connecting"}
    node = make_node("cpu-a")
    head.nodes.append(node)
    assert head.join(node).status_code == 200
    assert asked.result().status_code == 201


def test_no_node_in_time_is_503_and_tells_where_to_look(make_head: MakeHead) -> None:
    answer = make_head(list_patience_s=0.3).start(image=IMAGE, command=SERVE)
    assert answer.status_code == 503
    assert "no node has joined" in answer.json()["detail"]
    assert "GET /nodes" in answer.json()["detail"]


def test_no_slot_in_time_is_503_with_both_numbers(make_node: MakeNode, make_head: MakeHead) -> None:
    head = make_head(make_node("cpu-a", 1), make_node("cpu-b", 1), list_patience_s=2.0)
    started(head), started(head)
    eventually(lambda: head.client.get("/nodes").json()["used"] == 2)
    answer = head.start(image=IMAGE, command=SERVE, session_id="late")
    assert answer.status_code == 503
    assert "2 of 2 sandbox slots on 2 nodes" in answer.json()["detail"]
    assert head.client.get("/sessions/late").status_code == 404


def test_who_came_first_is_served_first(make_node: MakeNode, make_head: MakeHead, pool: ThreadPoolExecutor) -> None:
    head = make_head(make_node("cpu-a", 1), make_node("cpu-b", 1))
    holders = [started(head), started(head)]
    waiting = [in_line(head, pool, f"w{number}") for number in range(3)]
    for place, holder in enumerate(holders):
        head.client.post("/stop", json={"runtime_id": holder["runtime_id"]})
        assert waiting[place].result().status_code == 201
        assert not waiting[place + 1].done()
    head.client.post("/stop", json={"runtime_id": waiting[0].result().json()["runtime_id"]})
    assert waiting[2].result().status_code == 201


def test_a_start_in_the_line_is_read_listed_and_stopped_like_any_other(
    make_node: MakeNode, make_head: MakeHead, pool: ThreadPoolExecutor
) -> None:
    head = make_head(make_node("cpu-a", 1))
    started(head)
    asked = in_line(head, pool, "waits")
    found = session(head, "waits")
    assert (found["status"], found["pod_status"]) == ("starting", "pending")
    assert "waits for a free slot" in found["events"][0]
    assert head.client.get(f"/runtime/{found['runtime_id']}").json() == found
    assert head.client.get("/list").json()["total"] == 2
    assert "waits" in httpx.get(url_of(head), auth=("anyone", API_KEY), trust_env=False).text
    assert head.client.post("/stop", json={"runtime_id": found["runtime_id"]}).status_code == 200
    assert asked.result().status_code == 409
    assert session(head, "waits")["pod_status"] == "not found"
    assert head.client.get("/nodes").json()["waiting"] == 0


def test_the_id_that_was_read_in_the_line_means_the_sandbox_afterwards(
    make_node: MakeNode, make_head: MakeHead, pool: ThreadPoolExecutor
) -> None:
    head = make_head(make_node("cpu-a", 1))
    holder = started(head)
    asked = in_line(head, pool, "waits")
    stand_in = session(head, "waits")["runtime_id"]
    head.client.post("/stop", json={"runtime_id": holder["runtime_id"]})
    sandbox = asked.result().json()
    assert head.client.get(f"/runtime/{stand_in}").json()["runtime_id"] == sandbox["runtime_id"]
    assert head.client.post("/stop", json={"runtime_id": stand_in}).status_code == 200
    assert head.names() == []


def test_a_client_that_leaves_the_line_is_forgotten(
    make_node: MakeNode, make_head: MakeHead, pool: ThreadPoolExecutor
) -> None:
    head = make_head(make_node("cpu-a", 1))
    holder = started(head)
    with pytest.raises(httpx.ReadTimeout):
        head.client.post("/start", json={"image": IMAGE, "command": SERVE, "session_id": "gone"}, timeout=0.5)
    eventually(lambda: head.client.get("/nodes").json()["waiting"] == 0)
    assert head.client.get("/sessions/gone").status_code == 404
    head.client.post("/stop", json={"runtime_id": holder["runtime_id"]})
    assert head.names() == []


def test_a_client_that_leaves_during_its_start_leaves_nothing_on_the_node(
    make_node: MakeNode, make_head: MakeHead
) -> None:
    head = make_head(make_node("cpu-a", 1, ready_grace_s=20.0))
    with pytest.raises(httpx.ReadTimeout):
        head.client.post("/start", json={"image": IMAGE, "command": SILENT, "session_id": "gone"}, timeout=0.7)
    eventually(lambda: head.names() == [] and head.manager.admission.slots.used == 0)
    assert started(head)["pod_status"] == "ready"


def test_who_asks_for_a_session_in_the_moment_that_its_client_leaves_gets_it_anew(
    make_node: MakeNode, make_head: MakeHead
) -> None:
    head = make_head(make_node("cpu-a", 1, FakePodman(delay_s=1.0)))
    body = {"image": IMAGE, "command": SERVE, "session_id": "again"}
    for _ in range(4):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url_of(head)}/start", json=body, headers={"X-API-Key": API_KEY}, timeout=0.15)
        answer = head.client.post("/start", json=body)
        assert answer.status_code == 201, answer.text
        assert head.names() == [f"sandbox-{answer.json()['runtime_id']}"]
        head.client.post("/stop", json={"runtime_id": answer.json()["runtime_id"]})


def test_a_session_stays_while_one_of_its_clients_does(
    make_node: MakeNode, make_head: MakeHead, pool: ThreadPoolExecutor
) -> None:
    head = make_head(make_node("cpu-a", 1, FakePodman(delay_s=1.0)))
    stays = pool.submit(lambda: head.start(image=IMAGE, command=SERVE, session_id="both"))
    eventually(lambda: head.client.get("/sessions/both").status_code == 200)
    with pytest.raises(httpx.ReadTimeout):
        head.client.post("/start", json={"image": IMAGE, "command": SERVE, "session_id": "both"}, timeout=0.3)
    assert stays.result().status_code == 201
    assert len(head.names()) == 1


# Nodes come and go.


def test_a_drained_node_keeps_what_it_has_and_gets_nothing_new(make_node: MakeNode, make_head: MakeHead) -> None:
    head = make_head(make_node("cpu-a", 4), make_node("cpu-b", 2))
    old = started(head, session_id="old")
    assert node_of(head, old) == "cpu-a"
    answer = head.client.post("/nodes/cpu-a/drain", json={"reason": "it is repaired"})
    assert (answer.json()["state"], answer.json()["reason"]) == ("draining", "it is repaired")
    assert head.nodes[0].client.get("/node").json()["draining"] is True
    assert {node_of(head, started(head)) for _ in range(2)} == {"cpu-b"}
    assert session(head, "old")["pod_status"] == "ready"
    assert head.start(image=IMAGE, command=SERVE, session_id="old").json()["runtime_id"] == old["runtime_id"]
    assert head.client.post("/nodes/nobody/drain", json={}).status_code == 404


def test_a_node_that_was_to_drain_does_so_in_its_next_life_too(
    stack: contextlib.ExitStack, make_node: MakeNode, make_head: MakeHead
) -> None:
    head = make_head()
    first, second = make_node("cpu-b"), make_node("cpu-b")
    wire = wired(stack, head, first)
    assert head.client.post("/nodes/cpu-b/drain", json={"reason": "repair"}).status_code == 200
    wire.lead_to(second.client.base_url.port or 0)
    assert head.join(second, url=wire.url).status_code == 200
    eventually(lambda: second.client.get("/node").json()["draining"])
    assert head.states() == {"cpu-b": "draining"}


def test_a_node_that_drains_by_itself_gets_nothing_new(make_node: MakeNode, make_head: MakeHead) -> None:
    nodes = [make_node("cpu-a", 4), make_node("cpu-b", 2)]
    head = make_head(*nodes)
    nodes[0].client.post("/drain", json={"reason": "its end is near"})
    assert {node_of(head, started(head)) for _ in range(2)} == {"cpu-b"}
    assert head.states() == {"cpu-a": "draining", "cpu-b": "ready"}


def test_a_node_that_leaves_fails_its_own_sandboxes_alone(make_node: MakeNode, make_head: MakeHead) -> None:
    head = make_head(make_node("cpu-a"), make_node("cpu-b"))
    sandboxes = {node_of(head, one): one["session_id"] for one in (started(head), started(head))}
    assert head.client.delete("/nodes/cpu-b", params={"reason": "its time is up"}).status_code == 200
    lost = session(head, sandboxes["cpu-b"])
    assert (lost["status"], lost["pod_status"]) == ("stopped", "failed")
    assert lost["pod_logs"] == "node cpu-b left: its time is up"
    assert session(head, sandboxes["cpu-a"])["pod_status"] == "ready"
    assert head.client.get("/list").json()["total"] == 1
    assert head.states() == {"cpu-a": "ready", "cpu-b": "left"}
    assert head.join(head.nodes[1]).status_code == 409  # a beat that was late
    assert started(head, session_id=sandboxes["cpu-b"])["pod_status"] == "ready"
    assert head.client.delete("/nodes/nobody").status_code == 404


def test_a_lost_node_fails_its_own_sandboxes_with_its_name_and_job(
    stack: contextlib.ExitStack, make_node: MakeNode, make_head: MakeHead
) -> None:
    head = make_head(make_node("cpu-a"), silence_s=SILENCE_S)
    node = make_node("cpu-b", 8)
    wire = wired(stack, head, node)
    assert head.join(node, url=wire.url, job="123_4").status_code == 200
    theirs = started(head, session_id="theirs")
    head.client.post("/nodes/cpu-b/drain", json={})
    ours = started(head, session_id="ours")
    wire.cut()
    lost = eventually(lambda: (found := session(head, "theirs"))["pod_status"] == "failed" and found, 20)
    assert lost["pod_logs"].startswith("node cpu-b (job 123_4) was lost: nothing was heard of it for")
    assert lost["runtime_id"] == theirs["runtime_id"]
    assert session(head, "ours")["pod_status"] == "ready"
    assert head.client.get("/list").json()["runtimes"][0]["runtime_id"] == ours["runtime_id"]
    assert started(head, session_id="theirs")["runtime_id"] != theirs["runtime_id"]


def test_what_a_lost_node_still_has_is_known_again_when_it_is_back_unless_it_was_replaced_or_stopped(
    stack: contextlib.ExitStack, make_node: MakeNode, make_head: MakeHead
) -> None:
    head = make_head(silence_s=SILENCE_S)
    node = make_node("cpu-b", 8)
    wire = wired(stack, head, node)
    names = ("kept", "replaced", "unwanted", "over", "told")
    kept, replaced, unwanted, _, _ = (started(head, session_id=name) for name in names)
    wire.cut()
    eventually(lambda: head.states() == {"cpu-b": "lost"}, 20)
    other = make_node("cpu-a")
    head.nodes.append(other)
    assert head.join(other).status_code == 200
    anew = started(head, session_id="replaced")
    assert head.client.post("/stop", json={"runtime_id": unwanted["runtime_id"]}).status_code == 200
    ended = started(head, session_id="over")
    assert head.client.post("/stop", json={"runtime_id": ended["runtime_id"]}).status_code == 200
    assert session(head, "told")["pod_status"] == "failed"
    wire.mend()
    assert head.join(node, url=wire.url).status_code == 200
    eventually(lambda: node.names() == [f"sandbox-{kept['runtime_id']}"])
    assert session(head, "kept")["pod_status"] == "ready"
    assert session(head, "kept")["runtime_id"] == kept["runtime_id"]
    assert session(head, "replaced")["runtime_id"] == anew["runtime_id"]
    assert session(head, "replaced")["pod_status"] == "ready"
    assert session(head, "unwanted")["status"] == "stopped"
    assert head.client.get(f"/runtime/{replaced['runtime_id']}").json()["status"] == "stopped"


def test_who_was_told_of_a_lost_sandbox_and_asks_anew_gets_another_on_the_same_node_too(
    stack: contextlib.ExitStack, make_node: MakeNode, make_head: MakeHead, pool: ThreadPoolExecutor
) -> None:
    head = make_head(silence_s=SILENCE_S)
    members, node = head.head.members, make_node("cpu-b", 8)
    stop_there = members.stop_there

    async def late(sandbox: Known) -> None:
        await asyncio.sleep(0.5)  # on the way: a start that does not wait for it finds what it stops
        await stop_there(sandbox)

    members.stop_there = late  # type: ignore[method-assign]
    wire = wired(stack, head, node)
    lost = started(head, session_id="told")
    wire.cut()
    eventually(lambda: head.states() == {"cpu-b": "lost"}, 20)
    assert session(head, "told")["pod_status"] == "failed"
    asked = in_line(head, pool, "told")
    wire.mend()
    assert head.join(node, url=wire.url).status_code == 200
    anew = asked.result().json()
    assert anew["runtime_id"] != lost["runtime_id"]
    eventually(lambda: node.names() == [f"sandbox-{anew['runtime_id']}"])
    eventually(lambda: session(head, "told")["pod_status"] == "ready")
    assert session(head, "told")["runtime_id"] == anew["runtime_id"]


def test_a_node_that_cannot_be_connected_to_costs_a_start_nothing(
    stack: contextlib.ExitStack, make_node: MakeNode, make_head: MakeHead
) -> None:
    head = make_head(make_node("cpu-a", 1))
    wired(stack, head, make_node("cpu-b", 8)).cut()
    sandbox = head.start(image=IMAGE, command=SERVE).json()
    assert node_of(head, sandbox) == "cpu-a"


def test_a_start_whose_connection_breaks_is_asked_for_again_on_the_same_node(
    stack: contextlib.ExitStack, make_node: MakeNode, make_head: MakeHead, pool: ThreadPoolExecutor
) -> None:
    head = make_head(make_node("cpu-a", 1))
    node = make_node("cpu-b", 8, FakePodman(delay_s=0.5))
    wire = wired(stack, head, node)
    asked = pool.submit(lambda: head.start(image=IMAGE, command=SERVE, session_id="broken"))
    eventually(lambda: node.client.get("/sessions/broken").status_code == 200)
    wire.cut()
    time.sleep(0.3)
    wire.mend()
    sandbox = asked.result().json()
    assert node_of(head, sandbox) == "cpu-b"
    eventually(lambda: head.names() == [f"sandbox-{sandbox['runtime_id']}"])


def test_a_start_on_a_node_that_is_lost_goes_to_another_and_is_no_second_sandbox(
    stack: contextlib.ExitStack, make_node: MakeNode, make_head: MakeHead, pool: ThreadPoolExecutor
) -> None:
    head = make_head(make_node("cpu-a", 1), silence_s=SILENCE_S)
    node = make_node("cpu-b", 8, FakePodman(delay_s=1.0))
    wire = wired(stack, head, node)
    asked = pool.submit(lambda: head.start(image=IMAGE, command=SERVE, session_id="moved"))
    eventually(lambda: node.client.get("/sessions/moved").status_code == 200)
    wire.cut()
    assert node_of(head, asked.result().json()) == "cpu-a"
    wire.mend()
    assert head.join(node, url=wire.url).status_code == 200
    eventually(lambda: head.states()["cpu-b"] == "ready" and node.names() == [])
    assert session(head, "moved")["pod_status"] == "ready"


def test_a_name_is_one_nodes_alone(make_node: MakeNode, make_head: MakeHead) -> None:
    head = make_head(make_node("cpu-a"))
    answer = head.join(make_node("cpu-a"))
    assert answer.status_code == 409
    assert "--node-name" in answer.json()["detail"]


def test_a_server_that_calls_itself_otherwise_is_not_taken(
    make_node: MakeNode, make_head: MakeHead, caplog: pytest.LogCaptureFixture
) -> None:
    head = make_head()
    assert head.join(make_node("cpu-a"), name="cpu-b").status_code == 200
    eventually(lambda: "calls itself cpu-a" in caplog.text)
    [told] = head.client.get("/nodes").json()["nodes"]
    assert told["state"] == "joining"
    assert "calls itself cpu-a" in told["reason"]


def test_nodes_need_the_key(make_head: MakeHead) -> None:
    url = url_of(make_head())
    for method, path in (("POST", "/nodes"), ("GET", "/nodes"), ("DELETE", "/nodes/x"), ("POST", "/nodes/x/drain")):
        answer = httpx.request(method, url + path, headers={"X-API-Key": "wrong"}, trust_env=False)
        assert answer.status_code == 401


def test_a_node_leads_the_head_and_its_key_nowhere_else(make_head: MakeHead) -> None:
    came: list[str] = []

    class Redirects(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            came.append(self.path)
            self.send_response(307)
            self.send_header("Location", f"http://{self.headers['Host']}/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_said: object) -> None:
            pass

    head = make_head()
    with ThreadingHTTPServer(("127.0.0.1", 0), Redirects) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        wish = {"name": "cpu-x", "url": f"http://127.0.0.1:{server.server_port}", "boot": "1"}
        assert head.client.post("/nodes", json=wish).status_code == 200
        eventually(lambda: len(came) > 1)
        [line] = head.client.get("/nodes").json()["nodes"]
        server.shutdown()
    assert "answers GET /changes with 307" in line["reason"]
    assert not any("elsewhere" in path for path in came)


def test_an_answer_without_end_is_not_read() -> None:
    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(bytes(1 << 16))
                await writer.drain()

    async def asked() -> None:
        async with await asyncio.start_server(endless, "127.0.0.1", 0) as server:
            link = Link(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", API_KEY)
            with pytest.raises(CutOff, match="without an end"):
                await link.ask("GET", "/changes", timeout_s=1.0)
            await link.close()

    asyncio.run(asked())


# A head after another.


def test_a_new_head_answers_once_it_knows_what_the_one_before_it_knew(
    make_node: MakeNode, make_head: MakeHead, pool: ThreadPoolExecutor
) -> None:
    node = make_node("cpu-a")
    sandbox = started(make_head(node), session_id="old")
    head = make_head(gather_s=5.0)
    asked = pool.submit(lambda: head.client.get("/sessions/old"))
    assert head.client.get("/health").status_code == 200
    assert not asked.done()
    assert head.join(node).status_code == 200
    assert asked.result().status_code == 200
    assert asked.result().json()["runtime_id"] == sandbox["runtime_id"]
    assert head.start(image=IMAGE, command=SERVE, session_id="old").json()["runtime_id"] == sandbox["runtime_id"]


def test_a_server_that_was_started_again_is_heard_out_anew(
    stack: contextlib.ExitStack, make_node: MakeNode, make_head: MakeHead
) -> None:
    head = make_head()
    first, second = make_node("cpu-b"), make_node("cpu-b")
    wire = wired(stack, head, first)
    before = started(head, session_id="before")
    wire.lead_to(second.client.base_url.port or 0)
    assert head.join(second, url=wire.url).status_code == 200
    eventually(lambda: session(head, "before")["pod_status"] == "failed")
    assert "its API server was started again" in session(head, "before")["pod_logs"]
    assert started(head, session_id="before")["runtime_id"] != before["runtime_id"]
    assert started(head, session_id="after")["pod_status"] == "ready"


# Images.


def test_builds_go_to_one_node_and_are_found_by_a_new_head(make_node: MakeNode, make_head: MakeHead) -> None:
    nodes = [make_node(name, build_images=True) for name in ("cpu-a", "cpu-b")]
    head = make_head(*nodes)
    form: dict[str, Any] = {"files": {"context": b"bm90aGluZw=="}, "data": {"target_image": "localhost/x:1"}}
    refused = head.client.post("/build", **form)
    assert (refused.status_code, refused.json()) == (422, nodes[0].client.post("/build", **form).json())
    assert head.client.get("/registry_prefix").json() == {"registry_prefix": "localhost/skyrl"}
    found = head.client.get("/image_exists", params={"image": IMAGE}).json()
    assert (found["exists"], found["url"]) == (True, url_of(head))
    assert head.client.get("/image_exists", params={"image": "localhost/none:1"}).json()["exists"] is False
    assert head.client.get("/build_status", params={"build_id": "nobody"}).status_code == 404


# What operators see.


def test_metrics_are_by_node_and_the_page_shows_each(make_node: MakeNode, make_head: MakeHead) -> None:
    head = make_head(make_node("cpu-a", 1), make_node("cpu-b", 2))
    started(head)
    text = head.client.get("/metrics").text
    assert 'skyrl_sandboxes{node="cpu-b",state="ready"} 1.0' in text
    assert 'skyrl_slots_total{node="cpu-a"} 1.0' in text
    assert 'skyrl_nodes{state="ready"} 2.0' in text
    assert "skyrl_head_starts_waiting 0.0" in text
    assert 'skyrl_http_answers_total{method="POST",route="/start",status="201"} 1.0' in text
    assert 'route="/sessions/{session_id}"' in text
    page = httpx.get(url_of(head), auth=("anyone", API_KEY), trust_env=False).text
    assert "cpu-a" in page
    assert "cpu-b" in page
    assert head.client.get("/health").json()["podman"] == "connected"
    assert "/nodes/{name}/drain" in head.client.get("/docs").text
    assert "/start" in head.client.get("/openapi.json").json()["paths"]
