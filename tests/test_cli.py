"""The command line of launch.py: what it accepts, what it says, how it ends, and from where it can be started."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from slurm.lib import cli
from slurm.lib.coordination import CoordinationDir, Flag
from slurm.lib.logs import log
from slurm.lib.settings import KEYS
from tests.fake_slurm import FakeSlurm

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "slurm" / "launch.py"
SHIPPED = ROOT / "slurm" / "config"
KEY = "sk-the-key-of-the-server"


@pytest.fixture(autouse=True)
def same_logging() -> Iterator[None]:
    """The command sets up logging for a process of its own; here it shares one."""
    before = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.level, log.propagate = before[0], before[1], before[2]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Slurm's commands on PATH, and an environment in which nothing else is set."""
    fake = FakeSlurm(tmp_path / "fake")
    path = fake.path
    for name in list(os.environ):
        monkeypatch.delenv(name)
    for name, value in {"PATH": path, "HOME": str(tmp_path), "SKYRL_JOBS_BASE": str(fake.jobs)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_CONF", "/nowhere/slurm.conf")
    monkeypatch.chdir(tmp_path)
    return fake


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


class Launcher:
    """Runs the command in this process."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self.capture = capture

    def __call__(self, *argv: str) -> Ended:
        self.capture.readouterr()
        try:
            code = cli.main(argv)
        except SystemExit as end:  # argparse
            code = int(end.code or 0)
        out, err = self.capture.readouterr()
        return Ended(code, out, err)


@pytest.fixture
def launch(slurm: FakeSlurm, capfd: pytest.CaptureFixture[str]) -> Launcher:
    return Launcher(capfd)


TRAINER = ("--set", "TRAINING_COMMAND=true")


def test_a_launch_says_where_to_look(launch: Launcher, slurm: FakeSlurm) -> None:
    done = launch("--config", "dev", *TRAINER)
    assert done.code == 0, done.err
    directory = next(slurm.jobs.iterdir())
    assert done.out.splitlines() == [
        "runtime job: 101",
        "training job: 102",
        f"coordination directory: {directory}",
        "watch: squeue -j 101,102",
        f"follow: tail -F '{directory}/runtime_101.out'",
        f"follow: tail -F '{directory}/training_102.out'",
    ]
    assert done.err == ""


def test_a_launch_of_one_heterogeneous_job_says_where_to_look(launch: Launcher, slurm: FakeSlurm) -> None:
    done = launch("--config", "dev", *TRAINER, "--set", "PAIRING=het")
    assert done.code == 0, done.err
    directory = next(slurm.jobs.iterdir())
    assert done.out.splitlines() == [
        "training job: 101",
        "runtime job: 102",
        f"coordination directory: {directory}",
        "watch: squeue -j 101,102",
        f"follow: tail -F '{directory}/training_101.out'",
        f"follow: tail -F '{directory}/runtime_102.out'",
        "stop: scancel 101   (one heterogeneous job: 102 is its second component)",
    ]
    assert done.err == ""


def test_one_job_alone_is_no_heterogeneous_job(launch: Launcher, slurm: FakeSlurm) -> None:
    done = launch("--config", "dev", *TRAINER, "--set", "PAIRING=het", "--runtime-only")
    assert done.code == 0, done.err
    assert "PAIRING=het has no effect here" in done.err
    assert slurm.names == ["sbatch", "scontrol release"]


def test_runtime_only_says_how_to_join_and_to_stop(launch: Launcher, slurm: FakeSlurm) -> None:
    done = launch("--config", "dev", "--runtime-only", "--set", "TRAINING_COMMAND=a b")
    assert done.code == 0, done.err
    assert slurm.names == ["sbatch", "scontrol release"]
    directory = shlex.quote(str(next(slurm.jobs.iterdir())))
    again = shlex.join([str(LAUNCH), "--config", "dev", "--set", "TRAINING_COMMAND=a b", "--skip-runtime"])
    assert f"join:  SKYRL_COORD_DIR={directory} {again}" in done.out
    flag = shlex.quote(str(next(slurm.jobs.iterdir()) / "training_complete.flag"))
    assert f"stop:  touch {flag}   (or: scancel 101)" in done.out


def test_a_runtime_that_has_served_its_training_is_not_joined(
    launch: Launcher, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch("--config", "dev", "--runtime-only")
    directory = CoordinationDir(next(slurm.jobs.iterdir()))
    directory.publish(directory.training_complete, Flag.of_this_host("102", "101", 0, "the trainer ended"))
    monkeypatch.setenv("SKYRL_COORD_DIR", str(directory.path))
    before = list(slurm.names)
    done = launch("--config", "dev", "--skip-runtime", *TRAINER)
    assert done.code == 2
    assert "the runtime job 101 in" in done.err
    assert "has ended (training_complete.flag: exit code 0, the trainer ended)" in done.err
    assert slurm.names == before, "nothing was submitted"
    shown = launch("--config", "dev", "--skip-runtime", "--dry-run", *TRAINER)
    assert (shown.code, "has ended (training_complete.flag" in shown.err) == (0, True)


def test_what_it_prints_to_join_does_join(launch: Launcher, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    launch("--config", "dev", "--runtime-only")
    directory = next(slurm.jobs.iterdir())
    monkeypatch.setenv("SKYRL_COORD_DIR", str(directory))
    slurm.answer("squeue", {"stdout": "RUNNING|None|cpu-a\n"})
    done = launch("--config", "dev", "--skip-runtime", *TRAINER)
    assert done.code == 0, done.err
    assert slurm.of("sbatch")[1].environment["SKYRL_RUNTIME_JOB_ID"] == "101"
    assert f"coordination directory: {directory}\n" in done.out


def test_a_dry_run_touches_nothing(launch: Launcher, slurm: FakeSlurm) -> None:
    done = launch("--config", "production", "--dry-run", *TRAINER)
    assert done.code == 0
    assert done.out.startswith("# runtime job\nsbatch")
    assert slurm.calls == []
    assert not slurm.jobs.exists()


def test_a_dry_run_works_where_there_is_no_slurm(launch: Launcher, slurm: FakeSlurm) -> None:
    shutil.rmtree(slurm.bin)
    assert launch("--config", "dev", "--dry-run", *TRAINER).code == 0


def test_what_is_missing_below_the_project_root_is_named(launch: Launcher, slurm: FakeSlurm, tmp_path: Path) -> None:
    words = ("--config", "dev", "--set", f"SKYRL_PROJECT_ROOT={tmp_path}")
    done = launch(*words)
    assert done.code == 71
    assert f"{tmp_path}/SkyRL/skyrl-agent (skyrl-agent) is missing; set SKYRL_PROJECT_ROOT" in done.err
    assert slurm.calls == []
    (tmp_path / "SkyRL/skyrl-agent").mkdir(parents=True)
    assert "skyrl-agent/uv.lock is missing" in launch(*words).err


def test_without_slurm_there_is_a_hint(launch: Launcher, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sbatch", "scontrol"):
        (slurm.bin / name).unlink()
    (slurm.bin / "bash").symlink_to(shutil.which("bash") or "/bin/bash")
    monkeypatch.setenv("PATH", str(slurm.bin))
    done = launch("--config", "dev", *TRAINER)
    assert done.code == 71
    assert "not on PATH: sbatch, scontrol; without Slurm, try --config local" in done.err
    assert not slurm.jobs.exists()


def test_all_problems_together_with_their_places(launch: Launcher, slurm: FakeSlurm, tmp_path: Path) -> None:
    conf = tmp_path / "bad.conf"
    conf.write_text("GPU_NODES=0\n\nTIME_LIMIT=soon\nRUNTIME_MEMORY=lots\nTP_SIZE=3\nGPUS_PER_NODE=4\nif true; then\n")
    done = launch("--config", str(conf), "--set", "GPU_NODES=0", "--set", "nonsense")
    assert done.code == 2
    for line, key in ((3, "TIME_LIMIT=soon"), (4, "RUNTIME_MEMORY=lots")):
        assert f"{conf}:{line}: {key}: " in done.err
    assert "--set GPU_NODES: GPU_NODES=0: must be at least 1" in done.err
    assert "--set nonsense: must be KEY=VALUE" in done.err
    assert "nothing was created or submitted" in done.err
    assert slurm.calls == []
    assert not slurm.jobs.exists()


def test_an_unknown_name_is_met_with_the_known_ones(launch: Launcher) -> None:
    done = launch("--config", "prodution")
    assert done.code == 2
    assert "--config prodution: there is no configuration of this name" in done.err
    assert "there are: check, dev, local, local-verl, production" in done.err


@pytest.mark.parametrize("words", [["--conf", "dev"], ["--config", "dev", "--dry"], ["--config", "dev", "--runtime"]])
def test_abbreviations_are_refused(launch: Launcher, words: list[str]) -> None:
    done = launch(*words)
    assert done.code == 2
    assert words[-1] in done.err or "--conf" in done.err


def test_help_and_version(launch: Launcher) -> None:
    done = launch("--help")
    assert done.code == 0
    for word in ("--config", "--dry-run", "--runtime-only", "--skip-runtime", "--api-key-file", "exit codes:"):
        assert word in done.out
    assert launch("--version").out == f"launch.py {cli.VERSION}\n"


def test_debug_reaches_the_jobs(launch: Launcher, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    launch("--config", "dev", *TRAINER)
    launch("--config", "dev", "--debug", *TRAINER)
    monkeypatch.setenv("SKYRL_DEBUG", "1")
    launch("--config", "dev", *TRAINER)
    debug = [call.environment["SKYRL_DEBUG"] for call in slurm.of("sbatch")]
    assert debug == ["0", "0", "1", "1", "1", "1"]


# --- the runtime of somebody else, and its key ------------------------------------------------------------------------


def test_a_runtime_by_its_address(launch: Launcher, slurm: FakeSlurm, tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text(f"{KEY}\n")
    done = launch("--config", "dev", "--runtime-url", "http://host:8000/", "--api-key-file", str(key_file), *TRAINER)
    assert done.code == 0, done.err
    (warning,) = done.err.splitlines()
    assert "[WARN] runtime: the runtime at http://host:8000 does not answer here" in warning
    assert slurm.names == ["sbatch", "scontrol release"]
    directory = next(slurm.jobs.iterdir())
    assert (directory / "runtime_url.txt").read_text() == "http://host:8000\n"
    assert (directory / "runtime_api_key.txt").read_text() == f"{KEY}\n"
    assert (directory / "runtime_api_key.txt").stat().st_mode & 0o777 == 0o600
    assert (directory / "runtime_ready.flag").exists()
    assert directory.name.endswith("_101")


def test_a_runtime_by_its_address_in_the_environment(
    launch: Launcher, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SANDBOX_REMOTE_RUNTIME_API_URL", "http://host:8000")
    monkeypatch.setenv("ALLHANDS_API_KEY", KEY)
    done = launch("--config", "dev", "--skip-runtime", *TRAINER)
    assert done.code == 0, done.err
    directory = next(slurm.jobs.iterdir())
    assert (directory / "runtime_api_key.txt").read_text() == f"{KEY}\n"


def test_the_key_of_the_command_line_wins_over_the_files(launch: Launcher, slurm: FakeSlurm, tmp_path: Path) -> None:
    conf, key_file = tmp_path / "mine.conf", tmp_path / "key"
    conf.write_text(f'source "{SHIPPED}/dev.conf"\nALLHANDS_API_KEY=of-the-file\n')
    key_file.write_text(KEY)
    words = ("--config", str(conf), "--runtime-url", "http://h:1", "--api-key-file", str(key_file), *TRAINER)
    assert launch(*words).code == 0
    assert (next(slurm.jobs.iterdir()) / "runtime_api_key.txt").read_text() == f"{KEY}\n"


def test_a_key_in_argv_is_taken_with_a_warning(launch: Launcher, slurm: FakeSlurm) -> None:
    done = launch("--config", "dev", "--runtime-url", "http://host:8000", "--api-key", KEY, *TRAINER)
    assert done.code == 0
    assert "--api-key: everyone on this host can read it in the process list; prefer --api-key-file" in done.err
    assert KEY not in done.err + done.out
    assert not any(KEY in word for call in slurm.calls for word in (*call.argv, *call.environment.values()))


def test_skip_runtime_needs_an_address(launch: Launcher, slurm: FakeSlurm) -> None:
    done = launch("--config", "dev", "--skip-runtime", *TRAINER)
    assert done.code == 2
    assert "SKYRL_COORD_DIR" in done.err
    assert "SANDBOX_REMOTE_RUNTIME_API_URL" in done.err
    assert slurm.calls == []


# --- bad input --------------------------------------------------------------------------------------------------------

DEV = ["--config", "dev"]
BAD: list[tuple[list[str], str]] = [
    ([], "--config NAME|PATH is required"),
    (["--config"], "expected one argument"),
    (["--config", ""], "there is no configuration of this name"),
    (["--config", "."], "there is no configuration of this name"),
    (["--config", "./"], "Is a directory"),
    (["--config", "/nowhere/x.conf"], "/nowhere/x.conf: cannot read this configuration file: No such file"),
    (["--config", "x.conf"], "No such file"),
    (["--config", "/dev/stdin"], "/dev/stdin: is not a regular file"),
    ([*DEV, "extra"], "unrecognized arguments: extra"),
    ([*DEV, "--nonsense"], "unrecognized arguments: --nonsense"),
    ([*DEV, "--set"], "expected one argument"),
    ([*DEV, "--set", ""], "must be KEY=VALUE"),
    ([*DEV, "--set", "="], "must be KEY=VALUE"),
    ([*DEV, "--set", "GPU_NODES"], "--set GPU_NODES: must be KEY=VALUE"),
    ([*DEV, "--set", "A-B=1"], "must be KEY=VALUE"),
    ([*DEV, "--set", "GPU_NODES=0"], "must be at least 1"),
    ([*DEV, "--set", "GPU_NODES=99999999999999999999999"], "must be a whole number"),
    ([*DEV, "--set", "GPU_NODES=\u0663"], "must be a whole number"),
    ([*DEV, "--set", "GPU_NODES=2\n3"], "must be a whole number"),
    ([*DEV, "--set", "GPUS_PER_NODE=\udcff"], "must be a whole number"),
    ([*DEV, "--set", "TIME_LIMIT=soon"], "must be a Slurm time"),
    ([*DEV, "--set", "RUNTIME_MEMORY=lots"], "must be an amount of memory"),
    ([*DEV, "--set", "TP_SIZE=3"], "TP_SIZE=3 must divide the number of GPUs"),
    ([*DEV, "--set", "RUNTIME_PORT=70000"], "must be a port"),
    ([*DEV, "--set", "SANDBOX_PORT_RANGE=9-1"], "must begin with the lower port"),
    ([*DEV, "--set", "CPU_SBATCH_ARGS=--comment='open"], "cannot be split like a command line"),
    ([*DEV, "--set", "GPU_MEMORY_UTILIZATION=nan"], "must be a number"),
    ([*DEV, "--set", "SKYRL_JOBS_BASE=/a\n/b"], "must be one path"),
    ([*DEV, "--set", "SKYRL_JOBS_BASE=/a/%j/b"], "%j would stand for a job's id"),
    ([*DEV, "--set", "SKYRL_JOBS_BASE=/a\\b"], "choose a folder without one"),
    ([*DEV, "--set", "SKYRL_BACKEND=cloud"], "must be slurm or local"),
    ([*DEV, "--set", "CPUS_PER_WORKER=1000"], "not one sandbox would fit"),
    ([*DEV, "--set", "ALLHANDS_API_KEY=two words"], "must be printable ASCII"),
    ([*DEV, "--runtime-only", "--skip-runtime"], "exclude each other"),
    ([*DEV, "--runtime-url", "ftp://host"], "must be an address like http://host:8000"),
    ([*DEV, "--runtime-url", "http://[::1"], "must be an address like http://host:8000"),
    ([*DEV, "--runtime-url", "http://h:99999999"], "must be an address like http://host:8000"),
    ([*DEV, "--runtime-url", ""], "--skip-runtime needs a runtime"),
    ([*DEV, "--skip-runtime", "--set", "SKYRL_COORD_DIR=/nowhere"], "SKYRL_COORD_DIR=/nowhere is not a folder"),
    ([*DEV, "--api-key-file", "/nowhere/key"], "--api-key-file /nowhere/key: No such file or directory"),
    ([*DEV, "--api-key-file", "~nosuch/x"], "--api-key-file ~nosuch/x: No such file or directory"),
    ([*DEV, "--api-key-file", "/"], "--api-key-file /: Is a directory"),
    ([*DEV, "--api-key-file", "/dev/null"], "--api-key-file /dev/null: the key is empty"),
    ([*DEV, "--api-key", ""], "--api-key: the key is empty"),
    ([*DEV, "--api-key", "zwei wörter"], "--api-key: the key must be printable ASCII"),
    (["--config", "local", "--skip-runtime"], "need Slurm"),
    (["--config", "local", "--runtime-url", "http://h:1"], "need Slurm"),
]


@pytest.mark.parametrize(
    ("words", "said"), BAD, ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else ""
)
def test_bad_input_is_a_sentence(launch: Launcher, slurm: FakeSlurm, words: list[str], said: str) -> None:
    done = launch(*words)
    assert done.code == 2, done.err
    assert said in done.err
    assert done.out == ""
    assert slurm.calls == []
    assert not slurm.jobs.exists()


BAD_FILES: list[tuple[bytes, str]] = [
    (b"GPU_NODES=(", "bash says: "),
    (b"if true; then\nGPU_NODES=1\n", "bash says: "),
    (b"GPU_NODES=1\nexit 3\n", ":2: the file ended bash here with exit code 3"),
    (b"GPU_NODES=1\r\nTP_SIZE=1\r\n", "has Windows line ends"),
    (b"GPU_NODES=\0\n", "is not a text file"),
    (b"\x7fELF\x02\xff\xfe GPU_NODES\n", "bash says: "),
    (b"GPU_NODES = 3\n", "an assignment has no space around '=': write GPU_NODES=VALUE"),
    (b"no_such_command_here\n", "command not found"),
    (b"GPU_NODES=\xff\n", "must be a whole number"),
    (b"declare -A MODEL=([a]=b)\n", "MODEL is an associative array"),
    (b"GPU_NODES=(1 2)\n", "must be one value, not a bash array"),
    (b"source /nowhere/base.conf\n", "/nowhere/base.conf"),
    (b"return 1\n", "the file gave up here"),
    (b"kill -9 $$\n", "ended bash here with exit code 137"),
]


@pytest.mark.parametrize(("content", "said"), BAD_FILES, ids=lambda value: repr(value)[:40])
def test_a_bad_file_is_a_sentence(
    launch: Launcher, slurm: FakeSlurm, tmp_path: Path, content: bytes, said: str
) -> None:
    (tmp_path / "x.conf").write_bytes(content)
    done = launch("--config", "x.conf")
    assert done.code == 2, done.err
    assert said in done.err
    assert slurm.calls == []


@settings(
    max_examples=60,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    name=st.sampled_from(sorted(KEYS)) | st.text(max_size=8),
    value=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
    | st.sampled_from(["-1", "0", "1e999", "\udc80", "~", "~nobody/x", "$(exit 3)", "'", "()", "../..", "%", "[", " "]),
)
def test_no_override_gives_a_traceback(launch: Launcher, slurm: FakeSlurm, name: str, value: str) -> None:
    """Whatever stands in --set: a plan, or a sentence and exit code 2."""
    done = launch("--config", "dev", "--dry-run", "--set", f"{name}={value}".replace("\0", ""))
    assert done.code in {0, 2}
    assert (done.out == "") == (done.code == 2)
    assert "Traceback" not in done.err
    assert slurm.calls == []


# Pieces of bash, whole and broken; none calls a program.
PIECES = st.sampled_from(
    [
        *("X=", "MODEL=", "GPU_NODES=2", "$(", ")", "'", '"', "\n", ";", "{", "}", "if ", "then ", "fi", "((", "]]"),
        *("<<E\n", "\0", "\r\n", "\udcff", "declare -A X", "unset HOME", "readonly X", "exit 3", "return 5", "set -eu"),
        *(
            "${!",
            "${X:?no}",
            "exec 2>&-",
            "trap : EXIT",
            "f() {",
            "X=(a b",
            "$'\\x00'",
            "\\",
            "&",
            "|",
            "#",
            "\t",
            "=",
            "\x1f",
        ),
    ]
)


@settings(
    max_examples=60,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(content=st.binary(max_size=60) | st.lists(PIECES, max_size=12).map(lambda pieces: os.fsencode("".join(pieces))))
def test_any_bytes_as_a_conf_are_read_once_and_give_no_traceback(
    launch: Launcher, slurm: FakeSlurm, tmp_path: Path, content: bytes
) -> None:
    conf, count = tmp_path / "any.conf", tmp_path / "count"
    count.write_text("")
    conf.write_bytes(b'builtin printf x >> "$HOME/count"\nPATH=\n' + content)
    done = launch("--config", str(conf), "--dry-run", "--set", "TRAINING_COMMAND=true")
    assert done.code in {0, 2}, done.err
    assert (done.out == "") == (done.code == 2)
    assert "Traceback" not in done.err
    is_text = not {b"\0", b"\r\n"} & {content[n : n + size] for n in range(len(content)) for size in (1, 2)}
    assert count.read_text() == ("x" if is_text else "")
    assert slurm.calls == []


# --- from everywhere --------------------------------------------------------------------------------------------------


def start(argv: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {"PATH": os.environ["PATH"], "HOME": str(cwd), **environment}
    return subprocess.run(argv, cwd=cwd, env=clean, capture_output=True, text=True, timeout=60, errors="replace")


DRY = ["--config", "dev", "--dry-run", *TRAINER]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    return steady(start([str(LAUNCH), *DRY], tmp_path_factory.mktemp("home"), HOME="/home/me", LC_ALL="C.UTF-8").stdout)


def steady(text: str) -> str:
    """A dry run without what differs between two of them: the time, and what shells on the way passed on."""
    before, _, after = text.partition("# environment of the jobs: passed on from this shell\n")
    return re.sub(r"\d{8}[_-]\d{6}", "TIME", before + after.partition("\n\n")[2])


def test_by_absolute_and_by_relative_path(tmp_path: Path, expected: str) -> None:
    assert "sbatch" in expected
    relative = os.path.relpath(LAUNCH, tmp_path.resolve())
    for argv in ([relative], ["./launch.py"], ["slurm/launch.py"]):
        cwd = {"./launch.py": LAUNCH.parent, "slurm/launch.py": ROOT}.get(argv[0], tmp_path)
        done = start([*argv, *DRY], cwd, HOME="/home/me", LC_ALL="C.UTF-8")
        assert done.returncode == 0, done.stderr
        assert steady(done.stdout) == expected


def test_through_a_link(tmp_path: Path, expected: str) -> None:
    (tmp_path / "my launcher").symlink_to(LAUNCH)
    (tmp_path / "code").symlink_to(ROOT)
    for argv in ([str(tmp_path / "my launcher")], [str(tmp_path / "code/slurm/launch.py")]):
        done = start([*argv, *DRY], tmp_path, HOME="/home/me", LC_ALL="C.UTF-8")
        assert done.returncode == 0, done.stderr
        assert steady(done.stdout) == expected


def test_by_the_old_name(tmp_path: Path, expected: str) -> None:
    (tmp_path / "link.sh").symlink_to(ROOT / "slurm/launch.sh")
    for script in (ROOT / "slurm/launch.sh", tmp_path / "link.sh"):
        done = start([str(script), *DRY], tmp_path, HOME="/home/me", LC_ALL="C.UTF-8")
        assert done.returncode == 0, done.stderr
        assert steady(done.stdout) == expected


def test_under_a_python_without_our_packages(tmp_path: Path, expected: str) -> None:
    """`-S` leaves out every installed package, whatever Python this is."""
    done = start([sys.executable, "-S", str(LAUNCH), *DRY], tmp_path, HOME="/home/me", LC_ALL="C.UTF-8")
    assert done.returncode == 0, done.stderr
    assert steady(done.stdout) == expected


def test_bytes_that_are_no_utf8_pass_through(tmp_path: Path) -> None:
    argv = [os.fsencode(LAUNCH), *map(os.fsencode, DRY), b"--set", b"MODEL=/models/caf\xe9"]
    for locale in ("C.UTF-8", "C"):
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LC_ALL": locale}
        done = subprocess.run(argv, env=environment, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert b"MODEL='/models/caf\xe9'" in done.stdout
        assert done.stderr == b""


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    done = start(
        ["bash", "-c", f"set -o pipefail; '{LAUNCH}' --config dev --dry-run {' '.join(TRAINER)} | true"], tmp_path
    )
    assert done.returncode == 0
    assert done.stderr == ""


def test_a_full_disk_under_stdout_is_said(tmp_path: Path) -> None:
    done = start(["bash", "-c", f"'{LAUNCH}' --config dev --dry-run {' '.join(TRAINER)} >/dev/full"], tmp_path)
    assert done.returncode == 71
    assert "cannot write to stdout: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "sbatch" in done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("python", ["", f"'{sys.executable}'", f"'{sys.executable}' -S"])
def test_closed_streams_lead_nowhere(tmp_path: Path, closed: str, python: str) -> None:
    """Also if it restarts itself; and what is said goes to the streams that are open."""
    conf = tmp_path / "x.conf"
    conf.write_text("cat\necho said by the file\nNO_SUCH_KEY=1\n")
    words = ["--config", str(conf), "--dry-run", *TRAINER]
    done = start(["bash", "-c", f'{python} "$0" "$@" {closed}', str(LAUNCH), *words], tmp_path)
    assert done.returncode == 0, done.stderr
    assert ("sbatch" in done.stdout) == (" >&-" not in f" {closed}")
    assert ("not a key of this suite: NO_SUCH_KEY" in done.stderr) == ("2>&-" not in closed)
    assert ("said by the file" in done.stderr) == ("2>&-" not in closed)
    assert "Traceback" not in done.stdout + done.stderr
    failed = start(["bash", "-c", f'{python} "$0" --config nonesuch {closed}', str(LAUNCH)], tmp_path)
    assert (failed.returncode, failed.stdout) == (2, "")


def test_in_a_folder_that_is_gone(tmp_path: Path) -> None:
    script = f"mkdir gone && cd gone && rmdir ../gone && '{sys.executable}' '{LAUNCH}' {' '.join(DRY)}"
    done = start(["bash", "-c", script], tmp_path)
    assert (done.returncode, done.stdout) == (71, "")
    assert "the current folder cannot be used: No such file or directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_configuration_from_a_pipe_is_refused(tmp_path: Path) -> None:
    done = start(["bash", "-c", f"'{LAUNCH}' --config <(echo GPU_NODES=7) --dry-run {' '.join(TRAINER)}"], tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "is not a regular file" in done.stderr


def test_colour_only_on_a_terminal(launch: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    import pty

    assert "\x1b" not in launch("--config", "prodution").err
    for environment, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        main, terminal = pty.openpty()
        clean = {"PATH": os.environ["PATH"], "HOME": "/nowhere", **environment}
        subprocess.run([str(LAUNCH), "--config", "prodution"], env=clean, stderr=terminal, timeout=60)
        os.close(terminal)
        with contextlib.closing(os.fdopen(main, "rb", buffering=0)) as reader:
            assert (b"\x1b[" in reader.read(65536)) == coloured


def test_what_starts_under_an_old_python_parses_there() -> None:
    """vermin reads the syntax and the library calls; it is part of scripts/test too."""
    files = ["slurm/launch.py", "slurm/lib/bootstrap.py", "slurm/__init__.py", "slurm/lib/__init__.py"]
    files += ["slurm/lib/common.py"]
    files += [f"slurm/jobs/{name}.py" for name in ("runtime_server", "verl_training", "__init__")]
    argv = [sys.executable, "-c", "import vermin; vermin.main()", "-t=3.6-", "--violations", "--no-tips", *files]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert not [name for name in files if "from __future__ import annotations" in (ROOT / name).read_text()]
