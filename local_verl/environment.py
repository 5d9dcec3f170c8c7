"""Where is VERL's own Python environment, and how is it made: once, from pinned requirements, by one of us at a time.

It lies in SKYRL_VERL_CACHE, else ``~/.cache/skyrl/verl-0.5.0``: 1.8 GB with the CPU build of torch. An environment
carries its own path, so it is made where it stays, and counts as made once its stamp is there, which is written last.
What was interrupted is made anew; pip has the downloads by then. ``python -m local_verl.environment`` makes it
beforehand.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from slurm.lib.coordination import write_atomically
from slurm.lib.edge import exit_code_of
from slurm.lib.errors import EXIT_OK, EnvironmentProblem, WaitTimeout
from slurm.lib.logs import log, setup_command_logging
from slurm.lib.processes import Child, ChildSpec, run
from slurm.lib.signals import SignalNotes
from slurm.lib.waiting import wait_for

VERL = "0.5.0"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
PYTHONS = (sys.executable, "python3.11", "python3.12", "python3")  # ours can be started by all who share it
MAKE_DEADLINE_S = 1800.0
LOCK_DEADLINE_S = MAKE_DEADLINE_S
PROBE_DEADLINE_S = 20.0
IMPORT_DEADLINE_S = 180.0
NEEDED_BYTES = 3 << 30  # 1.8 GB, and what pip unpacks meanwhile
TELL_EVERY_S = 30.0
IS_SUITABLE = "import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))"
IMPORTS = "import ray, torch; from verl.trainer import main_ppo"


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Where the environment is, or will be."""
    return Path(environment.get("SKYRL_VERL_CACHE") or f"~/.cache/skyrl/verl-{VERL}").expanduser().absolute()


def fingerprint(requirements: str) -> str:
    """What tells one set of requirements from another; comments do not count."""
    lines = [line.strip() for line in requirements.splitlines() if line.strip() and not line.startswith("#")]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def venv_folder(cache: Path) -> Path:
    """The environment of these requirements; another version of them has another folder."""
    return cache / f"venv-{fingerprint(REQUIREMENTS.read_text(encoding='utf-8'))}"


def stamp(venv: Path) -> Path:
    """The file that says that all is there."""
    return venv / "skyrl-complete"


def is_complete(venv: Path) -> bool:
    """Whether it can be used."""
    return stamp(venv).is_file() and os.access(python_of(venv), os.X_OK)


def python_of(venv: Path) -> Path:
    """Its interpreter."""
    return venv / "bin" / "python"


def ready(environment: Mapping[str, str], notes: SignalNotes) -> Path:
    """The interpreter of VERL's environment, which is made where it is not there yet.

    :raises EnvironmentProblem: it cannot be made; the message says why and what to do
    :raises WaitTimeout: another process has been making it for ``LOCK_DEADLINE_S`` seconds
    :raises Interrupted: a signal came meanwhile
    """
    cache = cache_folder(environment)
    venv = venv_folder(cache)
    if not is_complete(venv):
        with locked(cache, notes):
            if not is_complete(venv):  # by now somebody else may have made it
                make(venv, environment, notes)
    return python_of(venv)


@contextlib.contextmanager
def locked(cache: Path, notes: SignalNotes) -> Iterator[None]:
    """Hold the lock of the folder, which goes with this process."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        file = (cache / "lock").open("w")
    except OSError as problem:
        raise EnvironmentProblem(
            f"cannot make VERL's environment in {cache}: {problem.strerror}; name a folder of yours in SKYRL_VERL_CACHE"
        ) from None
    with file:
        if not _taken(file.fileno()):
            log.info("another run is making VERL's environment in %s; waiting for it", cache)
            what = f"another run to make VERL's environment in {cache}"
            wait_for(
                what,
                lambda: _taken(file.fileno()) or None,
                LOCK_DEADLINE_S,
                still_possible=notes.check,
                sleep=notes.sleep,
            )
        yield


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def make(venv: Path, environment: Mapping[str, str], notes: SignalNotes) -> None:
    """Make it in place of whatever an interrupted attempt left."""
    check_room(venv.parent)
    base, begin = base_python(environment, notes), time.monotonic()
    log.info("making VERL %s's environment in %s: once, 1.8 GB, one to three minutes", VERL, venv)
    shutil.rmtree(venv, ignore_errors=True)
    own = {name: value for name, value in environment.items() if not name.startswith("PYTHON")}
    install = ("-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar=off", "-r")
    step([base, "-m", "venv", str(venv)], venv, own, notes)
    step([str(python_of(venv)), *install, str(REQUIREMENTS)], venv, own, notes)
    step([str(python_of(venv)), "-c", IMPORTS], venv, own, notes)
    write_atomically(stamp(venv), f"verl {VERL}\n")
    log.info("VERL's environment is ready after %.0f s", time.monotonic() - begin)


def check_room(cache: Path) -> None:
    """Refuse a disk that is too full before anything is downloaded."""
    free = shutil.disk_usage(cache).free
    if free < NEEDED_BYTES:
        raise EnvironmentProblem(
            f"{cache} has {free >> 20} MiB free and VERL's environment needs {NEEDED_BYTES >> 20}; "
            "name a folder on another disk in SKYRL_VERL_CACHE"
        )


def base_python(environment: Mapping[str, str], notes: SignalNotes) -> str:
    """A Python that VERL's requirements have packages for, and that can make environments.

    :raises EnvironmentProblem: there is none
    """
    named = environment.get("SKYRL_VERL_PYTHON")
    for name in (named,) if named else PYTHONS:
        with contextlib.suppress(EnvironmentProblem, WaitTimeout):
            if run([name, "-c", IS_SUITABLE], timeout_s=PROBE_DEADLINE_S, check=notes.check).ok:
                return name
    raise EnvironmentProblem(
        f"VERL {VERL} needs Python 3.11 or 3.12 with its venv module, and {named or 'no such one on PATH'} "
        f"{'is not one' if named else 'was found'}; name one in SKYRL_VERL_PYTHON"
    )


def step(argv: Sequence[str], venv: Path, environment: Mapping[str, str], notes: SignalNotes) -> None:
    """Run one command of the making to its end; what it prints goes to a file, whose end is shown if it fails."""
    output = venv.parent / "making.log"
    end = time.monotonic() + MAKE_DEADLINE_S
    with output.open("ab") as out:
        out.truncate(0)
        name = "the making of VERL's environment"
        spec = ChildSpec(tuple(argv), environment, name, cwd=venv.parent, stdout=out, stderr=out)
        with Child(spec) as child:
            _follow(child, end, notes)
            code = child.exit_code
    if code != 0:
        last = "\n".join(output.read_text(errors="replace").strip().splitlines()[-8:])
        raise EnvironmentProblem(
            f"cannot make VERL's environment: {' '.join(argv[:4])} … ended with exit code {code}. "
            f"The end of {output}:\n{last}"
        )


def _follow(child: Child, end: float, notes: SignalNotes) -> None:
    next_word = time.monotonic() + TELL_EVERY_S
    while child.exit_code is None:
        notes.check()
        if time.monotonic() > end:
            raise WaitTimeout(f"{child.spec.name} has not ended within {MAKE_DEADLINE_S:.0f} s")
        if time.monotonic() > next_word:
            log.info("still making VERL's environment")
            next_word = time.monotonic() + TELL_EVERY_S
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(0.2)


def main() -> int:
    """Make it, or say that it is there; the exit code."""
    setup_command_logging()

    def tell(notes: SignalNotes) -> int:
        print(ready(os.environ, notes))
        return EXIT_OK

    return exit_code_of(tell, "ended by %s; what is unfinished is made anew the next time")


if __name__ == "__main__":
    sys.exit(main())
