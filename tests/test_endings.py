"""Does run.json tell how each job ended, whoever knows it, and whatever order they write in?"""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from slurm.lib.attempts import Attempt
from slurm.lib.coordination import CoordinationDir, Flag, parse_flag
from slurm.lib.endings import End, note_ends
from slurm.lib.helpers import wait_for_training_complete

JOBS = {"runtime": {"id": "7", "name": "skyrl-runtime"}, "training": {"id": "8", "name": "skyrl-train"}}
RUNTIME = End("runtime", "7", 0, "training job 8 is complete", "runtime")
TRAINING = End("training", "8", 3, "the trainer ended with exit code 3", "training")
GONE = End("training", "8", None, "the training job 8 is gone", "runtime")


@pytest.fixture
def directory(tmp_path: Path) -> CoordinationDir:
    (tmp_path / "run.json").write_text(json.dumps({"schema": 1, "user": "me", "jobs": JOBS}))
    return CoordinationDir(tmp_path)


def ended(directory: CoordinationDir, kind: str, file: str = "run.json") -> dict[str, Any]:
    found = json.loads((directory.path / file).read_text())["jobs"][kind].get("ended", {})
    return {name: found[name] for name in ("exit_code", "reason", "said_by") if name in found}


def test_each_job_says_how_it_ended_and_the_rest_of_the_record_stays(directory: CoordinationDir) -> None:
    note_ends(directory, TRAINING)
    note_ends(directory, RUNTIME, End.of_flag("training", Flag("8", "7", exit_code=3, reason="as the flag says")))
    assert ended(directory, "training") == {"exit_code": 3, "reason": TRAINING.reason, "said_by": "training"}
    assert ended(directory, "runtime") == {"exit_code": 0, "reason": RUNTIME.reason, "said_by": "runtime"}
    record = json.loads(directory.run_record.read_text())
    assert (record["user"], record["jobs"]["runtime"]["name"]) == ("me", "skyrl-runtime")


def test_a_jobs_own_word_wins_over_its_partners_and_not_the_other_way_round(directory: CoordinationDir) -> None:
    note_ends(directory, RUNTIME, GONE)
    assert ended(directory, "training")["said_by"] == "runtime"
    note_ends(directory, TRAINING)
    assert ended(directory, "training")["reason"] == TRAINING.reason
    note_ends(directory, GONE)
    assert ended(directory, "training")["reason"] == TRAINING.reason


def test_a_training_without_a_word_gets_its_flag_from_the_runtime(directory: CoordinationDir) -> None:
    note_ends(directory, RUNTIME, GONE)
    flag = parse_flag(directory.training_complete.read_text())
    assert flag is not None
    assert (flag.job_id, flag.runtime_job_id, flag.exit_code, flag.reason) == ("8", "7", None, GONE.reason)
    assert wait_for_training_complete(directory.path, 1) == 69


def test_a_training_that_spoke_keeps_its_flag(directory: CoordinationDir) -> None:
    directory.publish(directory.training_complete, Flag("8", "7", exit_code=3, reason="its own word"))
    note_ends(directory, RUNTIME, GONE)
    assert wait_for_training_complete(directory.path, 1) == 3


def test_a_flag_that_is_not_seen_here_yet_is_not_replaced(
    directory: CoordinationDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an NFS client that still believes in its absence."""
    own = Flag("8", "7", exit_code=7, reason="the trainer failed")
    directory.publish(directory.training_complete, own)
    monkeypatch.setattr("slurm.lib.coordination.is_listed", lambda path: path != directory.training_complete)
    note_ends(directory, RUNTIME, GONE)
    monkeypatch.undo()
    assert parse_flag(directory.training_complete.read_text()) == own
    assert [path.name for path in directory.path.iterdir() if path.name.startswith(".")] == []


def test_the_flag_of_an_earlier_training_is_replaced(directory: CoordinationDir) -> None:
    directory.publish(directory.training_complete, Flag("5", "4", exit_code=0, reason="long ago"))
    note_ends(directory, RUNTIME, GONE)
    flag = parse_flag(directory.training_complete.read_text())
    assert flag is not None
    assert flag.job_id == "8"


@pytest.mark.parametrize(("successor", "speaks"), [({"runtime": "9", "training": "10"}, False), ({}, True)])
def test_nobody_speaks_for_a_training_that_another_attempt_follows(
    directory: CoordinationDir, successor: dict[str, str], speaks: bool
) -> None:
    Attempt(1, {"runtime": "7", "training": "8"}, "", successor).write(directory)
    note_ends(directory, RUNTIME, GONE)
    assert directory.training_complete.exists() == speaks


def test_what_the_training_says_of_its_runtime_is_no_completion(directory: CoordinationDir) -> None:
    note_ends(directory, End("runtime", "7", None, "it is gone", "training"))
    assert not directory.training_complete.exists()


def test_only_the_record_of_the_pair_is_changed(directory: CoordinationDir) -> None:
    other = {"schema": 1, "jobs": {"runtime": {"id": "17"}, "training": {"id": "18"}}}
    for name in ("run_17.json", "run_9.json"):
        (directory.path / name).write_text(json.dumps(other) if name == "run_17.json" else '{"jobs": ')
    note_ends(directory, End("training", "18", 0, "well", "training"))
    assert ended(directory, "training") == {}
    assert ended(directory, "training", "run_17.json")["reason"] == "well"
    assert (directory.path / "run_9.json").read_text() == '{"jobs": '


def test_two_jobs_at_once_both_stand_there_in_the_end(directory: CoordinationDir) -> None:
    for _ in range(20):
        directory.run_record.write_text(json.dumps({"schema": 1, "jobs": JOBS}))
        processes = multiprocessing.get_context("fork")  # as on two nodes, each with a process id of its own
        meet = processes.Barrier(2)

        def end(*ends: End, meet: Any = meet) -> None:
            meet.wait()
            note_ends(directory, *ends)

        pair = [processes.Process(target=end, args=ends) for ends in ((TRAINING,), (RUNTIME,))]
        for process in pair:
            process.start()
        for process in pair:
            process.join()
        assert ended(directory, "training")["reason"] == TRAINING.reason
        assert ended(directory, "runtime")["reason"] == RUNTIME.reason


def test_what_the_other_job_says_while_this_one_writes_is_not_lost(
    directory: CoordinationDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is slow to sync: this one's writing ends long after the other one's last look."""
    sync, others = os.fsync, [(RUNTIME,)]

    def slow(descriptor: int) -> None:
        sync(descriptor)
        if others:
            pid = os.fork()  # as another job: its process id is in the name of what it writes
            if not pid:
                monkeypatch.undo()
                note_ends(directory, *others[0])
                os._exit(0)
            others.clear()
            os.waitpid(pid, 0)

    monkeypatch.setattr(os, "fsync", slow)
    note_ends(directory, TRAINING)
    assert ended(directory, "training").get("reason") == TRAINING.reason
    assert ended(directory, "runtime").get("reason") == RUNTIME.reason


def test_a_folder_that_is_gone_is_a_line_of_log(tmp_path: Path) -> None:
    note_ends(CoordinationDir(tmp_path / "gone"), TRAINING)
    record = tmp_path / "run.json"
    for text in ("", "[]", '{"jobs": []}', '{"jobs": {"training": 8}}'):
        record.write_text(text)
        note_ends(CoordinationDir(tmp_path), TRAINING)
        assert record.read_text() == text
