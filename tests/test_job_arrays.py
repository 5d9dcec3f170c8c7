"""Slurm's words about job arrays, as a real controller (22.05.8) said them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slurm.lib.job_arrays import arrays_of, folded, is_slurms, is_task, shown_ids
from slurm.lib.processes import Completed
from slurm.lib.scheduler import JobState, Slurm, parse_accounted, parse_shown, parse_statuses, parse_use
from tests.fake_slurm import FakeSlurm

# A runtime job, an array of three of which one runs, and one that is held; the controller as it answered.
TASKS = """\
2 2_2|PENDING|Resources||test|ann|1795926132|0:00|12:00:00|skyrl-worker
2 2_3|PENDING|Resources||test|ann|1795926132|0:00|12:00:00|skyrl-worker
3 3_4|PENDING|JobHeldUser||test|ann|N/A|0:00|12:00:00|skyrl-worker
1 1|RUNNING|None|cpu-a|test|ann|1795882931|0:03|12:00:00|skyrl-runtime
6 2_1|RUNNING|None|cpu-b|test|ann|1795882932|0:02|12:00:00|skyrl-worker
"""
# Without -r, as a list of what a user has.
UNFOLDED = "2 2_[2-3]|PENDING|Resources||test|ann|N/A|0:00|12:00:00|skyrl-worker\n"
THROTTLED = "3 3_[3-6%2]|PENDING|JobHeldUser||test|ann|N/A|0:00|12:00:00|skyrl-worker\n"
# After the tasks that waited were cancelled: one line without a task.
CANCELLED = """\
2 2|CANCELLED|Resources||test|ann|1795883014|0:00|12:00:00|skyrl-worker
1 1|RUNNING|None|cpu-a|test|ann|1795882931|0:06|12:00:00|skyrl-runtime
6 2_1|COMPLETED|None|cpu-b|test|ann|1795882932|0:04|12:00:00|skyrl-worker
"""
SACCT = """\
1|1|CANCELLED by 0|cpu-a|test|ann|1795882931|00:00:06|12:00:00|0:0|skyrl-runtime
4|2_1|COMPLETED|cpu-b|test|ann|1795882932|00:00:04|12:00:00|0:0|skyrl-worker
2|2_[2-3]|CANCELLED by 0|None assigned|test|ann|None|00:00:00|Partition_Limit|0:0|skyrl-worker
"""
USE = """\
4|2_1|4|00:00.023|100|1||600000M|billing=100,cpu=100,mem=600000M,node=1|
4.batch|2_1.batch|4|00:00.023|100|1|4444K||cpu=100,mem=600000M,node=1|cpu=00:00:00,energy=0,mem=4444K
2|2_[2-3]|0|00:00:00|100|0||600000M||
"""


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path / "slurm")


def test_each_task_is_known_by_its_number_in_the_array() -> None:
    shown = parse_shown(TASKS)
    assert {job_id: job.word for job_id, job in shown.items()} == {
        "2_2": "PENDING",
        "2_3": "PENDING",
        "3_4": "PENDING",
        "1": "RUNNING",
        "2_1": "RUNNING",
    }
    assert shown["2_1"].number == "6", "srun takes no other"
    assert (shown["2_2"].number, shown["1"].number) == ("", "")


def test_what_waits_is_read_also_where_it_is_folded() -> None:
    assert list(parse_shown(UNFOLDED)) == ["2_2", "2_3"]
    assert list(parse_shown(THROTTLED)) == ["3_3", "3_4", "3_5", "3_6"]


@pytest.mark.parametrize(
    ("shown", "ids"),
    [
        ("124_1", ["124_1"]),
        ("124_[2-5%3]", ["124_2", "124_3", "124_4", "124_5"]),
        ("124_[1,3-4]", ["124_1", "124_3", "124_4"]),
        ("124_[0-6:3]", ["124_0", "124_3", "124_6"]),
        ("124+1", ["9"]),
        ("124_[1-9999999]", []),
        ("124_[1,...]", ["9"]),
        ("", ["9"]),
    ],
)
def test_the_ids_of_a_line(shown: str, ids: list[str]) -> None:
    assert shown_ids("9", shown) == ids


@settings(deadline=None)
@given(st.text("0123456789_[]-,:%.", max_size=30))
def test_no_text_is_an_error(text: str) -> None:
    shown_ids("9", text)
    parse_shown(f"9 {text}|RUNNING|None|n|p|u|N/A|0:00|1:00|x\n")
    parse_accounted(f"9|{text}|RUNNING|n|p|u|N/A|0:00|1:00|0:0|x\n")
    assert is_task(text) <= is_slurms(text)


def test_the_status_of_tasks_and_of_a_whole_array() -> None:
    answer = Completed(("squeue",), 0, "".join("|".join(line.split("|")[:4]) + "\n" for line in TASKS.splitlines()), "")
    found = parse_statuses(answer, ["1", "2_1", "2_3", "2_9", "2", "3"])
    assert [found[job_id].state for job_id in ("1", "2_1", "2_3")] == [
        JobState.RUNNING,
        JobState.RUNNING,
        JobState.PENDING,
    ]
    assert found["2_9"].state is JobState.PURGED
    assert found["2"].state is JobState.RUNNING, "one of its tasks runs"
    assert found["3"].state is JobState.PENDING


def test_tasks_that_were_cancelled_in_the_queue_are_told_by_their_array(slurm: FakeSlurm) -> None:
    slurm.answer("squeue", {"stdout": CANCELLED})
    known = Slurm({"PATH": slurm.path}).known(["1", "2_1", "2_2", "2_3", "5"])
    assert known is not None
    assert {job_id: (job.job_id, job.word) for job_id, job in known.items()} == {
        "1": ("1", "RUNNING"),
        "2_1": ("2_1", "COMPLETED"),
        "2_2": ("2_2", "CANCELLED"),
        "2_3": ("2_3", "CANCELLED"),
    }
    (call,) = slurm.of("squeue")
    assert "1,2,5" in call.argv, "each array is asked about once: tasks that ended are not found by their own ids"
    assert "-r" in call.argv


def test_accounting_of_tasks(slurm: FakeSlurm) -> None:
    slurm.answer("sacct", {"stdout": SACCT}, {"stdout": USE})
    door = Slurm({"PATH": slurm.path})
    told = door.accounted(["1", "2_1", "2_2", "2_3"], "2026-11-01T00:00:00")
    assert {job_id: job.word for job_id, job in told.items()} == {
        "1": "CANCELLED",
        "2_1": "COMPLETED",
        "2_2": "CANCELLED",
        "2_3": "CANCELLED",
    }
    assert "--jobs=1,2" in slurm.everything[0].argv
    used = door.use(["2_1"], "2026-11-01T00:00:00")
    assert [row.step for row in used["2_1"]] == ["", "batch"]
    assert used["2_1"][1].memory_peak_bytes == 4444 * 1024
    assert parse_use(USE)["2_3"][0].elapsed_s == 0


def test_own_jobs_by_name_are_arrays(slurm: FakeSlurm) -> None:
    slurm.answer("squeue --user", {"stdout": "2 2_[2-3]\n4 4_[4]\n6 2_1\n1 1\n8 7+1\n"})
    assert Slurm({"PATH": slurm.path}).own_named(["x"]) == ["1", "2", "4", "8"]


def test_ids_for_people() -> None:
    assert folded(["124_1", "124_2", "124_3", "124_7"]) == "124_[1-3,7]"
    assert folded(["124_1", "125", "126_9"]) == "124_1, 125, 126_9"
    assert folded([]) == ""
    assert arrays_of(["124_1", "124_2", "9", "local1.0"]) == ["124", "9", "local1.0"]
