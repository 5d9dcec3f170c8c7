#!/usr/bin/env python3
#SBATCH --job-name=skyrl-worker
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --no-requeue
"""A worker: a further node of a runtime on several nodes, which joins the head in the runtime job.

Submitted by launch.py, or directly to a run that lives, with SKYRL_COORD_DIR set to its directory:
sbatch --array=1-3 slurm/jobs/runtime_worker.py
Slurm runs a copy of this file under the node's Python; here it only finds its code. What the job does stands in
slurm/lib/worker_job.py.
"""

import os
import socket
import subprocess
import sys
import time

JOB = "runtime_worker.py"
EXIT_ENVIRONMENT = 71  # as in slurm/lib/errors.py
CODE_DEADLINE_S = 60  # an NFS client may believe for so long what it saw before (nfs(5): acdirmax)


def has_code(folder: str) -> bool:
    return bool(folder) and os.path.isfile(os.path.join(folder, "slurm", "lib", "bootstrap.py"))


def submitted_from() -> str:
    """The checkout that `Command=` names; Slurm prints path and arguments unquoted, so the longest file wins."""
    job = os.environ.get("SLURM_JOB_ID", "")
    try:
        shown = subprocess.check_output(["scontrol", "show", "job", job], stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return ""
    for line in shown.decode("utf-8", "replace").splitlines():
        words = line.strip()[len("Command=") :].split(" ") if line.strip().startswith("Command=") else []
        for end in range(len(words), 0, -1):
            path = " ".join(words[:end])
            if os.path.isfile(path):
                return os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(path))))
    return ""


def end_here(reason: str) -> None:
    """End, and say why."""
    sys.stderr.write(JOB + ": " + reason + "\n")
    sys.exit(EXIT_ENVIRONMENT)


def awaited(copy: str) -> str:
    """The run's copy of the code once it is to be seen; that of the checkout would be other code. Empty in the end."""
    end = time.monotonic() + CODE_DEADLINE_S
    while not has_code(copy) and time.monotonic() < end:
        time.sleep(0.5)
    return copy if has_code(copy) else ""


def find_code() -> str:
    """The folder that holds slurm/lib: this file's own place, the run's copy, else the checkout submitted from."""
    beside = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    if has_code(beside):
        return beside
    copy = os.environ.get("SKYRL_CODE_DIR", "").replace("%j", os.environ.get("SLURM_JOB_ID", ""))
    if copy:
        return awaited(copy)
    for find in (submitted_from, lambda: os.environ.get("SLURM_SUBMIT_DIR", "")):
        folder = find()
        if has_code(folder):
            return folder
    return ""


def missing_code() -> str:
    copy = os.environ.get("SKYRL_CODE_DIR")
    if not copy:
        return "cannot find the SkyRL checkout; submit it by its path inside the checkout"
    return "the run's code %s is not to be seen on %s (waited %d s): it was removed, or its storage is not well" % (
        copy,
        socket.gethostname(),
        CODE_DEADLINE_S,
    )


def main() -> None:
    code = find_code()
    if not code:
        end_here(missing_code())
    sys.path[0] = code  # instead of this file's folder, whose names are nobody's modules
    from slurm.lib.bootstrap import ensure_interpreter  # no more: a run that is joined may have an older release's

    ensure_interpreter(code, os.path.join(code, "slurm", "jobs", JOB))
    from slurm.lib.worker_job import main as job

    sys.exit(job(sys.argv[1:]))


if __name__ == "__main__":
    main()
