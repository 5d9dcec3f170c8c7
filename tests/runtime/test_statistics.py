"""What a server counts over the life of its job, and what a next server knows of it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slurm.lib.observe.sandbox_statistics import SandboxStatistics, read_statistics
from slurm_runtime.diagnostics import (
    NO_IMAGE,
    NO_SLOT,
    PODMAN_REFUSED,
    PODMAN_SILENT,
    STOPPED,
    Diagnosis,
    kind_of,
    kind_of_offence,
)
from slurm_runtime.podman import BadArchive, EngineBroke, EngineError, EngineSilent, NoSuchImage, PullFailed
from slurm_runtime.statistics import BOUNDS_S, MOST_REASONS, OTHER, Durations, Statistics, StatisticsFile, kept
from slurm_runtime.steps import StepTimes
from tests.runtime.commands import IMAGE, SERVE
from tests.runtime.conftest import CONFIG, Api, serving
from tests.runtime.fake_podman import FakePodman


def told(statistics: Statistics, slots: int = 4) -> SandboxStatistics:
    """As a command that looks at the run reads them."""
    found = read_statistics(json.dumps({**statistics.told(slots), "at": 1.0}))
    assert found is not None
    return found


def filled() -> Statistics:
    found = Statistics()
    for seconds in (0.2, 0.4, 3.0):
        found.note_asked()
        found.note_started(seconds)
    found.note_asked()
    found.note_failed(NO_IMAGE)
    found.note_ended(STOPPED)
    found.note_living(3)
    found.requests.note(0.01)
    with found.steps.of("create"):
        time.sleep(0.002)
    return found


# --- figures ----------------------------------------------------------------------------------------------------------


def test_quantiles_are_at_most_a_tenth_too_high() -> None:
    durations = Durations()
    values = [0.001 * 1.013**step for step in range(1000)]
    for value in values:
        durations.note(value)
    for share in (0.01, 0.5, 0.9, 0.99, 1.0):
        exact = values[round(share * len(values)) - 1]
        assert exact <= (durations.quantile(share) or 0) <= exact * 1.1 + 1e-6
    assert durations.quantile(1.0) == max(values)
    assert durations.sum == pytest.approx(sum(values))


@pytest.mark.parametrize("value", [0.0, 1e-6, BOUNDS_S[7], BOUNDS_S[-1], 5000.0])
def test_what_was_written_is_read_back(value: float) -> None:
    durations = Durations()
    for one in (value, 0.5, value, 0.07):
        durations.note(one)
    assert Durations.read(json.loads(json.dumps(durations.told()))) == durations


def test_the_reader_reads_what_the_server_counts() -> None:
    found = told(filled(), slots=7)
    assert (found.starts.asked, found.starts.succeeded, found.starts.failed) == (4, 3, {NO_IMAGE: 1})
    assert (found.start_seconds.count, found.start_seconds.max) == (3, 3.0)
    assert found.start_seconds.p50 == pytest.approx(0.4, rel=0.1)
    assert found.start_seconds.buckets[-1] == (3.0, 3)
    assert found.steps["create"].count == 1
    assert (found.steps["create"].sum or 0) >= 0.002
    assert (found.peak_living, found.slots, found.ended, found.requests.count) == (3, 7, {STOPPED: 1}, 1)


def test_nothing_counted_yet() -> None:
    found = told(Statistics())
    assert (found.starts.asked, found.start_seconds.count, found.start_seconds.p50) == (0, 0, None)


def test_reasons_are_bounded() -> None:
    statistics = Statistics()
    for number in range(3 * MOST_REASONS):
        statistics.note_failed(f"reason {number}")
    assert len(statistics.failed) == MOST_REASONS + 1
    assert statistics.failed[OTHER] == 2 * MOST_REASONS


@pytest.mark.parametrize(
    ("problem", "kind"),
    [
        (NoSuchImage("x"), NO_IMAGE),
        (PullFailed("x"), NO_IMAGE),
        (BadArchive("x"), NO_IMAGE),
        (EngineSilent("x"), PODMAN_SILENT),
        (EngineBroke("x"), PODMAN_SILENT),
        (EngineError("x"), PODMAN_REFUSED),
    ],
)
def test_what_a_failure_of_podman_is_counted_as(problem: Exception, kind: str) -> None:
    assert kind_of(problem) == kind


def test_what_other_deaths_are_counted_as() -> None:
    assert kind_of_offence("it ran 300 processes and threads and may run 200") == "too many processes"
    assert kind_of_offence("it used 3.0 GiB of memory and may use 2.0 GiB") == "out of memory"
    assert kind_of_offence("it filled 3.0 GiB of disk and may fill 2.0 GiB") == "too much disk"
    assert Diagnosis("it ended", "", out_of_memory=True).counted_as == "out of memory"
    assert Diagnosis("it ended", "").counted_as == "its program ended"


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_next_server_goes_on_counting(tmp_path: Path) -> None:
    path, first = tmp_path / "statistics.json", filled()
    with StatisticsFile(path, lambda: first.told(4)):
        pass
    assert path.stat().st_mode & 0o777 == 0o600
    second = kept(path, True, StepTimes())
    assert second.told(4) == first.told(4)
    second.note_asked()
    with second.steps.of("create"):
        pass
    assert (second.asked, told(second).steps["create"].count) == (5, 2)
    assert kept(path, False, StepTimes()).asked == 0


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema":2}', '{"schema":1}', "[" * 50_000])
def test_a_damaged_file_begins_anew(text: str, tmp_path: Path) -> None:
    path = tmp_path / "statistics.json"
    path.write_text(text)
    assert kept(path, True, StepTimes()) == Statistics()


def test_buckets_that_cannot_be_are_not_believed() -> None:
    data = {**filled().told(4), "requests": {"buckets": [[1.0, 5], [2.0, 3]], "sum": 1.0, "max": 2.0}}
    assert Statistics.read(json.dumps(data), StepTimes()) == Statistics()


def test_it_is_written_when_something_changed(tmp_path: Path) -> None:
    path, statistics, written = tmp_path / "statistics.json", Statistics(), list[str]()

    class Noting(StatisticsFile):
        def _write(self, text: str) -> None:
            super()._write(text)
            written.append(text)

    with Noting(path, lambda: statistics.told(4)) as file:
        for _ in range(3):
            file.look()
            _until(lambda: len(written) == 1)
            time.sleep(0.05)
        statistics.note_asked()
        file.look()
        _until(lambda: len(written) == 2)
        assert json.loads(path.read_text())["starts"]["asked"] == 1
    assert len(written) == 2
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    statistics = Statistics()
    with StatisticsFile(tmp_path / "nowhere" / "statistics.json", lambda: statistics.told(4)) as file:
        for _ in range(3):
            statistics.note_asked()
            file.look()
            time.sleep(0.05)
    assert caplog.text.count("are not written") == 1


def test_a_disk_that_hangs_does_not_delay_the_end(tmp_path: Path) -> None:
    pipe = tmp_path / "statistics.json"
    hangs, goes_on = threading.Event(), threading.Event()

    class Hanging(StatisticsFile):
        def _write(self, text: str) -> None:
            hangs.set()
            goes_on.wait(30)

    begin = time.monotonic()
    with Hanging(pipe, lambda: Statistics().told(4)) as file:
        file.look()
        assert hangs.wait(10)
        begin = time.monotonic()
        file.look()
    took = time.monotonic() - begin
    goes_on.set()
    assert took < 10  # 0.5 s; a machine may be busy


def _until(reached: Any) -> None:
    end = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


# --- a whole server ---------------------------------------------------------------------------------------------------


@pytest.fixture
def few(tmp_path: Path) -> Iterator[Api]:
    config = replace(CONFIG, statistics_file=tmp_path / "statistics.json", list_patience_s=5.0, string_patience_s=5.0)
    with serving(FakePodman(), config, slots=2) as api:
        yield api


def test_what_a_server_did(few: Api) -> None:
    def start(session: str, **more: Any) -> Any:
        return few.start(**{"image": IMAGE, "command": SERVE, "working_dir": "/", "session_id": session, **more})

    sandboxes = [start(f"s{number}").json() for number in range(2)]
    assert start("s0").json()["runtime_id"] == sandboxes[0]["runtime_id"]  # the one that lives is no new start
    assert start("no room").status_code == 503
    assert start("too large", resource_factor=8).status_code == 422
    for sandbox in sandboxes:
        _until(lambda sandbox=sandbox: few.manager.by_runtime(sandbox["runtime_id"]).state.name == "READY")
    assert few.client.post("/stop", json={"runtime_id": sandboxes[0]["runtime_id"]}).status_code == 200
    assert start("unknown image", image="localhost/nonesuch:1").status_code >= 400
    few.client.get("/health")

    found = told(few.manager.statistics)
    assert (found.starts.asked, found.starts.succeeded) == (5, 2)
    assert found.starts.failed == {NO_SLOT: 1, "it needs more slots than there are": 1, NO_IMAGE: 1}
    assert found.ended == {STOPPED: 1}
    assert (found.start_seconds.count, found.peak_living) == (2, 2)
    assert found.requests.count == 7  # not that for /health
    assert found.steps["create"].count >= 2
