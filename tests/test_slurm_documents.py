"""Does what a reader types from the documents work? Every block of commands is run on the test cluster, as a user.

The reader of each document has a home of its own with a fresh clone of the repository, an environment as
``scripts/setup`` makes it, and one shell for all blocks in their order. VERL is not there: ``TRAINING_COMMAND`` is set
in its place.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import OrdinaryUser, belongings, copy_checkout, environment_folder, fresh_folder, sweep
from tests.doc_blocks import all_blocks, script, with_blocks_to_run

pytestmark = [pytest.mark.slurm]

DEADLINE_S = 900.0
END_S = 10.0
SHOWN_LINES = 60


@dataclass(frozen=True)
class Library:
    """What all readers share: the repository that they clone, and an environment."""

    user: OrdinaryUser
    repository: Path
    environment: Path

    def variables(self, home: Path) -> dict[str, str]:
        """The environment of a reader with this home."""
        return {
            **self.user.environment,
            "HOME": str(home),
            "REPOSITORY": str(self.repository),
            "SKYRL_VENV": str(self.environment),
            "TRAINING_COMMAND": "sleep 2",
        }


def committed(user: OrdinaryUser, folder: Path) -> None:
    """Make a folder of files a repository with one commit."""
    author = ("-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "init.defaultBranch=main")
    for words in (("init", "--quiet"), ("add", "--all"), ("commit", "--quiet", "--message=all")):
        done = user.run(["git", *author, "-C", str(folder), *words])
        assert done.returncode == 0, done.stderr


def made_environment(user: OrdinaryUser, shared: Path, repository: Path, folder: Path) -> None:
    """An environment of the user's with a shared one's packages, and the stamp by which scripts/setup knows it."""
    done = user.run([str(shared / "bin" / "python"), "-m", "venv", "--without-pip", str(folder)])
    assert done.returncode == 0, done.stderr
    (packages,) = folder.glob("lib/python3.*/site-packages")
    (there,) = shared.glob("lib/python3.*/site-packages")
    (packages / "shared.pth").write_text(f"import site; site.addsitedir({str(there)!r})\n")
    project = hashlib.sha256((repository / "pyproject.toml").read_bytes()).hexdigest()
    (folder / "skyrl-setup.stamp").write_text(f"{project} server,demo,dev {folder}\n")


@pytest.fixture(scope="module")
def library(user: OrdinaryUser) -> Library:
    folder = fresh_folder(user, "documents")
    repository, environment = folder / "repository", folder / "environment"
    repository.mkdir()
    copy_checkout(repository)
    subprocess.run(["chown", "-Rh", f"{user.uid}:{user.gid}", str(repository)], check=True)
    committed(user, repository)
    made_environment(user, environment_folder(user, repository), repository, environment)
    return Library(user, repository, environment)


@pytest.fixture
def clone(library: Library, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A reader's fresh clone, PROJECT_ROOT/SkyRL in a home of its own; what the reader starts ends with the test."""
    user = library.user
    before = belongings(user)
    home = fresh_folder(user, re.sub(r"\W+", "_", request.node.callspec.id))
    folder = home / "project" / "SkyRL"
    try:
        done = user.run(["git", "clone", "--quiet", str(library.repository), str(folder)])
        assert done.returncode == 0, done.stderr
        (folder / ".venv").symlink_to(library.environment)
        yield folder
    finally:
        sweep(user, before)
        shutil.rmtree(home, ignore_errors=True)


def ended(shell: subprocess.Popen[str]) -> int:
    """The exit code of a reader's shell, whatever it left in the background ended; 124 where it took too long."""
    try:
        return shell.wait(DEADLINE_S)
    except subprocess.TimeoutExpired:
        return 124
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, number)
                time.sleep(0.5)
        shell.wait(END_S)


@pytest.mark.parametrize("document", with_blocks_to_run(all_blocks()))
def test_what_a_document_says_works(library: Library, clone: Path, tmp_path: Path, document: str) -> None:
    text = script([block for block in all_blocks() if block.document == document])
    log = tmp_path / "log"
    with log.open("w") as out:
        variables = library.variables(clone.parent.parent)
        argv = ["bash", "-c", text]
        shell = library.user.popen(
            argv, variables, clone, stdout=out.fileno(), stderr=subprocess.STDOUT, start_new_session=True
        )
        code = ended(shell)
    said = "\n".join(log.read_text(errors="replace").splitlines()[-SHOWN_LINES:])
    print(log.read_text(errors="replace"))
    assert code == 0, f"{document}: exit code {code}{' (too long)' if code == 124 else ''}\n{said}"
