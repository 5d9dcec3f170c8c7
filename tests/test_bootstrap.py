"""From any Python to the one with our packages: which is taken, and what is said where there is none."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slurm.lib import bootstrap
from slurm.lib.coordination import parse_flag

ROOT = Path(__file__).resolve().parent.parent
JOBS = sorted(path.name for path in (ROOT / "slurm" / "jobs").glob("[!_]*.py"))


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A checkout without an environment: the launcher and its code."""
    target = tmp_path / "my: checkout"
    shutil.copytree(ROOT / "slurm", target / "slurm", ignore=shutil.ignore_patterns("__pycache__"))
    return target


def python_at(path: Path, body: str) -> Path:
    """An interpreter that is a shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def good(path: Path) -> Path:
    return python_at(path, f'echo "through {path}" >&2\nexec "{sys.executable}" "$@"')


def poor(path: Path) -> Path:
    """A Python without any installed package."""
    return python_at(path, f'exec "{sys.executable}" -S "$@"')


def start(
    code: Path, *words: str, script: str = "slurm/launch.py", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Start a script of the checkout under a Python without any installed package."""
    clean = {"PATH": os.environ["PATH"], "HOME": "/nowhere", **environment}
    argv = [sys.executable, "-S", str(code / script), *words]
    return subprocess.run(argv, env=clean, capture_output=True, text=True, timeout=60)


def test_the_checkouts_own_environment_is_taken(code: Path) -> None:
    python = good(code / ".venv/bin/python")
    done = start(code, "--version")
    assert (done.returncode, done.stdout) == (0, "launch.py 0.1.0\n")
    assert done.stderr == f"through {python}\n"


@pytest.mark.parametrize("name", ["SKYRL_PYTHON", "SKYRL_VENV"])
def test_a_named_one_comes_first(code: Path, tmp_path: Path, name: str) -> None:
    good(code / ".venv/bin/python")
    other = good(tmp_path / "other/bin/python")
    done = start(code, "--version", **{name: str(other if name == "SKYRL_PYTHON" else tmp_path / "other")})
    assert done.stderr == f"through {other}\n"


def test_without_any_one_line_says_which_command_makes_it(code: Path) -> None:
    done = start(code, "--version")
    assert done.returncode == 71
    assert done.stdout == ""
    assert done.stderr == (
        f"{code}/slurm/launch.py: no suitable Python: "
        f"{code}/.venv/bin/python (the project's environment) is not there; "
        f"make the environment with:  '{code}/scripts/setup'\n"
    )


def test_a_run_names_the_checkout_it_was_launched_from(code: Path) -> None:
    done = start(code, "--version", SKYRL_CHECKOUT=str(ROOT))
    assert f"'{ROOT}/scripts/setup'" in done.stderr
    done = start(code, "--version", SKYRL_CHECKOUT="/the/checkout")
    assert "the checkout /the/checkout is gone: launch again from where it is now" in done.stderr


def test_broken_ones_do_not_take_turns_for_ever(code: Path, tmp_path: Path) -> None:
    own, named = poor(code / ".venv/bin/python"), poor(tmp_path / "na:med")
    done = start(code, "--version", SKYRL_PYTHON=str(named))
    assert done.returncode == 71
    assert f"{named} (SKYRL_PYTHON) is too old or lacks packages" in done.stderr
    assert f"{own} (the project's environment) is too old or lacks packages" in done.stderr
    assert done.stderr.count("\n") == 1


def test_one_that_cannot_be_started_is_passed_over(code: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/no/such/interpreter\n")
    broken.chmod(0o755)
    done = start(code, "--version", SKYRL_PYTHON=str(broken))
    assert done.returncode == 71
    assert f"{broken} (SKYRL_PYTHON) cannot be started" in done.stderr
    good(code / ".venv/bin/python")
    assert start(code, "--version", SKYRL_PYTHON=str(broken)).returncode == 0


def test_a_folder_is_no_interpreter(code: Path, tmp_path: Path) -> None:
    done = start(code, "--version", SKYRL_PYTHON=str(tmp_path))
    assert done.returncode == 71
    assert f"{tmp_path} (SKYRL_PYTHON) is not there" in done.stderr


def test_the_arguments_and_the_pid_stay(code: Path) -> None:
    python_at(code / ".venv/bin/python", 'echo "$$"; shift; printf "<%s>" "$@"')
    argv = [sys.executable, "-S", str(code / "slurm/launch.py"), "a  b", "", "*", "--config"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env={"PATH": os.environ["PATH"]}) as process:
        out, _ = process.communicate(timeout=60)
    assert out == f"{process.pid}\n<a  b><><*><--config>"


@pytest.mark.parametrize("script", ["slurm/lib/common.py", *(f"slurm/jobs/{job}" for job in JOBS)])
def test_every_script_restarts_itself(code: Path, script: str) -> None:
    python = good(code / ".venv/bin/python")
    done = start(code, "--help", script=script)
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"through {python}\n"
    assert "usage:" in done.stdout


@pytest.mark.parametrize("job", JOBS)
def test_a_spooled_job_script_finds_its_code(code: Path, tmp_path: Path, job: str) -> None:
    """Slurm runs a copy, elsewhere: the run's own code is named in the environment, with %j for the job's id."""
    spooled = tmp_path / "spool" / "slurm_script"
    spooled.parent.mkdir()
    shutil.copy(ROOT / "slurm/jobs" / job, spooled)
    good(code / ".venv/bin/python")
    run = code.rename(tmp_path / "run_77")
    environment = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "77", "SKYRL_CODE_DIR": str(tmp_path / "run_%j")}
    argv = [sys.executable, "-S", str(spooled), "--help"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"usage: {job}" in done.stdout
    assert run.is_dir()


def test_a_spooled_job_script_without_any_code_says_so(tmp_path: Path) -> None:
    shutil.copy(ROOT / "slurm/jobs/runtime_server.py", tmp_path / "slurm_script")
    environment = {"PATH": "/nowhere", "SLURM_JOB_ID": "77", "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "slurm_script")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == bootstrap.EXIT_ENVIRONMENT
    assert "cannot find the SkyRL checkout; submit it by its path inside the checkout" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("job", "flag", "about"),
    [("runtime_server.py", "runtime_failed.flag", "77"), ("verl_training.py", "training_complete.flag", "70")],
)
def test_the_other_job_reads_that_there_is_no_interpreter(
    code: Path, tmp_path: Path, job: str, flag: str, about: str
) -> None:
    """Before anything of ours can run, in words that the other job's reader takes."""
    run = tmp_path / "run_77"
    run.mkdir()
    named = {"SLURM_JOB_ID": "77", "SKYRL_RUNTIME_JOB_ID": about, "SKYRL_COORD_DIR": str(tmp_path / "run_%j")}
    done = start(code, script=f"slurm/jobs/{job}", SKYRL_PYTHON="/gone/python", **named)
    assert done.returncode == 71
    said = parse_flag((run / flag).read_text())
    assert said is not None
    assert (said.job_id, said.runtime_job_id, said.exit_code) == ("77", about, 71)
    assert "/gone/python (SKYRL_PYTHON) is not there" in said.reason
    assert [path.name for path in run.iterdir()] == [flag]


@pytest.mark.parametrize("named", [{}, {"SKYRL_COORD_DIR": ""}], ids=["unset", "empty"])
@pytest.mark.parametrize("job", ["runtime_server.py", "verl_training.py"])
def test_a_job_that_knows_of_no_directory_writes_nothing(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, named: dict[str, str]
) -> None:
    """Submitted directly its folder is wherever sbatch was called."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = start(code, script=f"slurm/jobs/{job}", SKYRL_PYTHON="/gone/python", SLURM_JOB_ID="77", **named)
    assert done.returncode == 71
    assert not list(Path.cwd().iterdir())


BODIES = {
    "prebuild_images.py": "prebuild_job.py",
    "runtime_server.py": "runtime_job.py",
    "runtime_worker.py": "worker_job.py",
    "verl_training.py": "training_job.py",
}
# What the release before had: it wrote the reason, and ended by sys.exit.
OLD_BOOTSTRAP = """
import os, sys

def ensure_interpreter(code, script, packages=()):
    if os.environ.get("SKYRL_PYTHON"):
        sys.stderr.write("no suitable Python\\n")
        sys.exit(71)
"""


@pytest.mark.parametrize("job", JOBS)
def test_a_run_with_an_older_releases_code_can_be_joined(code: Path, tmp_path: Path, job: str) -> None:
    """Slurm spools the script of today's checkout; the modules are those of the run's copy."""
    (code / "slurm/lib/bootstrap.py").write_text(OLD_BOOTSTRAP)
    (code / "slurm/lib" / BODIES[job]).write_text("def main(argv):\n    print('begun with', argv)\n    return 0\n")
    (tmp_path / "run").mkdir()
    spooled = tmp_path / "slurm_script"
    shutil.copy(ROOT / "slurm/jobs" / job, spooled)
    named = {"SLURM_JOB_ID": "77", "SKYRL_CODE_DIR": str(code), "SKYRL_COORD_DIR": str(tmp_path / "run")}
    done = start(tmp_path, "--x", script="slurm_script", **named)
    assert (done.returncode, done.stdout, done.stderr) == (0, "begun with ['--x']\n", "")
    done = start(tmp_path, "--x", script="slurm_script", SKYRL_PYTHON="/gone/python", **named)
    assert (done.returncode, done.stderr) == (71, "no suitable Python\n")
    said = [parse_flag(path.read_text()) for path in (tmp_path / "run").iterdir()]
    assert [flag and flag.reason for flag in said] == (
        [] if job in {"prebuild_images.py", "runtime_worker.py"} else ["no suitable Python; its log says more"]
    )


def test_the_runs_code_is_awaited_and_no_other_taken(code: Path, tmp_path: Path) -> None:
    good(code / ".venv/bin/python")
    spooled = tmp_path / "slurm_script"
    shutil.copy(ROOT / "slurm/jobs/verl_training.py", spooled)
    late = tmp_path / "late"
    named = {"SLURM_JOB_ID": "77", "SKYRL_CODE_DIR": str(late), "SLURM_SUBMIT_DIR": str(code)}
    argv = [sys.executable, "-S", str(spooled), "--help"]
    with subprocess.Popen(argv, env={"PATH": "/usr/bin:/bin", **named}, stdout=subprocess.PIPE, text=True) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.5)
        code.rename(late)
        out, _ = process.communicate(timeout=30)
    assert out.startswith("usage: verl_training.py")


def test_what_is_suitable() -> None:
    assert bootstrap.suitable((3, 10), ("os", "json"))
    assert bootstrap.suitable(tuple(sys.version_info[:2]), ("tenacity", "dotenv", "yaml"))
    assert not bootstrap.suitable((3, 6), ())
    assert not bootstrap.suitable((3, 9), ())
    assert not bootstrap.suitable((3, 12), ("os", "no_such_package"))


def test_the_numbers_agree_with_those_of_the_suite() -> None:
    from slurm.lib.errors import EXIT_ENVIRONMENT

    assert bootstrap.EXIT_ENVIRONMENT == EXIT_ENVIRONMENT
    assert (
        f'requires-python = ">={bootstrap.MINIMUM[0]}.{bootstrap.MINIMUM[1]}"' in (ROOT / "pyproject.toml").read_text()
    )


def test_the_job_scripts_find_their_code_in_the_same_way() -> None:
    """Slurm runs copies of single files, so they cannot share these functions; they must stay equal."""
    assert JOBS == ["prebuild_images.py", "runtime_server.py", "runtime_worker.py", "verl_training.py"]
    trees = [ast.parse((ROOT / "slurm" / "jobs" / name).read_text()) for name in JOBS]
    functions = [
        {node.name: ast.unparse(node) for node in tree.body if isinstance(node, ast.FunctionDef)} for tree in trees
    ]
    for name in ("has_code", "submitted_from", "awaited", "find_code", "missing_code"):
        assert len({found[name] for found in functions}) == 1
