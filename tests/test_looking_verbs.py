"""``launch.py list``, ``status`` and ``wait``: words, tables, terminals and mistakes.

On a real Slurm they are used in test_slurm_status.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slurm.lib.observe.run_view import JobView, Stage
from slurm.lib.observe.sandboxes import Sandboxes
from slurm.lib.observe.unknown import Unknown
from slurm.lib.reports.run_words import about, clock, failed_start_words, job_words, sandbox_words
from slurm.lib.scheduler import clock_s
from slurm.lib.verbs.table import GAP, Column, fitting, lines_of
from tests.fake_slurm import FakeSlurm
from tests.observed_runs import folder_of

ROOT = Path(__file__).resolve().parent.parent
NOW = time.mktime((2026, 11, 28, 13, 0, 0, 0, 0, -1))
PENDING = JobView("training", "12", Stage.PENDING, "PENDING", "Resources")
RUNNING = JobView("training", "12", Stage.RUNNING, "RUNNING", node="gpu-a", elapsed_s=3723.0, limit_s=43200.0)
ENDED = JobView(
    "runtime", "11", Stage.ENDED, exit_code=0, end_reason="training job 12 is complete: it failed (exit code 7)"
)


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (replace(PENDING, starts_at=NOW + 4800), "PENDING (Resources), starts about 14:20"),
        (replace(PENDING, starts_at=NOW + 86400 + 4800), "PENDING (Resources), starts about Sun 29 Nov 14:20"),
        (PENDING, "PENDING (Resources): waits for free resources"),
        (replace(PENDING, reason="ASiteReason"), "PENDING (ASiteReason)"),
        (
            replace(PENDING, reason="ReqNodeNotAvail, UnavailableNodes:cpu-b"),
            "PENDING (ReqNodeNotAvail, UnavailableNodes:cpu-b): its nodes are down, drained or reserved; "
            "sinfo -R tells why",
        ),
        (
            replace(PENDING, reason="Dependency", starts_at=NOW + 60),
            "PENDING (Dependency): waits for the job before it",
        ),
        (replace(PENDING, starts_at=NOW - 900), "PENDING (Resources): waits for free resources"),  # an old estimate
        (RUNNING, "RUNNING on gpu-a, 1:02:03 of 12:00:00"),
        (replace(RUNNING, limit_s=None), "RUNNING on gpu-a, 1:02:03"),
        (replace(RUNNING, word="COMPLETING"), "COMPLETING on gpu-a, 1:02:03 of 12:00:00"),
        (ENDED, "ended with exit code 0: training job 12 has ended"),
        (replace(ENDED, kind="training", exit_code=None, end_reason="it is gone"), "ended: it is gone"),
        (
            JobView("training", "1", Stage.UNKNOWN, why_unknown="Slurm does not answer"),
            "unknown: Slurm does not answer",
        ),
    ],
)
def test_a_job_in_words(job: JobView, words: str) -> None:
    assert job_words(job, NOW) == words


def test_sandboxes_that_did_not_start_in_words() -> None:
    failed = replace(RUNNING, asked_starts=9, failed_starts={"too late": 1, "no image": 4}, failed_start="no x:lates")
    assert failed_start_words(failed) == "5 of 9 starts failed: 4 no image, 1 too late; the last: no x:lates"
    assert failed_start_words(replace(failed, failed_starts={})) == ""


def test_sandboxes_in_words() -> None:
    assert sandbox_words(Sandboxes(3, 4, 7, 0)) == "3 living, 4 of 7 slots used"
    assert sandbox_words(Sandboxes(7, 7, 7, 2)) == "7 living, 7 of 7 slots used, 2 waiting for a slot"
    assert sandbox_words(Unknown("its API server is not reachable from here")).startswith("unknown: its API server")


@settings(deadline=None)  # the machine may be busy
@given(st.integers(0, 300 * 86400))
def test_a_length_of_time_is_written_as_slurm_does(seconds: int) -> None:
    assert clock_s(clock(float(seconds))) == seconds


@settings(deadline=None)  # the machine may be busy
@given(st.floats(0, 2**31), st.floats(0, 2**31))
def test_a_moment_has_its_day_where_that_is_another(moment: float, now: float) -> None:
    same = time.localtime(moment)[:3] == time.localtime(now)[:3]
    assert bool(re.fullmatch(r"\d\d:\d\d", about(moment, now))) is same


# --- tables -----------------------------------------------------------------------------------------------------------

COLUMNS = (Column("NAME", least=4), Column("STATE"), Column("PHASE", least=6, loss=1), Column("MORE", loss=2))
CELLS = st.lists(st.tuples(*[st.text("abc ", max_size=30)] * 4), max_size=4)


@settings(deadline=None)  # the machine may be busy
@given(CELLS, st.integers(1, 120))
def test_a_table_fits_the_terminal_or_has_only_what_stays(rows: list[tuple[str, ...]], width: int) -> None:
    lines = [GAP.join(line) for line in lines_of(COLUMNS, rows, width)]
    widths = fitting(COLUMNS, [[column.title for column in COLUMNS], *rows], width)
    assert len({len(line) for line in lines}) == 1
    assert len(lines[0]) <= width or (widths[2:] == [0, 0] and widths[0] <= 4)
    assert widths[0] and widths[1], "what stays is never dropped"


@settings(deadline=None)  # the machine may be busy
@given(CELLS)
def test_without_a_terminal_every_value_is_whole(rows: list[tuple[str, ...]]) -> None:
    lines = lines_of(COLUMNS, rows, None)
    assert [[cell.rstrip() for cell in line] for line in lines[1:]] == [[cell.rstrip() for cell in row] for row in rows]


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path / "fake")


@pytest.fixture
def base(slurm: FakeSlurm) -> Path:
    """A jobs base with recorded runs: a chain, a failure, one of which only Slurm knows the end."""
    slurm.jobs.mkdir()
    for name in ("chained", "failed", "het_withdrawn", "local_completed"):
        shutil.copytree(folder_of(name), slurm.jobs / folder_of(name).name)
    return slurm.jobs


def environment(slurm: FakeSlurm, **more: str) -> dict[str, str]:
    return {"PATH": slurm.path, "HOME": str(slurm.folder), "SKYRL_JOBS_BASE": str(slurm.jobs), "TZ": "UTC", **more}


def call(slurm: FakeSlurm, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(ROOT / "slurm" / "launch.py"), *words]
    return subprocess.run(argv, env=environment(slurm, **more), capture_output=True, text=True, timeout=90, check=False)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["list", "nonesuch"], "unrecognized arguments"),
        (["status", "--every", "1"], "is no number of seconds from 5"),
        (["status", "--every", "soon"], "is no number of seconds from 5"),
        (["status", "--gpu", "--watch"], "--gpu does not go with --watch"),
        (["wait"], "the following arguments are required: RUN"),
        (["wait", "x", "--timeout", "-1"], "is no number of seconds"),
        (["wait", "nonesuch"], "there is no run 'nonesuch'"),
        (["status", "nonesuch", "latest"], "there is no run 'nonesuch'"),
    ],
)
def test_a_mistake_is_one_sentence(words: list[str], what: str, slurm: FakeSlurm) -> None:
    done = call(slurm, *words)
    assert done.returncode == 2
    assert what in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_no_runs_are_no_error(slurm: FakeSlurm) -> None:
    for verb in ("list", "status"):
        done = call(slurm, verb)
        assert (done.returncode, done.stdout) == (0, f"no runs below SKYRL_JOBS_BASE={slurm.jobs}\n")
    assert json.loads(call(slurm, "list", "--json").stdout)["runs"] == []
    slurm.jobs.write_text("")
    assert call(slurm, "list").returncode == 0


def test_status_without_a_name_shows_what_lives_else_the_latest(slurm: FakeSlurm, base: Path) -> None:
    living = {"stdout": "".join(f"{job}|RUNNING|None|gpu-a|g|user|1|1:00|20:00|skyrl\n" for job in ("219", "220"))}
    slurm.answer("squeue", living)
    (run,) = json.loads(call(slurm, "status", "--json").stdout)["runs"]
    assert (run["run"], run["state"]) == (folder_of("het_withdrawn").name, "running")
    (latest,) = json.loads(call(slurm, "status", "--json").stdout)["runs"]
    assert latest["run"] == folder_of("chained").name


def test_the_newest_are_listed_and_all_that_live(slurm: FakeSlurm, base: Path) -> None:
    for number in range(25):
        shutil.copytree(folder_of("failed"), base / f"20270101_0000{number:02}_74")
    old = folder_of("het_withdrawn").name
    done = call(slurm, "list")
    assert len(done.stdout.splitlines()) == 21
    assert "9 older runs are not shown" in done.stderr
    assert len(call(slurm, "list", "--all").stdout.splitlines()) == 30
    slurm.answer("squeue", *[{"stdout": "219|PENDING|Resources|||user|N/A|0:00|20:00|skyrl\n"}] * 9)
    slurm.forget()
    assert old in call(slurm, "list").stdout


def test_what_a_log_says_cannot_touch_the_terminal(slurm: FakeSlurm, base: Path) -> None:
    folder = base / folder_of("failed").name
    with next(folder.glob("training_*.err")).open("a") as file:
        file.write("ValueError: \x1b]0;title\x07\x1b[2Jgone\r\x9b31m\u202edesrever\n")
    done = call(slurm, "status", folder.name)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", done.stdout)
    assert "gone" in done.stdout


def test_an_error_that_the_end_tells_already_is_not_said_twice(slurm: FakeSlurm, base: Path) -> None:
    folder = base / folder_of("failed").name
    errors = next(folder.glob("training_*.err"))
    for line, shown in (("the trainer failed with exit code 7; stopping it", 0), ("no room on the disk", 1)):
        errors.write_text(f"2026-11-28 18:32:48 [ERROR] {line}\n")
        assert call(slurm, "status", folder.name).stdout.count("training says") == shown


# --- on a terminal ----------------------------------------------------------------------------------------------------


class Terminal:
    """A command on a terminal of so many columns."""

    def __init__(self, slurm: FakeSlurm, columns: int, *words: str, **more: str) -> None:
        self.main, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        argv = [sys.executable, str(ROOT / "slurm" / "launch.py"), *words]
        shell: Mapping[str, Any] = {"stdin": side, "stdout": side, "stderr": subprocess.DEVNULL}
        given = environment(slurm, TERM="xterm", **more)
        self.process = subprocess.Popen(argv, env=given, start_new_session=True, **shell)
        os.close(side)

    def read(self, until: str = "") -> str:
        """What it has shown, until that has come, or it has ended."""
        shown = b""
        while not until or until.encode() not in shown:
            try:
                data = os.read(self.main, 65536)
            except OSError:  # it has ended
                break
            shown += data
        return shown.decode().replace("\r\n", "\n")

    def end(self) -> int:
        code = self.process.wait(60)
        os.close(self.main)
        return code


def test_a_narrow_terminal_loses_columns_and_a_wide_one_none(slurm: FakeSlurm, base: Path) -> None:
    for columns, titles in ((200, 8), (60, 5), (30, 2)):
        terminal = Terminal(slurm, columns, "list", NO_COLOR="1")
        shown = terminal.read()
        assert terminal.end() == 0
        assert all(len(line) <= columns for line in shown.splitlines()), shown
        assert len(shown.splitlines()[0].split()) == titles, shown
        assert folder_of("chained").name in shown
        assert "\x1b" not in shown


def test_colour_is_for_terminals_alone(slurm: FakeSlurm, base: Path) -> None:
    for more, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        terminal = Terminal(slurm, 200, "list", **more)
        assert ("\x1b[31mfailed" in terminal.read()) is coloured
        assert terminal.end() == 0
    assert "\x1b" not in call(slurm, "list").stdout


def test_a_watch_redraws_until_all_have_ended(slurm: FakeSlurm, base: Path) -> None:
    living = {"stdout": "".join(f"{job}|RUNNING|None|gpu-a|g|user|1|1:00|20:00|skyrl\n" for job in ("219", "220"))}
    slurm.answer("squeue", living, {})
    terminal = Terminal(slurm, 100, "status", "--watch", "--every", "5", folder_of("het_withdrawn").name)
    shown = terminal.read()
    assert terminal.end() == 0
    first, second = shown.split("\x1b[H\x1b[2J")[1:]
    assert "RUNNING on gpu-a, 1:00 of 20:00" in first
    assert "how it ended is not known" in second
    assert [call.name for call in slurm.everything].count("squeue") == 2, "one question for each look"


def test_ctrl_c_ends_a_watch_and_not_the_run(slurm: FakeSlurm, base: Path) -> None:
    living = {"stdout": "219|RUNNING|None|gpu-a|g|user|1|1:00|20:00|skyrl\n"}
    slurm.answer("squeue", *[living] * 5)
    terminal = Terminal(slurm, 100, "status", "--watch", "--every", "60", folder_of("het_withdrawn").name)
    terminal.read("directory")
    begin = time.monotonic()
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130
    assert time.monotonic() - begin < 30
    assert not [call for call in slurm.calls if call.name in {"scancel", "scontrol"}]


def test_a_watch_without_a_terminal_says_each_change_once(slurm: FakeSlurm, base: Path) -> None:
    runs = {"stdout": "219|RUNNING|None|gpu-a|g|user|1|1:00|20:00|skyrl\n"}
    slurm.answer("squeue", runs, runs, {})
    done = call(slurm, "status", "--watch", "--every", "5", "--json", folder_of("het_withdrawn").name)
    assert done.returncode == 0
    assert [json.loads(line)["state"] for line in done.stdout.splitlines()] == ["running", "ended"]


# --- wait -------------------------------------------------------------------------------------------------------------


def test_a_wait_outlasts_a_silent_controller(slurm: FakeSlurm, base: Path) -> None:
    """It ends by the run's own word, which comes while Slurm is silent."""
    folder = base / folder_of("het_withdrawn").name
    slurm.answer("squeue", *[{"code": 1, "stderr": "slurm_load_jobs error: Unable to contact slurm controller\n"}] * 9)
    argv = [sys.executable, str(ROOT / "slurm" / "launch.py"), "wait", folder.name]
    wait = subprocess.Popen(argv, env=environment(slurm), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert wait.stderr
    assert "Slurm does not answer" in wait.stderr.readline()
    time.sleep(1.5)
    assert wait.poll() is None
    record = json.loads((folder / "run.json").read_text())
    for kind, code in (("training", 9), ("runtime", 0)):
        record["jobs"][kind]["ended"] = {"exit_code": code, "reason": "as it is", "said_by": kind, "time": ""}
    (folder / "beside").write_text(json.dumps(record))
    (folder / "beside").replace(folder / "run.json")
    out, _ = wait.communicate(timeout=40)
    assert (wait.returncode, out) == (9, f"{folder.name} failed: as it is\n")


def test_a_wait_for_a_run_that_nobody_knows_the_end_of(slurm: FakeSlurm, base: Path) -> None:
    begin = time.monotonic()
    done = call(slurm, "wait", folder_of("het_withdrawn").name)
    assert done.returncode == 69
    assert "no exit code is known" in done.stderr
    assert time.monotonic() - begin > 9, "a controller that was just started may not know a job yet"


def test_a_wait_for_a_directory_that_goes_away(slurm: FakeSlurm, base: Path) -> None:
    slurm.answer("squeue", *[{"stdout": "219|RUNNING|None|gpu-a|g|user|1|1:00|20:00|skyrl\n"}] * 30)
    argv = [sys.executable, str(ROOT / "slurm" / "launch.py"), "wait", folder_of("het_withdrawn").name]
    wait = subprocess.Popen(argv, env=environment(slurm), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert wait.stderr
    assert ": running" in wait.stderr.readline()
    shutil.rmtree(base / folder_of("het_withdrawn").name)
    _, err = wait.communicate(timeout=60)
    assert wait.returncode == 71
    assert "is gone, or cannot be read any more" in err
