"""What the jobs find in their environment: functions from environment to environment, one reason each."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike

# Read by Slurm's commands, and set by people on purpose (sbatch(1), squeue(1), INPUT ENVIRONMENT VARIABLES).
KEPT_SLURM_NAMES = frozenset(
    {
        "SLURM_CONF",
        "SLURM_CONF_SERVER",  # where there is no slurm.conf on the nodes ("configless")
        "SLURM_JWT",  # who we are, where Slurm takes tokens (auth/jwt)
        "SLURM_CLUSTERS",
        "SLURM_TIME_FORMAT",
        "SLURM_BITSTR_LEN",
        "SLURM_DEBUG_FLAGS",
        "SLURM_RUNTIME_DIR",  # ours: a user's own slurm-remote-runtime
    }
)
# Set by Slurm inside an allocation for its steps; in another job they bind to CPUs that are not there.
DROPPED_PREFIXES = ("SLURM_", "SLURMD_", "SRUN_", "SLURM_PMI", "PMI_", "PMIX_", "SBATCH_CPU_BIND", "SBATCH_MEM_BIND")
# By these a job's processes are known and ended with it (node_shell, trainer): nothing of another job may have them.
MARKS = frozenset({"SKYRL_SHELL", "SKYRL_TRAINER"})
# A person's defaults for these commands hide living jobs from the suite, as SQUEUE_PARTITION does.
FILTER_PREFIXES = ("SQUEUE_", "SCANCEL_", "SCONTROL_")
# Defaults of sbatch that the suite decides by itself. Some have no option on its command line that would win over them:
# with SBATCH_WAIT the launch would last as long as the jobs, with SBATCH_GRES the CPU job would ask for GPUs.
DECIDED = (
    "ARRAY_INX DEPENDENCY ERROR EXPORT EXPORT_FILE GET_USER_ENV HOLD INPUT JOB_NAME NO_REQUEUE OUTPUT REQUEUE SIGNAL "
    "WAIT CPUS_PER_GPU CPUS_PER_TASK GPUS GPUS_PER_NODE GPUS_PER_SOCKET GPUS_PER_TASK GRES MEM_PER_CPU MEM_PER_GPU "
    "MEM_PER_NODE NODES NTASKS NTASKS_PER_NODE"
)
DECIDED_NAMES = frozenset(f"SBATCH_{name}" for name in DECIDED.split())
# Sizes of the job, and options of a person's for srun, which would contradict those that each step is given.
CONTRADICTING = "SRUN_ SLURM_MEM_PER_ SLURM_CPU_BIND SLURM_GPUS SLURM_NTASKS_PER_ SLURM_DISTRIBUTION"
CONTRADICTING_PREFIXES = tuple(CONTRADICTING.split())
# Devices that Slurm gave to the surrounding job, not to the one being submitted.
DEVICE_NAMES = frozenset({"CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"})


def without_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment less what Slurm set in a surrounding allocation, and less what would overrule the suite.

    Without this a launch inside ``salloc`` hands the allocation's id, CPU binding and GPUs to the new jobs. What a
    person sets for Slurm's commands stays: SBATCH_ACCOUNT, SBATCH_QOS, SLURM_CONF and the like. Their defaults for
    what the suite decides do not: SBATCH_WAIT, SBATCH_GRES, SQUEUE_PARTITION and the like. SBATCH_CLUSTERS becomes
    SLURM_CLUSTERS, which all of Slurm's commands read: a job must be released and cancelled where it was submitted.
    """
    inside = "SLURM_JOB_ID" in environment

    def dropped(name: str) -> bool:
        slurms = name.startswith(DROPPED_PREFIXES) and name not in KEPT_SLURM_NAMES
        decided = name in DECIDED_NAMES or name.startswith(FILTER_PREFIXES)
        return slurms or decided or name in MARKS or (inside and name in DEVICE_NAMES)

    result = {name: value for name, value in environment.items() if not dropped(name)}
    clusters = result.pop("SBATCH_CLUSTERS", None)
    return {"SLURM_CLUSTERS": clusters, **result} if clusters else result


def without_proxy(environment: Mapping[str, str], host: str) -> dict[str, str]:
    """The environment with ``host`` exempt from any HTTP proxy: the runtime's server is inside the cluster."""
    result = dict(environment)
    for name in ("no_proxy", "NO_PROXY"):
        hosts = [entry for entry in result.get(name, "").split(",") if entry]
        result[name] = ",".join([*hosts, *([host] if host not in hosts else [])])
    return result


def scratch_folders(local_scratch: str | PathLike[str] | None, environment: Mapping[str, str]) -> list[str]:
    """The folders to try for node-local files, in order: LOCAL_SCRATCH, SLURM_TMPDIR, TMPDIR, /tmp."""
    named = [local_scratch, environment.get("SLURM_TMPDIR"), environment.get("TMPDIR"), "/tmp"]
    return [str(folder) for folder in named if folder]
