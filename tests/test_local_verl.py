"""Does the real VERL train here: parts of it with nothing else, and a whole run, killed and resumed, in real sandboxes.

The run is that of ``--config local-verl`` by an ordinary user. Its environment (1.8 GB) is made once and kept below
``/var/tmp/skyrl-tests``.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from local_verl import environment, reward, tasks, tiny, train
from local_verl.adaptation import install
from shell_rl.errors import SandboxDied
from shell_rl.sandbox import RuntimeApi, Sandbox
from slurm.lib.config import load_config
from slurm.lib.errors import EnvironmentProblem, UsageError
from slurm.lib.settings import Settings
from slurm.lib.signals import Interrupted, SignalNotes
from tests.conftest import CHECKOUT, VERL_CACHE, OrdinaryUser, belongings, copy_checkout, environment_folder
from tests.local_runs import Local, Place, processes
from tests.test_shell_rl import KEY, FakeApi, needs_busybox, serving
from tests.users import open_tun, ordinary_user, subordinate_uids
from tests.verl_records import notes, rollouts, sandboxes, saved_step, steps

# --- what is asked, and how an answer is judged ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exit_code", "stdout", "worth"),
    [
        (0, "1\n2\n3\n", 1.0),
        (0, "1\n2\n", 2 / 3),
        (0, "1\n2\n3\n4\n5\n6\n", 1 / 2),
        (0, "3\n2\n1\n", 1 / 3),
        (0, "", 0.0),
        (1, "1\n2\n3\n", 0.0),
    ],
)
def test_reward(exit_code: int, stdout: str, worth: float) -> None:
    assert tasks.reward(tasks.expected_output(3), exit_code, stdout) == pytest.approx(worth)


def test_every_prompt_and_every_right_answer_is_in_the_models_words() -> None:
    for row in tiny.rows():
        prompt: Any = row["prompt"]
        assert set(prompt[0]["content"].split()) <= set(tasks.WORDS)
    assert {str(number) for number in range(2, tasks.HIGHEST + 1)} <= set(tasks.WORDS)
    assert len(tiny.rows()) == tiny.ROWS


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    """An API server of these tests, whose sandboxes are real processes, named as the training job names its own."""
    (tmp_path / "sandboxes").mkdir()
    with serving(FakeApi(tmp_path / "sandboxes")) as fake:
        values = (fake.url, KEY, "localhost/any:latest")
        for name, value in zip(train.NEEDED, values, strict=False):
            monkeypatch.setenv(name, value)
        yield fake


@needs_busybox
def test_each_answer_has_a_sandbox_of_its_own(api: FakeApi) -> None:
    answers = ["3", "2", "", "6", "3 ; exit 7"]
    wanted = [tasks.expected_output(3)] * len(answers)
    scores = reward.compute_scores(["count"] * len(answers), answers, wanted, [None] * len(answers))
    assert [score["score"] for score in scores] == pytest.approx([1, 2 / 3, 0, 1 / 2, 0])
    assert [score["exit_code"] for score in scores] == [0, 0, 1, 0, 7]
    assert scores[1]["stdout"] == "1\n2\n"
    assert api.started == len({score["runtime_id"] for score in scores}) == len(answers)
    assert api.alive() == []


def test_an_answer_is_tried_in_other_sandboxes_and_then_given_up(api: FakeApi) -> None:
    api.constant = b""
    with pytest.raises(SandboxDied):
        reward.run(MuteApi(api.url, KEY, "localhost/any:latest"), "seq 1")
    assert api.started == reward.ATTEMPTS
    assert api.alive() == []


class MuteApi(RuntimeApi):
    """Its sandboxes are gone as soon as they were ready."""

    def start(self, session_id: str, closing: threading.Event) -> Sandbox:
        sandbox = super().start(session_id, closing)
        self.stop(session_id)
        return sandbox


# --- VERL is told what the launcher tells any VERL --------------------------------------------------------------------


def settings(*given: str) -> Settings:
    shell = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    folder = CHECKOUT / "slurm" / "config"
    loaded = load_config("local-verl", given, shell, folder, datetime(2026, 1, 1), CHECKOUT.parent)
    assert loaded.warnings == ()
    return loaded.settings


def told(*given: str) -> dict[str, str]:
    """What VERL is told last of each name."""
    found = settings("CHECKPOINT_DIR=/c", "ROLLOUT_DIR=/r", *given)
    words = train.verl_overrides(found, Path("/run/local-verl"), Path("/run/code"))
    return dict(word.split("=", 1) for word in words)


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ("TRAIN_BATCH_SIZE=2", "data.train_batch_size", "2"),
        ("ROLLOUT_N=8", "actor_rollout_ref.rollout.n", "8"),
        ("SAVE_FREQ=7", "trainer.save_freq", "7"),
        ("GPUS_PER_NODE=3", "trainer.n_gpus_per_node", "1"),
        ("TOTAL_EPOCHS=3", "trainer.total_epochs", "3"),
        ("WANDB_EXPERIMENT=mine", "trainer.default_local_dir", "/c/mine"),
        ("VERL_OVERRIDES=trainer.total_training_steps=1", "trainer.total_training_steps", "1"),
    ],
)
def test_the_launchers_keys_reach_verl(given: str, name: str, value: str) -> None:
    assert told(given)[name] == value


def test_model_data_and_reward_are_those_of_the_run() -> None:
    found = told()
    assert found["actor_rollout_ref.model.path"] == "/run/local-verl/model"
    assert found["data.train_files"] == "/run/local-verl/rows.parquet"
    assert found["custom_reward_function.path"] == "/run/code/local_verl/reward.py"
    assert found["actor_rollout_ref.rollout.name"] == "hf"
    assert (found["trainer.nnodes"], found["trainer.n_gpus_per_node"]) == ("1", "1"), "what VERL asks Ray for"


def test_without_the_training_jobs_folders_it_says_so() -> None:
    with pytest.raises(UsageError, match="CHECKPOINT_DIR and ROLLOUT_DIR"):
        train.verl_overrides(settings(), Path("/run"), Path("/code"))


def test_started_by_hand_it_says_how_to_start_it() -> None:
    argv = [sys.executable, "-m", "local_verl.train"]
    done = subprocess.run(argv, cwd=CHECKOUT, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "launch.py --config local-verl" in done.stderr
    assert "Traceback" not in done.stderr


def test_ray_is_the_runs_own_whatever_the_shell_says() -> None:
    job = {"RAY_ADDRESS": "10.0.0.1:6379", "CUDA_VISIBLE_DEVICES": "NoDevFiles", "RAY_TMPDIR": "/tmp/r", "KEPT": "yes"}
    made = train.verl_processes_environment(job, Path("/code"), Path("/run"))
    assert not {"RAY_ADDRESS", "CUDA_VISIBLE_DEVICES"} & made.keys()
    assert (made["RAY_TMPDIR"], made["TMPDIR"], made["KEPT"]) == ("/tmp/r", "/tmp/r", "yes")
    assert made["PYTHONPATH"].split(os.pathsep) == ["/code/local_verl/shim", "/code"]


# --- the adaptation changes modules, not files ------------------------------------------------------------------------


@pytest.fixture
def adapted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of modules, one of which is changed when it is imported."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def change(module: ModuleType) -> None:
        module.__dict__["word"] = "changed"

    finder = install({"adapted_for_test": change})
    yield tmp_path
    sys.meta_path.remove(finder)
    for name in ("adapted_for_test", "not_adapted_for_test"):
        sys.modules.pop(name, None)


def test_a_module_is_changed_once_it_is_there(adapted: Path) -> None:
    for name in ("adapted_for_test", "not_adapted_for_test"):
        (adapted / f"{name}.py").write_text("word = 'as written'\nkept = 1\n")
    module = importlib.import_module("adapted_for_test")
    assert (module.word, module.kept) == ("changed", 1)
    assert importlib.import_module("not_adapted_for_test").word == "as written"
    assert (adapted / "adapted_for_test.py").read_text().startswith("word = 'as written'")


def test_a_module_that_is_absent_stays_absent(adapted: Path) -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("adapted_for_test")


# --- VERL's environment: made once ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shell", "folder"),
    [
        ({"SKYRL_VERL_CACHE": "/big/verl"}, "/big/verl"),
        ({"SKYRL_VERL_CACHE": ""}, str(Path.home() / ".cache/skyrl/verl-0.5.0")),
        ({}, str(Path.home() / ".cache/skyrl/verl-0.5.0")),
    ],
)
def test_where_the_environment_lies(shell: Mapping[str, str], folder: str) -> None:
    assert str(environment.cache_folder(shell)) == folder


def test_other_requirements_have_another_environment() -> None:
    one = environment.fingerprint("verl==0.5.0\ntorch==2.13.0\n")
    assert environment.fingerprint("# a word on it\nverl==0.5.0\n\ntorch==2.13.0") == one
    assert environment.fingerprint("verl==0.5.0\ntorch==2.14.0\n") != one


def test_everything_is_pinned() -> None:
    lines = [line for line in environment.REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    assert f"verl=={environment.VERL}" in lines
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)


def pretended(cache: Path) -> Path:
    """What counts as a complete environment."""
    venv = environment.venv_folder(cache)
    environment.python_of(venv).parent.mkdir(parents=True)
    environment.python_of(venv).symlink_to(sys.executable)
    environment.stamp(venv).touch()
    return venv


def test_one_that_is_complete_is_used_as_it_is(tmp_path: Path) -> None:
    venv = pretended(tmp_path)
    made = environment.ready({"SKYRL_VERL_CACHE": str(tmp_path)}, SignalNotes())
    assert made == environment.python_of(venv)
    assert [path.name for path in tmp_path.iterdir()] == [venv.name]  # no lock: it may be another user's


def test_an_unfinished_one_is_made_anew_and_a_failure_is_told(tmp_path: Path) -> None:
    venv = pretended(tmp_path)
    environment.stamp(venv).unlink()
    shell = {"PATH": os.environ["PATH"], "SKYRL_VERL_CACHE": str(tmp_path), "SKYRL_VERL_PYTHON": "/bin/false"}
    with pytest.raises(EnvironmentProblem, match=r"Python 3.11 or 3.12.*/bin/false is not one.*SKYRL_VERL_PYTHON"):
        environment.ready(shell, SignalNotes())


def test_a_step_that_fails_shows_the_end_of_what_it_said(tmp_path: Path) -> None:
    argv = ["sh", "-c", "echo no such package; exit 3"]
    with pytest.raises(EnvironmentProblem, match=r"(?s)exit code 3.*no such package"):
        environment.step(argv, tmp_path / "venv", {"PATH": os.environ["PATH"]}, SignalNotes())


def test_a_step_reads_no_code_of_the_runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, cache = tmp_path / "here", tmp_path / "cache"
    here.mkdir()
    cache.mkdir()
    (here / "venv.py").write_text("raise SystemExit('was read')\n")
    monkeypatch.chdir(here)
    environment.step([sys.executable, "-m", "venv", "--help"], cache / "venv", dict(os.environ), SignalNotes())


def test_a_signal_ends_a_step(tmp_path: Path) -> None:
    notes = SignalNotes()
    notes.note(signal.SIGTERM)
    with pytest.raises(Interrupted):
        environment.step(["sleep", "300"], tmp_path / "venv", {"PATH": os.environ["PATH"]}, notes)


def test_two_at_once_wait_for_each_other(tmp_path: Path) -> None:
    notes = SignalNotes()
    with environment.locked(tmp_path, SignalNotes()):
        notes.note(signal.SIGTERM)
        with pytest.raises(Interrupted), environment.locked(tmp_path, notes):
            raise AssertionError("both hold the lock")
    with environment.locked(tmp_path, SignalNotes()):
        pass


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(EnvironmentProblem, match="SKYRL_VERL_CACHE"),
        environment.locked(tmp_path / "file" / "cache", SignalNotes()),
    ):
        pass


# --- the real thing ---------------------------------------------------------------------------------------------------

BATCH, EPOCH_STEPS, SAVE_FREQ = 16, 4, 3  # prompts × rollouts, steps of an epoch (the configuration), and ours
NOTHING_LEFT_WITHIN_S = 15.0


@pytest.fixture
def place(verl_python: Path) -> Iterator[Place]:
    """An ordinary user's own checkout; no Slurm is needed."""
    if os.geteuid() != 0 or shutil.which("podman") is None:
        pytest.skip("needs root, to become an ordinary user, and Podman")
    open_tun()
    entry = ordinary_user()
    home = Path(entry.pw_dir)
    user = OrdinaryUser(entry.pw_name, entry.pw_uid, entry.pw_gid, home, subordinate_uids(entry.pw_name), {})
    home.chmod(0o755)
    base = home / "jobs" / "local_verl"
    copy = base / "SkyRL"
    shutil.rmtree(base, ignore_errors=True)
    copy_checkout(copy)
    (copy / ".venv").symlink_to(environment_folder(user, copy))
    subprocess.run(["chown", "-Rh", f"{user.uid}:{user.gid}", str(home / "jobs")], check=True)
    made = Place(copy, base, user, {**user.environment, "SKYRL_VERL_CACHE": str(VERL_CACHE)})
    before = belongings(user).paths
    with made.lent():
        yield made
    assert belongings(user).paths <= before


def start(place: Place, epochs: int) -> Local:
    """Launch, or go on with what an earlier launch left."""
    words = (f"CHECKPOINT_DIR={place.base}/checkpoints", f"TOTAL_EPOCHS={epochs}", f"SAVE_FREQ={SAVE_FREQ}")
    return place.start(*words, "SKYRL_DEBUG=1", config="local-verl")


def checkpoints(place: Place) -> Path:
    return place.base / "checkpoints" / "local-verl"


def kill(place: Place, words: bytes) -> None:
    """SIGKILL to the one process of the run with ``words`` in its command line."""
    found = [pid for pid, line in processes([os.fsencode(place.base)]) if words in line]
    assert len(found) == 1, found
    os.kill(found[0], signal.SIGKILL)


def assert_all_gone(place: Place) -> None:
    """No process, container, socket, storage or Ray's folder of the runs."""
    place.assert_nothing_left(NOTHING_LEFT_WITHIN_S)
    assert place.user
    assert not [line for line in place.user.processes().values() if f"skyray-{place.user.uid}-" in line]


def assert_every_rollout_ran_in_a_sandbox(run: Local, steps_done: int) -> None:
    found = rollouts(run.directory)
    assert len(found) == BATCH * steps_done
    ids = {rollout["runtime_id"] for rollout in found}
    assert len(ids) == len(found)
    assert ids <= sandboxes(run.directory)  # the API server's own log
    for rollout in found:
        wanted = tasks.expected_output(int(rollout["input"].split()[-1]))
        assert rollout["score"] == pytest.approx(tasks.reward(wanted, rollout["exit_code"], rollout["stdout"]))
    assert len({rollout["score"] for rollout in found}) > 1


@pytest.mark.podman
@pytest.mark.verl
def test_verl_trains_is_killed_and_goes_on(place: Place, verl_python: Path) -> None:
    # VERL's driver is killed in the fifth step: the fourth is lost, the checkpoint is that of the third.
    first = start(place, epochs=3)
    first.wait_for(" step:4 - ", 180)
    kill(place, b"local_verl.driver")
    assert first.wait(60) == 128 + signal.SIGKILL, first.stderr
    assert steps(first.stderr)[:4] == [1, 2, 3, 4]
    at = saved_step(checkpoints(place))
    assert at % SAVE_FREQ == 0
    assert at < max(steps(first.stderr))
    assert len(sandboxes(first.directory)) >= BATCH * len(steps(first.stderr))
    assert any(float(norm) > 0 for norm in re.findall(r"actor/grad_norm:(\d[\d.e-]*)", first.stderr))
    assert_all_gone(place)

    # The same launch goes on from there, with the weights that were saved, to its end.
    last = 3 * EPOCH_STEPS
    second = start(place, epochs=3)
    assert second.wait(300) == 0, second.stderr
    assert notes(checkpoints(place), "loaded") == {at: notes(checkpoints(place), "saved")[at]}
    assert steps(second.stderr) == list(range(at + 1, last + 1))
    assert saved_step(checkpoints(place)) == last
    assert len(sandboxes(second.directory)) >= BATCH * (last - at)
    assert_every_rollout_ran_in_a_sandbox(second, last - at)
    hashes = notes(checkpoints(place), "saved")
    assert len(set(hashes.values())) == len(hashes)  # every save has weights of its own: they were trained
    file = checkpoints(place) / f"global_step_{last}" / "actor" / "model_world_size_1_rank_0.pt"
    argv = [str(verl_python), "-m", "local_verl.weights", str(file)]
    done = subprocess.run(argv, cwd=CHECKOUT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == hashes[last], done.stderr
    assert_all_gone(place)

    # With more epochs it goes on once more; now the training job itself is killed.
    third = start(place, epochs=20)
    third.wait_for(f" step:{last + 1} - ", 180)
    assert notes(checkpoints(place), "loaded")[last] == hashes[last]
    kill(place, b"verl_training.py")
    assert third.wait(60) != 0
    assert_all_gone(place)


@pytest.mark.podman
@pytest.mark.verl
def test_one_is_cancelled_after_its_next_checkpoint(place: Place, verl_python: Path) -> None:
    """It is waited for while VERL writes: the checkpoint that counts is whole, and is the last one."""
    assert place.user
    run = start(place, epochs=50)
    run.wait_for(" step:1 - ", 240)
    argv = [str(place.checkout / "slurm" / "launch.py"), "cancel", "latest", "--after-checkpoint", "--json"]
    done = place.user.run(argv, {"SKYRL_JOBS_BASE": str(place.base)}, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"(SAVE_FREQ={SAVE_FREQ}); waiting for the next one" in done.stderr
    (told,) = json.loads(done.stdout)["runs"]
    at = saved_step(checkpoints(place))
    assert at % SAVE_FREQ == 0
    assert told["after_checkpoint"]["cause"] == "checkpoint"
    assert told["after_checkpoint"]["checkpoint"] == f"step {at}"
    assert all(job["ended"] for job in told["jobs"])
    file = checkpoints(place) / f"global_step_{at}" / "actor" / "model_world_size_1_rank_0.pt"
    argv = [str(verl_python), "-m", "local_verl.weights", str(file)]
    weights = subprocess.run(argv, cwd=CHECKOUT, capture_output=True, text=True, timeout=120)
    assert weights.stdout.strip() == notes(checkpoints(place), "saved")[at], weights.stderr
    assert run.wait(60) == 128 + signal.SIGTERM
    assert_all_gone(place)


def interrupt(place: Place) -> None:
    """Ctrl-C to the launcher."""
    place.started[-1].send_signal(signal.SIGINT)


def kill_the_trainer(place: Place) -> None:
    kill(place, b"local_verl.train")


@pytest.mark.podman
@pytest.mark.verl
@pytest.mark.parametrize(("end", "code"), [(interrupt, 143), (kill_the_trainer, 137)])
def test_nothing_is_left_of_one_that_is_stopped_as_its_workers_start(
    place: Place, end: Callable[[Place], None], code: int
) -> None:
    run = start(place, epochs=1)
    run.wait_for("TaskRunner pid=", 120)
    end(place)
    assert run.wait(60) == code, run.stderr
    assert "Traceback" not in "".join(line for line in run.stderr.splitlines() if "local_verl" in line)
    assert_all_gone(place)
