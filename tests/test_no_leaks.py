"""A key stays in private files and environments: looked for wherever others can look, through a whole real run."""

from __future__ import annotations

import base64
import contextlib
import os
import shlex
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import cluster as test_cluster
from tests.conftest import OrdinaryUser
from tests.runs import Run, User, launch, launch_argv, parse_report, until

pytestmark = [pytest.mark.slurm, pytest.mark.podman]

KEY = "sk-Planted/Key+0123456789=="
TOKEN = "wandb-Planted-Token-987654321"
PRIVATE = {"secrets.json", "runtime_api_key.txt", "training.env"}
LOOKS_PER_S = 20
LOOP = '"$SKYRL_PYTHON" -m shell_rl.train --steps 2 --rollouts 2 --sandboxes 2'


@pytest.fixture(autouse=True)
def clean(nothing_left: Callable[[], None]) -> None:
    """Every test here ends with nothing left on any node (the fixture checks at its end)."""


def traces(secret: str) -> list[bytes]:
    """How a secret may show: plain, or in base64, alone and inside a longer text at each of three alignments.

    Of the aligned ones only the characters that the secret alone decides, in both alphabets.
    """
    raw = secret.encode()
    found = [raw]
    for offset in range(3):
        whole = base64.b64encode(b"\0" * offset + raw)
        inside = whole[(offset * 8 + 5) // 6 : (offset + len(raw)) * 8 // 6]
        found += [inside, inside.translate(bytes.maketrans(b"+/", b"-_"))]
    return found


def shows(data: bytes, *secrets: str) -> list[str]:
    """The secrets that a text gives away."""
    return [secret for secret in secrets if any(trace in data for trace in traces(secret))]


class Sampler:
    """Reads the arguments of all processes of this machine, of every node, 20 times a second."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self.looks = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(1 / LOOKS_PER_S):
            for entry in Path("/proc").iterdir():
                if entry.name.isdigit():
                    self._look(entry)
            self.looks += 1

    def _look(self, process: Path) -> None:
        try:
            self.seen.add((process / "cmdline").read_bytes())
        except OSError:
            return

    def showing(self, *secrets: str) -> list[bytes]:
        return [words for words in self.seen.copy() if shows(words, *secrets)]


@pytest.fixture
def sampler() -> Iterator[Sampler]:
    with Sampler() as started:
        yield started


@pytest.fixture
def conf(user: OrdinaryUser, checkout: Path) -> Iterator[Path]:
    """A ``.conf`` of the user's with a key in it, beside ours in the checkout, whose code is copied."""
    path = checkout / "slurm" / "config" / "with key.conf"
    path.write_text(f'source {shlex.quote(str(checkout))}/slurm/config/dev.conf\nALLHANDS_API_KEY="{KEY}"\n')
    path.chmod(0o600)
    os.chown(path, user.uid, user.gid)
    yield path
    path.unlink()


def server_environments(user: OrdinaryUser) -> bytes:
    """The environments of the user's API servers and Podman processes."""
    servers = [pid for pid, words in user.processes().items() if "podman system" in words or "api_server" in words]
    assert len(servers) >= 2
    found = []
    for pid in servers:
        with contextlib.suppress(OSError):  # forked for a moment under the same name
            found.append(Path(f"/proc/{pid}/environ").read_bytes())
    assert len(found) >= 2
    return b"".join(found)


def with_conf(argv: list[str], conf: Path) -> list[str]:
    """The same launch with another configuration."""
    position = argv.index("--config")
    return [*argv[: position + 1], str(conf), *argv[position + 2 :]]


def slurms_words(user: User, run: Run) -> bytes:
    """Everything that Slurm tells an ordinary user about a run's jobs."""
    answers = []
    for job_id in run.jobs.values():
        answers += [
            user.run(["scontrol", "show", "job", "-dd", job_id]),
            user.run(["scontrol", "write", "batch_script", job_id, "-"]),
            user.run(["squeue", "-h", "-t", "all", "-j", job_id, "-O", "Command:500,Comment:200,StdOut:500"]),
        ]
    for answer in answers:
        assert answer.returncode == 0, answer.stderr
        assert answer.stdout
    return "".join(answer.stdout for answer in answers).encode()


def cluster_files() -> Iterator[tuple[Path, bytes]]:
    """Slurm's own logs, its saved state and its spooled scripts and environments."""
    for path in test_cluster.HOME.rglob("*"):
        try:
            if path.is_file():
                yield path, path.read_bytes()
        except OSError:
            continue


def assert_only_in_private_files(folder: Path, *secrets: str) -> set[str]:
    """No file but the private ones holds a secret; returns the names of those that do."""
    holding = set()
    for path in folder.rglob("*"):
        if path.is_file() and shows(path.read_bytes(), *secrets):
            assert path.name in PRIVATE, path
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
            holding.add(path.name)
    return holding


def test_planted_keys_show_nowhere(
    user: OrdinaryUser, checkout: Path, jobs_base: Path, conf: Path, sampler: Sampler
) -> None:
    environment = {"WANDB_API_KEY": TOKEN}
    settings = (f"SKYRL_JOBS_BASE={jobs_base}", f"TRAINING_COMMAND={LOOP}; exit 0")
    argv = with_conf(launch_argv(checkout, *settings), conf)
    dry = user.run([*argv, "--dry-run", "--debug"], env=environment)
    assert dry.returncode == 0, dry.stderr
    assert "ALLHANDS_API_KEY=***" in dry.stdout
    done = user.run([*argv, "--debug"], env=environment)
    assert done.returncode == 0, done.stderr
    run = parse_report(user, done.stdout)
    run.wait_for_text("training", "is ready at")
    told = slurms_words(user, run)
    assert shows(server_environments(user), KEY, TOKEN) == []
    kept = {str(path): shows(data, KEY, TOKEN) for path, data in cluster_files()}
    run.wait_over(seconds=120)
    assert run.completion["exit_code"] == 0, run.log("training")
    said = (dry.stdout + dry.stderr + done.stdout + done.stderr).encode()
    assert shows(said, KEY, TOKEN) == []
    assert shows(told, KEY, TOKEN) == []
    assert {path: found for path, found in kept.items() if found} == {}
    assert any("environment" in path for path in kept)  # Slurm's copy of the jobs' environments was looked at
    assert {"secrets.json", "runtime_api_key.txt"} <= assert_only_in_private_files(run.directory, KEY)
    assert "secrets.json" in assert_only_in_private_files(run.directory, TOKEN)
    assert (run.directory / conf.name).exists()
    assert sampler.showing(KEY, TOKEN) == []
    assert any(b"slurm_runtime.api_server" in words for words in sampler.seen)
    assert any(b"shell_rl.train" in words for words in sampler.seen)
    assert sampler.looks >= LOOKS_PER_S


def test_a_generated_key_shows_nowhere(user: User, checkout: Path, jobs_base: Path, sampler: Sampler) -> None:
    run = launch(user, checkout, jobs_base, f"TRAINING_COMMAND={LOOP}; exit 0")
    run.wait_for_text("training", "is ready at")
    key = run.text("runtime_api_key.txt").strip()
    assert len(key) >= 32
    told = slurms_words(user, run)
    kept = [str(path) for path, data in cluster_files() if shows(data, key)]
    run.wait_over(seconds=120)
    assert run.completion["exit_code"] == 0, run.log("training")
    assert shows(told, key) == []
    assert kept == []
    assert assert_only_in_private_files(run.directory, key) == {"runtime_api_key.txt", "training.env"}
    assert sampler.showing(key) == []


def test_the_sampler_sees_a_key_that_is_in_argv(
    user: User, checkout: Path, jobs_base: Path, conf: Path, sampler: Sampler
) -> None:
    """The same run with a trainer that is careless: what the tests above look for is found."""
    command = 'TRAINING_COMMAND=exec -a "--key=$ALLHANDS_API_KEY" sleep 2'
    argv = with_conf(launch_argv(checkout, f"SKYRL_JOBS_BASE={jobs_base}", command), conf)
    done = user.run(argv, env={"WANDB_API_KEY": TOKEN})
    run = parse_report(user, done.stdout)
    run.wait_over(seconds=60)
    assert sampler.showing(KEY) == [f"--key={KEY}\0".encode() + b"2\0"]
    assert sampler.showing(TOKEN) == []


@pytest.mark.parametrize("offset", range(3))
def test_a_key_inside_base64_is_found(offset: int) -> None:
    text = base64.b64encode(b"u" * offset + KEY.encode() + b"more")
    assert shows(text, KEY, TOKEN) == [KEY]
    assert shows(base64.urlsafe_b64encode(b"user:"[:offset] + KEY.encode()), KEY) == [KEY]


def test_a_leak_in_a_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "runtime_1.out").write_text(f"key is {KEY}")
    with pytest.raises(AssertionError):
        assert_only_in_private_files(tmp_path, KEY)
    (tmp_path / "runtime_1.out").rename(tmp_path / "secrets.json")
    (tmp_path / "secrets.json").chmod(0o644)
    with pytest.raises(AssertionError):
        assert_only_in_private_files(tmp_path, KEY)


def test_the_sampler_looks_often_enough(sampler: Sampler) -> None:
    until("looks", lambda: sampler.looks >= 5, 30)
    assert len(sampler.seen) > 1
