"""``launch.py shell`` on a real Slurm: in sandboxes and on the nodes of jobs, with and without a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import OrdinaryUser, fresh_folder, leaving_nothing
from tests.runs import WITH_SANDBOXES, Run, cancelled, launch, squeue, until, with_sandboxes

pytestmark = [pytest.mark.slurm, pytest.mark.podman, pytest.mark.verbs]

SMALL = ("CPUS_FOR_RUNTIME=2", "RUNTIME_MEMORY=2G", "GPUS_PER_NODE=0")
STEP_S = 60.0  # for a step to begin, on a busy machine


@dataclass
class Shells:
    """Calls of ``launch.py shell`` about one run."""

    user: OrdinaryUser
    checkout: Path
    run: Run

    def argv(self, *words: str) -> list[str]:
        return [str(self.checkout / "slurm" / "launch.py"), "shell", *words]

    def call(self, *words: str, user: OrdinaryUser | None = None) -> subprocess.CompletedProcess[str]:
        return (user or self.user).run(self.argv(str(self.run.directory), *words), timeout=2 * STEP_S)

    def piped(self, text: str, *words: str) -> subprocess.CompletedProcess[str]:
        script = 'printf %s "$0" | "$@"'
        return self.user.run(["bash", "-c", script, text, *self.argv(str(self.run.directory), *words)], timeout=STEP_S)

    @property
    def sandboxes(self) -> list[dict[str, str]]:
        found: list[dict[str, str]] = json.loads(self.run.text("sandboxes.json"))
        return found

    def steps(self) -> str:
        """The names of all steps of the run's jobs."""
        jobs = ",".join(self.run.jobs.values())
        return squeue(self.user, "--steps", "-j", jobs, "-o", "%j")


@contextlib.contextmanager
def run_with_sandboxes(user: OrdinaryUser, checkout: Path, name: str, *settings: str) -> Iterator[Shells]:
    with leaving_nothing(user):
        run, _urls = with_sandboxes(user, checkout, fresh_folder(user, name), *SMALL, *settings)
        try:
            yield Shells(user, checkout, run)
        finally:
            user.run([str(checkout / "slurm" / "launch.py"), "cancel", str(run.directory)])


@pytest.fixture(scope="module")
def shells(user: OrdinaryUser, checkout: Path) -> Iterator[Shells]:
    """A run with two sandboxes, s0 and s1."""
    with run_with_sandboxes(user, checkout, "shells") as made:
        yield made


class Terminal:
    """A command of a user's on a terminal of its own."""

    def __init__(self, user: OrdinaryUser, argv: list[str]) -> None:
        self.main, side = pty.openpty()
        os.chown(os.ttyname(side), user.uid, -1)
        self.process: subprocess.Popen[bytes] = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *argv],
            env={**user.environment, "TERM": "xterm"},
            cwd=user.home,
            user=user.uid,
            group=user.gid,
            extra_groups=[],
            stdin=side,
            stdout=side,
            stderr=side,
        )
        os.close(side)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.main, text.encode())

    def read_until(self, text: str, seconds: float = STEP_S) -> None:
        """Read what is shown until that has come."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < end, self.shown
            self.read()

    def read(self) -> None:
        ready, _, _ = select.select([self.main], [], [], 0.2)
        with contextlib.suppress(OSError):  # the other side is closed
            self.shown += os.read(self.main, 4096).decode(errors="replace") if ready else ""

    def end(self, seconds: float = STEP_S) -> int:
        """Its exit code, once it has ended."""
        until_s = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < until_s, self.shown
            self.read()
        return self.process.returncode

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_exc: object) -> None:
        os.close(self.main)  # which hangs up
        self.process.kill()
        self.process.wait()


# --- runs of their own: before the fixture's, since they check that nothing of the user's is left ---------------------


def test_a_heterogeneous_job_and_its_end(user: OrdinaryUser, checkout: Path) -> None:
    """Open shells do not hold up the end of the run: two terminals, one of them in a sandbox."""
    with run_with_sandboxes(user, checkout, "het_shells", "PAIRING=het") as shells:
        run = shells.run
        for options, kind in ((["--training"], "training"), (["--runtime"], "runtime")):
            assert shells.call(*options, "--", "hostname").stdout == f"{run.node(kind)}\n"
        with contextlib.ExitStack() as stack:
            terminals = [
                stack.enter_context(Terminal(user, shells.argv(str(run.directory), *words)))
                for words in (["s0"], ["--runtime"], ["--training"])
            ]
            for number, terminal in enumerate(terminals):
                terminal.read_until("$ " if number else "# ")
                terminal.type(f"echo =$(({number} + 40))=\r")
                terminal.read_until(f"={number + 40}=")
            cancelled(lambda: user.run([str(checkout / "slurm" / "launch.py"), "cancel", str(run.directory)]))
            for terminal in terminals:
                assert terminal.end() != 0
        gone = shells.call("s0", "--", "true")
        assert gone.returncode == 69
        assert " has no node to go to: runtime job" in gone.stderr
        assert gone.stderr.count("\n") == 1


def test_a_run_that_does_not_run_yet(user: OrdinaryUser, checkout: Path, jobs_base: Path) -> None:
    with leaving_nothing(user):
        run = launch(user, checkout, jobs_base, *SMALL, "CPU_SBATCH_ARGS=--begin=now+3600", WITH_SANDBOXES)
        shells = Shells(user, checkout, run)
        for words in (["s0"], [], ["--runtime"], ["--training"]):
            done = shells.call(*words)
            assert done.returncode == 69
            assert "(pending) has no node to go to: " in done.stderr
            assert "PENDING" in done.stderr
        user.run([str(checkout / "slurm" / "launch.py"), "cancel", str(run.directory)])


# --- a run that goes on -----------------------------------------------------------------------------------------------


def test_a_command_in_a_sandbox(shells: Shells) -> None:
    script = "echo out; echo err >&2; exit 7"
    done = shells.call("s0", "--", "sh", "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")
    assert shells.piped("one\ntwo\n", "s1", "--", "cat").stdout == "one\ntwo\n"
    quoted = "a b $HOME 'c' \\"
    assert shells.call("s1", "--", "echo", quoted, "--", "-x").stdout == f"{quoted} -- -x\n"


def test_a_sandbox_sees_no_key_but_its_own(shells: Shells) -> None:
    key = shells.run.text("runtime_api_key.txt").strip()
    seen = shells.call("s0", "--", "env").stdout
    assert f"SESSION_API_KEY={shells.sandboxes[0]['session_api_key']}\n" in seen
    assert key
    assert key not in seen
    strange = [line for line in seen.splitlines() if line.startswith(("SLURM_", "SKYRL_", "CONTAINERS_"))]
    assert [line.partition("=")[0] for line in strange] == ["SKYRL_SHELL"]


def test_by_which_names_a_sandbox_is_known(shells: Shells) -> None:
    first = shells.sandboxes[0]
    for name in (first["session_id"], first["runtime_id"], first["runtime_id"][:9], f"sandbox-{first['runtime_id']}"):
        done = shells.call(name, "--", "sh", "-c", "echo $SESSION_API_KEY")
        assert done.stdout.strip() == first["session_api_key"], done.stderr
    for name, words in (("s", "'s' means 2 sandboxes: s0 ("), ("nonesuch", "no sandbox 'nonesuch' lives on")):
        done = shells.call(name, "--", "true")
        assert done.returncode == 2
        assert words in done.stderr
        assert "s0 (localhost/skyrl-busybox:latest, running), s1 (" in done.stderr
        assert done.stderr.count("\n") == 1


def test_on_the_nodes_of_the_jobs(shells: Shells) -> None:
    for options, kind in (([], "training"), (["--training"], "training"), (["--runtime"], "runtime")):
        done = shells.call(*options, "--", "sh", "-c", 'hostname; echo "$SLURM_JOB_ID"; pwd')
        wanted = f"{shells.run.node(kind)}\n{shells.run.jobs[kind]}\n{shells.run.directory}\n"
        assert done.stdout == wanted, done.stderr
    named = shells.call("--runtime", "--", "podman", "ps", "--format", "{{.Names}}").stdout.split()
    assert sorted(named) == sorted(f"sandbox-{sandbox['runtime_id']}" for sandbox in shells.sandboxes)
    here = shells.call("--node", shells.run.node("training"), "--", "hostname")
    assert here.stdout == f"{shells.run.node('training')}\n"
    wrong = shells.call("--node", "nonesuch", "--", "hostname")
    assert wrong.returncode == 2
    assert f"--node nonesuch: the training job {shells.run.jobs['training']} runs on " in wrong.stderr


def test_a_terminal_in_a_sandbox(shells: Shells) -> None:
    with Terminal(shells.user, shells.argv(str(shells.run.directory), "s0")) as terminal:
        terminal.read_until("# ")
        terminal.type("test -t 0 && echo on a ter''minal\r")
        terminal.read_until("on a terminal")
        terminal.type("sleep 1600\r")
        until("what is to be interrupted", lambda: _has(shells.user, "sleep 1600"), STEP_S)
        terminal.type("\x03echo =$((40 + 2))=\r")
        terminal.read_until("=42=")
        terminal.type("exit 3\r")
        assert terminal.end() == 3
        assert "srun: error" not in terminal.shown
    assert shells.run.state("runtime") == "RUNNING"


def test_a_terminal_on_a_node(shells: Shells) -> None:
    with Terminal(shells.user, shells.argv(str(shells.run.directory), "--training")) as terminal:
        terminal.read_until("$ ")
        terminal.type("echo =$(hostname)=\r")
        terminal.read_until(f"={shells.run.node('training')}=")
        assert f"training job {shells.run.jobs['training']} on " in terminal.shown
        terminal.type("exit 0\r")
        assert terminal.end() == 0


def test_ctrl_c_is_the_commands_own(shells: Shells) -> None:
    script = "trap 'echo =heard=' INT; sleep 1601; sleep 2; echo =went on=; exit 5"
    with Terminal(
        shells.user, shells.argv(str(shells.run.directory), "--training", "--", "sh", "-c", script)
    ) as terminal:
        until("what is to be interrupted", lambda: _has(shells.user, "sleep 1601"), STEP_S)
        terminal.type("\x03")
        terminal.read_until("=went on=")
        assert terminal.end() == 5
        assert "=heard=" in terminal.shown


def test_a_terminal_that_is_closed_ends_what_runs_in_it(shells: Shells) -> None:
    with Terminal(shells.user, shells.argv(str(shells.run.directory), "s1")) as terminal:
        terminal.read_until("# ")
        terminal.type("trap '' HUP; sleep 1234 &\r")
        until("what runs in it", lambda: _has(shells.user, "sleep 1234"), STEP_S)
    until("its end", lambda: not _has(shells.user, "sleep 1234"), STEP_S)
    until("the end of its step", lambda: "skyrl-shell" not in shells.steps(), STEP_S)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP, signal.SIGINT])
def test_a_shell_that_is_ended_leaves_nothing(shells: Shells, number: int) -> None:
    marker = 1000 + number
    argv = shells.argv(str(shells.run.directory), "s0", "--", "sleep", str(marker))
    process = shells.user.popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until("its step", lambda: _has(shells.user, f"sleep {marker}"), STEP_S)
    process.send_signal(number)
    process.communicate(timeout=STEP_S)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    until("the end of its step", lambda: "skyrl-shell" not in shells.steps(), STEP_S)
    until("the end of its command", lambda: not _has(shells.user, f"sleep {marker}"), STEP_S)


SUBMITS = """
options="-p $SLURM_JOB_PARTITION -w $(hostname) -n 1 -c 1 --mem=50 -o /dev/null"
id=$(sbatch --parsable $options --wrap "exec sleep $0")
for _ in $(seq 240); do
    [ "$(squeue -h -j "$id" -o %T)" = RUNNING ] && pgrep -fx "sleep $0" >/dev/null && exec echo "$id"
    sleep 0.25
done
"""


def test_a_job_that_is_submitted_in_a_shell_outlives_it(shells: Shells) -> None:
    """Though it has the shell's environment, and runs on the same node."""
    done = shells.call("--runtime", "--", "sh", "-c", SUBMITS, "1700")
    job_id = done.stdout.strip()
    assert job_id.isdigit(), done.stderr
    try:
        until("the end of the shell's step", lambda: "skyrl-shell" not in shells.steps(), STEP_S)
        assert _has(shells.user, "sleep 1700")
        state = squeue(shells.user, "-j", job_id, "-o", "%T").strip()
        assert state == "RUNNING"
    finally:
        shells.user.run(["scancel", job_id])
    until("its end", lambda: not _has(shells.user, "sleep 1700"), STEP_S)


def _has(user: OrdinaryUser, words: str) -> bool:
    return any(line.strip() == words for line in user.processes().values())


def test_another_users_run(shells: Shells, other_user: OrdinaryUser) -> None:
    done = shells.call("s0", "--", "true", user=other_user)
    assert done.returncode == 2
    assert f"cannot be read: it is {shells.user.name}'s" in done.stderr
