"""``launch.py logs``: what it prints, of which runs, to whom, and how it ends. On a real Slurm: test_slurm_logs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slurm.lib.observe.log_lines import cleaned
from slurm.lib.observe.log_merge import Origin
from slurm.lib.verbs.logs import labels
from tests.fake_slurm import FakeSlurm
from tests.observed_runs import folder_of
from tests.runs import until
from tests.test_looking_verbs import ROOT, Terminal, call, environment

LIVES = {"stdout": "74|RUNNING|None|cpu-a|g|user|1|1:00|20:00|skyrl\n75|RUNNING|None|gpu-a|g|user|1|1:00|20:00|skyrl\n"}
OURS = "2026-11-28 18:32:48 [INFO] "
ENDS = "2026-11-28 18:32:48 [ERROR] training job 75 ends with exit code 7"
LATEST_S = 60.0
RECORDED = [path.name for path in sorted((ROOT / "tests" / "observed").iterdir()) if [*path.rglob("*.out")]]


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path / "fake")


@pytest.fixture
def base(slurm: FakeSlurm) -> Path:
    slurm.jobs.mkdir()
    return slurm.jobs


@pytest.fixture
def failed(base: Path) -> Path:
    """The directory of a run that failed."""
    return added(base, "failed")


def added(base: Path, name: str) -> Path:
    return Path(shutil.copytree(folder_of(name), base / folder_of(name).name))


def lines_of(folder: Path) -> Counter[str]:
    """All lines of a run's logs; those once that stand in both of a job's."""
    found: Counter[str] = Counter()
    for out in folder.glob("*_*.out"):
        said, erred = (
            Counter(map(cleaned, path.read_text().split("\n")[:-1])) for path in (out, out.with_suffix(".err"))
        )
        found += said | erred
    return found


# --- what is shown ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECORDED)
def test_all_lines_of_a_real_run_come_once_and_in_order(name: str, slurm: FakeSlurm, base: Path) -> None:
    folder = added(base, name)
    done = call(slurm, "logs", "--json", str(folder))
    assert (done.returncode, done.stderr) == (0, "")
    shown = [json.loads(line) for line in done.stdout.splitlines()]
    assert Counter(line["text"] for line in shown) == lines_of(folder)
    assert (times := forward(shown)) == sorted(times)
    told = [line for line in shown if not line["estimated"]]
    assert all(re.search(r"\d\d:\d\d:\d\d", line["text"]) for line in told)
    assert slurm.everything == [], "a run that has logs is shown without Slurm"


def forward(shown: list[dict[str, Any]]) -> list[str]:
    """The times of lines; in a log that several processes write time may go back a second: that of the line before."""
    last: dict[str, str] = {}
    times = []
    for line in shown:
        last[line["job"]] = max(line["at"], last.get(line["job"], ""))
        times.append(last[line["job"]])
    return times


def test_each_line_begins_with_its_job(slurm: FakeSlurm, base: Path) -> None:
    failed, chained, requeued = (added(base, name) for name in ("failed", "chained", "requeued"))
    prefixes = [
        {re.split(" [|!]( |$)", line)[0] for line in call(slurm, "logs", str(folder)).stdout.splitlines()}
        for folder in (failed, chained, requeued)
    ]
    assert prefixes == [
        {"runtime ", "training"},
        {"runtime 1 ", "training 1", "runtime 2 ", "training 2"},
        {"runtime 1      ", "training 1     ", "runtime 2 (158)", "runtime 2 (184)", "training 2     "},
    ]


def test_the_names_of_jobs_have_one_width() -> None:
    origins = [
        Origin("training", "133", 1, "out"),
        Origin("training", "134", 1, "out"),
        Origin("runtime", "1", 1, "out"),
    ]
    assert list(labels(1, origins).values()) == ["training (133)", "training (134)", "runtime       "]
    assert list(labels(3, origins[:1]).values()) == ["training 1"], "where there may be several attempts"
    assert labels(1, []) == {}


def test_what_the_trainer_said_on_stderr_is_marked(slurm: FakeSlurm, failed: Path) -> None:
    err, out = failed / "training_75.err", failed / "training_75.out"
    err.write_text("Traceback (most recent call last):\n\nValueError: too large\n" + err.read_text())
    *before, end = out.read_text().splitlines(keepends=True)
    out.write_text("".join([*before, "Traceback (most recent call last):\n\nValueError: too large\n", end]))
    shown = call(slurm, "logs", failed.name).stdout.splitlines()
    at = shown.index("training ! ValueError: too large")
    assert shown[at - 2 : at] == ["training ! Traceback (most recent call last):", "training !"]
    assert any("[ERROR] training job 75 ends with exit code 7" in line for line in shown[at:]), "the cause comes first"


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["--training"], 13),
        (["--runtime"], 21),
        (["-n", "1"], 2),
        (["--lines", "2", "--training"], 2),
        (["-n", "0"], 0),
        (["--since", "2026-11-28T18:32:49+00:00"], 2),
        (["--since", "2026-11-28T18:32:49+00:00", "--training"], 0),
        (["--since", "1d", "--grep", "never there"], 0),
        (["--grep", "exit code [67]"], 3),
        (["--grep", r"^2026-\S+ \S+ \[ERROR\]"], 1),
    ],
)
def test_which_lines_are_shown(words: list[str], count: int, slurm: FakeSlurm, failed: Path) -> None:
    done = call(slurm, "logs", failed.name, *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == count, done.stdout


def test_a_line_for_scripts(slurm: FakeSlurm, failed: Path) -> None:
    (line,) = call(slurm, "logs", failed.name, "--json", "--grep", "ends with exit code 7").stdout.splitlines()
    assert json.loads(line) == {
        "schema": 1,
        "at": "2026-11-28T18:32:48.000+00:00",
        "estimated": False,
        "kind": "training",
        "job": "75",
        "attempt": 1,
        "stream": "err",
        "text": f"{ENDS}: the trainer failed with exit code 7",
    }


def test_a_run_is_named_in_each_way(slurm: FakeSlurm, failed: Path) -> None:
    shown = {
        call(slurm, "logs", name).stdout for name in ("75", "74", failed.name, failed.name[:-1], "latest", str(failed))
    }
    assert len(shown) == 1


def test_a_local_run_is_shown_too(slurm: FakeSlurm, base: Path) -> None:
    added(base, "local_completed")
    done = call(slurm, "logs", "local9351.1", "--training", "-n", "1")
    assert done.returncode == 0
    assert "training job local9351.1 ends with exit code 0" in done.stdout


def test_logs_may_be_links(slurm: FakeSlurm, failed: Path, tmp_path: Path) -> None:
    """As of jobs that were given to sbatch directly."""
    whole = call(slurm, "logs", failed.name).stdout
    for path in failed.glob("*.out"):
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    assert call(slurm, "logs", failed.name).stdout == whole


def test_one_file_for_both_streams_is_shown_once(slurm: FakeSlurm, failed: Path, tmp_path: Path) -> None:
    """As Slurm's slurm-75.out."""
    file = tmp_path / "slurm-75.out"
    (failed / "training_75.out").rename(file)
    (failed / "training_75.err").unlink()
    for suffix in ("out", "err"):
        (failed / f"training_75.{suffix}").symlink_to(file)
    done = call(slurm, "logs", "--training", failed.name)
    assert [line.partition(" | ")[2] for line in done.stdout.splitlines()] == file.read_text().splitlines()


# --- what is not as it should be --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ([], "the following arguments are required: RUN"),
        (["nonesuch"], "there is no run 'nonesuch'"),
        (
            ["latest", "--grep", "("],
            r"argument --grep: '(' is no regular expression: missing ), unterminated subpattern",
        ),
        (
            ["latest", "--grep", "a{99999999999999999999}"],
            "is no regular expression: the repetition number is too large",
        ),
        (["latest", "--since", "soon"], "argument --since: 'soon' is no time; write it as 10m, 1h30m, 14:20, or 2026-"),
        (["latest", "--since", "2099-01-01"], "argument --since: '2099-01-01' is still to come: it is 20"),
        (["latest", "--since", "999999d"], "argument --since: "),
        (["latest", "-n", "-1"], "argument -n/--lines: '-1' is no number of lines"),
        (["latest", "--runtime", "--training"], "argument --training: not allowed with argument --runtime"),
    ],
)
def test_a_mistake_is_one_sentence(words: list[str], what: str, slurm: FakeSlurm, failed: Path) -> None:
    done = call(slurm, "logs", *words)
    assert done.returncode == 2, done
    assert what in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_log_that_cannot_be_read_is_named_and_the_others_are_shown(slurm: FakeSlurm, failed: Path) -> None:
    (failed / "training_75.out").unlink()
    (failed / "training_75.out").symlink_to("/nonexistent/slurm-75.out")
    done = call(slurm, "logs", failed.name)
    assert done.returncode == 71
    assert done.stderr.count("\n") == 1
    what = "training_75.out cannot be read: it is a link to /nonexistent/slurm-75.out: No such file or directory"
    assert what in done.stderr
    assert "runtime job 74 ends" in done.stdout


def test_half_of_a_run_directory(slurm: FakeSlurm, failed: Path) -> None:
    whole = call(slurm, "logs", failed.name).stdout
    (failed / "run.json").write_text('{"jobs": {"runtime"')
    done = call(slurm, "logs", failed.name)
    assert (done.returncode, done.stdout) == (0, whole)
    (failed / "runtime_74.err").unlink()
    (failed / "training_75.out").unlink()
    assert "runtime job 74 ends" in call(slurm, "logs", failed.name).stdout


def test_a_run_without_logs_says_why(slurm: FakeSlurm, failed: Path) -> None:
    for path in failed.glob("*_7?.*"):
        path.unlink()
    record = json.loads((failed / "run.json").read_text())
    for job in record["jobs"].values():
        del job["ended"]
    (failed / "run.json").write_text(json.dumps(record))
    (failed / "training_complete.flag").unlink()
    pending = "74|PENDING|Resources||c|user|N/A|0:00|20:00|skyrl\n75|PENDING|Dependency||g|user|N/A|0:00|20:00|skyrl\n"
    slurm.answer("squeue", {"stdout": pending}, {"stdout": pending}, {})
    done = call(slurm, "logs", failed.name)
    assert (done.returncode, done.stdout) == (0, "")
    assert f"{failed.name} has no log yet: it is pending; training job 75: PENDING (Dependency): waits" in done.stderr
    assert "runtime job 74: PENDING (Resources): waits for free resources" in done.stderr
    only = call(slurm, "logs", "--runtime", failed.name).stderr
    assert "has no runtime log yet: it is pending; runtime job 74: PENDING (Resources)" in only
    assert "training" not in only
    assert "has no log: it is ended; training job 75: ended" in call(slurm, "logs", failed.name).stderr


def test_what_a_log_says_cannot_touch_the_terminal(slurm: FakeSlurm, failed: Path) -> None:
    with (failed / "training_75.err").open("a") as file:
        file.write("\x1b]0;title\x07\x1b[2J\x1b[31mred\x1b[8mhidden\x9b31m\u202edesrever\x00\n")
    assert "red" in call(slurm, "logs", failed.name).stdout
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", call(slurm, "logs", failed.name).stdout)
    terminal = Terminal(slurm, 200, "logs", "--training", failed.name)
    shown = terminal.read()
    assert terminal.end() == 0
    assert "\x1b[35mtraining \x1b[31m!\x1b[0m \x1b[31mredhiddendesrever\x1b[0m\n" in shown
    assert "\x1b[35mtraining |\x1b[0m 2026-11-28 18:32:48 [INFO] starting the trainer" in shown
    plain = Terminal(slurm, 200, "logs", "--training", failed.name, NO_COLOR="1")
    assert "\x1b" not in plain.read()
    assert plain.end() == 0


def test_a_long_log_needs_little_memory(slurm: FakeSlurm, failed: Path) -> None:
    with (failed / "training_75.out").open("ab") as file:
        file.truncate(file.tell() + 400_000_000)  # a line of nothing
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + f"{OURS}the last\n".encode())
    # Not by ru_maxrss, which a process keeps from the one that it was forked from.
    argv = ["prlimit", "--as=350000000", sys.executable, str(ROOT / "slurm" / "launch.py"), "logs", failed.name]
    done = subprocess.run(argv, env=environment(slurm), capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert b"the last\n" in done.stdout
    assert re.search(rb"\xe2\x80\xa6 \(399\d{6} more bytes\)\n", done.stdout)


def test_a_reader_that_leaves_is_no_error(slurm: FakeSlurm, failed: Path) -> None:
    with (failed / "training_75.out").open("a") as file:
        file.write("a line\n" * 300_000)
    shell = f"{sys.executable} {ROOT}/slurm/launch.py logs latest | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", shell], env=environment(slurm), capture_output=True, text=True, timeout=LATEST_S, check=False
    )
    assert done.stdout.splitlines()[1:] == ["0"]
    assert done.stderr == ""


def test_a_full_disk_is_said(slurm: FakeSlurm, failed: Path) -> None:
    argv = [sys.executable, str(ROOT / "slurm" / "launch.py"), "logs", failed.name]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(argv, env=environment(slurm), stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 71
    assert "cannot write to stdout: No space left on device" in done.stderr
    assert done.stderr.count("\n") == 1


# --- followed ---------------------------------------------------------------------------------------------------------


class Following:
    """``launch.py logs -f`` in the background."""

    def __init__(self, slurm: FakeSlurm, *words: str) -> None:
        argv = [sys.executable, str(ROOT / "slurm" / "launch.py"), "logs", "-f", *words]
        self.out, self.err = slurm.folder / "followed.out", slurm.folder / "followed.err"
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(argv, env=environment(slurm), stdout=out, stderr=err)

    def sees(self, text: str) -> None:
        until(text, lambda: text in self.out.read_text() + self.err.read_text(), LATEST_S)

    def code(self) -> int:
        return self.process.wait(LATEST_S)


@pytest.fixture
def running(slurm: FakeSlurm, failed: Path) -> Path:
    """The same run, of which nobody has said yet that it ended."""
    record = json.loads((failed / "run.json").read_text())
    told = {kind: job.pop("ended") for kind, job in record["jobs"].items()}
    (failed / "run.json").write_text(json.dumps(record))
    (failed / "ended.json").write_text(json.dumps(told))
    (failed / "training_complete.flag").unlink()
    for path in failed.glob("*_7?.*"):
        path.write_text("")
    slurm.answer("squeue", *[LIVES] * 99)
    return failed


def end(folder: Path) -> None:
    """The jobs say that they have ended."""
    record: dict[str, Any] = json.loads((folder / "run.json").read_text())
    for kind, told in json.loads((folder / "ended.json").read_text()).items():
        record["jobs"][kind]["ended"] = told
    (folder / "beside").write_text(json.dumps(record))
    (folder / "beside").replace(folder / "run.json")


@pytest.fixture
def followed(slurm: FakeSlurm, running: Path) -> Iterator[Following]:
    found = Following(slurm, running.name)
    try:
        yield found
    finally:
        found.process.kill()
        found.process.wait()


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_a_run_is_followed_to_its_end(slurm: FakeSlurm, running: Path, followed: Following) -> None:
    out, err = running / "training_75.out", running / "training_75.err"
    append(out, f"{OURS}starting the trainer\n")
    followed.sees(f"training | {OURS}starting the trainer\n")
    append(out, "step 1")
    append(running / "runtime_74.out", f"{OURS}API server ready\n")
    followed.sees(f"runtime  | {OURS}API server ready\n")
    append(out, "/3\n")
    followed.sees("training | step 1/3\n")
    append(running / "training_76.out", "another job's first\n")  # of a next attempt
    followed.sees("training (76) | another job's first\n")
    out.write_text("begun again\n")
    followed.sees("training (75) | begun again\n")
    followed.sees("training_75.out was begun again, and is shown from its beginning")
    append(err, "ValueError: too large\nno end")
    end(running)
    assert followed.code() == 7
    assert followed.out.read_text().endswith("training (75) ! no end\n")
    assert "ValueError: too large" in followed.out.read_text()
    assert ": failed" in followed.err.read_text()
    assert len([call for call in slurm.everything if call.name == "squeue"]) < 10, "Slurm is asked seldom"


def test_a_followed_run_that_has_ended_ends_at_once(slurm: FakeSlurm, failed: Path) -> None:
    whole = call(slurm, "logs", failed.name).stdout
    done = call(slurm, "logs", "--follow", failed.name)
    assert (done.returncode, done.stdout) == (7, whole)


def test_a_run_that_is_withdrawn_ends_with_the_code_that_cancel_writes(slurm: FakeSlurm, running: Path) -> None:
    """Slurm knows of the end a moment before the run's directory does."""
    slurm.answer("squeue", *[{"stdout": LIVES["stdout"].replace("RUNNING", "CANCELLED")}] * 99)
    following = Following(slurm, running.name)
    try:
        following.sees(": cancelled")
        end(running)
        assert following.code() == 7
    finally:
        following.process.kill()


def test_ctrl_c_ends_the_following_and_not_the_run(slurm: FakeSlurm, running: Path, followed: Following) -> None:
    followed.sees(": running")
    followed.process.send_signal(signal.SIGINT)
    assert followed.code() == 130
    assert not [call for call in slurm.calls if call.name in {"scancel", "scontrol"}]


def test_a_following_whose_reader_has_left_ends_though_nothing_comes(slurm: FakeSlurm, running: Path) -> None:
    append(running / "training_75.out", f"{OURS}one\n{OURS}two\n")
    argv = [sys.executable, str(ROOT / "slurm" / "launch.py"), "logs", "-f", running.name]
    with subprocess.Popen(argv, env=environment(slurm), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as shown:
        assert shown.stdout
        assert shown.stderr
        assert b"one" in shown.stdout.readline()
        shown.stdout.close()
        try:
            assert shown.wait(LATEST_S) == 0
        finally:
            shown.kill()
        assert b"Traceback" not in shown.stderr.read()


def test_a_followed_directory_that_goes_away(slurm: FakeSlurm, running: Path, followed: Following) -> None:
    append(running / "training_75.out", f"{OURS}one\n")
    followed.sees("one")
    shutil.rmtree(running)
    assert followed.process.wait(LATEST_S) == 71
    assert "is gone, or cannot be read any more" in followed.err.read_text()
