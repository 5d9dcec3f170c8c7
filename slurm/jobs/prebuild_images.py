#!/usr/bin/env python3
#SBATCH --job-name=skyrl-prebuild
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --no-requeue
"""The prebuild job: fetches every image that a dataset names, into archives on shared storage.

Submitted directly:  DATASET_PATH=FILE sbatch slurm/jobs/prebuild_images.py [--config NAME|PATH]
Slurm runs a copy of this file under the node's Python; here it only finds its code. What the job does stands in
slurm/lib/prebuild_job.py.
"""

import os
import subprocess
import sys

JOB = "prebuild_images.py"


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


def find_code() -> str:
    """The folder that holds slurm/lib: this file's own place, the run's copy, the checkout submitted from."""
    beside = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    if has_code(beside):
        return beside
    copy = os.environ.get("SKYRL_CODE_DIR", "").replace("%j", os.environ.get("SLURM_JOB_ID", ""))
    if has_code(copy):
        return copy
    for find in (submitted_from, lambda: os.environ.get("SLURM_SUBMIT_DIR", "")):
        folder = find()
        if has_code(folder):
            return folder
    sys.exit(JOB + ": cannot find the SkyRL checkout; submit it by its path inside the checkout")


def main() -> None:
    code = find_code()
    sys.path[0] = code  # instead of this file's folder, whose names are nobody's modules
    from slurm.lib.bootstrap import ensure_interpreter

    ensure_interpreter(code, os.path.join(code, "slurm", "jobs", JOB))
    from slurm.lib.prebuild_job import main as job

    sys.exit(job(sys.argv[1:]))


if __name__ == "__main__":
    main()
