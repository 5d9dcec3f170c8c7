"""TAB in real shells: what is offered, by which path launch.py is called, and that nothing else is started."""

from __future__ import annotations

import http.server
import json
import os
import pty
import select
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.lib import cli
from slurm.lib.settings import KEYS
from slurm.lib.verbs.completion import CHOICES, code_for, paths, verb_parser
from tests.observed_runs import folder_of

ROOT = Path(__file__).resolve().parent.parent
SHELLS = ("bash", "zsh", "fish")
RUN = folder_of("chained").name
KEY_S = 60.0  # for what a key press brings, on a busy machine
CONFIGS = sorted(path.stem for path in (ROOT / "slurm" / "config").glob("*.conf"))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with a run whose name is known, and the code for each shell."""
    shutil.copytree(folder_of("chained"), tmp_path / ".skyrl_jobs" / RUN)
    for shell in SHELLS:
        (tmp_path / f"code.{shell}").write_text(code_for(shell))
    return tmp_path


def environment(home: Path) -> dict[str, str]:
    """The interpreter of the tests is the first python3, as an environment that was activated."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "HOME": str(home), "TERM": "dumb", "LANG": "C.UTF-8"}


def needs(shell: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed; scripts/test installs it on Debian when it runs as root")


def offered(shell: str, home: Path, line: str) -> list[str]:
    """What the shell offers at the end of a line: as it says itself (fish), or by the function that it calls (bash)."""
    code, quoted = shlex.quote(str(home / f"code.{shell}")), shlex.quote(line)
    program = shlex.quote(line.split(" ")[0])
    line_so_far = f"COMP_LINE={quoted}; COMP_POINT=${{#COMP_LINE}}; COMP_TYPE=9"
    scripts = {
        "bash": f'source {code}; {line_so_far}; _skyrl_launch {program}; printf "%s\\n" "${{COMPREPLY[@]}}"',
        "fish": f"source {code}; complete -C {quoted}",
    }
    argv = {"bash": ["bash", "--norc", "-c"], "fish": ["fish", "--no-config", "-c"]}[shell]
    done = subprocess.run(
        [*argv, scripts[shell]],
        cwd=ROOT,
        env=environment(home),
        stdout=subprocess.PIPE,
        text=True,
        timeout=90,
        check=False,
    )
    return [found.partition("\t")[0].strip() for found in done.stdout.splitlines()]


@pytest.mark.parametrize("shell", ["bash", "fish"])
@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("slurm/launch.py sta", ["status"]),
        ("slurm/launch.py --config ", CONFIGS),
        ("slurm/launch.py --config l", ["local", "local-verl"]),
        ("slurm/launch.py status ", ["latest", RUN]),
        ("slurm/launch.py shell 2", [RUN]),
        ("slurm/launch.py shell latest --r", ["--runtime"]),
        ("slurm/launch.py completion ", ["bash", "fish", "zsh"]),
        ("slurm/launch.py doctor --conf", ["--config"]),
        ("slurm/launch.py doctor --config pr", ["production"]),
        ("slurm/launch.py wait --timeout ", []),
    ],
)
def test_what_is_offered(shell: str, home: Path, line: str, wanted: list[str]) -> None:
    needs(shell)
    assert sorted(filter(None, offered(shell, home, line))) == sorted(wanted)


def test_verbs_and_options_are_offered_first(home: Path) -> None:
    found = offered("bash", home, "slurm/launch.py ")
    assert set(found) >= {*cli.VERBS, "--config", "--set", "--help"}


def test_keys_and_what_they_can_be(home: Path) -> None:
    assert offered("bash", home, "launch.py --set RESTARTS") == ["RESTARTS="]
    assert offered("bash", home, "launch.py --set NETWORK=") == ["private", "deny"]
    for name, words in CHOICES.items():
        keys = [key for key in KEYS.values() if key.parse.__name__ == name]
        assert keys, name
        assert all(key.parse(word) is not None for key in keys for word in words)


def test_configurations_are_those_of_the_launch_py_that_is_typed(home: Path) -> None:
    other = home / "other" / "slurm"
    (other / "config").mkdir(parents=True)
    (other / "config" / "theirs.conf").touch()
    started = home / "started"
    (other / "launch.py").write_text(f"#!/bin/sh\ntouch {started}\n")
    (other / "launch.py").chmod(0o755)
    assert offered("bash", home, f"{other}/launch.py --config ") == ["theirs"]
    assert not started.exists(), "a TAB starts no program of another folder"


def test_paths_are_offered_as_they_are_and_no_shell_reads_them(home: Path) -> None:
    """A name may hold what a shell would run."""
    folder = home / "confs"
    hostile = ["$(touch was-run)", "`touch was-run`", "';touch was-run;'", "with blank"]
    for name in ("one.conf", "one.txt", ".hidden.conf", *(f"{name}/two.conf" for name in hostile)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    folders = [f"{folder}/{name}/" for name in hostile]
    assert paths(f"{folder}/", ".conf") == sorted([f"{folder}/one.conf", *folders])
    assert paths(f"{folder}/o") == [f"{folder}/one.conf", f"{folder}/one.txt"]
    assert paths(f"{folder}/.h", ".conf") == [f"{folder}/.hidden.conf"]
    assert paths(f"{folder}/", only_folders=True) == sorted(folders)
    for name in hostile:
        assert paths(f"{folder}/{name}/t", ".conf") == [f"{folder}/{name}/two.conf"]
    assert paths(f"{folder}/none/") == paths("~nobody-of-this-name/") == []
    assert offered("bash", home, f"slurm/launch.py --config {folder}/o") == [f"{folder}/one.conf"]
    assert offered("bash", home, "slurm/launch.py --config ~/confs/o") == ["~/confs/one.conf"]
    assert not list(home.rglob("was-run"))


@pytest.fixture
def server(home: Path) -> Iterator[None]:
    """An API server with two sandboxes, as the run's files name it."""

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            named = [{"session_id": name} for name in ("task-1", "task-2")]
            body = {"runtimes": named} if self.headers["X-API-Key"] == "the-key" else {}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_words: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        folder = home / ".skyrl_jobs" / RUN
        (folder / "runtime_url.txt").write_text(f"http://127.0.0.1:{made.server_port}\n")
        (folder / "runtime_api_key.txt").write_text("the-key\n")
        yield
        made.shutdown()


def test_the_sandboxes_of_a_run(home: Path, server: None) -> None:
    for line, wanted in (("latest ", ["task-1", "task-2"]), (f"{RUN} task-2", ["task-2"])):
        # A server that a busy machine lets answer late is not waited for.
        tries = (offered("bash", home, f"launch.py shell {line}") for _ in range(3))
        assert any(found == wanted for found in tries), line
    assert offered("bash", home, "launch.py shell nonesuch ") == [""]


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("program", ["./slurm/launch.py", "slurm/launch.py", str(ROOT / "slurm" / "launch.py")])
def test_a_tab_however_launch_py_is_called(shell: str, program: str, home: Path) -> None:
    """On a terminal; fish is asked what it would offer there."""
    needs(shell)
    if shell == "fish":
        assert offered(shell, home, f"{program} compl") == ["completion"]
        return
    setup = "autoload -U compinit; compinit -u -D; " if shell == "zsh" else ""
    argv = {"bash": ["bash", "--norc", "-i"], "zsh": ["zsh", "-f", "-i"]}[shell]
    main, side = pty.openpty()
    process = subprocess.Popen(
        argv, cwd=ROOT, env=environment(home), stdin=side, stdout=side, stderr=side, start_new_session=True
    )
    os.close(side)
    try:
        os.write(main, f"{setup}source {home}/code.{shell}; echo :$((6 * 7)):\r".encode())
        read_until(main, ":42:")
        os.write(main, f"{program} compl\t".encode())
        read_until(main, "completion")
    finally:
        process.kill()
        process.wait()
        os.close(main)


def read_until(descriptor: int, text: str) -> str:
    shown, end = "", time.monotonic() + KEY_S
    while text not in shown:
        assert time.monotonic() < end, shown
        if select.select([descriptor], [], [], 0.2)[0]:
            shown += os.read(descriptor, 4096).decode(errors="replace")
    return shown


def test_a_path_of_any_name(tmp_path: Path) -> None:
    """The code names the launch.py that it is for, quoted."""
    script = tmp_path / "it's a $HOME" / "launch.py"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\nprintf 'offered\\013' >&8\n")
    script.chmod(0o755)
    (tmp_path / "code.bash").write_text(code_for("bash", script))
    assert offered("bash", tmp_path, "launch.py ") == ["offered"]


def test_every_verb_has_a_parser_of_its_own() -> None:
    """From which its words are completed."""
    for name in cli.VERBS:
        assert verb_parser(name).prog == f"launch.py {name}"


def test_completion_costs_no_other_start() -> None:
    """argcomplete is imported only at a TAB."""
    script = "import sys; sys.argv = ['launch.py', '--version']\nfrom slurm.lib import cli\n"
    script += "try:\n    cli.main(['--version'])\nexcept SystemExit:\n    pass\nprint('argcomplete' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
