"""What ``launch.py report`` reads of what was measured: samples, the API server's statistics, accounting."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slurm.lib.observe.sandbox_statistics import Seconds, Starts, read_statistics
from slurm.lib.observe.usage import GpuSample, Usage, efficiency, from_sacct, read_usage
from slurm.lib.scheduler import AccountedUse, parse_use

GB = 2**30


def line(at: float, cpu_s: float | None, node: str = "gpu-a", **more: Any) -> str:
    return json.dumps({"schema": 1, "at": at, "node": node, "cpus": 4, "cpu_s": cpu_s, "gpus": [], **more})


def card(index: int, busy: float | None, used: float) -> dict[str, object]:
    return {"index": index, "name": "H100", "busy_percent": busy, "used_mib": used, "total_mib": 81920}


# --- samples ----------------------------------------------------------------------------------------------------------


def test_what_the_samples_of_a_node_say() -> None:
    text = "\n".join(
        [
            line(100, 0.0, memory_bytes=2 * GB, memory_limit_bytes=8 * GB, gpus=[card(0, 0, 10), card(1, 50, 10)]),
            line(130, 60.0, memory_bytes=6 * GB, memory_limit_bytes=8 * GB, gpus=[card(0, 100, 60000), card(1, 50, 9)]),
            line(160, 120.0, memory_bytes=4 * GB, memory_limit_bytes=8 * GB),
        ]
    )
    assert efficiency(read_usage(text)) == Usage(
        "samples",
        span_s=60.0,
        cpus=4.0,
        cpu_share=0.5,
        memory_peak_bytes=6 * GB,
        memory_limit_bytes=8 * GB,
        gpus=2,
        gpu_busy_share=0.5,
        gpu_memory_peak_mib=60000.0,
        gpu_memory_total_mib=81920.0,
    )


def test_several_nodes_are_weighed_by_what_they_had() -> None:
    rows = [line(0, 0.0), line(100, 400.0), line(50, 0.0, "gpu-b", cpus=12), line(150, 0.0, "gpu-b", cpus=12)]
    usage = efficiency(read_usage("\n".join(rows)))
    assert (usage.cpus, usage.cpu_share) == (16.0, 0.25)


def test_a_job_that_was_requeued_counts_from_zero_again() -> None:
    rows = [line(0, 0.0), line(10, 40.0), line(20, 0.0), line(30, 40.0), line(40, 40.0)]
    assert efficiency(read_usage("\n".join(rows))).cpu_share == 0.5


@pytest.mark.parametrize("rows", [[], [line(1, 5.0)], [line(1, 5.0), line(1, 9.0)]])
def test_no_share_without_a_span(rows: list[str]) -> None:
    assert efficiency(read_usage("\n".join(rows))).cpu_share is None


def test_unknown_stays_unknown() -> None:
    usage = efficiency(read_usage("\n".join([line(0, 0.0, cpus=None), line(10, 5.0, cpus=None)])))
    assert (usage.cpus, usage.cpu_share, usage.memory_peak_bytes, usage.gpu_busy_share) == (None, None, None, None)
    assert usage.gpus == 0
    assert efficiency(()) == Usage("samples")
    assert efficiency(read_usage("\n".join([line(0, None), line(10, None)]))).cpu_share is None


@pytest.mark.parametrize(
    "damaged",
    [
        line(20, 7.0)[:-5],
        "\0" * 50,
        "[]",
        "3",
        "[" * 100_000,
        line(20, 7.0).replace('"schema": 1', '"schema": 2'),
        line(20, 7.0).replace('"at": 20', '"at": NaN'),
        line(20, 7.0).replace('"at": 20', '"at": true'),
        line(20, 7.0).replace('"at": 20', '"at": 1e999'),
        line(20, 7.0).replace('"at": 20', f'"at": 1{"0" * 5000}'),
    ],
)
def test_a_damaged_line_says_nothing(damaged: str) -> None:
    samples = read_usage("\n".join([line(0, 0.0), damaged, line(10, 20.0)]))
    assert [sample.at for sample in samples] == [0.0, 10.0]


def test_hostile_values_are_none() -> None:
    (sample,) = read_usage(
        line(
            5,
            -1.0,
            node="\x1b[31mbad\nnode",
            cpus="many",
            memory_bytes=float("nan"),
            gpus=[7, {"index": "x"}, {"index": 0, "name": ["a"], "busy_percent": -4, "used_mib": 1e300}],
        )
    )
    assert sample.node == "bad node"
    assert (sample.cpu_s, sample.cpus, sample.memory_bytes) == (None, None, None)
    assert sample.gpus == (GpuSample(0),)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=9,
)
FIELDS = ("at", "node", "cpus", "cpu_s", "memory_bytes", "memory_limit_bytes", "gpus", "starts", "steps", "ended")
OURS = st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=9).map(lambda one: json.dumps({"schema": 1, **one}))


@given(st.lists(OURS | st.text(max_size=99), max_size=5).map("\n".join))
@settings(deadline=None)
def test_whatever_stands_there_is_no_error(text: str) -> None:
    usage = efficiency(read_usage(text))
    assert usage.cpu_share is None or 0 <= usage.cpu_share <= 1
    assert usage.gpu_busy_share is None or 0 <= usage.gpu_busy_share <= 1
    read_statistics(text)
    parse_use(text)


# --- the API server's statistics --------------------------------------------------------------------------------------

STATISTICS = {
    "schema": 1,
    "at": 1234.5,
    "starts": {"asked": 5, "succeeded": 3, "failed": {"no image": 2}},
    "start_seconds": {
        "count": 3,
        "sum": 6.0,
        "p50": 2.0,
        "p90": 3.0,
        "p99": 3.0,
        "max": 3.0,
        "buckets": [[1.0, 1], [5.0, 3]],
    },
    "steps": {"create": {"count": 3, "sum": 0.5}},
    "peak_living": 2,
    "slots": 4,
    "ended": {"stopped": 3},
    "requests": {"count": 100, "p50": 0.01, "p99": 0.5},
}


def test_the_statistics_of_a_server() -> None:
    found = read_statistics(json.dumps(STATISTICS))
    assert found is not None
    assert found.starts == Starts(5, 3, {"no image": 2})
    assert found.start_seconds == Seconds(3, 6.0, 2.0, 3.0, 3.0, 3.0, ((1.0, 1), (5.0, 3)))
    assert found.steps == {"create": Seconds(3, 0.5)}
    assert (found.at, found.peak_living, found.slots, found.ended) == (1234.5, 2, 4, {"stopped": 3})
    assert found.requests == Seconds(100, p50=0.01, p99=0.5)


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps(STATISTICS)[:-9], json.dumps({**STATISTICS, "schema": 2})])
def test_no_statistics_in_what_is_none(text: str) -> None:
    assert read_statistics(text) is None


def test_statistics_of_wrong_types_are_unknown() -> None:
    odd = {"schema": 1, "at": 1, "starts": 3, "steps": [], "slots": True, "ended": {"x\x1b[2J\n": 2, "y": "z"}}
    found = read_statistics(json.dumps(odd | {"start_seconds": {"buckets": [1, [2], ["a", 3], [1.0, -3]]}}))
    assert found is not None
    assert (found.starts, found.steps, found.slots, found.ended) == (Starts(), {}, None, {"x": 2})
    assert found.start_seconds.buckets == ((1.0, 0),)


# --- accounting -------------------------------------------------------------------------------------------------------

SACCT = """\
12|12|100|03:20.500|4|1||8G|billing=4,cpu=4,gres/gpu=2,mem=8G,node=1|
12.batch|12.batch|100|03:20.500|4|1|3145728K||cpu=4,gres/gpu=2,mem=8G,node=1|cpu=00:01:00,gres/gpumem=512M,gres/gpuutil=88,mem=3G
12.extern|12.extern|100|00:00:00|4|1|0||billing=4|
13|13|10|1-02:03:04|2|2||4Gc||
13.0|13.0|10|00:01.250|1|1||4Gc||
"""


def test_what_accounting_says() -> None:
    rows = parse_use(SACCT)
    assert [row.step for row in rows["12"]] == ["", "batch", "extern"]
    assert rows["12"][0] == AccountedUse("12", "", 100.0, 200.5, 4, None, 8 * GB, 2)
    assert from_sacct(rows["12"]) == Usage(
        "sacct",
        span_s=100.0,
        cpus=4,
        cpu_share=200.5 / 400,
        memory_peak_bytes=3 * GB,
        memory_limit_bytes=8 * GB,
        gpus=2,
        gpu_busy_share=0.88,
        gpu_memory_peak_mib=512.0,
    )
    assert rows["13"][0].cpu_s == 26 * 3600 + 3 * 60 + 4
    assert rows["13"][0].memory_bytes == 4 * GB  # of 2 CPUs, on each of 2 nodes
    assert rows["13"][1].cpu_s == 1.25
    assert from_sacct(rows["13"]).memory_peak_bytes is None


def test_of_two_jobs_with_one_id_the_later_counts() -> None:
    rows = parse_use("7|7|5|00:01|1|1||1G||\n7.batch|7.batch|5|00:01|1|1|5K|||\n7|7|9|00:02|1|1||1G||\n")
    assert [row.elapsed_s for row in rows["7"]] == [9.0]


def test_accounting_that_says_nothing() -> None:
    assert parse_use("sacct: error: no database\n") == {}
    assert from_sacct(()) == Usage("sacct")
