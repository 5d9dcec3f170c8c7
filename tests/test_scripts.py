"""Do the commands of a checkout set up what is missing, say what they cannot, and pass on how things ended?"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
NOBODY = 65534
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
# What scripts/setup itself runs; the machine of these tests has more than that, the one they play has not.
BASE_TOOLS = "awk cat dirname env find flock grep id ls mkdir mktemp python3 readlink rm sha256sum sort tr unshare"
EXIT_ENVIRONMENT = 71

FAKE_PYTHON = """\
#!/bin/bash
printf '%s\\n' "$*" >>{log}
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && touch "$3/pyvenv.cfg" ;;
    "-m pip "*install*) [ ! -e {folder}/pip-fails ] || {{ echo 'pip: no such package'; exit 1; }} ;;
    "-m pip"* | "-m mypy"* | */bin/vermin*) ;;
    "-m ruff"*) [ ! -e {folder}/ruff-fails ] || {{ echo 'ruff: E501'; exit 1; }} ;;
    "-m pytest"*)
        printf '%s\\n' '= short test summary info =' '== 1 failed, 2 passed in 0.10s =='
        [ ! -e {folder}/failures ] || cat {folder}/failures >"$TELL_FAILURES"
        exit "$(cat {folder}/pytest-status)" ;;
    "-m tests.cluster logs") echo {folder}/logs ;;
    *launch.py*) exit 7 ;;
    *) exec '{python}' "$@" ;;
esac
"""


@dataclass(frozen=True)
class Copy:
    """A checkout below a path with a space that every user can read, and an environment that only writes down."""

    root: Path
    folder: Path  # of the fake environment

    @property
    def environment(self) -> dict[str, str]:
        home = self.root.parent
        return {"PATH": SYSTEM_PATH, "HOME": str(home), "LANG": "C.UTF-8", "SKYRL_VENV": str(self.folder)}

    def run(self, *argv: str, user: int | None = None, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run a script of the checkout from another folder."""
        return subprocess.run(
            [str(self.root / argv[0]), *argv[1:]],
            env={**self.environment, **changes},
            cwd="/",
            user=user,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def calls(self, word: str) -> list[str]:
        """The fake Python's command lines that contain ``word``, since the last call of this."""
        log = self.folder / "calls"
        lines = [line for line in log.read_text().splitlines() if word in line]
        log.write_text("")
        return lines


@pytest.fixture
def copy() -> Iterator[Copy]:
    """Not below pytest's own folder, which other users cannot enter."""
    with tempfile.TemporaryDirectory(prefix="skyrl test ") as name:
        Path(name).chmod(0o755)
        made = Copy(Path(name) / "a checkout", Path(name) / "its environment")
        no_cache = shutil.ignore_patterns("__pycache__")
        for part in ("scripts", "slurm", ".ci"):
            shutil.copytree(CHECKOUT / part, made.root / part, ignore=no_cache)
        (made.root / "tests" / "cluster").mkdir(parents=True)
        for file in ("pyproject.toml", "tests/cluster/alone"):
            shutil.copy(CHECKOUT / file, made.root / file)
        (made.folder / "bin").mkdir(parents=True)
        (made.folder / "pytest-status").write_text("0")
        python = made.folder / "bin" / "python"
        quoted = f"'{made.folder}'"
        python.write_text(FAKE_PYTHON.format(log=f"{quoted}/calls", folder=quoted, python=sys.executable))
        python.chmod(0o755)
        yield made


@pytest.fixture
def bare_path(copy: Copy) -> Path:
    """A PATH with hardly more than a shell."""
    folder = copy.root.parent / "bin"
    folder.mkdir()
    for name in ["bash", *BASE_TOOLS.split()]:
        found = shutil.which(name, path=SYSTEM_PATH)
        assert found, name
        (folder / name).symlink_to(found)
    return folder


def fake_program(folder: Path, name: str, says: str = "") -> None:
    (folder / name).write_text(f"#!/bin/bash\necho '{says}'\n")
    (folder / name).chmod(0o755)


def test_setup_installs_once_and_then_does_nothing(copy: Copy) -> None:
    first = copy.run("scripts/setup")
    assert first.returncode == 0, first.stderr
    assert len(calls := copy.calls("install")) == 1
    assert calls[0].endswith("--editable .[server,demo,dev]")
    second = copy.run("scripts/setup")
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert copy.calls("pip") == []


def test_setup_sees_changed_requirements_and_wider_options(copy: Copy) -> None:
    copy.run("scripts/setup", "--minimal")
    assert copy.calls("install")[0].endswith(".[server,prebuild]")
    copy.run("scripts/setup")
    assert copy.calls("install")[0].endswith(".[server,demo,dev]")
    copy.run("scripts/setup", "--minimal")
    assert copy.calls("install") == []
    with (copy.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    copy.run("scripts/setup")
    assert len(copy.calls("install")) == 1


def test_setup_shows_what_pip_said_and_tries_again(copy: Copy) -> None:
    (copy.folder / "pip-fails").touch()
    done = copy.run("scripts/setup")
    assert done.returncode == EXIT_ENVIRONMENT
    assert "pip: no such package" in done.stderr
    assert str(copy.folder) in done.stderr.splitlines()[-1]
    (copy.folder / "pip-fails").unlink()
    again = copy.run("scripts/setup")
    assert again.returncode == 0
    assert "pip" not in again.stderr


def test_setup_makes_an_environment_from_nothing_and_anew_after_a_move(copy: Copy) -> None:
    """The scripts in an environment name its folder, so a moved one is replaced."""
    python, made, moved = str(copy.folder / "bin" / "python"), copy.root / ".venv", copy.root / "moved"
    assert copy.run("scripts/setup", SKYRL_VENV="", PYTHON=python).returncode == 0
    assert [line.split()[1] for line in copy.calls("-m") if "--version" not in line] == ["venv", "pip"]
    assert copy.run("scripts/setup", SKYRL_VENV="").returncode == 0
    assert copy.calls("-m") == []
    (made.rename(moved) / "of the old place").touch()
    done = copy.run("scripts/setup", SKYRL_VENV=str(moved), PYTHON=python)
    assert done.returncode == 0, done.stderr
    assert "made elsewhere" in done.stderr
    assert not (moved / "of the old place").exists()
    assert copy.calls("-m venv") == [f"-m venv {moved}"]


def test_setup_leaves_a_folder_that_is_no_environment(copy: Copy) -> None:
    precious = copy.root.parent / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    done = copy.run("scripts/setup", SKYRL_VENV=str(precious))
    assert done.returncode == EXIT_ENVIRONMENT
    assert str(precious) in done.stderr
    assert (precious / "file").read_text() == "mine"


def test_setup_refuses_a_python_that_is_too_old(copy: Copy, bare_path: Path) -> None:
    (bare_path / "old").write_text("#!/bin/bash\nexit 1\n")
    (bare_path / "old").chmod(0o755)
    done = copy.run("scripts/setup", SKYRL_VENV=str(copy.root / "new"), PYTHON=str(bare_path / "old"))
    assert done.returncode == EXIT_ENVIRONMENT
    assert f"PYTHON={bare_path / 'old'} is no Python 3.10 or newer" in done.stderr


@pytest.mark.parametrize("arguments", [["--wrong"], ["--packages"], ["--packages", "all"]])
def test_setup_refuses_other_arguments(copy: Copy, arguments: list[str]) -> None:
    done = copy.run("scripts/setup", *arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without privileges")
class TestOrdinaryUser:
    def setup(self, copy: Copy, path: Path) -> subprocess.CompletedProcess[str]:
        return copy.run("scripts/setup", "--packages", "run", user=NOBODY, PATH=str(path))

    def test_is_told_all_that_is_missing_at_once(self, copy: Copy, bare_path: Path) -> None:
        done = self.setup(copy, bare_path)
        assert done.returncode == EXIT_ENVIRONMENT
        missing = [line.strip() for line in done.stderr.splitlines() if line.startswith("  - ")]
        for name in ("podman", "slirp4netns", "newuidmap and newgidmap", "busybox"):
            assert any(line.startswith(f"- {name}:") for line in missing), done.stderr
        assert any("/etc/subuid and /etc/subgid" in line and "nobody" in line for line in missing)
        assert done.stderr.count("An administrator") == 1
        assert "podman slirp4netns uidmap" in done.stderr
        assert not any("user namespaces:" in line for line in missing)  # this machine has them

    def test_is_offered_a_range_that_nobody_has(self, copy: Copy, bare_path: Path) -> None:
        done = self.setup(copy, bare_path)
        line = next(line for line in done.stderr.splitlines() if "usermod" in line)
        first, last = map(int, line.split("--add-subuids ")[1].split()[0].split("-"))
        taken = [row.split(":") for row in Path("/etc/subuid").read_text().splitlines()]
        assert last - first == 65535
        assert all(last < int(start) or first >= int(start) + int(count) for _, start, count in taken)

    @pytest.mark.parametrize(
        ("version", "complaint"),
        [("3.4.4", "podman 4.0 or newer"), ("4.3.1", None), ("5.2.0", "pasta")],
    )
    def test_is_asked_for_what_its_podman_needs(
        self, copy: Copy, bare_path: Path, version: str, complaint: str | None
    ) -> None:
        fake_program(bare_path, "podman", f"podman version {version}")
        for name in ("runc", "slirp4netns", "newuidmap", "newgidmap", "busybox"):
            fake_program(bare_path, name)
        done = self.setup(copy, bare_path)
        missing = [line for line in done.stderr.splitlines() if line.startswith("  - ") and "subordinate" not in line]
        missing = [line for line in missing if "/dev/net/tun" not in line]  # as this machine has it
        assert [complaint in line for line in missing] == [True] if complaint else missing == []


@pytest.mark.podman
def test_quickstart_launches_locally_and_ends_like_the_launcher(copy: Copy) -> None:
    done = copy.run("scripts/quickstart", "--dry-run", "--set", "A=b c")
    assert done.returncode == 7, done.stderr
    assert copy.calls("launch.py") == [f"{copy.root}/slurm/launch.py --config local --dry-run --set A=b c"]


@pytest.mark.slurm
class TestTestCommand:
    @pytest.mark.parametrize("ci", ["true", ""])
    def test_ends_with_the_line_of_pytest(self, copy: Copy, ci: str) -> None:
        done = copy.run("scripts/test", "-k", "a b", CI=ci)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "== 1 failed, 2 passed in 0.10s =="
        assert copy.calls("-m pytest") == [
            "-m pytest " + ("-p tests.no_skips -p tests.tell_failures " if ci else "") + "-k a b"
        ]

    def test_fails_for_a_lint_after_the_tests(self, copy: Copy) -> None:
        (copy.folder / "ruff-fails").touch()
        done = copy.run("scripts/test")
        assert done.returncode == 1
        assert "ruff: E501" in done.stderr
        assert len(copy.calls("/bin/vermin")) == 1
        assert "failed: ruff check; ruff format;" in done.stderr
        assert done.stdout.splitlines()[-1] == "== 1 failed, 2 passed in 0.10s =="

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a cluster a network of its own")
    def test_without_arguments_every_test_is_in_one_of_four_parts(self, copy: Copy) -> None:
        (copy.folder / "pytest-status").write_text("3")
        done = copy.run("scripts/test")
        assert done.returncode == 3
        expressions = [line.partition(" no:cacheprovider -m ")[2] for line in copy.calls("-m pytest")]
        assert sorted(expressions[:2]) == ["not slurm and not podman", "not slurm and podman"]
        assert sorted(expressions[2:]) == ["slurm and (faults or verbs)", "slurm and not (faults or verbs)"]
        assert done.stdout.count("== 1 failed, 2 passed in 0.10s ==") == 4, "all are shown"

    def test_in_ci_shows_the_logs_of_slurm_when_it_fails_and_last_what_did(self, copy: Copy) -> None:
        (copy.folder / "ruff-fails").touch()
        (copy.folder / "pytest-status").write_text("3")
        (copy.folder / "failures").write_text("FAILED a test\n")
        (copy.folder / "logs").mkdir()
        (copy.folder / "logs" / "slurmctld.log").write_text("error: node down\n")
        done = copy.run(".ci/run")
        assert done.returncode == 3
        last = done.stdout.partition("error: node down")[2]
        assert "failed: ruff check; ruff format;" in last
        assert last.splitlines()[-5:] == ["== 1 failed, 2 passed in 0.10s =="] * 4 + ["FAILED a test"]
        assert "no_skips" in copy.calls("-m pytest")[0]


SKIPPING = """\
import pytest
{module}
@pytest.mark.skip(reason="by mark")
def test_marked(): pass
def test_inside(): pytest.skip("inside")
@pytest.fixture
def absent(): pytest.skip("in a fixture")
def test_fixture(absent): pass
@pytest.mark.xfail(strict=True)
def test_expected(): assert False
def test_passes(): pass
"""


@pytest.mark.parametrize(
    ("module", "summary"),
    [("", "1 failed, 1 passed, 1 xfailed, 2 errors"), ("pytest.importorskip('no_such_module')", "1 error")],
)
def test_in_ci_a_skip_is_a_failure(tmp_path: Path, module: str, summary: str) -> None:
    (tmp_path / "test_it.py").write_text(SKIPPING.format(module=module))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    argv = [sys.executable, "-m", "pytest", "-p", "tests.no_skips", "-p", "no:cacheprovider", "-q", "test_it.py"]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "In CI no test may be skipped" in done.stdout
    assert done.stdout.splitlines()[-1].startswith(f"{summary} in ")


def test_what_failed_is_told_in_short(tmp_path: Path) -> None:
    long = "def test_long(): assert not 'the beginning' + 'x' * 9000 + 'the end'\n"
    (tmp_path / "test_it.py").write_text(f"{long}def test_of_two_lines(): raise ValueError('one\\n\\ntwo')\n")
    (tmp_path / "test_no_module.py").write_text("import no_such_module\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    plugins = ["-p", "tests.tell_failures", "-p", "no:cacheprovider"]
    argv = [sys.executable, "-m", "pytest", *plugins, "-q", "--continue-on-collection-errors"]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "TELL_FAILURES": str(tmp_path / "told")}
    subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, timeout=60, check=False)
    told = (tmp_path / "told").read_text()
    paragraphs = told.split("FAILED ")[1:]
    assert [text.split()[0] for text in paragraphs] == [
        "test_no_module.py",
        "test_it.py::test_long",
        "test_it.py::test_of_two_lines",
    ]
    assert "no_such_module" in paragraphs[0]
    assert "the beginning" in paragraphs[1] and "the end" in paragraphs[1] and len(paragraphs[1]) < 1600
    assert "  ValueError: one\n  two\n" in paragraphs[2]


class TestLauncher:
    """``-S`` makes any Python one without our packages."""

    def launch(self, copy: Copy, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": SYSTEM_PATH, "HOME": str(copy.root.parent), "LANG": "C.UTF-8", **changes}
        argv = [sys.executable, "-S", str(copy.root / "slurm" / "launch.py"), *arguments]
        return subprocess.run(argv, env=environment, cwd="/", capture_output=True, text=True, timeout=60, check=False)

    def test_without_environment_names_the_command_that_makes_it(self, copy: Copy) -> None:
        done = self.launch(copy, "--version")
        assert done.returncode == EXIT_ENVIRONMENT
        assert len(done.stderr.splitlines()) == 1
        assert f"'{copy.root}/scripts/setup'" in done.stderr

    def test_restarts_itself_in_the_environment_of_the_checkout(self, copy: Copy) -> None:
        (copy.root / ".venv").symlink_to(sys.prefix)
        done = self.launch(copy, "--help")
        assert done.returncode == 0, done.stderr
        assert "--runtime-only" in done.stdout

    def test_restarts_itself_in_the_environment_that_is_named(self, copy: Copy) -> None:
        done = self.launch(copy, "--help", SKYRL_VENV=sys.prefix)
        assert done.returncode == 0, done.stderr
