"""The benchmark of the head: its simulated nodes are as real ones on the wire, and its figures are computed rightly.

The tests of a real node's wire run here too, on a simulated one.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from benchmarks import head_scale
from benchmarks.simulator import delays, parts
from benchmarks.simulator.figures import Summary, added_s, overtaken, spread, summary, waits_by_group
from benchmarks.simulator.http import BadAnswer, header, message, whole
from benchmarks.simulator.load import Start, due_times
from benchmarks.simulator.parts import Fairness, Growth, Loaded, Loss
from benchmarks.simulator.stage import Stage, cpus_from, stage
from slurm_runtime.node_models import NodeFacts
from tests.runtime import test_changes, test_contract
from tests.runtime.commands import IMAGE, SERVE
from tests.runtime.conftest import Api
from tests.runtime.replica import Replica
from tests.runtime.test_changes import follow
from tests.runtime.test_contract import eventually, started

# --- pure parts -------------------------------------------------------------------------------------------------------


def start(session: str, due: float, answered: float = 0.0, **fields: Any) -> Start:
    return Start(session, fields.pop("group", ""), due, due, answered, status=201, **fields)


def test_delays_are_drawn_between_the_measured_quantiles() -> None:
    quantiles = tuple(float(number) for number in range(len(delays.SHARES)))
    assert [delays.at(quantiles, share) for share in delays.SHARES] == list(quantiles)
    assert delays.at(quantiles, 0.375) == 2.5  # half way between the shares of 2 and 3
    measured = delays.read()
    found = sorted(delays.drawn(measured.start_s, random.Random(1)) for _ in range(1))
    drawn = sorted(delays.drawn(measured.start_s, chance) for chance in [random.Random(2)] for _ in range(4000))
    assert measured.start_s[0] <= found[0] <= measured.start_s[-1]
    assert drawn[2000] == pytest.approx(measured.start_s[3], rel=0.1)


def test_quantiles_of_samples_are_their_own_values() -> None:
    assert delays.quantiles_of([number / 100 for number in range(1, 101)])[3] == 0.5
    assert delays.quantiles_of([3.0])[0] == delays.quantiles_of([3.0])[-1] == 3.0


def test_due_times_have_the_rate_and_know_nothing_of_answers() -> None:
    moments = due_times(100, 50, random.Random(3))
    assert moments == sorted(moments)
    assert len(moments) == 5000
    assert sum(moment < 25 for moment in moments) == pytest.approx(2500, rel=0.1)


def test_what_a_head_adds_is_counted_from_when_a_start_was_due() -> None:
    late = Start("a", "", due=10.0, asked=10.5, answered=11.0, status=201)
    assert added_s(late, {"a": (10.6, 10.9)}) == pytest.approx(0.7)
    assert added_s(late, {}) is None
    assert added_s(Start("a", "", 10.0, status=503), {"a": (1.0, 2.0)}) is None


def test_a_summary_counts_what_went_wrong() -> None:
    starts = [start("a", 1.0, 1.5), Start("b", "", 1.0, status=503, detail="no room")]
    found = summary(starts, {"a": (1.1, 1.4)})
    assert (found.starts, found.failed, found.why) == (2, 1, {"503 no room": 1})
    assert (round(found.whole.median), round(found.added.median)) == (500, 200)


def test_overtaken_are_those_that_were_due_clearly_before_one_that_was_placed_before() -> None:
    starts = [start("a", 1.0), start("b", 1.2), start("c", 1.21), start("d", 0.5)]
    assert overtaken(starts[:3], {"a": (5.0, 0), "b": (6.0, 0), "c": (5.9, 0)}) == 0  # 10 ms are by chance
    assert overtaken(starts[:3], {"b": (5.0, 0), "a": (6.0, 0), "c": (7.0, 0)}) == 1
    assert overtaken(starts, {"a": (5.0, 0), "b": (6.0, 0)}) == 0  # who never came was not overtaken


def test_waits_are_told_by_group() -> None:
    found = waits_by_group([start("a", 1.0, group="x"), start("b", 1.0, group="y")], {"a": (2.0, 3.0), "b": (4.0, 5.0)})
    assert {group: round(one.median) for group, one in found.items()} == {"x": 1000, "y": 3000}


def load_of(rate: float, p99_ms: float, failed: int = 0) -> Loaded:
    added = spread([p99_ms / 1000])
    return Loaded(1, rate, Summary(10, failed, {}, added, added, added), 1.0, 1.0, 0.5, 0.5)


def test_the_highest_rate_is_one_that_was_kept() -> None:
    assert parts.highest([load_of(50, 10), load_of(100, 99), load_of(150, 101)]) == 100
    assert parts.highest([load_of(50, 10, failed=1)]) == 0
    assert "< 100 ms: 50 starts a second" in head_scale.of_rate([load_of(50, 10), load_of(100, 101)])


def test_the_head_has_a_cpu_of_its_own_where_there_are_two() -> None:
    assert cpus_from([3, 4, 5]).head == {3}
    assert cpus_from([3, 4, 5]).others == {4, 5}
    assert cpus_from([3]).others == {3}


def test_http_messages_come_in_any_pieces() -> None:
    text = message(b"HTTP/1.1 200 OK", b'{"a":1}', b"\r\nx-skyrl-upto: 7") + b"next"
    for cut in range(len(text) - len(b"next")):
        assert whole(text[:cut]) is None
    found = whole(text)
    assert found is not None
    assert (found[1], found[2]) == (b'{"a":1}', b"next")
    assert header(found[0], b"x-skyrl-upto") == b"7"
    assert header(found[0], b"upto") == b""
    with pytest.raises(BadAnswer):
        whole(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")


# --- a simulated node on the wire -------------------------------------------------------------------------------------


@dataclass
class SimulatedApi:
    """What the tests of a real node ask of their ``Api``."""

    client: httpx.Client
    serve: str | list[str]
    agent: bool = False

    def start(self, **fields: Any) -> httpx.Response:
        return self.client.post("/start", json=fields)

    def names(self) -> list[str]:
        return [one["runtime_id"] for one in self.client.get("/list").json()["runtimes"]]


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with stage(tmp_path_factory.mktemp("stage"), cpus_from([*range(1)])) as made:
        yield made


@pytest.fixture
def server_with(staged: Stage) -> Iterator[Callable[..., Api]]:
    """Simulated nodes with so many slots, in the place of the real one's fixture."""
    with contextlib.ExitStack() as stack:

        def serve(slots: int = 20) -> Api:
            return cast(Api, stack.enter_context(simulated(staged, slots)))

        yield serve


@pytest.fixture(scope="module")
def node(staged: Stage) -> Iterator[Api]:
    with simulated(staged, 20) as api:
        yield cast(Api, api)


@contextlib.contextmanager
def simulated(staged: Stage, slots: int) -> Iterator[SimulatedApi]:
    """One simulated node that registers nowhere."""
    with staged.simulator("none", slots) as simulator:
        simulator.ask("POST", "/add?count=1")
        url = next(iter(simulator.ask("GET", "/nodes").values()))["url"]
        with httpx.Client(base_url=url, headers={"X-API-Key": simulator.key}, timeout=60, trust_env=False) as client:
            yield SimulatedApi(client, SERVE)


OF_ANY_SERVER = [
    test_contract.test_08_09_start_answers_with_all_that_clients_read,
    test_changes.test_a_long_poll_ends_with_what_it_waits_for,
    test_changes.test_answers_that_change_something_say_up_to_which_change_they_tell,
]
OF_A_FRESH_SERVER = [
    test_contract.test_12_the_same_session_twice_at_once_is_one_sandbox,
    test_changes.test_another_life_or_a_number_from_nowhere_is_told_all,
]


def name_of(test: Callable[..., None]) -> str:
    return test.__name__


@pytest.mark.parametrize("contract", OF_ANY_SERVER, ids=name_of)
def test_a_simulated_node_keeps_the_contract_of_a_real_one(node: Api, contract: Callable[[Api], None]) -> None:
    contract(node)


@pytest.mark.parametrize("contract", OF_A_FRESH_SERVER, ids=name_of)
def test_a_fresh_one_does(server_with: Callable[..., Api], contract: Callable[[Api], None]) -> None:
    contract(server_with())


def test_of_starts_at_the_same_moment_as_many_are_refused_as_have_no_slot(server_with: Callable[..., Api]) -> None:
    api = server_with(slots=3)
    with ThreadPoolExecutor(8) as pool:
        wish, headers = {"image": IMAGE, "command": SERVE}, {"X-SkyRL-Wait": "0"}
        answers = list(pool.map(lambda _: api.client.post("/start", json=wish, headers=headers), range(8)))
    assert sorted(one.status_code for one in answers) == [201] * 3 + [503] * 5
    assert {one.headers.get("X-SkyRL-Refused") for one in answers if one.status_code == 503} == {"full"}


def test_a_head_hears_what_the_simulated_node_says(server_with: Callable[..., Api]) -> None:
    api, head = server_with(), Replica()
    assert follow(api, head).complete
    one, two = started(api, session_id="one"), started(api, session_id="two")
    assert api.client.post("/pause", json={"runtime_id": one["runtime_id"]}).json()["status"] == "paused"
    assert api.client.post("/stop", json={"runtime_id": two["runtime_id"]}).json()["status"] == "stopped"
    told = follow(api, head)
    for session in ("one", "two"):
        found = api.client.get(f"/sessions/{session}").json()
        assert head.sandboxes[head.newest[session]].model_dump(exclude_none=True) == found
    assert head.living() == set(api.names()) == {one["runtime_id"]}
    assert (told.node.used, told.node.slots, told.node.images, head.completes) == (1, 20, None, 1)
    assert len(head.images) == 20


def test_a_simulated_node_that_forgets_says_what_is_gone(server_with: Callable[..., Api]) -> None:
    api, head = server_with(slots=100), Replica()
    follow(api, head)
    with ThreadPoolExecutor(30) as pool:

        def live(number: int) -> None:
            one = api.start(image=IMAGE, session_id=f"s{number}").json()
            assert api.client.post("/stop", json={"runtime_id": one["runtime_id"]}).status_code == 200

        list(pool.map(live, range(90)))
    first = follow(api, head)
    assert len(head.sandboxes) == 64
    assert not first.complete
    assert len(first.gone) == 90 - 64


def test_a_simulated_node_drains_and_refuses_what_it_has_no_room_for(server_with: Callable[..., Api]) -> None:
    api = server_with(slots=2)
    one = started(api, session_id="one")
    wish = {"image": IMAGE, "resource_factor": 2}
    full = api.client.post("/start", json={**wish, "session_id": "two"}, headers={"X-SkyRL-Wait": "0"})
    assert (full.status_code, full.headers["X-SkyRL-Refused"]) == (503, "full")
    assert api.client.get("/sessions/two").status_code == 404
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(api.start, **wish, session_id="three")
        eventually(lambda: api.client.get("/node").json()["waiting"] == 1)
        api.client.post("/stop", json={"runtime_id": one["runtime_id"]})
        assert waiting.result(30).status_code == 201
    assert NodeFacts.model_validate(api.client.post("/drain", json={"reason": "of a test"}).json()).draining
    drained = api.start(image=IMAGE, session_id="four")
    assert (drained.status_code, drained.headers["X-SkyRL-Refused"]) == (503, "draining")
    assert api.start(image=IMAGE, session_id="three").status_code == 201


def test_a_client_that_hangs_up_leaves_nothing_on_a_simulated_node(server_with: Callable[..., Api]) -> None:
    api = server_with(slots=1)
    one = started(api)
    with pytest.raises(httpx.ReadTimeout):
        api.client.post("/start", json={"image": IMAGE, "session_id": "left"}, timeout=0.3)
    eventually(lambda: api.client.get("/node").json()["waiting"] == 0)
    api.client.post("/stop", json={"runtime_id": one["runtime_id"]})
    eventually(lambda: api.client.get("/node").json()["used"] == 0)


def test_a_simulated_node_asks_for_the_key(node: Api) -> None:
    for path in ("/node", "/changes", "/list"):
        assert httpx.get(f"{node.client.base_url}{path}", trust_env=False).status_code == 401


# --- the whole --------------------------------------------------------------------------------------------------------


def test_the_benchmark_runs_and_its_figures_hold_together(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--nodes", "3", "--slots", "4", "--seconds", "1", "--step", "4", "--most", "4", "--rate", "4", "--json"]
    head_scale.main([*words, "--parts", "raw,full,churn"])  # how fast it is here does not matter
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert [(one["summary"]["starts"], one["summary"]["failed"]) for one in found["raw"]] == [(4, 0), (12, 0)]
    assert found["raw"][0]["simulator_ms"] > 0
    full = found["full"]
    assert (full["wanted"], full["held"], full["listed"], full["summary"]["failed"]) == (12, 12, 12, 0)
    assert full["empty_mb"] > 10
    assert (found["churn"]["changed"], found["churn"]["bystanders"]) == (3, 0)
    for words_shown in ("without a head", "12 of 12, 12 in GET /list", "3 nodes changed"):
        assert words_shown in shown.err


def test_what_is_aimed_at_and_missed_is_said() -> None:
    assert head_scale.missed({"rate": [load_of(200, 10), load_of(300, 99)]}, 1000) == []
    assert head_scale.missed({"rate": [load_of(200, 10), load_of(300, 101)]}, 1000) == [
        "200 starts a second were kept, 300 are aimed at"
    ]
    lost = Loss("kill", 1, 5, 4, 1.0, 2.0, 9, 1, "")
    fair = Fairness(4, 1.0, 1, {}, 4, 2, load_of(1, 1).summary)
    sentences = head_scale.missed({"losses": [lost], "fairness": fair}, 1000)
    assert sentences == ["2 starts were overtaken by later ones", "kill: 4 of 5 told, 1 failed elsewhere"]


def test_the_plot_shows_the_cost_over_the_nodes_with_labelled_axes(tmp_path: Path) -> None:
    from benchmarks.simulator.plot import plot

    plot([Growth(nodes, load_of(25, 3.0 * nodes), 0.1) for nodes in (1, 10, 200)], tmp_path / "growth.svg")
    drawn = (tmp_path / "growth.svg").read_text()
    for words in ("CPU time of the head (ms)", "added to a start by the head (ms)", ">nodes</text>", ">200</text>"):
        assert words in drawn


def test_a_part_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        head_scale.main(["--parts", "raw,speed"])
    assert ended.value.code == 2
    assert "no such part: speed" in capsys.readouterr().err
