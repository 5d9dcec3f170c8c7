"""``python -m slurm.lib.doctor.node FOLDER NAME``: look at this node, report, answer the doctor, leave nothing.

The doctor starts it as a small job. What is to be looked at stands in FOLDER. Exit codes: 0 reported; 71 the folder
cannot be written; 75 there is no question; 128+N ended by signal N.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slurm.lib.coordination import read_if_there, write_atomically
from slurm.lib.doctor import containers
from slurm.lib.doctor.exchange import PRIVATE, TOLD, question_file, report_file, serve
from slurm.lib.doctor.facts import Question, Report, Sandboxes, Seen, Trainer, Trial, from_text, to_text
from slurm.lib.edge import exit_code_of
from slurm.lib.errors import EXIT_OK, EnvironmentProblem, SuiteError
from slurm.lib.interpreter import mark
from slurm.lib.job_context import code_folder, own_job_id
from slurm.lib.job_environment import scratch_folders
from slurm.lib.logs import log, setup_job_logging
from slurm.lib.node_facts import EFA_FOLDERS, cards_of_slices, find_cuda, find_python, site_packages, version_of
from slurm.lib.podman_storage import choose_scratch, file_system_of
from slurm.lib.preflight.node import absent_programs, visible_gpus
from slurm.lib.preflight.places import look_at_folder, look_at_ids
from slurm.lib.processes import run
from slurm.lib.secrets import is_secret_name
from slurm.lib.signals import SignalNotes
from slurm.lib.waiting import wait_for

COMMAND_S = 10.0
QUESTION_S = 60.0  # an NFS client may believe for so long what it saw before
SHARE_TRIALS = 7
SMI_FIELDS = "name,driver_version,memory.total,mig.mode.current"
LIMITS = {"open files": resource.RLIMIT_NOFILE, "processes": resource.RLIMIT_NPROC, "locked": resource.RLIMIT_MEMLOCK}
EFA_DEVICES = Path("/sys/class/infiniband")


def main(argv: Sequence[str]) -> int:
    """Report, answer, end; returns the exit code."""
    setup_job_logging()
    folder, name = Path(argv[0]), argv[1]
    return exit_code_of(lambda notes: attend(folder, name, os.environ, notes), "the doctor's look ends by %s")


def attend(folder: Path, name: str, environment: Mapping[str, str], notes: SignalNotes) -> int:
    """Answer the question that lies in the folder, then messages; containers go at the end."""
    asked = wait_for("the doctor's question", lambda: read_if_there(question_file(folder, name)), QUESTION_S)
    question = from_text(Question, asked)
    open_environment = {key: value for key, value in environment.items() if not is_secret_name(key)}
    report = look(question, open_environment)
    with contextlib.ExitStack() as stack:
        if report.sandboxes:
            trial = containers.tried(
                report.sandboxes,
                Path(question.base),
                code_folder(),
                own_job_id(environment),
                open_environment,
                notes.check,
            )
            report = replace(report, sandboxes=stack.enter_context(trial))
        write_atomically(report_file(folder, name), to_text(report), PRIVATE)

        def sleep(seconds: float) -> None:
            notes.check()
            notes.sleep(seconds)

        ending = serve(folder, name, answer, sleep)
        log.info("reported; %s", ending)
    if ending != TOLD:  # the doctor is dead, and its folder nobody's
        shutil.rmtree(folder, ignore_errors=True)
    return EXIT_OK


def answer(message: dict[str, Any]) -> dict[str, object]:
    """What the doctor wants to know later: whether a page on another node is to be reached from here."""
    if not message.get("host"):
        return {}
    return {"reached": containers.reach(str(message["host"]), int(message["port"]), str(message["token"]))}


def look(question: Question, environment: Mapping[str, str]) -> Report:
    """All that is found out without a container."""
    share = Path(question.share)
    folders = [look_at_folder(key, Path(path)) for key, path in question.folders.items()]
    seen = [Seen(each.key, str(each.path), str(each.there), each.is_folder, each.writable) for each in folders]
    return Report(
        host=socket.gethostname(),
        mark=mark(),
        share=share_trial(share),
        share_file_system=file_system_of(share),
        folders=tuple(seen),
        limits={name: resource.getrlimit(number)[0] for name, number in LIMITS.items()},
        sandboxes=look_at_sandboxes(question, environment) if question.sandboxes else None,
        trainer=look_at_trainer(question, environment) if question.trainer else None,
    )


def share_trial(folder: Path) -> Trial:
    """A small file made, synced, renamed, read and removed: the median of several."""
    seconds = []
    path = folder / f".doctor-{socket.gethostname()}-{os.getpid()}"
    try:
        for _ in range(SHARE_TRIALS):
            begin = time.monotonic()
            write_atomically(path, "skyrl", PRIVATE)
            path.read_text()
            path.unlink()
            seconds.append(time.monotonic() - begin)
    except (OSError, EnvironmentProblem) as problem:
        return Trial(problem=str(problem))
    return Trial(statistics.median(seconds))


# --- for sandboxes ----------------------------------------------------------------------------------------------------


def look_at_sandboxes(question: Question, environment: Mapping[str, str]) -> Sandboxes:
    """What Podman needs before a container is started."""
    scratch, problem = None, ""
    try:
        scratch = choose_scratch(scratch_folders(question.local_scratch, environment), own_job_id(environment))
    except EnvironmentProblem as fault:
        problem = str(fault)
    ids = look_at_ids()
    return Sandboxes(
        absent=tuple(absent_programs(environment)),
        user=ids.user,
        uid=ids.uid,
        lacking=ids.lacking,
        scratch=str(scratch or ""),
        scratch_problem=problem,
        file_system=file_system_of(scratch) if scratch else "",
        free=shutil.disk_usage(scratch).free if scratch else 0,
        docker=first_line(("docker", "--version"), environment)[0],
    )


# --- for the trainer --------------------------------------------------------------------------------------------------


def look_at_trainer(question: Question, environment: Mapping[str, str]) -> Trainer:
    """What the trainer's environment is made of."""
    agent = Path(question.agent)
    packages = site_packages(agent, environment)
    python = None if "UV_PYTHON" in environment else find_python(agent, environment)
    found = Trainer(
        uv=first_line(("uv", "--version"), environment)[0],
        nccl=version_of(packages, "nvidia_nccl_cu*"),
        python=str(python or ""),
        named_python=environment.get("UV_PYTHON", ""),
        efa=tuple(str(path) for path in EFA_FOLDERS if path.is_dir()),
        efa_devices=tuple(sorted(path.name for path in EFA_DEVICES.glob("efa*"))),
    )
    return replace(found, **look_at_gpus(question, environment)) if question.gpus else found


def look_at_gpus(question: Question, environment: Mapping[str, str]) -> dict[str, Any]:
    """The fields of ``Trainer`` about this job's GPUs."""
    cards, problem = first_line(
        ("nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader"), environment, lines=16
    )
    libcuda, module_problem = None, ""
    try:
        libcuda, _modules, module_problem = find_cuda(question.cuda_modules, environment)
    except EnvironmentProblem as fault:
        module_problem = str(fault)
    return {
        "visible": environment.get("CUDA_VISIBLE_DEVICES"),
        "visible_number": visible_gpus(environment),
        "cards": tuple(cards.splitlines()),
        "smi_problem": problem,
        "slices": cards_of_slices(environment),
        "libcuda": str(libcuda or ""),
        "module_problem": module_problem,
    }


def first_line(argv: Sequence[str], environment: Mapping[str, str], lines: int = 1) -> tuple[str, str]:
    """The first lines that a command prints, and why it printed none; both empty where there is no such command."""
    if not shutil.which(argv[0], path=environment.get("PATH")):
        return "", ""
    try:
        done = run(argv, timeout_s=COMMAND_S, environment=environment)
    except SuiteError as problem:
        return "", str(problem)
    return ("\n".join(done.stdout.strip().splitlines()[:lines]), "") if done.ok else ("", done.complaint)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
