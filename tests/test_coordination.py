"""What the two jobs leave for each other, and what a reader believes of it."""

from __future__ import annotations

import json
import os
import re
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm.lib import coordination
from slurm.lib.coordination import CoordinationDir, Counter, CounterWatch, Flag, FlagReader, parse_flag, parse_object
from slurm.lib.errors import EnvironmentProblem
from slurm.lib.run_record import job_ids


def ours(flag: Flag) -> bool:
    return flag.runtime_job_id == "7"


def test_a_file_is_never_seen_half_written(tmp_path: Path) -> None:
    path = tmp_path / "value.txt"
    seen: set[str] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            text = coordination.read_if_there(path)
            seen.add("absent" if text is None else f"{text[:1]}{len(text)}")

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(200):
        coordination.write_atomically(path, str(number % 10) * 200_000)
    done.set()
    reader.join()
    assert {entry[1:] for entry in seen if entry != "absent"} <= {"200000"}
    assert [path.name for path in tmp_path.iterdir()] == ["value.txt"]


def test_the_key_is_private_from_its_first_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    real_open = os.open

    def watching_open(path: str, flags: int, mode: int = 0o777) -> int:
        opened.append(mode)
        return real_open(path, flags, mode)

    monkeypatch.setattr(os, "open", watching_open)
    CoordinationDir(tmp_path).publish_key("k")
    assert opened == [0o600]
    assert stat.S_IMODE((tmp_path / "runtime_api_key.txt").stat().st_mode) == 0o600


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o277])
def test_the_mode_does_not_depend_on_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        coordination.write_atomically(tmp_path / "flag", "text", 0o644)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "flag").stat().st_mode) == 0o644


def test_who_writes_only_what_is_absent_learns_whether_it_was(tmp_path: Path) -> None:
    assert coordination.write_if_absent(tmp_path / "flag", "first")
    assert not coordination.write_if_absent(tmp_path / "flag", "second")
    assert (tmp_path / "flag").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["flag"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"cannot write .*nowhere/runtime_url\.txt: No such file"):
        CoordinationDir(tmp_path / "nowhere").publish_url("http://h:1")


def test_a_flag_of_this_attempt_is_believed(tmp_path: Path) -> None:
    directory = CoordinationDir(tmp_path)
    reader = FlagReader.of_new_directory(directory.training_complete, ours)
    assert reader.read() is None
    directory.publish(directory.training_complete, Flag.of_this_host("8", "7", 3, "broke"))
    flag = reader.read()
    assert flag is not None
    assert (flag.job_id, flag.exit_code, flag.reason) == ("8", 3, "broke")


def test_a_flag_of_another_attempt_is_ignored(tmp_path: Path) -> None:
    directory = CoordinationDir(tmp_path)
    directory.publish(directory.training_complete, Flag.of_this_host("8", "6", 0))
    assert FlagReader.of_new_directory(directory.training_complete, ours).read() is None


@pytest.mark.parametrize("text", ["{", '{"schema": 1', "[]", '{"schema": 2}', "7", '{"schema": 1, "exit_code": "x"}'])
def test_a_half_written_or_foreign_flag_is_ignored(tmp_path: Path, text: str) -> None:
    path = tmp_path / "f.flag"
    path.write_text(text)
    assert FlagReader.of_new_directory(path, lambda _flag: True).read() is None


def test_a_touched_flag_counts_if_it_is_newer_than_the_attempt(tmp_path: Path) -> None:
    path = tmp_path / "training_complete.flag"
    path.touch()
    reader = FlagReader.from_now(path, ours)
    assert reader.read() is None, "left over from before"
    os.utime(path, ns=(1, 2))
    flag = reader.read()
    assert flag is not None
    assert flag.by_hand


@given(st.text(), st.integers() | st.none())
def test_every_flag_comes_back_as_it_was(reason: str, code: int | None) -> None:
    flag = Flag("1", "2", "host", "now", code, reason)
    assert parse_flag(flag.to_text()) == flag


@given(st.text())
def test_no_text_breaks_the_reader(text: str) -> None:
    parse_flag(text)


SCALARS = st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["--me", "1,2", "7"])
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))


@given(JSON)
def test_no_json_breaks_the_reader(value: object) -> None:
    parse_flag(json.dumps({"schema": 1, "job_id": value, "exit_code": value}))


@given(st.text() | JSON.map(json.dumps) | st.just("[" * 100_000))
def test_an_object_or_nothing(text: str) -> None:
    assert isinstance(parse_object(text), dict)


@given(JSON)
def test_ids_of_jobs_are_words_whatever_a_record_holds(value: object) -> None:
    for jobs in (value, {"training": value}, {"training": {"id": value}}):
        for kind, job_id in job_ids(jobs).items():
            assert kind in {"training", "runtime"}
            assert re.fullmatch(r"\w[\w.+]*", job_id, re.ASCII), "an option of scancel, or several ids"


def test_a_counter_tells_life_by_change_not_by_time(tmp_path: Path) -> None:
    now = [100.0]
    counter, watch = Counter(tmp_path / "beat"), CounterWatch(tmp_path / "beat", clock=lambda: now[0])
    assert watch.age_s() is None
    counter.beat()
    assert watch.age_s() == 0
    now[0] += 5
    assert watch.age_s() == 5
    counter.beat()
    assert watch.age_s() == 0


def test_address_and_key_are_those_that_the_flag_names(tmp_path: Path) -> None:
    directory = CoordinationDir(tmp_path)

    def read() -> tuple[str, str | None] | None:
        flag = parse_flag(directory.runtime_ready.read_text())
        assert flag is not None
        return directory.read_server(flag)

    directory.publish_server("http://h:1", "key 1", Flag("8", "8"))
    assert read() == ("http://h:1", "key 1")
    directory.publish_url("http://h:2")
    assert read() is None, "an old flag with a new address, or the other way round"
    directory.publish_url("http://h:1")
    directory.publish_key("key 2")
    assert read() is None
    directory.runtime_api_key.unlink()
    assert read() is None, "a key that is still to come"
    directory.publish_server("http://h:3", None, Flag("8", "8"))
    assert read() == ("http://h:3", None)
    directory.publish(directory.runtime_ready, Flag("8", "8"))
    assert read() == ("http://h:3", None), "of an older release, or of a script"


def test_a_directory_is_lost_when_it_stays_away(tmp_path: Path) -> None:
    now = [0.0]
    folder = tmp_path / "run"
    folder.mkdir()
    presence = coordination.Presence(folder, clock=lambda: now[0])
    assert not presence.is_lost()
    folder.rename(tmp_path / "elsewhere")
    assert not presence.is_lost()
    now[0] = 9.0
    assert not presence.is_lost()
    (tmp_path / "elsewhere").rename(folder)
    assert not presence.is_lost(), "a file server that stumbled"
    folder.rmdir()
    assert not presence.is_lost()
    now[0] = 19.0
    assert presence.is_lost()


def test_old_is_told_by_the_clock_that_stamps_the_files(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert abs(coordination.server_time(tmp_path) - (tmp_path / "file").stat().st_mtime) < 5
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(EnvironmentProblem, match=f"cannot write in {tmp_path}/nowhere: No such file"):
        coordination.server_time(tmp_path / "nowhere")
