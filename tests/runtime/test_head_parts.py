"""The parts of the head by themselves: which node, who is next, what is known. Nothing is asked over the network."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm_runtime import __version__
from slurm_runtime.config import ServerConfig
from slurm_runtime.deadlines import at_once_or_within, within
from slurm_runtime.head.answers import BadNews, Known, known, stopped
from slurm_runtime.head.choice import Room, Wanted, choose, grants
from slurm_runtime.head.config import HeadConfig
from slurm_runtime.head.directory import Directory, News, unwanted
from slurm_runtime.head.feed import Feed, read
from slurm_runtime.head.fleet import NameTaken, Node, Standing, ended, heard, joined, wanted
from slurm_runtime.head.line import Line
from slurm_runtime.head.link import Link, Reply
from slurm_runtime.head.starts import Starts
from slurm_runtime.head.views import Views
from slurm_runtime.head.wish import read_start
from slurm_runtime.node_models import NodeFacts, NodeWish
from slurm_runtime.wishes import BadRequest

T = TypeVar("T")


def finished(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def facts(name: str = "cpu-a", slots: int = 4, used: int = 0, **more: Any) -> NodeFacts:
    fields = {"boot": "b1", "waiting": 0, "draining": False, "podman": "connected", "version": __version__}
    return NodeFacts(**{"name": name, "slots": slots, "used": used, **fields, **more})


def node(name: str = "cpu-a", slots: int = 4, used: int = 0, **more: Any) -> Node:
    return heard(Node(name, f"http://{name}:1", "b1", 0.0), facts(name, slots, used, **more), 0.0)


def sandbox(runtime_id: str, session_id: str = "s", on: str = "cpu-a", pod_status: str = "ready", at: int = 1) -> Known:
    told = {
        "runtime_id": runtime_id,
        "session_id": session_id,
        "url": "http://x:1",
        "status": "running" if pod_status == "ready" else "stopped",
        "pod_status": pod_status,
        "container_statuses": [{"state": pod_status}],
        "image": "i",
    }
    return known(on, told, at)


# Which node.


def test_most_free_slots_win_and_an_image_at_hand_is_worth_a_quarter_of_the_slots() -> None:
    with_image = Room("a", 8, 5, images={"i"})
    assert choose([with_image, Room("b", 8, 6)], Wanted(1, "i")) is with_image
    assert choose([with_image, empty := Room("b", 8, 8)], Wanted(1, "i")) is empty
    assert choose([with_image, more := Room("b", 8, 6)], Wanted(1, "j")) is more
    coming = Room("c", 8, 5, coming={"i"})
    assert choose([Room("b", 8, 6), coming], Wanted(1, "i")) is coming


def test_an_image_that_no_registry_has_is_started_only_where_it_is() -> None:
    full = Room("a", 8, 0, images={"localhost/i:1"})
    assert choose([full, Room("b", 8, 8)], Wanted(1, "localhost/i:1")) is None
    assert choose([Room("b", 8, 8)], Wanted(1, "localhost/i:1")) is not None  # the node says that it is not there


def test_a_node_that_has_refused_or_is_too_full_is_not_chosen() -> None:
    assert choose([Room("a", 8, 8)], Wanted(1, avoid={"a"})) is None
    assert choose([Room("a", 8, 1)], Wanted(2)) is None


def test_small_starts_pass_a_large_one_but_not_on_the_node_that_it_waits_for() -> None:
    rooms = [Room("a", 8, 3), Room("b", 8, 1)]
    assert [(place, room.node) for place, room in grants([Wanted(4), Wanted(1), Wanted(1)], rooms)] == [(1, "b")]
    rooms[0].free = 4
    assert [(place, room.node) for place, room in grants([Wanted(4), Wanted(1)], rooms)] == [(0, "a")]


@given(
    st.lists(st.integers(1, 6), max_size=12),
    st.lists(st.tuples(st.integers(1, 6), st.integers(-1, 6)), max_size=5),
)
def test_no_slot_is_granted_twice_and_no_equal_start_is_overtaken(
    sizes: list[int], shape: list[tuple[int, int]]
) -> None:
    rooms = [Room(f"n{number}", slots, min(free, slots)) for number, (slots, free) in enumerate(shape)]
    before = [room.free for room in rooms]
    granted = grants([Wanted(size) for size in sizes], rooms)
    assert all(room.free >= min(0, was) for room, was in zip(rooms, before, strict=True))
    assert sum(before) - sum(room.free for room in rooms) == sum(sizes[place] for place, _ in granted)
    places = {place for place, _ in granted}
    for size in set(sizes):
        same = [place in places for place, one in enumerate(sizes) if one == size]
        assert same == sorted(same, reverse=True)


# Who is next.


def test_the_line_serves_in_the_order_of_numbers_also_one_that_comes_back() -> None:
    async def live() -> list[str]:
        line, served = Line(), []
        first, second, third = line.number(), line.number(), line.number()

        async def ask(number: int, name: str) -> None:
            await line.claim(number, name, Wanted(1), 5)
            served.append(name)

        tasks = [asyncio.create_task(ask(*one)) for one in ((second, "2"), (third, "3"), (first, "1"))]
        await asyncio.sleep(0)
        for used in (3, 2, 1):
            line.counted("cpu-a", 9, {"1", "2", "3"}, complete=False)
            line.open(node(used=4 if used == 3 else 3))
            line.counted("cpu-a", 9, {"1", "2", "3"}, complete=False)
            line.open(node(used=3))
            await asyncio.sleep(0.01)
        await asyncio.gather(*tasks)
        return served

    assert finished(live()) == ["1", "2", "3"]


def test_slots_on_their_way_are_not_given_twice_and_are_the_nodes_once_it_counts_them() -> None:
    async def live() -> None:
        line = Line()
        line.open(node(slots=2))
        claims = [await line.claim(line.number(), name, Wanted(1), 1) for name in ("x", "y")]
        with pytest.raises(asyncio.TimeoutError):
            await line.claim(line.number(), "z", Wanted(1), 0.01)
        assert line.waiting == 0
        claims[0].at = 7
        line.counted("cpu-a", 6, set(), complete=False)  # before the change at which it was answered
        line.open(node(slots=2))
        with pytest.raises(asyncio.TimeoutError):
            await line.claim(line.number(), "z", Wanted(1), 0.01)
        line.counted("cpu-a", 7, {"y"}, complete=False)
        line.open(node(slots=2, used=1))
        await line.claim(line.number(), "z", Wanted(1), 1)

    finished(live())


def test_who_leaves_the_line_gives_back_what_was_granted_in_the_same_moment() -> None:
    async def live() -> None:
        line = Line()
        line.open(node(slots=1))
        held = await line.claim(line.number(), "x", Wanted(1), 1)
        waiting = asyncio.create_task(line.claim(line.number(), "y", Wanted(1), 5))
        await asyncio.sleep(0)
        line.release(held)  # grants it to y
        waiting.cancel()
        await asyncio.wait([waiting])
        await line.claim(line.number(), "z", Wanted(1), 1)

    finished(live())


# Nodes.


def wish(**more: Any) -> NodeWish:
    return NodeWish(**{"name": "cpu-a", "url": "http://cpu-a:1", "boot": "b1", **more})


def test_the_standing_of_a_node() -> None:
    new = joined(None, wish(job="123_4"), 0.0)
    assert (new.standing(0.0), new.standing(7.0)) == (Standing.JOINING, Standing.SILENT)
    assert new.called == "node cpu-a (job 123_4)"
    assert (node().standing(1.0), node().takes(1.0), node().takes(7.0)) == (Standing.READY, True, False)
    assert wanted(node(), "repair").standing(0.0) is Standing.DRAINING
    assert node(draining=True, reason="its end").why(0.0) == "its end"
    assert ended(node(), Standing.LOST, "silence").why(9.0) == "silence"


def test_who_may_take_a_name() -> None:
    here = node()
    assert joined(here, wish(), 1.0).facts is here.facts
    assert joined(here, wish(boot="b2"), 1.0).facts is None
    with pytest.raises(NameTaken, match="--node-name"):
        joined(here, wish(boot="b2", url="http://cpu-x:1"), 1.0)
    assert joined(here, wish(boot="b2", url="http://cpu-x:1"), 7.0).url == "http://cpu-x:1"
    with pytest.raises(NameTaken, match="has left"):
        joined(ended(here, Standing.LEFT, "done"), wish(), 1.0)
    assert joined(ended(here, Standing.LOST, "silence"), wish(), 1.0).standing(1.0) is Standing.JOINING
    assert joined(wanted(here, "repair"), wish(boot="b2"), 1.0).wanted == "repair"
    assert joined(replace(wanted(here, "repair"), job="1"), wish(boot="b2", job="2"), 1.0).wanted == ""


def test_images_that_are_not_told_are_those_told_before() -> None:
    first = heard(node(), facts(images=["i"]), 1.0)
    assert heard(first, facts(), 2.0).images == {"i"}
    assert heard(first, facts(images=[]), 2.0).images == frozenset()


# Sandboxes.


def test_a_session_is_its_newest_sandbox() -> None:
    directory = Directory()
    directory.hear("cpu-a", News(2, True, (sandbox("old", pod_status="failed"), sandbox("new"))))
    assert directory.of_session("s") is directory.of_runtime("new")
    directory.hear("cpu-a", News(3, False, (sandbox("old", pod_status="failed", at=3),), frozenset({"old"})))
    assert directory.of_session("s") is directory.of_runtime("new")


def test_what_the_head_knows_already_is_not_undone_by_older_news() -> None:
    directory = Directory()
    directory.hear("cpu-a", News(1, True, (sandbox("r"),)))
    directory.answered(stopped(sandbox("r"), 5))
    directory.hear("cpu-a", News(4, False, (sandbox("r", at=4),)))
    found = directory.of_runtime("r")
    assert found is not None
    assert found.is_dead
    directory.hear("cpu-a", News(6, False, (sandbox("r", pod_status="failed", at=6),)))
    assert json.loads((directory.of_runtime("r") or found).body)["pod_status"] == "failed"


def test_of_two_that_live_the_first_stays_or_the_one_that_the_head_has_placed() -> None:
    directory = Directory()
    directory.hear("cpu-a", News(1, True, (sandbox("a"),)))
    [double] = directory.hear("cpu-b", News(1, True, (sandbox("b", on="cpu-b"),)))
    assert (double.extra.runtime_id, double.kept.runtime_id) == ("b", "a")
    directory.placed_on = lambda _session: "cpu-b"
    [double] = directory.hear("cpu-b", News(2, False, (sandbox("b", on="cpu-b", at=2),)))
    assert (double.extra.runtime_id, double.kept.runtime_id) == ("a", "b")
    assert directory.of_session("s") is directory.of_runtime("b")


def test_what_was_given_up_comes_back_unless_it_is_unwanted() -> None:
    directory = Directory()
    directory.hear("cpu-a", News(1, True, (sandbox("r"), sandbox("u", "t"))))
    assert directory.give_up("cpu-a", "node cpu-a was lost") == 2
    lost = directory.of_runtime("u")
    assert lost is not None
    assert json.loads(lost.body)["pod_logs"] == "node cpu-a was lost"
    directory.put(unwanted(lost))
    [double] = directory.hear("cpu-a", News(1, True, (sandbox("r"), sandbox("u", "t"))))
    assert double.extra.runtime_id == "u"
    assert [one.runtime_id for one in directory.living()] == ["r"]


def test_what_was_told_as_failed_or_was_replaced_does_not_live_again() -> None:
    directory = Directory()
    all_of_a = News(1, True, (sandbox("told", "t"), sandbox("old", "o"), sandbox("unread", "u")))
    directory.hear("cpu-a", all_of_a)
    directory.give_up("cpu-a", "node cpu-a was lost")
    found = Views(directory, cast("Starts", SimpleNamespace(of_session=lambda _: None))).session("t")
    assert b"node cpu-a was lost" in (found or b"")
    directory.hear("cpu-b", News(1, True, (sandbox("new", "o", on="cpu-b"),)))
    directory.hear("cpu-b", News(2, False, (sandbox("new", "o", on="cpu-b", pod_status="failed", at=2),)))
    doubles = directory.hear("cpu-a", all_of_a)
    assert [(one.extra.runtime_id, one.kept.runtime_id) for one in doubles] == [("told", "told"), ("old", "new")]
    assert [one.runtime_id for one in directory.living()] == ["unread"]


def test_a_fault_in_what_is_done_with_news_loses_no_node() -> None:
    told = {"node": facts().model_dump(), "upto": 3, "complete": True, "sandboxes": []}
    asked: list[str] = []

    async def ask(_method: str, path: str, **_more: Any) -> Reply:
        asked.append(path)
        return Reply(200, json.dumps(told).encode())

    async def followed() -> None:
        heard_out: asyncio.Future[News] = asyncio.get_running_loop().create_future()

        def hear(_facts: NodeFacts, news: News) -> None:
            if len(asked) == 1:
                raise KeyError("a fault")
            heard_out.set_result(news)

        following = asyncio.create_task(
            Feed("cpu-a", cast("Link", SimpleNamespace(ask=ask)), hear, lambda: 60.0, 5.0).follow()
        )
        assert await within(10, heard_out)
        following.cancel()
        await asyncio.wait([following])

    finished(followed())
    assert [path.split("&")[0] for path in asked] == ["/changes?since=-1"] * 2


def test_what_people_read_of_the_head_does_not_tell_its_key() -> None:
    assert "secret" not in repr(HeadConfig("secret")) + repr(Link("http://x:1", "secret"))
    assert "secret" not in repr(ServerConfig("secret"))


def test_the_dead_are_remembered_up_to_a_number_and_the_living_all() -> None:
    directory = Directory(dead_kept=10)
    for number in range(100):
        directory.hear("cpu-a", News(number, False, (sandbox(f"d{number}", f"s{number}", pod_status="failed"),)))
        directory.hear("cpu-a", News(number, False, (sandbox(f"l{number}", f"t{number}"),)))
    assert len(directory) == 110
    assert directory.of_runtime("d89") is None
    assert directory.of_session("s99") is not None
    directory.hear("cpu-a", News(200, False, (), frozenset(), tuple(f"l{number}" for number in range(100))))
    assert len(directory) == 10


def test_news_that_cannot_be_read_say_whose_they_are() -> None:
    told = {"node": facts().model_dump(), "upto": 3, "complete": True, "sandboxes": []}
    assert read("cpu-a", json.dumps(told).encode())[1].upto == 3
    broken: list[Any] = [
        {},
        {**told, "sandboxes": [{"runtime_id": "r"}]},
        {**told, "node": 3},
        [],
        {**told, "upto": None},
    ]
    for answer in broken:
        with pytest.raises(BadNews, match="cpu-a"):
            read("cpu-a", json.dumps(answer).encode())
    with pytest.raises(BadNews, match="calls itself cpu-a"):
        read("cpu-b", json.dumps(told).encode())


# Starts.


def test_what_the_head_reads_of_a_start() -> None:
    body = json.dumps({"image": "busybox", "command": "/a b", "session_id": "s", "resource_factor": 1.5}).encode()
    found = read_start(body)
    assert (found.session_id, found.wanted.units, found.wanted.image) == ("s", 2, "docker.io/library/busybox:latest")
    assert found.is_string
    assert found.body is body
    assert not read_start(b'{"command": ["/a"]}').is_string
    with pytest.raises(BadRequest, match="session_id"):
        read_start(b'{"session_id": "a/b"}')


def test_a_start_without_a_name_gets_one_and_keeps_its_fields() -> None:
    sent = {"image": "x", "command": ["/a"], "run_as_user": 10001, "environment": {"A": "1"}, "new": {"a": [1]}}
    found = read_start(json.dumps(sent).encode())
    assert json.loads(found.body) == {**sent, "session_id": found.session_id}


# Work that need not wait.


def test_work_that_waits_goes_on_and_work_that_does_not_has_no_task() -> None:
    async def tells_its_tasks(wait: bool) -> list[Any]:
        tasks = [asyncio.current_task()]
        if wait:
            await asyncio.sleep(0)
            await asyncio.sleep(0.001)
        return [*tasks, asyncio.current_task()]

    async def live() -> None:
        mine = asyncio.current_task()
        assert await at_once_or_within(1, tells_its_tasks(wait=False)) == [mine, mine]
        first, second = await at_once_or_within(1, tells_its_tasks(wait=True))
        assert first is mine
        assert second is not mine

    finished(live())


def test_work_that_has_begun_ends_at_its_deadline_and_its_errors_come_out() -> None:
    ends: list[str] = []

    async def for_ever() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise

    async def fails(wait: bool) -> None:
        if wait:
            await asyncio.sleep(0)
        raise ValueError("mine")

    async def live() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await at_once_or_within(0.01, for_ever())
        for wait in (False, True):
            with pytest.raises(ValueError, match="mine"):
                await at_once_or_within(1, fails(wait))

    finished(live())
    assert ends == ["cancelled"]
