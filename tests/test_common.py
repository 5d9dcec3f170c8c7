"""The helpers of the bash suite, called as a shell calls them."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slurm.lib import common, helpers, node_facts
from slurm.lib.coordination import CoordinationDir, Flag
from slurm.lib.logs import log
from tests.fake_slurm import FakeSlurm

ROOT = Path(__file__).resolve().parent.parent
COMMON = ROOT / "slurm/lib/common.py"


@pytest.fixture(autouse=True)
def same_logging() -> Iterator[None]:
    """The command sets up logging for a process of its own; a test here shares one."""
    before = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.level, log.propagate = before[0], before[1], before[2]


class Shell:
    """Runs helpers by command, and bash scripts with all of them as functions."""

    def __init__(self, folder: Path) -> None:
        self.base = folder / "my jobs"
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "SKYRL_JOBS_BASE": str(self.base)}

    def __call__(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self._run([sys.executable, str(COMMON), *words], environment)

    def script(self, text: str, **environment: str) -> subprocess.CompletedProcess[str]:
        load = f'eval "$({shlex.quote(sys.executable)} {shlex.quote(str(COMMON))} shell-functions)"'
        return self._run(["bash", "-c", f"set -euo pipefail\n{load}\n{text}"], environment)

    def _run(self, argv: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        merged = {**self.environment, **environment}
        return subprocess.run(argv, env=merged, capture_output=True, text=True, timeout=60)


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@pytest.fixture
def directory(tmp_path: Path) -> CoordinationDir:
    path = tmp_path / "20260101_000000_7"
    path.mkdir()
    return CoordinationDir(path)


def ready(directory: CoordinationDir, url: str = "http://h:1") -> None:
    directory.publish_url(url)
    directory.publish(directory.runtime_ready, Flag.of_this_host("7", "7"))


def test_a_directory_is_made_and_only_its_path_is_said(shell: Shell) -> None:
    done = shell("create-job-coordination-dir", "42")
    path = Path(done.stdout.rstrip("\n"))
    assert done.returncode == 0, done.stderr
    assert path.parent == shell.base
    assert path.name.endswith("_42")
    assert path.stat().st_mode & 0o777 == 0o700
    own = shell("create-job-coordination-dir", SLURM_JOB_ID="43")
    assert own.stdout.endswith("_43\n")


def test_the_coordination_dir_of_the_environment(shell: Shell, directory: CoordinationDir) -> None:
    assert shell("get-coordination-dir", SKYRL_COORD_DIR=str(directory.path)).stdout == f"{directory.path}\n"
    named = str(directory.path).replace("_7", "_%j")
    assert shell("get-coordination-dir", SKYRL_COORD_DIR=named, SLURM_JOB_ID="7").stdout == f"{directory.path}\n"
    assert shell("get-coordination-dir", SKYRL_COORD_DIR="/nowhere").stdout.startswith(f"{shell.base}/")


def test_the_url_is_said_once_the_runtime_is_ready(shell: Shell, directory: CoordinationDir) -> None:
    path = str(directory.path)
    done = shell("write-runtime-url", path, "http://node 1:8000")
    assert (done.returncode, done.stdout) == (0, "")
    assert "[INFO] wrote the runtime's URL to" in done.stderr
    early = shell("wait-for-runtime-url", path, "0.2")
    assert (early.returncode, early.stdout) == (75, "")
    assert "waited 0.2 s for a ready runtime" in early.stderr
    assert shell("signal-runtime-ready", path, SLURM_JOB_ID="7").returncode == 0
    assert json.loads(directory.runtime_ready.read_text())["job_id"] == "7"
    done = shell("wait-for-runtime-url", path)
    assert (done.returncode, done.stdout) == (0, "http://node 1:8000\n")


def test_completion_carries_the_trainers_exit_code(shell: Shell, directory: CoordinationDir) -> None:
    ready(directory)
    path = str(directory.path)
    assert shell("signal-training-complete", path, "3", SLURM_JOB_ID="8").returncode == 0
    flag = json.loads(directory.training_complete.read_text())
    assert (flag["job_id"], flag["runtime_job_id"], flag["exit_code"]) == ("8", "7", 3)
    done = shell("wait-for-training-complete", path)
    assert (done.returncode, done.stdout) == (0, "3\n")


def test_a_flag_set_by_hand_counts(shell: Shell, directory: CoordinationDir) -> None:
    directory.training_complete.touch()
    assert shell("wait-for-training-complete", str(directory.path), "5").stdout == "0\n"


@pytest.mark.parametrize("command", ["wait-for-runtime-url", "wait-for-training-complete"])
def test_deadlines(shell: Shell, directory: CoordinationDir, command: str) -> None:
    """None given is the environment's; 0 is now."""
    path = str(directory.path)
    assert shell(command, path, "0").returncode == 75
    name = {"wait-for-runtime-url": "RUNTIME_READY_TIMEOUT"}.get(command, "TRAINING_COMPLETE_TIMEOUT")
    assert shell(command, path, **{name: "0.1"}).returncode == 75
    done = shell(command, path, **{name: "soon"})
    assert done.returncode == 2
    assert f"{name}: seconds: 'soon' is not a number" in done.stderr


def test_a_wait_ends_when_the_flag_comes(shell: Shell, directory: CoordinationDir) -> None:
    argv = [sys.executable, str(COMMON), "wait-for-runtime-url", str(directory.path), "60"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=shell.environment) as process:
        time.sleep(0.3)
        ready(directory, "http://late:1")
        assert process.communicate(timeout=30)[0] == "http://late:1\n"


def test_ctrl_c_ends_a_wait_without_a_traceback(directory: CoordinationDir, request: pytest.FixtureRequest) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in what a script starts with "&"
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    try:
        assert common.main(["wait-for-runtime-url", str(directory.path), "60"]) == 130
    finally:
        timer.join()


BAD = [
    (["nonsense"], 2, "usage: common.py COMMAND"),
    ([], 2, "usage: common.py COMMAND"),
    (["write-runtime-url"], 2, "write-runtime-url takes: DIR URL"),
    (["write-runtime-url", "/nowhere", "u"], 71, "the coordination directory /nowhere does not exist"),
    (["signal-runtime-ready", "/nowhere"], 71, "does not exist"),
    (["signal-training-complete", "/nowhere"], 71, "does not exist"),
    (["signal-training-complete", "/tmp", "x"], 2, "'x' is not a whole number"),
    (["wait-for-runtime-url", "/nowhere"], 71, "does not exist"),
    (["wait-for-runtime-url", "/tmp", "nan"], 2, "'nan' is not a number of at least 0"),
    (["wait-for-runtime-url", "/tmp", "-1"], 2, "'-1' is not a number of at least 0"),
    (["wait-for-training-complete", "/tmp", "inf"], 2, "'inf' is not a number of at least 0"),
    (["cleanup-old-coordination-dirs", "-1"], 2, "'-1' is not a number of at least 0"),
    (["cleanup-old-coordination-dirs", "7", "8"], 2, "cleanup-old-coordination-dirs takes: [DAYS]"),
    (["load-env-file", "/nowhere/.env"], 71, "environment file not found: /nowhere/.env"),
    (["load-config", "nonesuch"], 2, "there are: check, dev, local, local-verl, production"),
    (["get-first-node", "x"], 2, "get-first-node takes: nothing"),
]


@pytest.mark.parametrize(
    ("words", "code", "said"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_mistakes_are_a_sentence_and_nothing_on_stdout(shell: Shell, words: list[str], code: int, said: str) -> None:
    done = shell(*words)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_nodes_and_cpus(shell: Shell, tmp_path: Path) -> None:
    assert shell("get-first-node").stdout == f"{socket.gethostname()}\n"
    assert shell("get-node-count").stdout == "1\n"
    assert shell("get-node-count", SLURM_NNODES="4").stdout == "4\n"
    assert shell("get-cpus-per-node", SLURM_CPUS_ON_NODE="12").stdout == "12\n"
    slurm = FakeSlurm(tmp_path / "fake")
    slurm.answer("scontrol", {"stdout": "gpu3\ngpu4\n"}, {"code": 1, "stderr": "no such nodes"})
    first = shell("get-first-node", PATH=slurm.path, SLURM_JOB_NODELIST="gpu[3-4]")
    assert first.stdout == "gpu3\n"
    assert slurm.calls[0].argv == ["show", "hostnames", "gpu[3-4]"]
    broken = shell("get-first-node", PATH=slurm.path, SLURM_JOB_NODELIST="gpu[3-4]")
    assert (broken.returncode, broken.stdout) == (71, "")
    assert "no such nodes" in broken.stderr


def test_is_slurm_job_is_an_exit_code(shell: Shell) -> None:
    assert shell("is-slurm-job").returncode == 1
    assert shell("is-slurm-job", SLURM_JOB_ID="7").returncode == 0


def test_efa(shell: Shell) -> None:
    assert shell("setup-efa-networking").stdout == ""
    assert shell("setup-efa-networking", SKYRL_LD_LIBRARY_PATH_EXPORT="1").stdout == "export FI_PROVIDER=efa\n"
    done = shell("setup-efa-networking", SKYRL_LD_LIBRARY_PATH_EXPORT="1", FI_PROVIDER="tcp")
    assert done.stdout == "export FI_PROVIDER=tcp\n"


def test_cuda_for_triton(shell: Shell, tmp_path: Path) -> None:
    folder = tmp_path / "driver"
    folder.mkdir()
    (folder / "libcuda.so.1").touch()
    lines = shell("setup-cuda-for-triton", CUDA_HOME="", LD_LIBRARY_PATH=f"/other:{folder}").stdout.splitlines()
    assert f"export TRITON_LIBCUDA_PATH={folder}" in lines and f"export LIBRARY_PATH={folder}" in lines
    assert f"export LD_LIBRARY_PATH=/other:{folder}" in lines
    refused = shell("setup-cuda-for-triton", CUDA_MODULES="'cuda")
    script = shell.script("setup_cuda_for_triton; echo $TRITON_LIBCUDA_PATH", LD_LIBRARY_PATH=str(folder))
    assert script.stdout == f"{folder}\n", script.stderr
    assert refused.returncode == 2 and "CUDA_MODULES: " in refused.stderr and not refused.stdout


@pytest.mark.parametrize(("variable", "expected"), [({}, "1"), ({"VERL_DISABLE_FLASH_ATTN_CE": "0"}, "0")])
def test_without_libcuda_verl_does_without_it(
    monkeypatch: pytest.MonkeyPatch, variable: dict[str, str], expected: str
) -> None:
    monkeypatch.setattr(node_facts, "find_cuda", lambda *_: (None, {}, "no command 'module'"))
    assert common.setup_cuda_for_triton(variable) == {"VERL_DISABLE_FLASH_ATTN_CE": expected}


def test_a_python_for_uv(shell: Shell, tmp_path: Path) -> None:
    """In a skyrl-agent whose environment was made from a Python that has its headers, or says that it has."""
    agent = tmp_path / "SkyRL" / "skyrl-agent"
    (agent / ".venv").mkdir(parents=True)
    (agent / ".venv" / "pyvenv.cfg").write_text(f"home = {tmp_path}\nversion = 3.12.1\n")
    python = tmp_path / "python3.12"
    python.write_text("#!/bin/sh\necho True\n")
    python.chmod(0o755)
    expected = f"export UV_PYTHON={python}\n"
    assert shell("setup-python-for-uv", SKYRL_PROJECT_ROOT=str(tmp_path)).stdout == expected
    assert shell("setup-python-for-uv", str(agent)).stdout == expected
    assert shell("setup-python-for-uv", str(agent), UV_PYTHON="3.12").stdout == ""
    assert shell("setup-python-for-uv", str(tmp_path)).stdout == ""


def aged(path: Path, *ids: str) -> Path:
    """A run directory that nothing has changed in for decades, with records that name these jobs."""
    path.mkdir(parents=True)
    (path / "runtime_url.txt").touch()
    for number, job_id in enumerate(ids):
        kind = "training" if number else "runtime"
        record = {"schema": 1, "jobs": {kind: {"id": job_id, "name": "x"}}}
        (path / f"{kind}_{job_id}.out").touch()
        (path / (f"run_{number}.json" if number else "run.json")).write_text(json.dumps(record))
    for entry in (*path.iterdir(), path):
        os.utime(entry, (0, 0))
    return path


def test_directories_of_jobs_that_live_stay(shell: Shell, tmp_path: Path) -> None:
    """A job may be queued for weeks; the one of several that joined need not be the last."""
    slurm = FakeSlurm(tmp_path / "fake")
    known = {"1": "PENDING|Priority", "3": "RUNNING|None", "6": "COMPLETED|None"}
    lines = [f"{job_id}|{words}||test|me|N/A|0:00|1:00|x\n" for job_id, words in known.items()]
    slurm.answer("squeue", {"stdout": "".join(lines)})
    ids = {"1": ("1",), "2": ("2", "3", "4"), "5": ("5",), "6": ("6",), "pid7": (), "8": ("8",)}
    paths = {name: aged(shell.base / f"20200101_000000_{name}", *given) for name, given in ids.items()}
    (paths["8"] / "runtime_8.out").unlink()  # it has not begun, on another cluster perhaps
    os.utime(paths["8"], (0, 0))
    done = shell("cleanup-old-coordination-dirs", "0", PATH=slurm.path)
    assert done.returncode == 0, done.stderr
    assert {name for name, path in paths.items() if path.exists()} == {"1", "2", "8"}
    (call,) = slurm.of("squeue")
    assert set(call.argv[call.argv.index("-j") + 1].split(",")) == set("1234568"), "all by one question"
    assert f"keeping {paths['1']}: its runtime job 1 is pending" in done.stderr
    assert f"keeping {paths['2']}: its training job 3 is running" in done.stderr
    assert f"keeping {paths['8']}: " in done.stderr


def test_a_silent_slurm_lets_nothing_be_removed(shell: Shell, tmp_path: Path) -> None:
    slurm = FakeSlurm(tmp_path / "fake")
    slurm.answer("squeue", {"code": 1, "stderr": "slurm_load_jobs error: Unable to contact slurm controller"})
    paths = [aged(shell.base / f"20200101_000000_{number}", str(number)) for number in (1, 2)]
    done = shell("cleanup-old-coordination-dirs", "7", PATH=slurm.path)
    assert done.returncode == 0, done.stderr
    assert all(path.exists() for path in paths)
    assert len(slurm.of("squeue")) == 1, "one silence is enough"


def test_a_local_run_that_lives_stays(shell: Shell) -> None:
    from slurm.lib.processes import start_ticks

    pid = os.getpid()
    living, dead = (aged(shell.base / f"20200101_000000_local{number}.0", f"local{number}.0") for number in (1, 2))
    (living / "local_jobs.txt").write_text(f"local1.0 {pid} {start_ticks(pid)}\n")
    (dead / "local_jobs.txt").write_text(f"local2.0 {pid} 1\n")
    for path in (living, dead):
        for entry in (path / "local_jobs.txt", path):
            os.utime(entry, (0, 0))
    assert shell("cleanup-old-coordination-dirs", "0").returncode == 0
    assert (living.exists(), dead.exists()) == (True, False)


def test_only_old_run_directories_are_removed(shell: Shell) -> None:
    old, young, foreign = (shell.base / name for name in ("20200101_000000_pid1", "20200101_000000_pid2", "my results"))
    for path in (old, young, foreign):
        path.mkdir(parents=True)
        (path / "runtime_url.txt").touch()
    for path in (old, foreign):
        for entry in (path / "runtime_url.txt", path):
            os.utime(entry, (0, 0))
    done = shell("cleanup-old-coordination-dirs", "30")
    assert (done.returncode, done.stdout) == (0, "")
    assert not old.exists()
    assert young.exists()
    assert foreign.exists()


def test_the_log_has_levels_and_stays_off_stdout(shell: Shell) -> None:
    for level in ("info", "warn", "error"):
        for done in (shell(f"log-{level}", "a  b", "$c"), shell.script(f"log_{level} 'a  b' '$c'")):
            assert done.stdout == ""
            assert done.stderr.endswith(f" [{level.upper()}] a  b $c\n")
    for environment, shows in (({}, False), ({"SKYRL_DEBUG": "1"}, True)):
        assert ("[DEBUG] x" in shell("log-debug", "x", **environment).stderr) == shows
        assert ("[DEBUG] x" in shell.script("log_debug x", **environment).stderr) == shows


def test_a_config_comes_over_whole(shell: Shell, tmp_path: Path) -> None:
    conf = tmp_path / "my own.conf"
    conf.write_text("""MODEL="a 'model' with \\$HOME"\nEXTRA=$'two\\nlines'\nCPU_SBATCH_ARGS=(--comment 'x y')\n""")
    done = shell.script(
        f'load_config {shlex.quote(str(conf))}\nprintf \'%s|\' "$MODEL" "$EXTRA" "$CPU_SBATCH_ARGS" "$GPU_NODES"'
    )
    assert done.stdout == "a 'model' with $HOME|two\nlines|--comment 'x y'|1|", done.stderr
    assert "not a key of this suite: EXTRA" in done.stderr


def test_an_env_file_comes_over_whole(shell: Shell, tmp_path: Path) -> None:
    env = tmp_path / ".env"
    env.write_text("A='x  y'\nB=<REPLACE>\nexport C=\"$A\"\nD=\n# E=1\nNO.NAME=1\n'x; touch pwned'=1\n")
    done = shell.script(
        f'cd {shlex.quote(str(tmp_path))}\nload_env_file .env\nprintf \'%s|\' "$A" "${{B-unset}}" "$C" "$D"'
    )
    assert done.stdout == "x  y|unset|$A||", done.stderr
    assert not (tmp_path / "pwned").exists()
    assert "'NO.NAME' is not a name that a shell can export" in done.stderr
    env.write_bytes(b"A=\xff\xfe\n")
    broken = shell("load-env-file", str(env))
    assert (broken.returncode, broken.stdout) == (71, "")
    assert f"cannot read the environment file {env}" in broken.stderr


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=1, max_size=8))
def test_whatever_is_exported_a_shell_reads_it_back(values: list[str]) -> None:
    text = helpers._exports({f"V{number}": value for number, value in enumerate(values)})
    names = " ".join(f'"$V{number}"' for number in range(len(values)))
    script = f"set -euo pipefail\n{text}printf '%s\\0' {names}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"})
    assert done.stdout.decode().split("\0")[:-1] == values


def test_a_failing_helper_ends_a_strict_script(shell: Shell) -> None:
    for helper in ("load_config nonesuch", "load_env_file /nowhere", "wait_for_runtime_url /nowhere"):
        done = shell.script(f"{helper}\necho not reached")
        assert done.returncode in {2, 71}, helper
        assert done.stdout == ""
    assert shell.script("if is_slurm_job; then echo yes; else echo no; fi").stdout == "no\n"


def test_every_command_is_a_function(shell: Shell) -> None:
    names = [
        name.replace("-", "_") for name in common.COMMANDS if name not in {"shell-functions", "hold-podman-storage"}
    ]
    done = shell.script("for name in " + " ".join(names) + '; do declare -F "$name" >/dev/null || echo "$name"; done')
    assert (done.returncode, done.stdout) == (0, "")


def test_the_shim_defines_them_under_strict_bash(shell: Shell, tmp_path: Path) -> None:
    link = tmp_path / "a link.sh"
    link.symlink_to(ROOT / "slurm/lib/common.sh")
    text = f"source {shlex.quote(str(link))}\nlog_info hello\nget_node_count"
    done = shell._run(["bash", "-c", f"set -euo pipefail\n{text}"], {})
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert "[INFO] hello" in done.stderr


def test_the_shim_fails_where_there_is_no_suitable_python(tmp_path: Path) -> None:
    """Not with functions undefined and a script that goes on."""
    (tmp_path / "python3").write_text("#!/bin/sh\necho too old >&2\nexit 1\n")
    (tmp_path / "python3").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    shim = shlex.quote(str(ROOT / "slurm/lib/common.sh"))
    for script, code in ((f"source {shim}; echo $?", 0), (f"set -e; source {shim}; echo not reached", 71)):
        done = subprocess.run(["bash", "-c", script], env={"PATH": path}, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (code, "71\n" if code == 0 else "", "too old\n")


def test_the_names_of_common_are_those_of_the_helpers() -> None:
    assert common.wait_for_runtime_url is helpers.wait_for_runtime_url
    assert common.isolated_podman_storage is helpers.isolated_podman_storage


def test_an_unknown_users_home_is_a_sentence(shell: Shell, tmp_path: Path) -> None:
    done = shell._run([sys.executable, str(COMMON), "cleanup-old-coordination-dirs"], {"SKYRL_JOBS_BASE": "~nosuch/x"})
    assert "Traceback" not in done.stderr


def test_it_runs_from_a_folder_of_any_name_and_by_a_link(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "linked to").symlink_to(ROOT)
    common_there = tmp_path / "linked to/slurm/lib/common.py"
    done = shell._run([sys.executable, "-S", str(common_there), "get-node-count"], {})
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
