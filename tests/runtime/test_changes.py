"""What a node tells its head: each change once, as it is now; nothing is missing however seldom or often it asks."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, cast
from urllib.parse import urlencode

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slurm_runtime import register as register_module
from slurm_runtime.admission import Admission
from slurm_runtime.changes import Changes, TooManyPolls
from slurm_runtime.entries import Draining, Entry
from slurm_runtime.images import Images
from slurm_runtime.known_images import KnownImages
from slurm_runtime.manager import Manager
from slurm_runtime.node import Node
from slurm_runtime.node_models import MOST_IMAGES, MOST_POLLS, ChangesAnswer, NodeFacts
from slurm_runtime.page import moment
from slurm_runtime.podman import EngineUnreachable
from slurm_runtime.register import Register
from slurm_runtime.routes_node import facts, news
from slurm_runtime.routes_sandboxes import answer
from slurm_runtime.sandbox import State
from slurm_runtime.slots import Slots
from tests.runtime.commands import IMAGE, NOT_THERE, SERVE
from tests.runtime.conftest import API_KEY, CONFIG, Api
from tests.runtime.fake_podman import FakePodman
from tests.runtime.replica import Replica
from tests.runtime.test_contract import eventually, started
from tests.runtime.test_manager_parts import made
from tests.runtime.test_metrics import samples

# --- the numbers ------------------------------------------------------------------------------------------------------


def test_each_id_is_told_once_in_the_order_of_its_last_change() -> None:
    changes = Changes()
    for name in ("a", "b", "a", "c"):
        changes.note(name)
    changes.note_server()
    assert (changes.upto, changes.since(0).changed) == (5, ("b", "a", "c"))
    assert changes.since(3).changed == ("c",)
    assert changes.since(4).changed == ()
    changes.note_gone("b")
    assert (changes.since(0).changed, changes.since(0).gone) == (("a", "c"), ("b",))
    changes.note("b")
    assert (changes.since(5).changed, changes.since(5).gone) == (("b",), ())


def test_where_something_was_forgotten_all_has_to_be_told() -> None:
    changes = Changes(gone_kept=2)
    for name in ("a", "b", "c"):
        changes.note(name)
        changes.note_gone(name)
    assert changes.since(1).changed is None  # the end of a, change 2, is not known any more
    assert changes.since(2).gone == ("b", "c")
    assert changes.since(-1).changed is None
    assert changes.since(7).changed is None  # of a life that had seen more than this one


def test_memory_is_bounded_by_what_there_is_and_not_by_what_happens() -> None:
    changes = Changes(gone_kept=10)
    for number in range(10_000):
        changes.note(str(number % 7))
        changes.note_gone(f"gone-{number}")
    assert (len(changes._changed), len(changes._gone)) == (7, 10)


def waited(changes: Changes, number: int, timeout_s: float, meanwhile: Callable[[], object]) -> float:
    """Seconds until a poll ends under which ``meanwhile`` happens."""

    async def wait() -> float:
        began = time.monotonic()
        asyncio.get_running_loop().call_later(0.05, meanwhile)
        await changes.beyond(number, timeout_s)
        return time.monotonic() - began

    return asyncio.run(wait())


def test_a_poll_ends_with_a_change_or_at_its_time_or_with_the_server() -> None:
    changes = Changes()
    assert waited(changes, 0, 60, lambda: changes.note("a")) < 30
    assert waited(changes, 1, 60, changes.note_server) < 30
    assert waited(changes, 2, 0.2, lambda: None) >= 0.2
    assert waited(changes, 2, 60, changes.close) < 30
    assert waited(changes, 2, 60, lambda: None) < 30  # of a server that has ended


def test_changes_that_come_together_are_told_together() -> None:
    changes = Changes(gather_s=0.5)

    async def two_polls() -> int:
        changes.note("a")
        await changes.beyond(0, 10)  # the first one is answered at once
        seen = changes.upto
        asyncio.get_running_loop().call_later(0.05, changes.note, "b")
        asyncio.get_running_loop().call_later(0.10, changes.note, "c")
        await changes.beyond(seen, 10)
        return changes.upto

    assert asyncio.run(two_polls()) == 3


def test_polls_are_bounded() -> None:
    async def many() -> None:
        changes = Changes()
        polls = [asyncio.create_task(changes.beyond(0, 60)) for _ in range(MOST_POLLS)]
        await asyncio.sleep(0)
        with pytest.raises(TooManyPolls):
            await changes.beyond(0, 60)
        changes.note("a")
        await asyncio.gather(*polls)
        await changes.beyond(0, 60)  # those that have ended make room

    asyncio.run(many())


# --- what a head makes of it ------------------------------------------------------------------------------------------

SESSIONS = st.sampled_from("abc")
HAPPENINGS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["add", "add_dead"]), SESSIONS),
        st.tuples(st.sampled_from(["begin", "fail", "explain", "forget", "pull"]), st.integers(0, 5)),
        st.tuples(st.sampled_from(["ask", "ask", "ask in vain", "ask of another life"]), st.just(0)),
    ),
    max_size=60,
)


class World:
    """A register with what happens to it, and a head that asks now and then."""

    def __init__(self) -> None:
        self.changes = Changes(gone_kept=2)
        self.register = Register(self.changes)
        self.node = Node("cpu-a", None, 0, self.changes.note_server)
        self.admission = Admission(Slots(3, 1.0), self.changes.note_server)
        self.images = Images(FakePodman(), known=KnownImages(self.changes.note_server))
        self.connection = FakeConnection()
        self.head = Replica()
        self.names = 0

    def happens(self, what: str, argument: Any) -> None:
        entries = self.register.entries()
        if what in {"add", "add_dead"}:
            self._enter(what, argument)
        elif what == "pull":
            self.images.known.note([f"image-{argument}"])
        elif what.startswith("ask"):
            self._ask(what)
        elif entries:
            self._change(what, entries[argument % len(entries)])

    def _enter(self, what: str, session: str) -> None:
        """As the manager does it: a session with a living one gets no other."""
        self.names += 1
        entry = made(str(self.names), session)
        if what == "add_dead":
            entry.become(entry.sandbox.changed(State.FAILED, "died"))
            self.register.add_dead(entry)
        elif self.register.living_of_session(session) is None:
            self.register.add(entry)

    def _change(self, what: str, entry: Entry) -> None:
        if what == "forget" and entry.sandbox.state.is_dead:
            self.register.forget(entry)
            entry.explain("what happens to a forgotten one is nobody's business")
        elif what == "explain":
            entry.explain(f"reason {self.changes.upto}")
        elif what == "begin" and entry.sandbox.state is State.PENDING:
            entry.become(entry.sandbox.changed(State.STARTING, "runs", url="http://cpu-a:1"))
        elif what == "fail" and not entry.sandbox.state.is_dead:
            entry.become(entry.sandbox.changed(State.FAILED, "died"))

    def _ask(self, what: str) -> None:
        boot = "another" if what == "ask of another life" else self.head.boot
        told = news(cast(Manager, self), self.head.upto, boot)
        if what == "ask in vain":  # the answer is lost on its way
            return
        self.head.apply(ChangesAnswer.model_validate_json(told.model_dump_json(exclude_none=True)))
        self.head_agrees()

    def head_agrees(self) -> None:
        entries = self.register.entries()
        assert self.head.sandboxes == {e.specification.runtime_id: answer(e.sandbox) for e in entries}
        newest = {session: self._newest(session) for session in "abc"}
        assert self.head.newest == {session: one for session, one in newest.items() if one}
        assert self.head.living() == {entry.specification.runtime_id for entry in self.register.living()}
        assert self.head.images == self.images.known.names

    def _newest(self, session: str) -> str:
        found = self.register._sessions.get(session, "")
        return found and self.register.of_session(session).specification.runtime_id


class FakeConnection:
    word = "connected"


@given(HAPPENINGS)
@example([("add", "a"), ("fail", 0), ("ask", 0), ("add", "a"), ("fail", 1), ("forget", 1), ("ask", 0)])
@example([("add", "a"), ("ask", 0), ("add_dead", "a"), ("ask", 0), ("forget", 1), ("ask", 0), ("fail", 0)])
@settings(max_examples=300, deadline=None, database=None, derandomize=True)
def test_whatever_happens_and_whenever_it_asks_a_head_knows_what_the_node_says(
    happenings: list[tuple[str, Any]],
) -> None:
    world = World()
    kept, register_module.DEAD_KEPT = register_module.DEAD_KEPT, 3
    try:
        for what, argument in [*happenings, ("ask", 0)]:
            world.happens(what, argument)
    finally:
        register_module.DEAD_KEPT = kept


def test_images_are_told_by_their_full_names_once_and_the_last_of_them() -> None:
    numbers = iter(range(1, 100))
    known = KnownImages(lambda: next(numbers))
    known.note(["python:3.11", "docker.io/library/python:3.11"])
    assert (known.names, known.changed_at) == (["docker.io/library/python:3.11"], 1)
    known.note(["python:3.11"])
    assert known.changed_at == 1
    known.note(f"docker.io/some/image:{number}" for number in range(MOST_IMAGES))
    assert (len(known.names), "docker.io/library/python:3.11" in known.names) == (MOST_IMAGES, False)
    known.forget("some/image:7")
    assert (known.changed_at, "docker.io/some/image:7" in known.names) == (3, False)


# --- draining ---------------------------------------------------------------------------------------------------------


def test_a_node_drains_before_its_end_and_says_until_when_and_why() -> None:
    told: list[str] = []
    end = time.time() + 100
    node = Node("cpu-a", end, 100 - 0.1, lambda: told.append("changed"))
    node.check()

    async def live() -> None:
        await asyncio.wait_for(node.drain_in_time(), 20)

    asyncio.run(live())
    assert time.time() >= end - 100 + 0.05
    assert node.reason == f"its time limit is near ({moment(end)})"
    with pytest.raises(Draining) as refused:
        node.check()
    for words in ("cpu-a takes no new sandboxes", "its time limit is near", f"it ends at {moment(end)}"):
        assert words in str(refused.value)
    node.drain("another reason")
    assert "time limit" in node.reason
    assert told == ["changed"]


def test_a_node_without_an_end_never_drains_by_itself() -> None:
    node = Node("cpu-a", None, 1800, lambda: None)
    asyncio.run(asyncio.wait_for(node.drain_in_time(), 5))
    assert not node.draining


# --- over HTTP --------------------------------------------------------------------------------------------------------


def asked(api: Api, **query: Any) -> ChangesAnswer:
    found = api.client.get("/changes", params=query)
    assert found.status_code == 200, found.text
    return ChangesAnswer.model_validate_json(found.content)


def follow(api: Api, head: Replica, wait_s: float = 0) -> ChangesAnswer:
    told = asked(api, since=head.upto, boot=head.boot, wait_s=wait_s)
    head.apply(told)
    return told


def settled(api: Api, head: Replica) -> None:
    """Nothing happens on the node any more."""
    eventually(lambda: (head.upto, follow(api, head, 0.2).upto) == (head.upto, head.upto))


def heard(api: Api, head: Replica, what: Callable[[NodeFacts], bool]) -> None:
    """Long polls bring ``what`` before the time of one of them is over."""
    began = time.monotonic()
    while not what(follow(api, head, 29).node):
        pass
    assert time.monotonic() - began < 25


def test_a_head_hears_what_the_api_says(fake: Api) -> None:
    head = Replica()
    assert follow(fake, head).complete
    one, two = started(fake, session_id="one"), started(fake, session_id="two")
    fake.start(image=IMAGE, command=NOT_THERE, session_id="dead")
    assert follow(fake, head).complete is False
    fake.client.post("/pause", json={"runtime_id": one["runtime_id"]})
    fake.client.post("/stop", json={"runtime_id": two["runtime_id"]})
    follow(fake, head)
    for session in ("one", "two", "dead"):
        found = fake.client.get(f"/sessions/{session}").json()
        assert head.sandboxes[head.newest[session]].model_dump(exclude_none=True) == found
    assert head.living() == {entry["runtime_id"] for entry in fake.client.get("/list").json()["runtimes"]}
    assert head.completes == 1
    told = eventually(lambda: t if (t := follow(fake, head)).node.used == 1 else None)  # two's slot is free again
    assert told.sandboxes == []
    assert (told.node.slots, told.node.waiting, told.node.podman) == (20, 0, "connected")
    assert told.node.images is None
    assert "localhost/bb:latest" in head.images


def test_a_long_poll_ends_with_what_it_waits_for(fake: Api) -> None:
    head = Replica()
    follow(fake, head)
    with ThreadPoolExecutor(1) as pool:
        poll = pool.submit(follow, fake, head, 30)
        one = started(fake, session_id="one")
        told = poll.result(20)
    assert [sandbox.runtime_id for sandbox in told.sandboxes] == [one["runtime_id"]]
    began = time.monotonic()
    while follow(fake, head).sandboxes:
        pass
    assert follow(fake, head, 0.3).sandboxes == []
    assert time.monotonic() - began >= 0.3


def test_a_slot_that_becomes_free_and_an_image_that_comes_end_a_poll_too(server_with: Callable[..., Api]) -> None:
    api = server_with(FakePodman(registry={"some/image:1"}))
    head = Replica()
    one = started(api)
    settled(api, head)

    with ThreadPoolExecutor(1) as pool:
        poll = pool.submit(heard, api, head, lambda _: "docker.io/some/image:1" in head.images)
        query = {"image": "some/image:1", "pull_from_repo": "true"}
        assert api.client.get("/image_exists", params=query).json()["exists"]
        poll.result(30)
        poll = pool.submit(heard, api, head, lambda node: node.used == 0)
        assert isinstance(api.engine, FakePodman)
        api.engine.refuse_removal = 1  # it is dead at once, and its slot is free a little later
        assert api.client.post("/stop", json={"runtime_id": one["runtime_id"]}).status_code == 502
        poll.result(30)


def test_the_state_of_podman_is_told(fake: Api) -> None:
    head = Replica()
    settled(fake, head)
    assert isinstance(fake.engine, FakePodman)
    fake.engine.away = True
    heard(fake, head, lambda node: node.podman == "unreachable")
    fake.engine.away = False
    heard(fake, head, lambda node: node.podman == "connected")


def test_another_life_or_a_number_from_nowhere_is_told_all(fake: Api) -> None:
    head = Replica()
    started(fake, session_id="one")
    follow(fake, head)
    for query in ({}, {"since": head.upto, "boot": "another", "wait_s": 30}, {"since": 10**9, "boot": head.boot}):
        told = asked(fake, **query)
        assert told.complete
        assert [sandbox.session_id for sandbox in told.sandboxes] == ["one"]
        assert told.node.images


def test_answers_that_change_something_say_up_to_which_change_they_tell(fake: Api) -> None:
    head = Replica()
    start = fake.start(image=IMAGE, command=SERVE)
    runtime_id = start.json()["runtime_id"]
    stop = fake.client.post("/stop", json={"runtime_id": runtime_id})
    unknown = fake.client.post("/pause", json={"runtime_id": "nonesuch"})
    numbers = [int(one.headers["X-SkyRL-Upto"]) for one in (start, stop, unknown)]
    assert 0 < numbers[0] < numbers[1] <= numbers[2]
    follow(fake, head)
    assert (head.upto >= numbers[1], head.sandboxes[runtime_id].pod_status) == (True, "not found")
    assert "X-SkyRL-Upto" not in fake.client.get("/list").headers


def test_more_long_polls_than_a_head_needs_are_429_and_a_client_that_left_makes_room(fake: Api) -> None:
    head = Replica()
    settled(fake, head)
    query: dict[str, str | float] = {"since": head.upto, "boot": head.boot, "wait_s": 30}
    polls = []
    for number in range(MOST_POLLS):
        polls.append(socket.create_connection(("127.0.0.1", fake.client.base_url.port or 0), 20))
        words = f"GET /changes?{urlencode(query)} HTTP/1.1\r\nHost: x\r\nX-API-Key: {API_KEY}\r\n\r\n"
        polls[number].sendall(words.encode())
    eventually(lambda: fake.run(_polls(fake)) == MOST_POLLS)
    refused = fake.client.get("/changes", params=query)
    assert refused.status_code == 429
    assert "one head" in refused.json()["detail"]
    assert fake.client.get("/changes", params=query | {"wait_s": 0}).is_success
    for poll in polls:
        poll.close()
    eventually(lambda: fake.run(_polls(fake)) == 0)
    assert fake.client.get("/changes", params=query | {"wait_s": 0.01}).is_success


def test_a_stopping_server_is_not_held_up_by_long_polls(server_with: Callable[..., Api]) -> None:
    api = server_with()
    head = Replica()
    settled(api, head)
    told: list[ChangesAnswer] = []
    poll = threading.Thread(target=lambda: told.append(follow(api, head, 30)))
    poll.start()
    eventually(lambda: api.run(_polls(api)) == 1)
    began = time.monotonic()
    api.run(api.manager.close(20))
    poll.join(20)
    assert time.monotonic() - began < 15
    assert told[0].sandboxes == []


async def _polls(api: Api) -> int:
    return len(api.manager.changes._polls)


def test_a_start_that_is_not_to_wait_is_refused_at_once_and_leaves_nothing(server_with: Callable[..., Api]) -> None:
    api = server_with(slots=2)
    one = started(api, session_id="one", resource_factor=1)
    before = api.client.get("/metrics").text
    wish = {"image": IMAGE, "command": SERVE, "resource_factor": 2}
    refused = api.client.post("/start", json={**wish, "session_id": "two"}, headers={"X-SkyRL-Wait": "0"})
    assert (refused.status_code, refused.headers["X-SkyRL-Refused"]) == (503, "full")
    assert "1 of 2" in refused.json()["detail"]
    assert api.client.get("/sessions/two").status_code == 404
    assert "skyrl_failures_kept 0" in before
    again = api.client.post("/start", json={**wish, "session_id": "one"}, headers={"X-SkyRL-Wait": "0"})
    assert (again.status_code, again.json()["runtime_id"]) == (201, one["runtime_id"])
    too_large = api.client.post("/start", json={**wish, "resource_factor": 3}, headers={"X-SkyRL-Wait": "0"})
    assert (too_large.status_code, "X-SkyRL-Refused" in too_large.headers) == (422, False)


def test_of_starts_at_the_same_moment_as_many_are_refused_as_have_no_slot(server_with: Callable[..., Api]) -> None:
    api = server_with(FakePodman(away=True), slots=3)  # nobody has a slot before Podman answers
    assert isinstance(api.engine, FakePodman)
    with ThreadPoolExecutor(8) as pool:
        wish, headers = {"image": IMAGE, "command": SERVE}, {"X-SkyRL-Wait": "0"}
        asked = [pool.submit(api.client.post, "/start", json=wish, headers=headers) for _ in range(8)]
        eventually(lambda: sum(one.done() for one in asked) == 5)
        api.engine.away = False
        answers = [one.result(20) for one in asked]
    assert sorted(one.status_code for one in answers) == [201] * 3 + [503] * 5


def test_a_start_that_waited_in_vain_is_refused_as_full_too(server_with: Callable[..., Api]) -> None:
    api = server_with(slots=1, string_patience_s=0.3, list_patience_s=0.3)
    started(api)
    refused = api.start(image=IMAGE, command=SERVE)
    assert (refused.status_code, refused.headers["X-SkyRL-Refused"]) == (503, "full")


def test_a_draining_node_refuses_new_sandboxes_and_serves_those_it_has(server_with: Callable[..., Api]) -> None:
    end = time.time() + 3600
    api = server_with(node_name="cpu-b", until=end)
    one = started(api, session_id="one")
    head = Replica()
    follow(api, head)
    drained = api.client.post("/drain", json={"reason": "the operator\nwants it"})
    assert drained.status_code == 200
    found = NodeFacts.model_validate(drained.json())
    assert (found.name, found.draining, found.reason, found.until) == ("cpu-b", True, "the operator wants it", end)
    assert follow(api, head).node.draining
    assert api.client.post("/drain", json={}).json()["reason"] == "the operator wants it"
    refused = api.start(image=IMAGE, command=SERVE, session_id="two")
    assert (refused.status_code, refused.headers["X-SkyRL-Refused"]) == (503, "draining")
    assert "the operator wants it" in refused.json()["detail"]
    assert moment(end) in refused.json()["detail"]
    assert api.client.get("/sessions/two").status_code == 404
    again = api.start(image=IMAGE, command=SERVE, session_id="one")
    assert (again.status_code, again.json()["runtime_id"]) == (201, one["runtime_id"])
    assert api.client.post("/pause", json={"runtime_id": one["runtime_id"]}).json()["status"] == "paused"
    assert api.client.post("/resume", json={"runtime_id": one["runtime_id"]}).status_code == 200
    assert api.client.post("/stop", json={"runtime_id": one["runtime_id"]}).status_code == 200
    metrics = samples(api.client.get("/metrics").text)
    assert metrics["skyrl_draining", ()] == 1
    assert metrics["skyrl_until_timestamp_seconds", ()] == pytest.approx(end)
    assert ("skyrl_registered", ()) not in metrics
    assert "the operator wants it" in api.client.get("/").text


def test_a_stopping_server_says_so_to_a_head(server_with: Callable[..., Api]) -> None:
    api = server_with()
    api.run(api.manager.close(20))
    refused = api.start(image=IMAGE, command=SERVE)
    assert (refused.status_code, refused.headers["X-SkyRL-Refused"]) == (503, "stopping")


def test_a_store_that_cannot_be_listed_costs_only_what_is_known_of_it(server_with: Callable[..., Api]) -> None:
    class Forgetful(FakePodman):
        async def all_images(self) -> tuple[str, ...]:
            raise EngineUnreachable("it went away")

    api = server_with(Forgetful())
    started(api)
    assert api.client.get("/node").json()["images"] == ["localhost/bb:latest"]


def test_the_job_s_statistics_do_not_count_how_long_a_head_waits(fake: Api) -> None:
    head = Replica()
    before = fake.manager.statistics.requests.count
    follow(fake, head)
    follow(fake, head, 0.1)
    assert fake.manager.statistics.requests.count == before


def test_the_node_is_what_the_configuration_says() -> None:
    async def node() -> NodeFacts:
        config = replace(CONFIG, node_name="cpu-c", until=1e9)
        manager = Manager(config, FakePodman(), _never, Slots(4, 1.0))
        found = facts(manager)
        await manager.close(1)
        return found

    found = asyncio.run(node())
    assert (found.name, found.slots, found.used, found.until, found.draining) == ("cpu-c", 4, 0, 1e9, False)


async def _never(_url: str, _dialect: object) -> bool:
    return False
