"""How a run is named on a command line, and what is said where a name means none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slurm.lib.coordination import CoordinationDir
from slurm.lib.errors import UsageError
from slurm.lib.runs import find, run_folders
from slurm.lib.scheduler import Slurm
from tests.fake_slurm import FakeSlurm

NAMES = ("20260101_000000_11", "20260101_000000_117", "20260102_120000_21", "20260102_130000_local5.0")


@pytest.fixture
def door(tmp_path: Path) -> Slurm:
    """A Slurm that knows no job."""
    return Slurm({"PATH": FakeSlurm(tmp_path / "fake").path})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    for name in NAMES:
        folder = tmp_path / "base" / name
        folder.mkdir(parents=True)
        job_id = name.rpartition("_")[2]
        (folder / "run.json").write_text(json.dumps({"jobs": {"runtime": {"id": job_id}}}))
    return tmp_path / "base"


@pytest.mark.parametrize(
    ("prefix", "name"),
    [
        ("20260102_13", NAMES[3]),
        ("20260102_12", NAMES[2]),
        ("20260101_000000_117", NAMES[1]),
        ("20260101_000000_11", NAMES[0]),  # a whole name is no prefix of another
    ],
)
def test_a_run_by_the_beginning_of_its_name(prefix: str, name: str, base: Path, door: Slurm) -> None:
    assert find(prefix, base, door, 1.0).directory == CoordinationDir(base / name)


def test_runs_of_one_second_are_ordered_by_their_jobs(base: Path) -> None:
    (base / "20260101_000000_9").mkdir()
    assert [path.name.rpartition("_")[2] for path in run_folders(base)] == ["local5.0", "21", "117", "11", "9"]


def test_an_ambiguous_beginning_lists_what_it_may_mean(base: Path, door: Slurm) -> None:
    for prefix, count in (("20260102_", 2), ("20260102_1", 2)):
        with pytest.raises(UsageError) as refused:
            find(prefix, base, door, 1.0)
        assert f"'{prefix}' is the beginning of {count} runs' names" in str(refused.value)
        assert NAMES[2] in str(refused.value)
        assert NAMES[3] in str(refused.value)


def test_a_number_alone_is_a_jobs_id(tmp_path: Path, base: Path, door: Slurm) -> None:
    """A wrong id must not mean some run of this year: it may be named to be cancelled."""
    for number in ("2", "2026", "20260102", "20260101"):
        with pytest.raises(UsageError, match=rf"no run with a job {number} \(a number alone is a job's id\)"):
            find(number, base, door, 1.0)
    folder = base / "20270101_000000_31"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"jobs": {"runtime": {"id": "31"}, "training": {"id": "20260102"}}}))
    assert find("20260102", base, door, 1.0).directory == CoordinationDir(folder)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(prefix=st.text(alphabet="0126_lo", min_size=1, max_size=18))
def test_a_beginning_never_means_another_run(prefix: str, base: Path, door: Slurm) -> None:
    try:
        found = find(prefix, base, door, 1.0).directory
    except UsageError:
        return
    assert found is not None
    named = [path.name for path in run_folders(base) if path.name.startswith(prefix)]
    by_id = found.path.name.endswith(f"_{prefix}")
    assert by_id or found.path.name == prefix or (named == [found.path.name] and not prefix.isdigit())


def test_a_folder_that_tells_nothing_says_what_it_lacks(base: Path, door: Slurm) -> None:
    (base / "20270101_000000_31").mkdir()
    for name in ("20270101_000000_31", str(base / "20270101_000000_31")):
        with pytest.raises(UsageError, match=r"no run\.json is there"):
            find(name, base, door, 1.0)
