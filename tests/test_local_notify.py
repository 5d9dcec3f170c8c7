"""NOTIFY and SNAPSHOT=1 in local runs, with real Podman: who tells people without Slurm, and which code runs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import CHECKOUT
from tests.local_runs import Place
from tests.receiver import Receiver, receiver
from tests.test_git import repository

pytestmark = pytest.mark.podman
TOKEN = "T0KEN-of-somebody"


@pytest.fixture
def hook() -> Iterator[Receiver]:
    with receiver() as made:
        yield made


@pytest.fixture
def place(tmp_path: Path, hook: Receiver) -> Iterator[Place]:
    """Our checkout, on a host that has a mail program, for a user with a skyrl-agent of their own."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sendmail").write_text(f'#!/bin/sh\n{{ echo "$@"; cat; }} >>{tmp_path}/mails\n')
    (programs / "sendmail").chmod(0o755)
    (tmp_path / "root" / "SkyRL").mkdir(parents=True)
    repository(tmp_path / "root" / "SkyRL" / "skyrl-agent")
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": os.environ["HOME"],
        "NOTIFY": f"{hook.url}/{TOKEN} me@lab.example",
        "SKYRL_PROJECT_ROOT": str(tmp_path / "root"),
    }
    made = Place(CHECKOUT, tmp_path, None, environment)
    with made.lent():
        yield made


def test_a_local_run_tells_people_and_uses_its_copy(place: Place, hook: Receiver) -> None:
    command = 'until [ -e go ]; do sleep 0.1; done; cat "$SKYRL_AGENT_DIR/a.py"; echo "told: $NOTIFY."; exit 4'
    run = place.start(f"TRAINING_COMMAND=echo trainer started; {command}", "SNAPSHOT=1")
    run.wait_for("training | trainer started")
    (place.base / "root" / "SkyRL" / "skyrl-agent" / "a.py").write_text("edited\n")
    (run.directory / "go").touch()
    assert run.wait() == 4, run.stderr
    assert "training | one\n" in run.stderr, "what the file was at the launch"
    assert "training | told: .\n" in run.stderr, "the trainer needs no webhook"
    [message] = hook.of(run.directory.name)
    assert (message["state"], message["exit_code"]) == ("failed", 4)
    mail = (place.base / "mails").read_text()
    assert mail.startswith("-i -- me@lab.example\n")
    assert f"Subject: skyrl run {run.directory.name} failed (exit code 4)" in mail.replace("\n ", " ")
    files = (path for path in run.directory.rglob("*") if path.is_file() and not path.is_symlink())
    assert {path.name for path in files if TOKEN.encode() in path.read_bytes()} == {"secrets.json"}


def test_a_local_run_that_is_stopped_was_cancelled(place: Place, hook: Receiver) -> None:
    run = place.start("TRAINING_COMMAND=echo trainer started; exec sleep 300")
    run.wait_for("training | trainer started")
    run.process.send_signal(signal.SIGINT)
    run.wait()
    [message] = hook.of(run.directory.name)
    assert message["state"] == "cancelled"
