"""The checks on the command line: --check, --json, --no-check, and what a launch does with findings."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.preflight.world import GOOD, ROOT, World

TRAINER = ("--set", "TRAINING_COMMAND=true")
ROOMY = ("--set", "MAX_CKPT_TO_KEEP=1")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def launch(world: World, *options: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(ROOT / "slurm" / "launch.py"), "--config", "dev", "--set", *GOOD, *options]
    return subprocess.run(argv, cwd=world.folder, env=world.environment, capture_output=True, text=True, timeout=60)


def test_a_good_configuration_passes_and_nothing_is_queued(world: World) -> None:
    done = launch(world, "--check", *ROOMY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("0 errors, 0 warnings, ")
    assert "steps in all" in done.stdout
    assert "checked  config, parts, slots, batch, " in done.stdout
    assert done.stderr == ""
    assert world.slurm.calls == []
    assert not world.slurm.jobs.exists()


def test_all_findings_at_once_for_scripts(world: World) -> None:
    (world.data / "train.parquet").unlink()
    done = launch(world, "--check", "--json", "--no-check=space", "--set", "TRAIN_BATCH_SIZE=3", "--set", "ROLLOUT_N=3")
    said = json.loads(done.stdout)
    assert "space" not in said["checked"] and "data" in said["checked"]
    assert done.returncode == 2
    errors = [finding for finding in said["findings"] if finding["level"] == "error"]
    assert {finding["check"] for finding in errors} == {"data", "batch"}
    assert said["errors"] == 2


def test_errors_stop_a_launch_and_the_rest_is_said(world: World) -> None:
    (world.data / "train.parquet").unlink()
    done = launch(world, "--set", "MAX_MODEL_LEN=4096", *ROOMY)
    assert (done.returncode, done.stdout) == (2, "")
    assert "1 error before submission; nothing was queued:\n  data: TRAIN_DATA=" in done.stderr
    assert "[WARN] lengths: MAX_MODEL_LEN=4096 is less than" in done.stderr
    assert "[INFO] slots: a step opens 8 sandboxes" in done.stderr
    assert world.slurm.calls == []
    assert not world.slurm.jobs.exists()


def test_unknown_keys_of_a_file_are_findings(world: World) -> None:
    conf = world.folder / "mine.conf"
    conf.write_text('source "$SKYRL_CONFIG_DIR/dev.conf"\nTRAIN_BATCHSIZE=8\n')
    done = launch(world, "--config", str(conf), "--check", "--json", *ROOMY)
    assert (done.returncode, done.stderr) == (0, "")
    warnings = [finding for finding in json.loads(done.stdout)["findings"] if finding["level"] == "warning"]
    assert [(finding["check"], finding["fix"]) for finding in warnings] == [
        ("config", "did you mean TRAIN_BATCH_SIZE?")
    ]
    assert "mine.conf:2: not a key of this suite: TRAIN_BATCHSIZE" in warnings[0]["sentence"]
    launched = launch(world, "--config", str(conf), "--no-check", *TRAINER)
    assert launched.returncode == 0
    assert launched.stderr.count("did you mean TRAIN_BATCH_SIZE?") == 1


@pytest.mark.parametrize(("environment", "is_plain"), [({}, False), ({"NO_COLOR": "1"}, True)])
def test_a_terminal_is_written_for_in_its_width(world: World, environment: dict[str, str], is_plain: bool) -> None:
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 70, 0, 0))
    argv = [sys.executable, str(ROOT / "slurm" / "launch.py"), "--config", "dev", "--set", *GOOD, "--check"]
    argv.append("--no-check=space")  # which says another thing where this host's disk is nearly full
    seen = {**world.environment, **environment}
    done = subprocess.run(argv, cwd=world.folder, env=seen, stdout=terminal, timeout=60, check=False)
    os.close(terminal)
    with contextlib.closing(os.fdopen(main, "rb", buffering=0)) as reader:
        text = reader.read(65536).decode()
    assert done.returncode == 0
    assert ("\x1b[32mestimate\x1b[0m slots" in text) == (not is_plain)
    slots = re.sub(r"\x1b\[\d*m", "", text).splitlines()[0]
    assert slots.startswith("estimate slots        a step opens 8 sandboxes at once")
    assert (len(slots) > 70) == is_plain


MISTAKES = ("--set", "RESTART=3", "--set", "GPU_NODES=0")


def test_mistakes_of_the_configuration_are_findings(world: World) -> None:
    done = launch(world, "--check", *MISTAKES)
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout.splitlines() == [
        "error    config       --set GPU_NODES: GPU_NODES=0: must be at least 1",
        "                      -> correct it there",
        "error    config       --set RESTART: not a key of this suite: RESTART",
        "                      -> did you mean RESTARTS?",
        "checked  config",
        "2 errors, 0 warnings, 0 estimates",
    ]
    assert world.slurm.everything == []


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (MISTAKES, 2, ["--set GPU_NODES: GPU_NODES=0: must be at least 1", "not a key of this suite: RESTART"]),
        (("--config", "prodution"), 2, ["there is no configuration of this name"]),
        (("--config", "/nowhere/x.conf"), 2, ["/nowhere/x.conf: cannot read this configuration file"]),
        (("--chekc",), 2, ["unrecognized arguments: --chekc"]),
        (("--dry-run",), 2, ["--check and --dry-run exclude each other"]),
        (("--skip-runtime",), 2, ["--skip-runtime needs a runtime"]),
        (("--no-check=",), 2, ["names no check"]),
    ],
)
def test_scripts_get_one_document_whatever_is_wrong(
    world: World, options: tuple[str, ...], code: int, said: list[str]
) -> None:
    done = launch(world, "--check", "--json", *options)
    document = json.loads(done.stdout)
    assert (done.returncode, document["errors"], document["checked"]) == (code, len(said), ["config"])
    for finding, words in zip(document["findings"], said, strict=True):
        assert (finding["check"], finding["level"]) == ("config", "error")
        assert words in finding["sentence"] and finding["fix"]


@pytest.mark.parametrize("option", ["--no-check", "--no-check=data", "--no-check=slots,data"])
def test_what_is_left_out_does_not_stop_it(world: World, option: str) -> None:
    (world.data / "train.parquet").unlink()
    done = launch(world, option)
    assert done.returncode == 0, done.stderr
    assert world.slurm.names == ["sbatch", "sbatch", "scontrol release", "scontrol release"]
    asked = [call.name for call in world.slurm.questions if call.name != "squeue --user"]  # about what is left
    assert bool(asked) == (option != "--no-check")


def test_an_example_that_makes_no_task_file_stops_a_launch(world: World) -> None:
    world.example.write_text("no mapping")
    done = launch(world, "--set", "TASK_YAML=auto", *ROOMY)
    assert done.returncode == 2
    assert "verl_oh.yaml (TASK_YAML) must hold keys and values" in done.stderr
    assert world.slurm.calls == []


def test_without_what_it_cannot_do_without_no_option_helps(world: World) -> None:
    (world.agent / "uv.lock").unlink()
    done = launch(world, "--no-check")
    assert done.returncode == 71
    assert "uv.lock is missing" in done.stderr
    assert world.slurm.calls == []


def test_each_job_is_asked_about_once(world: World) -> None:
    assert launch(world, *TRAINER).returncode == 0
    names = sorted(call.name for call in world.slurm.questions)
    assert names == ["sbatch --test-only", "sbatch --test-only", "sinfo", "squeue --user"]
    asked = [call for call in world.slurm.questions if call.name != "sinfo"]
    for call in asked:
        assert "--parsable" not in call.argv and "a-key-of-wandb" not in "".join(
            [*call.argv, *call.environment.values()]
        )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--json"], "--json goes with --check"),
        (["--check", "--dry-run"], "--check and --dry-run exclude each other"),
        (["--no-check="], "--no-check= names no check; there are: slots, batch,"),
        (["--chekc"], "unrecognized arguments: --chekc; launch.py --help lists the options"),
        (["--no-check=nonsense"], "there is no check nonsense; there are: slots, batch,"),
    ],
)
def test_what_does_not_go_together(world: World, options: list[str], said: str) -> None:
    done = launch(world, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert world.slurm.everything == []


def test_a_slurm_that_is_silent_is_a_warning(world: World) -> None:
    silent = {"code": 1, "stderr": "Unable to contact slurm controller (connect failure)"}
    world.slurm.answer("sbatch --test-only", silent, silent)
    done = launch(world, "--check", *TRAINER)
    assert done.returncode == 0
    assert "Slurm does not answer, so neither the jobs" in done.stdout
