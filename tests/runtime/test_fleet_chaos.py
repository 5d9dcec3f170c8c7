"""Many clients, and wires that are cut and mended under them: what is true at the end whatever has happened between."""

from __future__ import annotations

import contextlib
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import pytest

from tests.runtime.commands import IMAGE, SERVE
from tests.runtime.conftest import API_KEY, CONFIG, Api, serving
from tests.runtime.fake_podman import FakePodman
from tests.runtime.fleet import HEAD_CONFIG, HeadApi, head_over, url_of
from tests.runtime.test_contract import eventually
from tests.runtime.wire import Wire, wire_to

SESSIONS, CLIENTS, NODES = 12, 6, 3
LASTS_S = 3.0


def client_of(head: HeadApi, seed: int, end: float) -> list[str]:
    """One client: starts, stops, polls and hangs up at random; what it was told that must never be told."""
    wrong, chance = [], random.Random(seed)
    with httpx.Client(base_url=url_of(head), headers={"X-API-Key": API_KEY}, trust_env=False, timeout=30) as http:
        while time.monotonic() < end:
            session_id = f"s{chance.randrange(SESSIONS)}"
            verb = chance.choice(["start", "start", "hang up", "stop", "poll", "list"])
            with contextlib.suppress(httpx.ReadTimeout):
                if verb in {"start", "hang up"}:
                    patience_s = 20.0 if verb == "start" else chance.uniform(0.01, 0.2)
                    body = {"image": IMAGE, "command": SERVE, "session_id": session_id}
                    answer = http.post("/start", json=body, timeout=patience_s)
                elif verb == "stop":
                    found = http.get(f"/sessions/{session_id}")
                    answer = found
                    if found.status_code == 200:
                        answer = http.post("/stop", json={"runtime_id": found.json()["runtime_id"]})
                else:
                    answer = http.get("/list" if verb == "list" else f"/sessions/{session_id}")
                if answer.status_code not in {200, 201, 404, 409, 502, 503, 504}:
                    wrong.append(f"{verb}: {answer.status_code} {answer.text}")
    return wrong


def trouble(wires: list[Wire], head: HeadApi, nodes: list[Api], seed: int, end: float) -> None:
    """Cut one wire after the other, for a moment or until its node is lost; it joins again as a node does."""
    chance = random.Random(seed)
    while time.monotonic() < end:
        number = chance.randrange(len(wires))
        wires[number].cut()
        time.sleep(chance.choice([0.05, 0.2, 1.5]))
        wires[number].mend()
        head.join(nodes[number], url=wires[number].url)
        time.sleep(chance.uniform(0, 0.3))


def living(nodes: list[Api]) -> list[tuple[str, str]]:
    """Session and runtime id of all that lives on any node."""
    return sorted(
        (one.specification.session_id, one.specification.runtime_id) for node in nodes for one in node.manager.living()
    )


def told(head: HeadApi) -> list[tuple[str, str]]:
    runtimes = head.client.get("/list").json()["runtimes"]
    return sorted((one["session_id"], one["runtime_id"]) for one in runtimes)


@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_is_cut_each_session_lives_once_and_the_head_knows_what_the_nodes_know(seed: int) -> None:
    with contextlib.ExitStack() as stack:
        nodes = [
            stack.enter_context(
                serving(FakePodman(delay_s=0.02), replace(CONFIG, node_name=f"n{number}", ready_grace_s=0.2), 6)
            )
            for number in range(NODES)
        ]
        config = replace(HEAD_CONFIG, silence_s=1.0, list_patience_s=5.0)
        head = stack.enter_context(head_over([], config))
        wires = [stack.enter_context(wire_to(node.client.base_url.port or 0)) for node in nodes]
        for node, wire in zip(nodes, wires, strict=True):
            assert head.join(node, url=wire.url).status_code == 200
        end = time.monotonic() + LASTS_S
        with ThreadPoolExecutor(CLIENTS + 1) as pool:
            causing = pool.submit(trouble, wires, head, nodes, seed, end)
            asking = [pool.submit(client_of, head, seed * 100 + number, end) for number in range(CLIENTS)]
            causing.result()
            assert [wrong for one in asking for wrong in one.result()] == []
        _quiet(head, nodes, wires)
        # A late stop may still take one away between the two looks.
        eventually(lambda: [n.manager.admission.slots.used for n in nodes] == [len(n.names()) for n in nodes])
        assert head.call(lambda: head.head.members.line.waiting) == 0
        for _, runtime_id in told(head):
            assert head.client.post("/stop", json={"runtime_id": runtime_id}).status_code == 200
        eventually(lambda: [node.names() for node in nodes] == [[]] * NODES)
        assert head.call(lambda: sum(map(len, head.head.members.line._claims.values()))) == 0


def _quiet(head: HeadApi, nodes: list[Api], wires: list[Wire]) -> None:
    """All nodes are back, no session lives twice, and the head knows what they know."""

    def agree() -> bool:
        for node, wire in zip(nodes, wires, strict=True):
            head.join(node, url=wire.url)
        alive = living(nodes)
        is_once = len({session_id for session_id, _ in alive}) == len(alive)
        return set(head.states().values()) == {"ready"} and is_once and told(head) == alive

    deadline = time.monotonic() + 20
    while not agree():
        assert time.monotonic() < deadline, (head.states(), told(head), living(nodes))
        time.sleep(0.1)
