"""Would Slurm take the jobs, and could they ever start: partitions, limits, GPUs, account?

Slurm's own word (``sbatch --test-only``) comes first. It takes jobs that wait for ever, so partitions are compared too;
``sacctmgr`` is asked only where an account or QOS is named, and need not exist.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime

from slurm.lib.plan import JobPlan, LaunchPlan
from slurm.lib.preflight.finding import Finding, error, estimate, warning
from slurm.lib.preflight.mig import mig_findings
from slurm.lib.preflight.words import duration, number_of
from slurm.lib.processes import Completed
from slurm.lib.sandbox_room import sandbox_room
from slurm.lib.scheduler import Slurm
from slurm.lib.settings import Settings, slurm_seconds
from slurm.lib.under_way import follow

LONG_WAIT_S = 1800.0  # for GPUs; what the runtime job holds for less is not worth a word
# Options of a real submission that a test has no use for.
NOT_TESTED = ("--parsable", "--hold", "--dependency=", "--kill-on-invalid-dep=")
# Words of sbatch that say nothing about the job: the controller did not answer.
SILENT = (
    "unable to contact",
    "connection refused",
    "timed out",
    "no answer within",
    "communication",
    "not found (",
    "could not establish a configuration source",
    "resolve_ctls",
    "fetch_config",
)
ELSEWHERE = re.compile(
    r"-p.*|--partition(=.*)?|-M.*|--clusters?(=.*)?|-t.*|--time(=.*)?|--gres(=.*)?|-N.*|--nodes(=.*)?"
)


@dataclass(frozen=True)
class NodeGroup:
    """Equal nodes of one partition, a line of ``sinfo``; ``limit_s`` infinite for none, so ``most_nodes`` of a job."""

    partition: str
    up: bool
    limit_s: float
    nodes: int
    gpus: Mapping[str, int]
    most_nodes: float = float("inf")


def parse_groups(text: str) -> list[NodeGroup]:
    """From ``sinfo -o '%R|%a|%l|%D|%G|%s'``; lines in another form are left out, the last field may be missing."""
    rows = [[*line.strip().split("|"), ""][:6] for line in text.splitlines() if line.count("|") in {4, 5}]
    return [
        NodeGroup(name, state == "up", _limit_s(limit), int(nodes), parse_gres(gres), _most_nodes(sizes))
        for name, state, limit, nodes, gres, sizes in (row for row in rows if row[3].isdigit())
    ]


def _most_nodes(sizes: str) -> float:
    """Of ``1-4``, ``1-infinite``, or ``4``."""
    most = sizes.rpartition("-")[2]
    return int(most) if most.isdigit() else float("inf")


def _limit_s(text: str) -> float:
    try:
        return slurm_seconds(text)
    except ValueError:  # "n/a"
        return float("inf")


def parse_gres(text: str) -> dict[str, int]:
    """GPUs by type, from ``gpu:a100:4(S:0-1),gpu:2,nic:1``; the type is empty where there is none."""
    found: dict[str, int] = {}
    for word in re.sub(r"\([^)]*\)", "", text).split(","):
        match = re.fullmatch(r"gpu(?::([^:]+))?:(\d+)", word.strip())
        if match:
            found[match[1] or ""] = found.get(match[1] or "", 0) + int(match[2])
    return found


def question_argv(argv: Sequence[str]) -> tuple[str, ...]:
    """A submission's command line as the question whether it would be taken."""
    kept = [word for word in argv if not word.startswith(NOT_TESTED)]
    return (kept[0], "--test-only", *kept[1:])


def submission_findings(kind: str, answer: Completed) -> list[Finding]:
    """What Slurm says about one job."""
    words = answer.complaint
    if is_silent(answer):
        return [_silence(answer)]
    if not answer.ok:
        said = ", ".join(_judged(kind, answer.argv))
        fix = f"correct what it means, {said + ' or ' if said else ''}a size; sinfo shows what there is"
        return [error("slurm", f"Slurm would not take the {kind} job: {words}", fix)]
    start = _start_in(answer)
    return [estimate("slurm", f"the {kind} job would start about {start}, by Slurm's word now")] if start else []


# The keys whose words Slurm knows, by the options that say them.
JUDGED = {
    "account": "ACCOUNT",
    "qos": "QOS",
    "constraint": "CONSTRAINT",
    "reservation": "RESERVATION",
    "exclude": "EXCLUDE_NODES",
}


def _judged(kind: str, argv: Sequence[str]) -> Iterator[str]:
    """The keys with their values by which Slurm may refuse a job; it seldom says which it means."""
    names = {**JUDGED, "partition": "GPU_PARTITION" if kind == "training" else "CPU_PARTITION"}
    for option, _, value in (word[2:].partition("=") for word in argv if word.startswith("--")):
        if option in names:
            yield f"{names[option]}={value}"


def _start_in(answer: Completed) -> str:
    """When a job would start, as ``sbatch --test-only`` says it; empty where it does not."""
    found = re.search(r"to start at (\S+)", answer.complaint) if answer.ok else None
    return found[1] if found else ""


def wait_findings(settings: Settings, runtime: Completed, training: Completed) -> list[Finding]:
    """What the runtime job would hold while the training job waits for GPUs, by Slurm's answers about both."""
    try:
        starts = [datetime.fromisoformat(_start_in(answer)) for answer in (runtime, training)]
    except ValueError:
        return []
    wait_s = (starts[1] - starts[0]).total_seconds()
    if wait_s <= LONG_WAIT_S:
        return []
    held = f"{settings.cpus_for_runtime} CPUs and {settings.runtime_memory} of memory"
    sentence = f"the training job would start {duration(wait_s)} after the runtime job, which holds {held} until then"
    if settings.runtime_idle_limit:
        given_back = f"it gives them back after RUNTIME_IDLE_LIMIT={settings.runtime_idle_limit} s"
        return [estimate("slurm", f"{sentence}; {given_back}, and both jobs are queued again")]
    fix = "RUNTIME_IDLE_LIMIT=600 has it give its node back, PAIRING=het has both jobs start together"
    if wait_s > slurm_seconds(settings.time_limit) / 2:
        sentence += f"; that is more than half of its TIME_LIMIT={settings.time_limit}, which runs meanwhile"
        fix += "; otherwise set a longer TIME_LIMIT, and MIN_RUN_TIME so that no training begins with too little left"
    return [warning("slurm", sentence, fix)]


def is_silent(answer: Completed) -> bool:
    """Whether a command of Slurm's failed because nobody answered it, whatever it was asked."""
    return not answer.ok and any(phrase in answer.complaint.lower() for phrase in SILENT)


def _silence(answer: Completed) -> Finding:
    """The same words for every question, so that they are said once: the last of them, less who says them."""
    words = re.sub(r"^(\w+: )*(Batch job submission failed: )?", "", answer.complaint.rpartition("; ")[2])
    words = re.sub(r"(no answer within [\d.]+ s): .*", r"\1", words)
    sentence = f"Slurm does not answer, so neither the jobs nor their partitions are compared: {words}"
    return warning("slurm", sentence, "is SLURM_CONF set? does `sinfo` answer?")


@dataclass(frozen=True)
class JobShape:
    """What one job asks of its partition; several partitions, with commas, mean any of them."""

    kind: str
    key: str
    partitions: tuple[str, ...]
    nodes: int
    gpus: int
    gpu_type: str


def shapes(settings: Settings, *, runtime: bool = True, training: bool = True) -> list[JobShape]:
    """The jobs whose options stand in keys alone; options in *_SBATCH_ARGS may say otherwise."""
    found = []
    if runtime and not _says_otherwise(settings.cpu_sbatch_args):
        nodes = settings.runtime_nodes if settings.runtime_mode == "allocation" else 1
        found.append(JobShape("runtime", "CPU_PARTITION", tuple(settings.cpu_partition.split(",")), nodes, 0, ""))
    if training and not _says_otherwise(settings.gpu_sbatch_args):
        names = tuple(settings.gpu_partition.split(","))
        gpus = settings.gpus_per_node
        found.append(JobShape("training", "GPU_PARTITION", names, settings.gpu_nodes, gpus, settings.gpu_type))
    return found


def job_shapes(plan: LaunchPlan) -> list[JobShape]:
    """Those of a launch."""
    return shapes(plan.settings, runtime=plan.runtime is not None, training=plan.training is not None)


def _says_otherwise(words: Sequence[str]) -> bool:
    return any(ELSEWHERE.fullmatch(word) for word in words)


def partition_findings(settings: Settings, job: JobShape, groups: Sequence[NodeGroup]) -> list[Finding]:
    """A job against its partitions; the reasons why none of them will do."""
    known = sorted({group.partition for group in groups})
    name = f"{job.key}={','.join(job.partitions)}"
    mine = [group for group in groups if group.partition in job.partitions]
    if not mine:
        return [error("slurm", f"{name}: there is no such partition", f"there are: {', '.join(known)}")]
    if not any(group.up for group in mine):
        return [error("slurm", f"{name} is not up", f"choose another partition ({', '.join(known)}), or wait")]
    return [
        *_limit_findings(settings, name, mine),
        *_size_findings(settings, job, name, mine),
        *_gpu_findings(job, name, mine),
        *(_worker_findings(settings, name, mine) if job.kind == "runtime" else []),
    ]


def _size_findings(settings: Settings, job: JobShape, name: str, groups: Sequence[NodeGroup]) -> list[Finding]:
    most = max(group.most_nodes for group in groups)
    if job.nodes <= most:
        return []
    sentence = (
        f"the {job.kind} job wants {number_of(job.nodes, 'node')}, {name} gives a job at most {most:g} (MaxNodes)"
    )
    level = warning if settings.qos or settings.reservation else error
    return [level("slurm", sentence, f"change {_keys_of_size(job)}")]


def _keys_of_size(job: JobShape) -> str:
    if job.key == "GPU_PARTITION":
        return "GPU_NODES, GPUS_PER_NODE, GPU_TYPE or GPU_PARTITION"
    return job.key if job.nodes == 1 else f"RUNTIME_NODES or {job.key}, or set RUNTIME_MODE=array"


def _worker_findings(settings: Settings, name: str, groups: Sequence[NodeGroup]) -> list[Finding]:
    """The runtime's nodes as jobs of one node each; with fewer nodes some of them may wait for others to end."""
    there = sum(group.nodes for group in groups)
    if settings.runtime_mode != "array" or settings.runtime_nodes <= there:
        return []
    sentence = (
        f"RUNTIME_NODES={settings.runtime_nodes}, and {name} has {number_of(there, 'node')}: where a node has no room "
        "for two of these jobs the others never join"
    )
    if sandbox_room(settings).nodes_for(sandbox_room(settings).min_slots) > there:
        sentence += ", and the training waits for them"
    return [warning("slurm", sentence, f"lower RUNTIME_NODES to {there}, or name more partitions in CPU_PARTITION")]


def _limit_findings(settings: Settings, name: str, groups: Sequence[NodeGroup]) -> list[Finding]:
    asked, longest = slurm_seconds(settings.time_limit), max(group.limit_s for group in groups)
    if asked <= longest:
        return []
    sentence = (
        f"TIME_LIMIT={settings.time_limit} is more than {name} allows ({longest / 3600:g} h): the job never starts"
    )
    fix = f"set TIME_LIMIT to at most {longest / 60:g} (minutes)"
    level = warning if settings.qos or settings.reservation else error  # a QOS can allow more than its partition
    return [level("slurm", sentence, fix)]


def _gpu_findings(job: JobShape, name: str, groups: Sequence[NodeGroup]) -> list[Finding]:
    def gpus(group: NodeGroup) -> int:
        return group.gpus.get(job.gpu_type, 0) if job.gpu_type else max(group.gpus.values(), default=0)

    fitting = sum(group.nodes for group in groups if gpus(group) >= job.gpus)
    if fitting >= job.nodes:
        return []
    each = number_of(job.gpus, f"{job.gpu_type} GPU".strip())
    wanted = number_of(job.nodes, "node") + (f" with {each} each" if job.gpus else "")
    there = "; ".join(f"{group.nodes} with {_shown(group.gpus)}" for group in groups)
    sentence = f"the {job.kind} job wants {wanted}, {name} has {fitting} of them (nodes: {there})"
    return [error("slurm", sentence, _type_fix(job, groups) or f"change {_keys_of_size(job)}")]


def _type_fix(job: JobShape, groups: Sequence[NodeGroup]) -> str:
    """Empty unless the partition has GPUs, and none of the type that is asked for."""
    types = {kind for group in groups for kind in group.gpus}
    if not job.gpu_type or not types or job.gpu_type in types:
        return ""
    named = sorted(types - {""})
    return f"GPU_TYPE can be {', '.join(named)} there" if named else "leave GPU_TYPE unset: its GPUs have no type there"


def _shown(gpus: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" if kind else number_of(count, "GPU") for kind, count in gpus.items()) or "no GPU"


def account_findings(settings: Settings, answer: Completed, user: str) -> list[Finding]:
    """ACCOUNT and QOS against the associations that ``sacctmgr`` printed as ``account|partition|qos,qos``."""
    rows = [line.split("|") for line in answer.stdout.splitlines() if line.count("|") >= 2]
    if not answer.ok or not rows:
        return []  # no accounting here, or it is not told to us: sbatch's word must do
    accounts = sorted({row[0] for row in rows})
    account, wanted = settings.account.casefold(), settings.qos.casefold()  # Slurm keeps both in lower case
    if account and account not in map(str.casefold, accounts):
        sentence = f"ACCOUNT={settings.account}: {user} has no association with it"
        return [error("account", sentence, f"choose one of: {', '.join(accounts)}")]
    mine = [row for row in rows if not account or row[0].casefold() == account]
    qos = sorted({name for row in mine for name in row[2].split(",") if name})
    if wanted and qos and wanted not in map(str.casefold, qos):  # an empty list says nothing
        sentence = f"QOS={settings.qos} is not among those of {user}" + (
            f" in {settings.account}" if settings.account else ""
        )
        return [error("account", sentence, f"choose one of: {', '.join(qos)}")]
    return []


def submissions_asked(slurm: Slurm, plan: LaunchPlan) -> list[Finding]:
    """Ask Slurm about all jobs, at the same time: a site's submission filter may take seconds."""

    def ask(job: JobPlan) -> Completed:
        return slurm.would_take(question_argv(job.argv))

    with ThreadPoolExecutor(len(plan.jobs), initializer=follow, initargs=(threading.current_thread(),)) as pool:
        answers = dict(zip([job.kind for job in plan.jobs], pool.map(ask, plan.jobs), strict=True))
    found = [finding for kind, answer in answers.items() for finding in submission_findings(kind, answer)]
    both = plan.runtime and plan.training and not plan.combined
    return found + (wait_findings(plan.settings, answers["runtime"], answers["training"]) if both else [])


def partitions_asked(slurm: Slurm, plan: LaunchPlan) -> list[Finding]:
    """Ask Slurm for its partitions, and compare both jobs with them."""
    answer = slurm.partitions()
    groups = parse_groups(answer.stdout)
    if is_silent(answer):
        return [_silence(answer)]
    if not answer.ok or not groups:
        sentence = f"partitions are not compared: sinfo says {answer.complaint}"
        return [warning("slurm", sentence, "is SLURM_CONF set? does `sinfo` answer?")]
    found = [finding for job in job_shapes(plan) for finding in partition_findings(plan.settings, job, groups)]
    return [*found, *_array_findings(plan, slurm), *_slice_findings(plan, groups)]


def _array_findings(plan: LaunchPlan, slurm: Slurm) -> list[Finding]:
    """The runtime's further nodes against the numbers that tasks of a job array may have."""
    settings = plan.settings
    if plan.runtime is None or settings.runtime_nodes == 1 or settings.runtime_mode != "array":
        return []
    return array_findings(settings, slurm.configuration())


def array_findings(settings: Settings, configuration: str) -> list[Finding]:
    """By ``MaxArraySize`` in what ``scontrol show config`` prints: the largest number of a task is one less."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", configuration, re.MULTILINE)
    if found is None or settings.runtime_nodes <= int(found[1]):
        return []
    sentence = (
        f"RUNTIME_NODES={settings.runtime_nodes}: the nodes beside the first are tasks of job arrays, which Slurm here "
        f"numbers up to {int(found[1]) - 1} (MaxArraySize={found[1]})"
    )
    return [error("slurm", sentence, f"set RUNTIME_NODES to at most {found[1]}, or RUNTIME_MODE=allocation")]


def _slice_findings(plan: LaunchPlan, groups: Sequence[NodeGroup]) -> list[Finding]:
    """Where GPU_TYPE does not say what the GPUs are, Slurm's list of them does; findings of the check ``mig``."""
    training = [job for job in job_shapes(plan) if job.kind == "training" and not job.gpu_type]
    mine = [group for job in training for group in groups if group.partition in job.partitions]
    return mig_findings(plan.settings, frozenset(kind for group in mine for kind in group.gpus)) if mine else []


def account_asked(slurm: Slurm, settings: Settings, user: str) -> list[Finding]:
    """Ask for the user's associations, where ACCOUNT or QOS is set."""
    if not (settings.account or settings.qos):
        return []
    return account_findings(settings, slurm.associations(user), user)
