"""The trainer of ``--config local-verl``: sees to VERL's environment, makes model and data, runs VERL, ends it whole.

Exit codes: VERL's own; 2 settings; 71 VERL's environment cannot be made; 75 a deadline; 128+N ended by signal N.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from local_verl import driver
from local_verl import environment as verl_environment
from local_verl.tiny import model_folder, rows_file
from slurm.lib.edge import exit_code_of
from slurm.lib.errors import EXIT_SIGNAL_BASE, EnvironmentProblem, UsageError
from slurm.lib.hydra_grammar import hydra_value
from slurm.lib.job_context import code_folder, load_job_config
from slurm.lib.logs import log, setup_command_logging
from slurm.lib.processes import Child, ChildSpec, adopt_orphans, descendants, kill_descendants, run
from slurm.lib.settings import Settings
from slurm.lib.signals import SignalNotes
from slurm.lib.verl_command import overrides

NEEDED = ("SANDBOX_REMOTE_RUNTIME_API_URL", "ALLHANDS_API_KEY", "CONTAINER_IMAGE", "SKYRL_COORD_DIR", "RAY_TMPDIR")
# Another Ray's address, and the node's real GPUs: Ray refuses to say that there is one where Slurm has given none.
NOT_FOR_RAY = ("RAY_ADDRESS", "CUDA_VISIBLE_DEVICES")
TINY_DEADLINE_S = 300.0
# Slurm's KillWait may be 5 s, half of which is the training job's own, and VERL saves nothing on a SIGTERM.
STOP_GRACE_S = 1.0
REST_GRACE_S = 0.5  # for what it left; Ray's gcs_server often hangs after a SIGTERM and has to be killed


def verl_overrides(settings: Settings, files: Path, code: Path) -> tuple[str, ...]:
    """What VERL is told: what the launcher tells any VERL, for the tiny model and its data, and where the reward is.

    :param files: the folder that ``tiny`` filled
    :param code: the folder that holds ``local_verl``
    """
    if settings.checkpoint_dir is None or settings.rollout_dir is None:
        raise UsageError("CHECKPOINT_DIR and ROLLOUT_DIR must be set, as the training job sets them")
    rows = rows_file(files)
    own = replace(settings, model=str(model_folder(files)), train_data=rows, val_data=rows)
    own = replace(own, gpu_nodes=1, gpus_per_node=driver.GPUS)
    return (
        *overrides(own, settings.checkpoint_dir, settings.rollout_dir),
        f"custom_reward_function.path={hydra_value(code / 'local_verl' / 'reward.py')}",
        "custom_reward_function.name=compute_scores",
        "reward_model.reward_manager=batch",
        f"hydra.run.dir={hydra_value(files / 'hydra')}",
    )


def verl_processes_environment(environment: Mapping[str, str], code: Path, files: Path) -> dict[str, str]:
    """The environment of VERL and, by inheritance, of all of Ray's processes.

    Ray's folder is the job's own, which goes with the job; so do VERL's lock files and torch's caches there.
    """
    own = {
        "PYTHONPATH": os.pathsep.join([str(code / "local_verl" / "shim"), str(code)]),
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": environment["RAY_TMPDIR"],
        "RAY_USAGE_STATS_ENABLED": "0",  # no report to Ray's makers
        "RAY_DEDUP_LOGS": "0",  # every line of every step
        "RAY_COLOR_PREFIX": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning about variables of GPUs
        "HF_HUB_OFFLINE": "1",  # all is here
        "HF_HOME": str(files / "huggingface"),  # caches of this run's data, gone with the run
        "OMP_NUM_THREADS": "1",  # threads of ten processes would fight for few CPUs
        "TOKENIZERS_PARALLELISM": "false",
        "HYDRA_FULL_ERROR": "1",
    }
    return {**{name: value for name, value in environment.items() if name not in NOT_FOR_RAY}, **own}


def train(environment: Mapping[str, str], notes: SignalNotes) -> int:
    """The whole training; returns VERL's exit code.

    :raises SuiteError: what a person should know
    """
    missing = [name for name in NEEDED if not environment.get(name)]
    if missing:
        raise UsageError(f"{', '.join(missing)} must be set; start this trainer by launch.py --config local-verl")
    settings = load_job_config(None, (), environment).settings
    python = verl_environment.ready(environment, notes)
    files = Path(environment["SKYRL_COORD_DIR"]) / "local-verl"
    code = code_folder()
    own = verl_processes_environment(environment, code, files)
    make_tiny(python, files, own, notes)
    argv = (str(python), "-m", "local_verl.driver", *verl_overrides(settings, files, code))
    adopt_orphans()
    try:
        return supervise(ChildSpec(argv, own, "VERL", cwd=files), notes)
    finally:
        end_descendants()


def make_tiny(python: Path, files: Path, environment: Mapping[str, str], notes: SignalNotes) -> None:
    """Have model, tokenizer and prompts made by VERL's Python, which has the packages."""
    argv = [str(python), "-m", "local_verl.tiny", str(files)]
    done = run(argv, timeout_s=TINY_DEADLINE_S, environment=environment, cwd=code_folder(), check=notes.check)
    if not done.ok:
        raise EnvironmentProblem(f"cannot make the tiny model in {files}: {done.complaint[-500:]}")
    log.info("%s", done.stdout.strip().splitlines()[-1])


def supervise(spec: ChildSpec, notes: SignalNotes) -> int:
    """Run VERL to its end, or to ours; returns the exit code."""
    log.info("starting VERL %s: %s", verl_environment.VERL, " ".join(spec.argv[1:3]))
    with Child(spec, stop_grace_s=STOP_GRACE_S) as child:
        while (code := child.exit_code) is None:
            if notes.stop_signal is not None:
                log.warning("received %s; stopping VERL", signal.Signals(notes.stop_signal).name)
                child.stop()
                return EXIT_SIGNAL_BASE + notes.stop_signal
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(0.2)
    log.info("VERL ended with exit code %s", code)
    return code


def end_descendants() -> None:
    """End what VERL and Ray left: asked, waited for, killed, by process id."""
    end = time.monotonic() + REST_GRACE_S
    for pid in (left := descendants({os.getpid()})):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    while left & descendants({os.getpid()}) and time.monotonic() < end:
        time.sleep(0.1)
    kill_descendants(spared=set())


def main() -> int:
    """The edge of the process; returns its exit code."""
    setup_command_logging()
    return exit_code_of(lambda notes: train(os.environ, notes), "ended by %s before VERL started")


if __name__ == "__main__":
    sys.exit(main())
