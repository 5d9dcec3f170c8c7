"""``launch.py shell`` and ``open``: which sandbox is meant, what is said, mistakes.

On a real Slurm they are used in test_slurm_shell and test_slurm_open.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slurm.lib.coordination import CoordinationDir
from slurm.lib.errors import EnvironmentProblem, NotRunning, UsageError
from slurm.lib.node_shell import CLAIM, Container, chosen, parse_containers, with_claim
from slurm.lib.scheduler import shell_argv
from slurm.lib.verbs import open_page
from slurm.lib.verbs.open_page import Page, as_json, as_text, laptop_argv
from slurm.lib.verbs.shell import parsed, split_exit_lines
from tests.fake_slurm import FakeSlurm
from tests.observed_runs import folder_of
from tests.test_looking_verbs import base, call, slurm  # noqa: F401  fixtures

FIRST = Container("c0ffee11", "sandbox-ab12", "s-1", "busybox", "running")
OTHERS = (
    Container("c0ffee22", "sandbox-ab34", "s-2", "busybox", "running"),
    Container("d00d", "sandbox-ffff", "s-10", "busybox", "paused"),
    Container("beef", "theirs", "", "busybox", "running"),
)


# --- which sandbox ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["s-2", "ab34", "ab3", "sandbox-ab34", "c0ffee2", "c0ffee22"])
def test_a_sandbox_is_meant_by_each_of_its_names(name: str) -> None:
    assert chosen((FIRST, *OTHERS), name, "here") is OTHERS[0]


def test_a_whole_name_wins_over_the_beginning_of_others() -> None:
    assert chosen((FIRST, *OTHERS), "s-1", "here") is FIRST
    assert chosen((FIRST, *OTHERS), "theirs", "here").container_id == "beef"


def test_a_container_that_was_made_before_its_session_is_known_by_it(tmp_path: Path) -> None:
    for one in (FIRST, OTHERS[2]):
        claim = tmp_path / "overlay-containers" / one.container_id / CLAIM
        claim.parent.mkdir(parents=True)
        claim.write_text(json.dumps({"skyrl.session": "s-9"}))
    assert with_claim(OTHERS[2], tmp_path).names[0] == "s-9"
    assert with_claim(FIRST, tmp_path) is FIRST  # its own label says it
    assert with_claim(replace(OTHERS[2], container_id="unknown"), tmp_path).session == ""
    (tmp_path / "overlay-containers" / "beef" / CLAIM).write_text("[]")
    assert with_claim(OTHERS[2], tmp_path) is OTHERS[2]


def test_what_means_no_sandbox_names_those_that_live() -> None:
    with pytest.raises(UsageError, match=r"no sandbox 'x' lives on here; there are s-1 \(busybox, running\), s-2 "):
        chosen((FIRST, *OTHERS), "x", "here")
    with pytest.raises(UsageError, match=r"'ab' means 2 sandboxes: s-1 \(busybox, running\), s-2 \(.*; write more"):
        chosen((FIRST, *OTHERS), "ab", "here")
    with pytest.raises(UsageError, match="no sandbox '' lives"):
        chosen((FIRST,), "", "here")
    with pytest.raises(NotRunning, match="no sandbox lives on here"):
        chosen((), "s-1", "here")
    with pytest.raises(NotRunning, match="s-10 on here is paused"):
        chosen((FIRST, *OTHERS), "s-10", "here")
    many = [replace(FIRST, session=f"n{number}") for number in range(30)]
    with pytest.raises(UsageError, match=r"n19 \(busybox, running\) and 10 more$"):
        chosen(many, "x", "here")


def test_containers_as_podman_lists_them() -> None:
    listed = [
        {"Id": "1", "Names": ["sandbox-aa"], "Labels": {"skyrl.session": "s"}, "Image": "i", "State": "Running"},
        {"Id": "2", "Names": None, "Labels": None},
        "no container",
    ]
    assert parse_containers(json.dumps(listed)) == [
        Container("2", "", "", "", ""),
        Container("1", "sandbox-aa", "s", "i", "running"),
    ]
    assert parse_containers("") == parse_containers("null") == []
    with pytest.raises(EnvironmentProblem, match="did not print JSON"):
        parse_containers("Error: no")


# --- the step ---------------------------------------------------------------------------------------------------------


def test_a_step_takes_nothing_from_the_job() -> None:
    argv = shell_argv("7", 1, node="n2", cwd=Path("/r"), terminal=True, command=["x", "--y"])
    assert argv[0] == "srun"
    assert {"--jobid=7", "--het-group=1", "--overlap", "--mem=0", "--ntasks=1", "--nodelist=n2", "--pty"} <= set(argv)
    assert argv[-2:] == ("x", "--y")
    plain = shell_argv("7", None, node="", cwd=Path("/r"), terminal=False, command=["x"])
    assert not [word for word in plain if word.startswith(("--het-group", "--nodelist", "--pty"))]


EXIT_LINE = b"srun: error: cpu-a: task 0: Exited with exit code 3\n"
LINES = st.lists(st.sampled_from([EXIT_LINE, b"srun: error: no such node\n", b"a line\n", b"\n"]))


@settings(deadline=None)  # the machine may be busy
@given(LINES, st.sampled_from([b"", b"s", b"srun: error: c", b"prompt> "]), st.integers(1, 60))
def test_only_the_lines_about_exit_codes_are_left_out(lines: list[bytes], last: bytes, size: int) -> None:
    data = b"".join([*lines, last])
    shown, held = b"", b""
    for at in range(0, len(data), size):
        more, held = split_exit_lines(held + data[at : at + size])
        shown += more
    assert shown + held == b"".join([*(line for line in lines if line != EXIT_LINE), last])


def test_a_prompt_is_shown_at_once() -> None:
    assert split_exit_lines(b"Password: ") == (b"Password: ", b"")
    assert split_exit_lines(b"its last word" + EXIT_LINE) == (b"its last word", b"")
    assert split_exit_lines(b"one\nsrun: error: cp") == (b"one\n", b"srun: error: cp")


def test_a_command_comes_after_two_dashes() -> None:
    arguments, command = parsed(["latest", "s0", "--", "ls", "--", "-l"])
    assert (arguments.run, arguments.sandbox, command) == ("latest", "s0", ["ls", "--", "-l"])
    for words, complaint in ((["r", "s", "ls"], "write -- before the command"), (["r", "--"], "no command after --")):
        with pytest.raises(UsageError, match=complaint):
            parsed(words)


# --- open -------------------------------------------------------------------------------------------------------------

PAGE = Page("20261128_204422_11", "cpu-a", "cpu-a:39299", True, Path("/runs/r/runtime_api_key.txt"))


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who and where we are."""
    monkeypatch.setattr("getpass.getuser", lambda: "you")
    monkeypatch.setattr("socket.getfqdn", lambda: "login1.cluster")


@pytest.mark.parametrize(
    ("page", "port", "tunnel", "words"),
    [
        (PAGE, None, None, "ssh -N -L 39299:cpu-a:39299 you@login1.cluster"),
        (PAGE, 8000, None, "ssh -N -L 8000:cpu-a:39299 you@login1.cluster"),
        (replace(PAGE, reachable=False), None, None, "ssh -N -L 39299:cpu-a:39299 -J you@login1.cluster you@cpu-a"),
        (replace(PAGE, reachable=False), None, 40000, "ssh -N -L 40000:127.0.0.1:40000 you@login1.cluster"),
        (replace(PAGE, reachable=False), 8000, 8000, "ssh -N -L 8000:127.0.0.1:8000 you@login1.cluster"),
        (
            replace(PAGE, host="127.0.0.1", target="127.0.0.1:5000"),
            None,
            None,
            "ssh -N -L 5000:127.0.0.1:5000 you@login1.cluster",
        ),
    ],
)
def test_the_command_for_a_laptop(page: Page, port: int | None, tunnel: int | None, words: str) -> None:
    assert " ".join(laptop_argv(page, port, tunnel)) == words
    assert words in as_text(page, port, tunnel)


def test_a_page_as_json() -> None:
    told = json.loads(as_json(replace(PAGE, reachable=False), 8000))
    assert told == {
        "schema": 1,
        "run": PAGE.run,
        "host": "cpu-a",
        "target": "cpu-a:39299",
        "reachable": False,
        "key_file": "/runs/r/runtime_api_key.txt",
        "url": None,
        "laptop_command": ["ssh", "-N", "-L", "8000:cpu-a:39299", "-J", "you@login1.cluster", "you@cpu-a"],
        "laptop_url": "http://localhost:8000/",
    }


def test_the_name_of_this_host_is_never_localhost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.getfqdn", lambda: "localhost.localdomain")
    assert open_page.own_name() == os.uname().nodename


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://",
        "nonsense",
        "http://h:99999999",
        "http://[fe80",
        "http://$(touch x):1",
        "http://-oProxyCommand=x:1",
        "http://h;reboot:1",
        "http://h:1/\x1b[2J",
        "http://h:1/\nsecond line",
    ],
)
def test_an_address_that_is_none(url: str, tmp_path: Path) -> None:
    with pytest.raises(NotRunning, match="holds no address"):
        open_page.located("r", url, "", CoordinationDir(tmp_path))


def test_a_host_that_is_none_becomes_no_word_of_a_command(tmp_path: Path) -> None:
    """Another user's run directory says where the run was launched from."""
    for host in ("-oProxyCommand=touch x", "h;reboot", "h\nx", "$(reboot)"):
        with pytest.raises(NotRunning, match="names no host that r was launched from"):
            open_page.located("r", "http://127.0.0.1:5000", host, CoordinationDir(tmp_path))


def test_an_address_of_ip_6_stands_in_brackets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_page, "answers", lambda _url: True)
    page = open_page.located("r", "http://[fd00::7]:5000", "", CoordinationDir(tmp_path))
    assert (page.host, page.target, page.server_port) == ("fd00::7", "[fd00::7]:5000", 5000)
    assert "ssh -N -L '5000:[fd00::7]:5000' you@login1.cluster" in as_text(page, None)


def test_a_loopback_address_of_another_host_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What answers there on this host is somebody else's."""
    monkeypatch.setattr(open_page, "answers", lambda _url: True)
    page = open_page.located("r", "http://127.0.0.1:5000", "elsewhere", CoordinationDir(tmp_path))
    assert (page.host, page.target, page.reachable) == ("elsewhere", "127.0.0.1:5000", False)
    assert open_page.located("r", "http://127.0.0.1:5000", "", CoordinationDir(tmp_path)).reachable


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        (["shell"], 2, "the following arguments are required: RUN"),
        (["shell", "nonesuch"], 2, "there is no run 'nonesuch'"),
        (["shell", "latest", "s0", "ls"], 2, "write -- before the command"),
        (["shell", "latest", "s0", "--training"], 2, "SANDBOX goes with neither"),
        (["shell", "latest"], 69, "has no node to go to"),
        (["shell", folder_of("local_completed").name], 69, "has no node to go to"),
        (["open"], 2, "the following arguments are required: RUN"),
        (["open", "nonesuch"], 2, "there is no run 'nonesuch'"),
        (["open", "latest", "--port", "0"], 2, "invalid port value: '0'"),
        (["open", "latest"], 69, "has no page: runtime job"),
    ],
)
def test_a_mistake_is_one_sentence(
    words: list[str],
    code: int,
    what: str,
    slurm: FakeSlurm,  # noqa: F811
    base: Path,  # noqa: F811
) -> None:
    done = call(slurm, *words)
    assert (done.returncode, done.stdout) == (code, "")
    assert what in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_host_without_slurm(slurm: FakeSlurm, base: Path) -> None:  # noqa: F811
    for name in ("srun", "squeue", "sacct"):
        (slurm.bin / name).unlink(missing_ok=True)
    done = call(slurm, "shell", folder_of("het_withdrawn").name, PATH=f"{slurm.bin}:{Path(sys.executable).parent}")
    assert done.returncode == 71
    assert "this host has no Slurm commands (srun)" in done.stderr


def test_a_command_on_our_own_streams_ends_with_us() -> None:
    """Killed, it takes the command along."""
    program = (
        "import os, sys\nfrom slurm.lib.processes import attached\nfrom slurm.lib.signals import SignalNotes\n"
        "attached(['sh', '-c', 'echo $$; exec sleep 300'], os.environ, SignalNotes())"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        pid = int(process.stdout.readline())
        process.kill()
        assert process.stdout.read() == ""  # the other end is closed once the command is gone
    assert not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes()
