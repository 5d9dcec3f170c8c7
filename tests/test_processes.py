"""Child processes: how they end, with us, before us and after us."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from slurm.lib.errors import EnvironmentProblem, WaitTimeout
from slurm.lib.guardian import end_session, guarded, session_members
from slurm.lib.processes import (
    Child,
    ChildSpec,
    descendants,
    first_bytes,
    kill_descendants,
    pids,
    run,
    start_ticks,
    write_through,
)
from slurm.lib.under_way import end_those_of

CODE = Path(__file__).resolve().parent.parent


def until(condition: object, seconds: float = 10) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come about in time"
        time.sleep(0.02)


def spec(*argv: str, death_signal: int = signal.SIGKILL) -> ChildSpec:
    return ChildSpec(argv, os.environ, "a child", death_signal=death_signal)


def test_a_failing_command_is_a_result() -> None:
    done = run(["sh", "-c", "echo out; echo err >&2; exit 3"], timeout_s=5)
    assert (done.returncode, done.stdout, done.complaint) == (3, "out\n", "err")


def test_a_command_that_is_killed_with_all_descendants_has_not_succeeded() -> None:
    """Whoever waits for a command must hear how it ended, whatever else ends all descendants meanwhile."""
    codes: list[int] = []

    def ask() -> None:
        codes.extend(run(["sleep", "60"], timeout_s=60).returncode for _ in range(40))

    spared = descendants({os.getpid()})
    asking = threading.Thread(target=ask)
    asking.start()
    end = time.monotonic() + 60
    while asking.is_alive() and time.monotonic() < end:
        kill_descendants(spared)
        time.sleep(0.01)
    asking.join(0)
    assert codes == [-signal.SIGKILL] * 40


def test_a_missing_program_is_named() -> None:
    with pytest.raises(EnvironmentProblem, match="no-such-program: not found"):
        run(["no-such-program"], timeout_s=5)


def test_a_command_that_hangs_is_ended() -> None:
    with pytest.raises(WaitTimeout, match="sleep: no answer within"):
        run(["sleep", "60"], timeout_s=0.1)


BODY = """
import sys, threading
sys.path.insert(0, {code!r})
from slurm.lib.edge import exit_code_of
from slurm.lib.errors import WaitTimeout
from slurm.lib.processes import run

def ask(begun):
    while True:
        try:
            begun.set()
            run(("sh", "-c", "sleep 300 & wait"), timeout_s=600, environment=dict(PATH="/usr/bin:/bin", OF={mark!r}))
        except WaitTimeout as problem:
            assert "since nobody waits for it any more" in str(problem)

def work(notes):
    for _ in range(4):
        begun = threading.Event()
        threading.Thread(target=ask, args=(begun,), daemon=True).start()
        begun.wait()
    print(run(["echo", "asked"], timeout_s=10).stdout, end="")
    return 3

code = exit_code_of(work, "%s")
print(run(["echo", "the", "main", "thread", "goes", "on"], timeout_s=10).stdout, end="")
sys.exit(code)
"""


def test_a_command_that_a_thread_waits_for_does_not_outlive_the_process() -> None:
    """Nor one that it would start next, whenever it is at it."""
    mark = f"SKYRL_TEST_{os.getpid()}"
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", BODY.format(code=str(CODE), mark=mark)], capture_output=True)
        assert (done.returncode, done.stdout) == (3, b"asked\nthe main thread goes on\n"), done.stderr
        left = started_with(f"OF={mark}")
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left, "left"


def test_what_a_command_leaves_in_the_background_ends_with_it() -> None:
    """The leader has ended by then; its number is ours until it is waited for."""
    begin = time.monotonic()
    with pytest.raises(WaitTimeout):
        run(
            ["sh", "-c", "sleep 300 & echo $! >&2; exit 0"],
            timeout_s=0.3,
            environment={"OF": f"the-background-{os.getpid()}"},
        )
    assert time.monotonic() - begin < 10
    until(lambda: not started_with(f"OF=the-background-{os.getpid()}"))


def test_the_first_bytes_are_not_waited_for_by_a_thread_that_is_dismissed() -> None:
    said: list[bytes | None] = []

    def ask() -> None:
        environment = {"PATH": "/usr/bin:/bin", "OF": f"the-first-{os.getpid()}"}
        said.append(first_bytes(["sh", "-c", "sleep 300"], 5, timeout_s=60, environment=environment, cwd=CODE))

    asking = threading.Thread(target=ask)
    asking.start()
    until(lambda: len(started_with(f"OF=the-first-{os.getpid()}")) > 0)
    end_those_of([asking])
    asking.join(10)
    assert said == [None]
    until(lambda: not started_with(f"OF=the-first-{os.getpid()}"))


@pytest.mark.parametrize(
    ("words", "most", "said"),
    [
        ("printf abc", 9, b"abc"),
        ("printf abcdef; sleep 20", 3, b"abc"),
        ("printf abc; exit 3", 9, None),
        ("printf abc; sleep 20", 9, None),
        ("printf abc; sleep 20 & exit 0", 9, b"abc"),  # it holds the pipe
        ("yes", 10**6, b"y\n" * (10**6 // 2)),
    ],
)
def test_the_first_bytes(words: str, most: int, said: bytes | None) -> None:
    begin = time.monotonic()
    environment = {"PATH": "/usr/bin:/bin"}
    limit_s = 0.8 if said is None else 60
    assert first_bytes(["sh", "-c", words], most, timeout_s=limit_s, environment=environment, cwd=CODE) == said
    assert time.monotonic() - begin < 10


def test_a_thread_that_is_dismissed_hears_of_no_end_of_its_command() -> None:
    """A job that sbatch has submitted just then may be there all the same."""
    heard: list[str] = []

    def ask() -> None:
        for _ in range(2):
            try:
                run(["sleep", "300"], timeout_s=60)
            except WaitTimeout as problem:
                heard.append(str(problem))

    asking = threading.Thread(target=ask)
    asking.start()
    until(lambda: len(descendants({os.getpid()})) > 0)
    end_those_of([asking])
    asking.join(10)
    assert ["ended, since" in heard[0], "not started, since" in heard[1]] == [True, True], heard


def test_a_thread_that_works_for_one_that_is_dismissed_starts_nothing(tmp_path: Path) -> None:
    """git is asked in a new thread each time."""
    (tmp_path / "git").write_text("#!/bin/sh\nexec sleep 300\n")
    (tmp_path / "git").chmod(0o755)
    code = f"""
        import sys, threading, time
        sys.path.insert(0, {str(CODE)!r})
        from slurm.lib import git
        from slurm.lib.edge import exit_code_of

        def ask():
            while True:
                git.ask(git.Path("/"), "status")

        def work(notes):
            threading.Thread(target=ask, daemon=True).start()
            time.sleep(0.3)
            return 3

        code = exit_code_of(work, "%s")
        time.sleep(0.3)  # in which it would go on
        sys.exit(code)
    """
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "OF": f"the-heir-{os.getpid()}"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True)
    assert done.returncode == 3, done.stderr
    assert not started_with(f"OF=the-heir-{os.getpid()}")


def started_with(entry: str) -> list[int]:
    found = []
    for pid in pids():
        with contextlib.suppress(OSError):
            if entry.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(pid)
    return found


def test_a_child_ends_with_its_block_with_all_its_group() -> None:
    with Child(spec("sh", "-c", "trap '' TERM; sleep 60 & sleep 60"), stop_grace_s=0.2) as child:
        until(lambda: len(session_members(child.pid)) == 3)
    until(lambda: session_members(child.pid) == [])
    assert child.exit_code == 128 + signal.SIGKILL


def test_a_child_that_obeys_keeps_its_exit_code() -> None:
    words = "trap 'exit 5' TERM; echo x; while :; do sleep 0.05; done"
    with Child(ChildSpec(("sh", "-c", words), os.environ, "a child", stdout=subprocess.PIPE)) as child:
        assert child.process.stdout
        with child.process.stdout as said:
            assert said.readline() == b"x\n", "its trap is set"
    assert child.exit_code == 5


def test_start_ticks_tell_processes_apart() -> None:
    assert start_ticks(os.getpid()) is not None
    assert start_ticks(2**22 + 1) is None


OWNER = """
import os, subprocess, sys
from pathlib import Path
sys.path.insert(0, {code!r})
from slurm.lib.guardian import guarded
from slurm.lib.processes import Child, ChildSpec
with guarded(Path({code!r})) as guardian:
    child = Child(ChildSpec(("sh", "-c", "sleep 300 & sleep 300"), os.environ, "a trainer"))
    guardian.own_session(child.pid)
    print(child.pid, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_after_the_owner_is_killed(number: signal.Signals) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER.format(code=str(CODE))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout and owner.stdin
    with owner.stdout, owner.stdin:
        sid = int(owner.stdout.readline())
        try:
            until(lambda: len(session_members(sid)) == 3)
            owner.send_signal(number)
            owner.wait()
            until(lambda: session_members(sid) == [])
        finally:
            for pid in session_members(sid):
                os.kill(pid, signal.SIGKILL)


def test_the_guardian_ends_only_what_it_was_told() -> None:
    with Child(spec("sleep", "60")) as child:
        ticks = start_ticks(child.pid)
        assert ticks is not None
        end_session(child.pid, ticks + 1)
        time.sleep(0.3)  # one that was killed is gone by then
        assert child.exit_code is None, "another process of the same number"
        end_session(child.pid, ticks)
        until(lambda: child.exit_code is not None)


def test_a_marked_process_in_a_session_of_its_own_is_ended() -> None:
    marked = {**os.environ, "SKYRL_TRAINER": "7.abc"}
    command = ("sh", "-c", "setsid sleep 300 & setsid sleep 300 & wait")
    with Child(ChildSpec(command, marked, "a trainer")) as child:
        until(lambda: len(descendants({child.pid})) == 2)
        daemons = descendants({child.pid})
        with guarded(CODE) as guardian:
            guardian.own_marker("SKYRL_TRAINER", "7.ab")
        time.sleep(0.3)
        assert descendants({child.pid}) == daemons, "another trainer's"
        with guarded(CODE) as guardian:
            guardian.own_marker("SKYRL_TRAINER", "7.abc")
        until(lambda: not any(start_ticks(pid) for pid in daemons))


def test_a_marked_process_of_another_job_is_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that sbatch was asked for in a shell, which starts on the same node with the shell's environment."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    marked = {**os.environ, "SKYRL_SHELL": "abc"}
    theirs = ChildSpec(("sleep", "300"), {**marked, "SLURM_JOB_ID": "77"}, "another job")
    own = ChildSpec(("sleep", "300"), marked, "its own")
    in_sandbox = ChildSpec(("sleep", "300"), {"SKYRL_SHELL": "abc", "PATH": os.defpath}, "in a sandbox")
    with Child(theirs) as other, Child(own) as first, Child(in_sandbox) as second:
        with guarded(CODE) as guardian:
            guardian.own_marker("SKYRL_SHELL", "abc")
        until(lambda: first.exit_code == second.exit_code == 128 + signal.SIGKILL)
        assert other.exit_code is None


def test_the_guardian_reads_no_code_where_a_person_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ctypes", "contextlib", "slurm"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'was_read')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    with Child(ChildSpec(("sleep", "300"), {**os.environ, "SKYRL_SHELL": "ab"}, "a shell")) as child:
        with guarded(CODE) as guardian:
            guardian.own_marker("SKYRL_SHELL", "ab")
        until(lambda: child.exit_code == 128 + signal.SIGKILL)
    assert not (tmp_path / "was_read").exists()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    with pytest.raises(EnvironmentProblem, match=f"^cannot start x: the folder {gone} is not there$"):
        Child(ChildSpec(("sleep", "1"), os.environ, "x", cwd=gone))
    with pytest.raises(EnvironmentProblem, match=r"^cannot start x: nonesuch not found; is it on PATH"):
        Child(ChildSpec(("nonesuch",), os.environ, "x", cwd=tmp_path))


def test_a_wait_for_a_command_ends_when_it_is_pointless() -> None:
    def stop() -> None:
        raise EnvironmentProblem("pointless")

    with pytest.raises(EnvironmentProblem, match="pointless"):
        run(["sleep", "60"], timeout_s=60, check=stop)


def test_an_environment_too_large_for_any_command_is_said() -> None:
    with pytest.raises(EnvironmentProblem, match="cannot start true: Argument list too long"):
        run(["true"], timeout_s=5, environment={"X": "x" * 200_000, "PATH": os.environ["PATH"]})


def test_a_sink_that_fails_does_not_end_the_child() -> None:
    command = ("sh", "-c", "for i in 1 2 3; do echo $i >&2 || exit 9; sleep 0.05; done")
    lines: list[bytes] = []
    spec = ChildSpec(command, os.environ, "a child", stderr=subprocess.PIPE)
    with Path("/dev/full").open("w") as full, Child(spec) as child:
        child.copy_stderr(write_through(full), lines.append)
        until(lambda: child.exit_code is not None)
    assert child.exit_code == 0
    assert lines == [b"1\n", b"2\n", b"3\n"]
