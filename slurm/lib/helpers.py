"""What the bash suite's helpers do, for Python, for shells by command, and as functions of a bash script.

Callers know them as ``common``, which starts under any Python. They are thin: what they do stands in the modules that
they call.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import select
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from slurm.lib import coordination
from slurm.lib.coordination import CoordinationDir, Flag, FlagReader, jobs_base
from slurm.lib.errors import (
    EXIT_OK,
    EXIT_SIGNAL_BASE,
    EXIT_UNAVAILABLE,
    EXIT_USAGE,
    EnvironmentProblem,
    SuiteError,
    UsageError,
)
from slurm.lib.logs import log, setup_command_logging
from slurm.lib.under_way import end_those_of_other_threads

CODE = Path(__file__).resolve().parent.parent.parent

DEFAULT_READY_TIMEOUT_S = 600
DEFAULT_COMPLETE_TIMEOUT_S = 43200
SHELL_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def log_info(*words: object) -> None:
    log.info("%s", " ".join(map(str, words)))


def log_warn(*words: object) -> None:
    log.warning("%s", " ".join(map(str, words)))


def log_error(*words: object) -> None:
    log.error("%s", " ".join(map(str, words)))


def log_debug(*words: object) -> None:
    """Shown only with SKYRL_DEBUG=1."""
    log.debug("%s", " ".join(map(str, words)))


def create_job_coordination_dir(job_id: str | None = None) -> Path:
    """Make ``YYYYMMDD_HHMMSS_<job id>`` below the jobs base, 0700; returns its path."""
    name = (
        f"{time.strftime(coordination.STAMP_FORMAT)}_{job_id or os.environ.get('SLURM_JOB_ID') or f'pid{os.getpid()}'}"
    )
    return coordination.make_run_dir(jobs_base() / name).path


def get_coordination_dir() -> Path:
    """SKYRL_COORD_DIR if it is there, else a new directory."""
    named = os.environ.get("SKYRL_COORD_DIR", "").replace("%j", os.environ.get("SLURM_JOB_ID", ""))
    return Path(named) if named and Path(named).is_dir() else create_job_coordination_dir()


def _existing(directory: str | Path) -> CoordinationDir:
    path = Path(directory)
    if not path.is_dir():
        raise EnvironmentProblem(f"the coordination directory {path} does not exist")
    return CoordinationDir(path)


def write_runtime_url(directory: str | Path, url: str) -> None:
    """Publish the runtime's address, whole."""
    _existing(directory).publish_url(url)
    log.info("wrote the runtime's URL to %s", CoordinationDir(Path(directory)).runtime_url)


def _flag(exit_code: int | None = None, reason: str = "") -> Flag:
    job_id = os.environ.get("SLURM_JOB_ID", "")
    return Flag.of_this_host(job_id, os.environ.get("SKYRL_RUNTIME_JOB_ID", ""), exit_code, reason)


def signal_runtime_ready(directory: str | Path) -> None:
    """Set ``runtime_ready.flag``."""
    where = _existing(directory)
    job_id = os.environ.get("SLURM_JOB_ID", "")
    where.publish(where.runtime_ready, Flag.of_this_host(job_id, job_id))
    log.info("set %s", where.runtime_ready)


def runtime_of(directory: CoordinationDir) -> str:
    """The job id of the runtime that is ready in a directory; empty if it did not say."""
    ready = FlagReader.of_new_directory(directory.runtime_ready, lambda _flag: True).read()
    return ready.job_id if ready else ""


def signal_training_complete(directory: str | Path, exit_code: int = 0, reason: str = "") -> None:
    """Set ``training_complete.flag`` for the runtime that is ready there."""
    where = _existing(directory)
    runtime_id = os.environ.get("SKYRL_RUNTIME_JOB_ID") or runtime_of(where)
    flag = Flag.of_this_host(os.environ.get("SLURM_JOB_ID", ""), runtime_id, exit_code, reason or "said by a script")
    where.publish(where.training_complete, flag)
    log.info("set %s", where.training_complete)


def _deadline_s(given: float | None, name: str, default: float) -> float:
    if given is not None:
        return given
    said = os.environ.get(name)
    return _amount(said, f"{name}: seconds") if said else default


def wait_for_runtime_url(directory: str | Path, timeout_s: float | None = None) -> str:
    """The runtime's address once it is ready; ``WaitTimeout`` after RUNTIME_READY_TIMEOUT seconds."""
    from slurm.lib.waiting import wait_for

    where = _existing(directory)
    ready = FlagReader.of_new_directory(where.runtime_ready, lambda _flag: True)
    seconds = _deadline_s(timeout_s, "RUNTIME_READY_TIMEOUT", DEFAULT_READY_TIMEOUT_S)
    return wait_for(f"a ready runtime in {where.path}", lambda: _address(where, ready.read()), seconds)


def _address(where: CoordinationDir, ready: Flag | None) -> str | None:
    server = where.read_server(ready) if ready else None
    return server[0] if server else None


def wait_for_training_complete(directory: str | Path, timeout_s: float | None = None) -> int:
    """The trainer's exit code once the training is complete.

    0 for a flag set by hand, 69 where the training job could not say it and the runtime job says that it is gone.
    """
    from slurm.lib.waiting import wait_for

    where = _existing(directory)
    complete = FlagReader.of_new_directory(where.training_complete, lambda _flag: True)
    seconds = _deadline_s(timeout_s, "TRAINING_COMPLETE_TIMEOUT", DEFAULT_COMPLETE_TIMEOUT_S)
    flag = wait_for(f"the training in {where.path} to be complete", complete.read, seconds)
    unknown = EXIT_OK if flag.by_hand else EXIT_UNAVAILABLE
    return unknown if flag.exit_code is None else flag.exit_code


def load_env_file(path: str | Path) -> dict[str, str]:
    """The values of a ``.env`` file, less those that still say <REPLACE>."""
    from slurm.lib.dot_env import read_dot_env

    if not Path(path).is_file():
        raise EnvironmentProblem(f"environment file not found: {path}")
    try:
        return read_dot_env(Path(path))
    except (OSError, UnicodeDecodeError) as problem:
        raise EnvironmentProblem(f"cannot read the environment file {path}: {problem}") from None


def load_config(name: str) -> dict[str, str]:
    """Every key of a configuration as it would reach the jobs."""
    from slurm.lib import config

    loaded = config.load_config(name, [], os.environ, CODE / "slurm" / "config", datetime.now(), CODE.parent)
    for warning in loaded.warnings:
        log.warning("%s", warning)
    return {**loaded.settings.as_environment(), **loaded.exported}


def get_first_node() -> str:
    """The first node of the allocation, else this host."""
    from slurm.lib.processes import run

    nodes = os.environ.get("SLURM_JOB_NODELIST") or os.environ.get("SLURM_NODELIST")
    if not nodes:
        return socket.gethostname()
    answer = run(["scontrol", "show", "hostnames", nodes], timeout_s=10)
    if not answer.ok:
        raise EnvironmentProblem(f"scontrol show hostnames {nodes}: {answer.complaint}")
    return answer.stdout.split()[0]


def get_node_count() -> int:
    return int(os.environ.get("SLURM_NNODES") or os.environ.get("SLURM_JOB_NUM_NODES") or 1)


def get_cpus_per_node() -> int:
    return int(os.environ.get("SLURM_CPUS_ON_NODE") or os.environ.get("SLURM_CPUS_PER_TASK") or 1)


def is_slurm_job() -> bool:
    return bool(os.environ.get("SLURM_JOB_ID"))


def cleanup_old_coordination_dirs(days: float = 7) -> list[Path]:
    """Remove this user's run directories below the jobs base that ended, and were not changed, for ``days`` days.

    As ``launch.py clean`` does it: never one with a job that is queued or runs, or with a checkpoint, and none that
    nothing is known of, as of all that Slurm would have to tell about while it is silent. Returns what is gone.
    """
    from slurm.lib import cleaning
    from slurm.lib.observe.survey import Survey
    from slurm.lib.scheduler import Slurm

    base = jobs_base()
    now = coordination.server_time(base) if base.is_dir() else 0.0
    found = cleaning.removed(cleaning.candidates(base, days * 86400, Survey(Slurm()), now))
    for candidate in found:
        stays = candidate.verdict.stay
        if stays is not cleaning.Stay.YOUNG:
            log.info("keeping %s: %s" if stays else "removed %s%s", candidate.path, candidate.verdict.why)
    return [candidate.path for candidate in found if candidate.goes]


def setup_efa_networking(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What SKYRL_LD_LIBRARY_PATH_EXPORT=1 sets for EFA; nothing otherwise."""
    if environment.get("SKYRL_LD_LIBRARY_PATH_EXPORT") != "1":
        return {}
    return {"FI_PROVIDER": environment.get("FI_PROVIDER") or "efa"}


def setup_cuda_for_triton(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Where Triton finds libcuda on this node, if need be by CUDA_MODULES; where it cannot, VERL does without it."""
    from slurm.lib.gpu_environment import with_libcuda
    from slurm.lib.node_facts import find_cuda
    from slurm.lib.settings import words

    try:
        named = words(environment.get("CUDA_MODULES", ""))
    except ValueError as problem:
        raise UsageError(f"CUDA_MODULES: {problem}") from None
    folder, modules, complaint = find_cuda(named, environment)
    if folder is None:
        why = f" ({complaint})" if complaint else ""
        log.warning("no libcuda.so.1 on this node%s: VERL runs without its flash-attention cross entropy", why)
        return {**modules, "VERL_DISABLE_FLASH_ATTN_CE": environment.get("VERL_DISABLE_FLASH_ATTN_CE", "1")}
    return {**modules, **with_libcuda(folder, {**environment, **modules})}


def setup_python_for_uv(agent: str | None = None, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """UV_PYTHON, a Python of skyrl-agent's version that has its headers; nothing where it is set, or there is none."""
    from slurm.lib.node_facts import find_python

    root = Path(environment.get("SKYRL_PROJECT_ROOT") or CODE.parent)
    folder = Path(agent) if agent else root / "SkyRL" / "skyrl-agent"
    found = None if environment.get("UV_PYTHON") else find_python(folder, environment)
    return {"UV_PYTHON": str(found)} if found else {}


@contextlib.contextmanager
def isolated_podman_storage(job_id: str | None = None) -> Iterator[Mapping[str, str]]:
    """Podman storage of one's own for the block; yields the environment that leads Podman there.

    It is gone afterwards, also if this process is killed, once no fork of it lives that runs no program of its own.
    """
    from slurm.lib import podman_storage
    from slurm.lib.guardian import guarded
    from slurm.lib.job_environment import scratch_folders

    name = job_id or os.environ.get("SLURM_JOB_ID") or f"pid{os.getpid()}"
    scratch = podman_storage.choose_scratch(scratch_folders(os.environ.get("LOCAL_SCRATCH"), os.environ), name)
    stores = podman_storage.readable_stores(os.environ)
    with (
        guarded(CODE) as guardian,
        podman_storage.podman_storage(scratch, name, stores, announce=guardian.own_storage) as storage,
    ):
        yield storage.environment(os.environ)


def hold_podman_storage() -> int:
    """Podman storage of its own for a shell: prints its exports, then holds it until stdin closes or a signal comes."""
    from slurm.lib.signals import noted_signals

    with noted_signals() as notes, isolated_podman_storage() as environment:
        own = {name: value for name, value in environment.items() if os.environ.get(name) != value}
        sys.stdout.write(_exports(own) + "# end\n")
        sys.stdout.flush()
        while notes.stop_signal is None and not select.select([sys.stdin], [], [], 0.5)[0]:
            pass
    return EXIT_OK


# ---- for shells ------------------------------------------------------------------------------------------------------


def _exports(values: Mapping[str, str]) -> str:
    """Lines that a shell evaluates; a name that is none of a shell's variables could be a command there."""
    for name in [name for name in values if not SHELL_NAME.fullmatch(name)]:
        log.warning("left out: %r is not a name that a shell can export", name)
    values = {name: value for name, value in values.items() if SHELL_NAME.fullmatch(name)}
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in sorted(values.items()))


def _value(text: object) -> int:
    sys.stdout.write(f"{text}\n")
    return EXIT_OK


def _done(action: Callable[[], object]) -> int:
    action()
    return EXIT_OK


def _amount(word: str, what: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise UsageError(f"{what}: {word!r} is not a number of at least 0")
    return number


def _seconds(word: str | None) -> float | None:
    return None if word is None else _amount(word, "seconds")


def _number(word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise UsageError(f"{word!r} is not a whole number") from None


Command = Callable[..., int]

# name → (words it takes, what it does); the words in brackets may be left out.
COMMANDS: dict[str, tuple[str, Command]] = {
    "create-job-coordination-dir": ("[JOB_ID]", lambda job_id=None: _value(create_job_coordination_dir(job_id))),
    "get-coordination-dir": ("", lambda: _value(get_coordination_dir())),
    "write-runtime-url": ("DIR URL", lambda where, url: _done(lambda: write_runtime_url(where, url))),
    "wait-for-runtime-url": (
        "DIR [SECONDS]",
        lambda where, seconds=None: _value(wait_for_runtime_url(where, _seconds(seconds))),
    ),
    "signal-runtime-ready": ("DIR", lambda where: _done(lambda: signal_runtime_ready(where))),
    "signal-training-complete": (
        "DIR [EXIT_CODE]",
        lambda where, code="0": _done(lambda: signal_training_complete(where, _number(code))),
    ),
    "wait-for-training-complete": (
        "DIR [SECONDS]",
        lambda where, seconds=None: _value(wait_for_training_complete(where, _seconds(seconds))),
    ),
    "load-env-file": ("FILE", lambda path: _print(_exports(load_env_file(path)))),
    "load-config": ("NAME|PATH", lambda name: _print(_exports(load_config(name)))),
    "get-first-node": ("", lambda: _value(get_first_node())),
    "get-node-count": ("", lambda: _value(get_node_count())),
    "get-cpus-per-node": ("", lambda: _value(get_cpus_per_node())),
    "is-slurm-job": ("", lambda: 0 if is_slurm_job() else 1),
    "setup-efa-networking": ("", lambda: _print(_exports(setup_efa_networking()))),
    "setup-cuda-for-triton": ("", lambda: _print(_exports(setup_cuda_for_triton()))),
    "setup-python-for-uv": ("[DIR]", lambda agent=None: _print(_exports(setup_python_for_uv(agent)))),
    "cleanup-old-coordination-dirs": (
        "[DAYS]",
        lambda days="7": _done(lambda: cleanup_old_coordination_dirs(_amount(days, "days"))),
    ),
    "log-info": ("WORDS…", lambda *words: _done(lambda: log_info(*words))),
    "log-warn": ("WORDS…", lambda *words: _done(lambda: log_warn(*words))),
    "log-error": ("WORDS…", lambda *words: _done(lambda: log_error(*words))),
    "log-debug": ("WORDS…", lambda *words: _done(lambda: log_debug(*words))),
    "hold-podman-storage": ("", hold_podman_storage),
    "shell-functions": ("", lambda: _print(shell_functions())),
}
# These change the calling shell's variables, so its functions evaluate what they print.
EVALUATED = frozenset(
    {"load-env-file", "load-config", "setup-efa-networking", "setup-cuda-for-triton", "setup-python-for-uv"}
)
# Called often; a Python start for each line of log would be felt.
LOG_LEVELS = {"log-info": "INFO", "log-warn": "WARN", "log-error": "ERROR", "log-debug": "DEBUG"}


def _print(text: str) -> int:
    sys.stdout.write(text)
    return EXIT_OK


def shell_functions() -> str:
    """Definitions of all helpers for bash, fit for ``set -euo pipefail``."""
    call = f"{shlex.quote(sys.executable)} {shlex.quote(str(Path(__file__).resolve().with_name('common.py')))}"
    commands = [name for name in COMMANDS if name not in {"shell-functions", "hold-podman-storage"}]
    return "".join(_shell_function(name, call) for name in commands) + SHELL_ONLY.replace("@CALL@", call)


# What only a shell can do to itself. The storage's holder ends with the shell, whose pipe is its stdin.
SHELL_ONLY = """\
activate_uv_venv() {
  local _skyrl_venv="${1:-${SKYRL_PROJECT_ROOT:-.}/SkyRL/skyrl-agent/.venv}"
  if [ ! -f "$_skyrl_venv/bin/activate" ]; then log_warn "no virtual environment: $_skyrl_venv"; return 0; fi
  . "$_skyrl_venv/bin/activate"
}
setup_graceful_shutdown() {
  _skyrl_cleanup="${1:-:}"
  trap '"$_skyrl_cleanup"; exit 143' TERM
  trap '"$_skyrl_cleanup"; exit 130' INT
}
setup_isolated_podman_storage() {
  local _skyrl_line _skyrl_out=""
  coproc _SKYRL_STORAGE { @CALL@ hold-podman-storage; }
  _skyrl_storage_pid=$_SKYRL_STORAGE_PID
  exec {_skyrl_storage_fd}>&"${_SKYRL_STORAGE[1]}"
  eval "exec ${_SKYRL_STORAGE[1]}>&-"
  while IFS= read -r -u "${_SKYRL_STORAGE[0]}" _skyrl_line && [ "$_skyrl_line" != "# end" ]; do
    _skyrl_out+="$_skyrl_line"$'\\n'
  done
  [ -n "$_skyrl_out" ] || { log_error "no Podman storage could be made"; return 71; }
  eval "$_skyrl_out"
}
cleanup_isolated_podman_storage() {
  [ -n "${_skyrl_storage_fd:-}" ] || return 0
  eval "exec $_skyrl_storage_fd>&-"
  wait "$_skyrl_storage_pid" || true
  unset _skyrl_storage_fd
}
"""


def _shell_function(name: str, call: str) -> str:
    function = name.replace("-", "_")
    if name in LOG_LEVELS:
        level = LOG_LEVELS[name]
        guard = '[ "${SKYRL_DEBUG:-0}" = 1 ] || return 0; ' if level == "DEBUG" else ""
        return f"{function}() {{ {guard}printf '%s [{level}] %s\\n' \"$(date '+%Y-%m-%d %H:%M:%S')\" \"$*\" >&2; }}\n"
    if name in EVALUATED:
        return f'{function}() {{ local _skyrl_out; _skyrl_out=$({call} {name} "$@") || return; eval "$_skyrl_out"; }}\n'
    return f'{function}() {{ {call} {name} "$@"; }}\n'


def usage() -> str:
    lines = [f"  {name} {words}".rstrip() for name, (words, _run) in COMMANDS.items()]
    return "usage: common.py COMMAND [WORDS]\n" + "\n".join(lines) + "\n"


def accepts(words: str, count: int) -> bool:
    """Whether a command that takes ``words`` can be called with ``count`` of them."""
    if "…" in words:
        return True
    most = len(words.split())
    return most - words.count("[") <= count <= most


def main(argv: Sequence[str]) -> int:
    """Run one helper; the exit codes are those of launch.py."""
    setup_command_logging()
    parser = argparse.ArgumentParser(prog="common.py", usage=usage().removeprefix("usage: "), add_help=True)
    parser.add_argument("command", nargs="?")
    parser.add_argument("words", nargs=argparse.REMAINDER)
    arguments = parser.parse_args(argv)
    if arguments.command not in COMMANDS:
        sys.stderr.write(usage())
        return EXIT_USAGE
    words, command = COMMANDS[arguments.command]
    try:
        if not accepts(words, len(arguments.words)):
            raise UsageError(f"{arguments.command} takes: {words or 'nothing'}")
        return command(*arguments.words)
    except SuiteError as problem:
        log.error("%s", problem)
        return problem.exit_code
    except KeyboardInterrupt:
        return EXIT_SIGNAL_BASE + signal.SIGINT
    finally:
        end_those_of_other_threads()
