"""The only door to Slurm: submit, release, cancel, and what it says about a job in our words.

A controller that is silent, or a word never seen before, is UNKNOWN and final of nothing. Works from Slurm 20.x on,
without ``--json`` and without accounting. Times are told by this host's clock, which may differ from the controller's
by minutes: only what both say at one moment relates them.
"""

from __future__ import annotations

import contextlib
import enum
import math
import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Protocol

from slurm.lib.errors import EnvironmentProblem, SubmissionError, WaitTimeout
from slurm.lib.job_arrays import array_of, arrays_of, is_task, shown_ids, with_arrays
from slurm.lib.launch_mark import PREFIX
from slurm.lib.processes import Completed, run, start_ticks

ASK_TIMEOUT_S = 10.0  # a busy controller answers squeue within seconds or not for minutes
QUESTION_TIMEOUT_S = 8.0  # before a submission; a person is waiting, and the launch can go on without the answer
SUBMIT_TIMEOUT_S = 60.0  # sbatch itself retries while the controller is busy
# A person's defaults for these commands, such as SQUEUE_PARTITION, would hide living jobs from us.
FILTERS = ("SQUEUE_", "SCANCEL_", "SCONTROL_", "SINFO_", "SACCT_")
SHOWN = "%A %i|%T|%r|%N|%P|%u|%S|%M|%l|%j"
ACCOUNTED = "JobIDRaw,JobID,State,NodeList,Partition,User,Start,Elapsed,Timelimit,ExitCode,JobName"
STEP_WITHIN_S = 30  # a step beside others begins within a second or two
ACCOUNTED_USE = "JobIDRaw,JobID,ElapsedRaw,TotalCPU,AllocCPUS,AllocNodes,MaxRSS,ReqMem,AllocTRES,TRESUsageInMax"
DEFAULT_KILL_WAIT_S = 30.0  # slurm.conf(5): KillWait
# What Slurm's commands print where the controller was not reached, or its answer was not (slurm_errno.c, 20.11-24.05).
SILENCE = re.compile(
    r"contact slurm controller|Socket timed out|Zero Bytes were transmitted|connection failure|Connection refused"
    r"|controller not responding|standby mode|Unexpected missing socket|Unexpected message received"
    r"|temporarily unable to accept|no answer within|since nobody waits for it"
)


class JobState(enum.Enum):
    """A job's state, as far as its partner needs it."""

    PENDING = "pending"
    RUNNING = "running"
    ENDED_WELL = "ended well"
    ENDED_BADLY = "ended badly"
    PURGED = "no longer known"  # Slurm forgets jobs MinJobAge after their end
    UNKNOWN = "unknown"

    @property
    def is_final(self) -> bool:
        return self in {JobState.ENDED_WELL, JobState.ENDED_BADLY, JobState.PURGED}


# squeue(1), JOB STATE CODES. What is not here is UNKNOWN.
SLURM_STATES = {
    **dict.fromkeys(["PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"], JobState.PENDING),
    **dict.fromkeys(["RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT"], JobState.RUNNING),
    "COMPLETED": JobState.ENDED_WELL,
    **dict.fromkeys(
        ["FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY"],
        JobState.ENDED_BADLY,
    ),
    "REVOKED": JobState.ENDED_BADLY,
}


@dataclass(frozen=True)
class JobStatus:
    """A job's state with the scheduler's own words for it.

    ``starts_at`` is when it started, or when Slurm expects a pending one to start; epoch seconds of this host's clock,
    None where it does not say. ``node``: where it runs or ran, as Slurm writes it.
    """

    state: JobState
    words: str
    starts_at: float | None = None
    node: str = ""

    def __str__(self) -> str:
        return f"{self.state.value} ({self.words})" if self.words else self.state.value


@dataclass(frozen=True)
class JobFacts:
    """What Slurm says about the time of a job that runs or is being ended.

    ``ends_at`` is its time limit in epoch seconds of this host's clock, None where it has none or Slurm does not say.
    ``preempted`` is true once Slurm has begun to take its nodes away for another job.
    """

    ends_at: float | None = None
    preempted: bool = False


@dataclass(frozen=True)
class QueuedJob:
    """A job in the queue, its comment as Slurm prints it; ``submitted_at`` by the controller's clock, epoch seconds."""

    job_id: str
    is_held: bool
    submitted_at: float | None
    comment: str


@dataclass(frozen=True)
class ShownJob:
    """A job as ``squeue`` shows it, or ``sacct`` after its end.

    ``word`` is Slurm's for its state, such as ``PENDING``; ``starts_at`` when it started, or is expected to, by the
    controller's clock, in epoch seconds; ``limit_s`` infinite where it has none. None is what Slurm does not say.
    ``exit_code`` is 128+N for a job that signal N ended. ``number`` is Slurm's own for a task that has begun.
    """

    job_id: str
    name: str
    word: str
    reason: str = ""
    node: str = ""
    partition: str = ""
    user: str = ""
    starts_at: float | None = None
    elapsed_s: float | None = None
    limit_s: float | None = None
    exit_code: int | None = None
    number: str = ""

    @property
    def state(self) -> JobState:
        return SLURM_STATES.get(self.word, JobState.UNKNOWN)


@dataclass(frozen=True)
class AccountedUse:
    """What accounting knows of a job's use, or of that of one of its steps; ``step`` is empty for the whole job.

    ``cpu_s`` is known of what has ended. ``memory_peak_bytes`` is a step's, of its largest task; ``memory_bytes`` what
    the job has on one node. What concerns GPUs is there where the site gathers it. None is not known.
    """

    job_id: str
    step: str = ""
    elapsed_s: float | None = None
    cpu_s: float | None = None
    cpus: int | None = None
    memory_peak_bytes: float | None = None
    memory_bytes: float | None = None
    gpus: int | None = None
    gpu_busy_percent: float | None = None
    gpu_memory_mib: float | None = None


class Scheduler(Protocol):
    """What a job body asks of whoever runs the jobs."""

    def status(self, job_id: str, timeout_s: float = ASK_TIMEOUT_S) -> JobStatus: ...

    def cancel(self, job_ids: Sequence[str]) -> str | None: ...

    def kill_wait_s(self) -> float: ...

    def facts(self, job_id: str, timeout_s: float = ASK_TIMEOUT_S) -> JobFacts: ...


def parse_facts(text: str, job_id: str = "") -> JobFacts:
    """The facts in the output of ``scontrol show job``; times as epoch seconds or as Slurm's standard format has them.

    These are the controller's. EndTime is the limit while a job runs, later the time of its end: then it is
    StartTime and TimeLimit. Of the first component of a heterogeneous job Slurm shows all components; those of
    ``job_id`` count, else those of the first.
    """
    from slurm.lib.settings import slurm_seconds  # 8 ms: felt in the start-up of commands that only look

    records = re.split(r"^(?=JobId=)", text.lstrip(), flags=re.MULTILINE)
    own = next((record for record in records if record.startswith(f"JobId={job_id} ")), "".join(records[:2]))
    found = dict(re.findall(r"(\w+)=(\S*)", own))
    preempted = found.get("JobState") == "PREEMPTED" or _epoch(found.get("PreemptTime", "")) is not None
    try:
        limit_s = slurm_seconds(found.get("TimeLimit", ""))
    except ValueError:
        limit_s = math.inf
    if math.isinf(limit_s):
        return JobFacts(None, preempted)
    start, end = _epoch(found.get("StartTime", "")), _epoch(found.get("EndTime", ""))
    running = found.get("JobState") in {"RUNNING", "SUSPENDED"} or start is None
    return JobFacts(end if running or start is None else start + limit_s, preempted)


def parse_config_time(text: str) -> float | None:
    """The controller's time in its answer to ``scontrol show config``, in whole seconds."""
    dated = re.match(r"Configuration data as of (\S+)", text)
    return _epoch(dated[1]) if dated else None


def _epoch(stamp: str) -> float | None:
    """Epoch seconds of a time that Slurm printed; None for Unknown, None and N/A."""
    if re.fullmatch(r"\d{1,15}", stamp, re.ASCII):
        return float(stamp) or None
    try:
        return datetime.fromisoformat(stamp).timestamp()
    except ValueError:
        return None


def parse_status(answer: Completed, job_id: str = "") -> JobStatus:
    """The status in an answer of ``squeue -h -t all -o '%T|%r|%N|%S|%A'``.

    Asked about the first component of a heterogeneous job, squeue prints a line for each; that of ``job_id`` counts.
    """
    if not answer.ok:
        if "Invalid job id" in answer.stderr:
            return JobStatus(JobState.PURGED, "no job of this number in Slurm's records")
        return JobStatus(JobState.UNKNOWN, answer.complaint)
    lines = [[*line.strip().split("|"), "", "", "", ""][:5] for line in answer.stdout.split("\n")]
    word, reason, node, start, _ = next((line for line in lines if line[4] == job_id), lines[0])
    if not word:
        return JobStatus(JobState.PURGED, "not in the queue any more")
    details = [word, *([reason] if reason not in {"", "None"} else []), *([f"on {node}"] if node else [])]
    return JobStatus(SLURM_STATES.get(word, JobState.UNKNOWN), ", ".join(details), _epoch(start), node)


def parse_statuses(answer: Completed, job_ids: Sequence[str]) -> dict[str, JobStatus]:
    """The status of each of several jobs, or tasks, in an answer of ``squeue -r -t all -o '%A %i|%T|%r|%N'``."""
    if not answer.ok and "Invalid job id" not in answer.stderr:
        return dict.fromkeys(job_ids, JobStatus(JobState.UNKNOWN, answer.complaint))
    found: dict[str, JobStatus] = {}
    for line in answer.stdout.split("\n"):
        name, word, reason, node = [*line.strip().split("|"), "", "", ""][:4]
        details = [word, *([reason] if reason not in {"", "None"} else []), *([f"on {node}"] if node else [])]
        status = JobStatus(SLURM_STATES.get(word, JobState.UNKNOWN), ", ".join(details), node=node)
        found |= dict.fromkeys(_ids(name), status)
    gone = JobStatus(JobState.PURGED, "not in the queue any more")
    return dict.fromkeys(job_ids, gone) | with_arrays(found, job_ids, _rank)


def _ids(name: str) -> list[str]:
    """The ids of the jobs that a line of ``squeue`` is about, by its ``%A %i``."""
    number, _, shown = name.partition(" ")
    return shown_ids(number, shown)


def _rank(job: JobStatus | ShownJob) -> int:
    """An array is as that of its tasks which lives most."""
    order = [JobState.RUNNING, JobState.PENDING, JobState.UNKNOWN]
    return order.index(job.state) if job.state in order else len(order)


def parse_shown(text: str) -> dict[str, ShownJob]:
    """The jobs, and tasks of arrays, by id in an answer of ``squeue -h -t all`` with ``SHOWN``."""
    found = {}
    for line in text.split("\n"):
        fields = line.strip().split("|", 9)
        if len(fields) == 10 and (match := re.fullmatch(r"(\d+)( \S+)?", fields[0], re.ASCII)):
            shown, word, reason, node, partition, user, start, elapsed, limit, name = fields
            reason = "" if reason == "None" else reason
            told = (name, word, reason, node, partition, user, _epoch(start), clock_s(elapsed), clock_s(limit))
            for job_id in _ids(shown):
                number = match[1] if is_task(job_id) and node else ""
                found[job_id] = ShownJob(job_id, *told, number=number)
    return found


def _by_ids(found: Mapping[str, ShownJob], job_ids: Sequence[str]) -> dict[str, ShownJob]:
    """What was found of these jobs, under the ids that they were asked by."""
    told = with_arrays(found, job_ids, _rank)
    return {job_id: replace(job, job_id=job_id) for job_id, job in told.items()}


def parse_accounted(text: str) -> dict[str, ShownJob]:
    """The jobs by id in an answer of ``sacct -n -P`` with ``ACCOUNTED``; of several with one id the last one counts."""
    found = {}
    for line in text.split("\n"):
        fields = line.strip().split("|", 10)
        if len(fields) == 11 and re.fullmatch(r"\d+", fields[0], re.ASCII):
            number, shown, state, node, partition, user, start, elapsed, limit, code, name = fields
            word = state.partition(" ")[0]  # CANCELLED by 1000
            node = "" if node == "None assigned" else node
            times = (_epoch(start), clock_s(elapsed), clock_s(limit))
            for job_id in shown_ids(number, shown):
                found[job_id] = ShownJob(job_id, name, word, "", node, partition, user, *times, parse_exit_code(code))
    return found


def parse_use(text: str) -> dict[str, list[AccountedUse]]:
    """Jobs and steps by the job's id in an answer of ``sacct -n -P`` with ``ACCOUNTED_USE``."""
    found: dict[str, list[AccountedUse]] = {}
    for line in text.split("\n"):
        fields = line.strip().split("|")
        name = re.fullmatch(r"(\d+)(?:\.(\S+))?", fields[0], re.ASCII)
        if len(fields) == 10 and name:
            step = name[2] or ""
            shown = fields[1].removesuffix(f".{step}")
            for job_id in shown_ids(name[1], shown):
                rows = found.setdefault(job_id, [])
                if not step:
                    rows.clear()  # an older job with this id
                rows.append(_use(job_id, step, fields[2:]))
    return found


def _use(job_id: str, step: str, fields: Sequence[str]) -> AccountedUse:
    elapsed, cpu, cpus, nodes, peak, asked, has, used = fields
    allocated, most = _tres(has), _tres(used)
    busy, gpu_memory = (_bytes(most.get(f"gres/{name}", "")) for name in ("gpuutil", "gpumem"))
    return AccountedUse(
        job_id,
        step,
        elapsed_s=float(elapsed) if re.fullmatch(r"\d{1,12}", elapsed, re.ASCII) else None,
        cpu_s=_cpu_time(cpu),
        cpus=_count(cpus),
        memory_peak_bytes=_bytes(peak),
        memory_bytes=_on_a_node(allocated.get("mem", asked), _count(cpus) or 0, _count(nodes) or 0),
        gpus=_count(allocated.get("gres/gpu", "")) if not step else None,
        gpu_busy_percent=busy,
        gpu_memory_mib=None if gpu_memory is None else gpu_memory / 2**20,
    )


def _tres(text: str) -> dict[str, str]:
    """Slurm's ``cpu=2,mem=4G``."""
    return dict(part.partition("=")[::2] for part in text.split(",") if "=" in part)


def _cpu_time(text: str) -> float | None:
    """Slurm's ``TotalCPU``, with milliseconds where it is short."""
    whole = clock_s(text)
    fraction = re.search(r"\.\d{1,9}$", text, re.ASCII)
    return None if whole is None else whole + float(fraction[0] if fraction else 0)


def _count(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\d{1,9}", text, re.ASCII) else None


def _bytes(text: str) -> float | None:
    """A number as Slurm writes it, with K, M, G, T or P for powers of 1024."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)([KMGTP]?)", text, re.ASCII)
    return float(match[1]) * 1024 ** " KMGTP".index(match[2] or " ") if match else None


def _on_a_node(text: str, cpus: int, nodes: int) -> float | None:
    """Bytes on one node of memory for a whole job, ``4G``; before Slurm 21.08 for each CPU ``4Gc``, or node ``4Gn``."""
    whole = _bytes(text.rstrip("cn"))
    if not whole or text.endswith("n"):
        return whole or None
    return whole * (cpus if text.endswith("c") else 1) / max(1, nodes)


def parse_exit_code(text: str) -> int | None:
    """A shell's exit code from Slurm's ``CODE:SIGNAL``."""
    match = re.fullmatch(r"(\d+):(\d+)", text, re.ASCII)
    return (128 + int(match[2]) if int(match[2]) else int(match[1])) if match else None


def clock_s(text: str) -> float | None:
    """Seconds of a time as Slurm's commands print it, ``[D-]HH:MM:SS`` or ``MM:SS``; None where it says none."""
    if text in {"UNLIMITED", "INFINITE"}:
        return math.inf
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)(?:\.\d+)?", text, re.ASCII)
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def parse_queue(text: str) -> list[QueuedJob]:
    """The jobs in the output of ``squeue -h -o '%A|%T|%r|%V|%k'``, the oldest first."""
    lines = [line.strip().split("|", 4) for line in text.split("\n") if line.count("|") >= 4]
    found = [
        QueuedJob(job_id, word == "PENDING" and reason == "JobHeldUser", _epoch(submitted), comment)
        for job_id, word, reason, submitted, comment in lines
        if job_id.isdigit()
    ]
    return sorted(found, key=lambda job: int(job.job_id))


def is_silence(complaint: str) -> bool:
    """Whether a complaint of Slurm's commands says only that the controller was not heard."""
    return bool(SILENCE.search(complaint))


def parse_job_id(answer: Completed) -> str | None:
    """The id that ``sbatch --parsable`` printed: ``ID`` or ``ID;CLUSTER``, perhaps after lines of a site's plugin."""
    for line in reversed(answer.stdout.split("\n")):
        match = re.fullmatch(r"(\d+)(;[\w.-]+)?", line.strip())
        if match:
            return match.group(1)
    return None


def filled_in(path: str, job_id: str) -> str:
    """The path of a log of ours, which Slurm shows as it is or, some versions, as the pattern that it was given."""
    return path.replace("%j", job_id).replace("%%", "%") if "%j" in path else path


def parse_log(shown: str, job_id: str, field: str = "StdOut") -> Path | None:
    """A log of a job, ``StdOut`` or ``StdErr``, in the output of ``scontrol show job``."""
    match = re.search(rf"^\s*{field}=(.*)$", shown, re.MULTILINE)
    return Path(filled_in(match.group(1).strip(), job_id)) if match else None


def parse_name(shown: str) -> str | None:
    """The name of a job in the same output."""
    match = re.search(r"^\s*JobId=\d+ .*?\bJobName=(.*)$", shown, re.MULTILINE)
    return match.group(1).strip() if match else None


def parse_array(shown: str) -> str | None:
    """The id of the array that a task belongs to, in the same output; None for a job that is none."""
    match = re.search(r"^\s*JobId=\d+ ArrayJobId=(\d+) ", shown, re.MULTILINE)
    return match.group(1) if match else None


def parse_mails(shown: str) -> bool:
    """Whether Slurm was asked for mails about the job that this output is about."""
    return re.search(r"^\s*MailUser=.*\bMailType=(?!NONE|\s)", shown, re.MULTILINE) is not None


def parse_components(text: str) -> list[str]:
    """The ids of a heterogeneous job's components, in order, from ``squeue -h -o '%i|%A'``: a line ``1+0|1`` each."""
    found = re.findall(r"^\s*\d+\+(\d+)\|(\d+)\s*$", text, re.MULTILINE)
    return [job_id for _offset, job_id in sorted(found, key=lambda pair: int(pair[0]))]


def component_step_argv(group: int, *, cpus: int, name: str, command: Sequence[str]) -> tuple[str, ...]:
    """The command that runs ``command`` once as a job step in a heterogeneous job's component, and ends with it.

    For a component of one node; said in full for the reasons of ``step_argv``.
    """
    options = (
        f"--het-group={group}",
        "--nodes=1",
        "--ntasks=1",
        "--overlap",
        f"--cpus-per-task={cpus}",
        "--gres=none",
        "--mem=0",
        "--export=ALL",
        f"--job-name={name}",
    )
    return ("srun", *options, *command)


def step_argv(node: str, *, cpus: int, gres: str, cwd: Path, command: Sequence[str]) -> tuple[str, ...]:
    """The command that runs ``command`` as a job step on one node of the allocation, and ends with it.

    Everything is said: since Slurm 22.05 a step no longer inherits the job's --cpus-per-task, and without --overlap
    it would wait for the CPUs that another step has. Standard input is the command's.
    """
    options = (
        "--nodes=1",
        "--ntasks=1",
        f"--nodelist={node}",
        "--overlap",
        f"--cpus-per-task={cpus}",
        f"--gres={gres}",
        "--mem=0",
        "--export=ALL",
        f"--chdir={cwd}",
        "--unbuffered",
        "--job-name=skyrl-ray",
    )
    return ("srun", *options, *command)


def node_step_argv(node: str, *, cpus: int, name: str, cwd: Path, command: Sequence[str]) -> tuple[str, ...]:
    """The same for a step without GPUs; its log is no terminal's, as it would be with --unbuffered."""
    options = ("--nodes=1", "--ntasks=1", f"--nodelist={node}", "--overlap", f"--cpus-per-task={cpus}")
    rest = ("--gres=none", "--mem=0", "--export=ALL", f"--chdir={cwd}", f"--job-name={name}")
    return ("srun", *options, *rest, *command)


def shell_argv(
    job_id: str, group: int | None, *, node: str, cwd: Path, terminal: bool, command: Sequence[str]
) -> tuple[str, ...]:
    """The command that runs ``command`` as a job step beside those that run, on our own streams, and ends with it.

    On one node of the job, its first where ``node`` is empty; of a heterogeneous job, named by its first component, in
    component ``group``. It takes no CPUs, memory or time from the others. With a ``terminal`` it has one of its own
    there. A step that cannot begin is given up.
    """
    options = [f"--jobid={job_id}", *([] if group is None else [f"--het-group={group}"])]
    options += ["--nodes=1", "--ntasks=1", *([f"--nodelist={node}"] if node else []), "--overlap", "--mem=0"]
    options += [f"--immediate={STEP_WITHIN_S}", f"--chdir={cwd}", "--export=ALL", "--job-name=skyrl-shell"]
    return ("srun", *options, *(["--pty"] if terminal else []), *command)


class Slurm:
    """Slurm as its commands on PATH; ``environment`` is what they are started with."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        given = os.environ if environment is None else environment
        self.environment = {name: value for name, value in given.items() if not name.startswith(FILTERS)}
        self._controllers_lead: float | None = None

    def plus(self, environment: Mapping[str, str]) -> Slurm:
        """The same with more in its commands' environment."""
        return Slurm({**self.environment, **environment})

    @property
    def is_here(self) -> bool:
        """Whether this host has Slurm's commands."""
        import shutil  # 1 ms, felt in commands that look

        return shutil.which("squeue", path=self.environment.get("PATH", os.defpath)) is not None

    def _ask(self, *argv: str, timeout_s: float = ASK_TIMEOUT_S) -> Completed:
        try:
            return run(argv, timeout_s=timeout_s, environment=self.environment)
        except (WaitTimeout, EnvironmentProblem) as problem:
            return Completed(argv, 124, "", str(problem))

    def submit(self, argv: Sequence[str], cwd: Path | None = None) -> str:
        """Submit and return the job's id; ``SubmissionError`` with Slurm's words if it was not taken."""
        try:
            answer = run(argv, timeout_s=SUBMIT_TIMEOUT_S, environment=self.environment, cwd=cwd)
        except WaitTimeout as problem:
            raise self._unheard(str(problem)) from None
        job_id = parse_job_id(answer)
        if answer.returncode < 0 or (
            not answer.ok and is_silence(answer.complaint)
        ):  # sbatch was killed, or heard nothing
            raise self._unheard(answer.complaint)
        if not answer.ok or job_id is None:
            raise SubmissionError(f"Slurm did not take the job: {answer.complaint}")
        return job_id

    @staticmethod
    def _unheard(words: str) -> SubmissionError:
        advice = "look with squeue --me, end it with scancel"
        return SubmissionError(f"{words}; it may have been queued all the same, held: {advice}", leaves_jobs=True)

    def own_jobs(self, timeout_s: float = ASK_TIMEOUT_S) -> list[QueuedJob] | None:
        """This user's jobs in the queue, in hidden partitions too, the oldest first; None while Slurm is silent."""
        question = ("squeue", "-h", "--all", f"--user={os.getuid()}", "-o", "%A|%T|%r|%V|%k")
        answer = self._with_epochs()._ask(*question, timeout_s=timeout_s)
        return parse_queue(answer.stdout) if answer.ok else None

    def own_named(self, names: Sequence[str], timeout_s: float = ASK_TIMEOUT_S) -> list[str] | None:
        """The ids of this user's jobs with these names that are queued or run, of tasks that of their array.

        None while Slurm is silent.
        """
        question = ("squeue", "-h", "--all", f"--user={os.getuid()}", f"--name={','.join(names)}", "-o", "%A %i")
        answer = self._ask(*question, timeout_s=timeout_s)
        listed = {array_of(job_id) for line in answer.stdout.split("\n") for job_id in _ids(line.strip())}
        return sorted(filter(str.isdigit, listed), key=int) if answer.ok else None

    def clock(self) -> float | None:
        """The controller's time in epoch seconds, to compare with what it says of jobs; None while it is silent."""
        return parse_config_time(self._config(QUESTION_TIMEOUT_S))

    def components(self, job_id: str) -> list[str]:
        """The ids of the components of the queued heterogeneous job ``job_id``, in order; the first is its own."""
        question = ("squeue", "-h", "--all", "-j", job_id, "-o", "%i|%A")
        answer = self._ask(*question, timeout_s=SUBMIT_TIMEOUT_S)
        found = parse_components(answer.stdout)
        if not found:
            raise SubmissionError(f"Slurm does not name the components of job {job_id}: {answer.complaint}")
        return found

    def release(self, job_id: str) -> None:
        """Let a held job start; ``SubmissionError`` with Slurm's words if that fails."""
        answer = self._ask("scontrol", "release", job_id, timeout_s=SUBMIT_TIMEOUT_S)
        if not answer.ok:
            unheard = is_silence(answer.complaint)
            raise SubmissionError(f"Slurm did not release job {job_id}: {answer.complaint}", leaves_jobs=unheard)

    def status(self, job_id: str, timeout_s: float = ASK_TIMEOUT_S) -> JobStatus:
        question = ("squeue", "-h", "--all", "-t", "all", "-j", job_id, "-o", "%T|%r|%N|%S|%A")
        status = parse_status(self._with_epochs()._ask(*question, timeout_s=timeout_s), job_id)
        return replace(status, starts_at=self._here(status.starts_at, timeout_s))

    def statuses(self, job_ids: Sequence[str], timeout_s: float = ASK_TIMEOUT_S) -> dict[str, JobStatus]:
        """The status of each of several jobs, or tasks of arrays, by one question."""
        asked = ",".join(arrays_of(job_ids))
        question = ("squeue", "-h", "-r", "--all", "-t", "all", "-j", asked, "-o", "%A %i|%T|%r|%N")
        return parse_statuses(self._ask(*question, timeout_s=timeout_s), job_ids)

    def known(self, job_ids: Sequence[str], timeout_s: float = ASK_TIMEOUT_S) -> dict[str, ShownJob] | None:
        """Those of several jobs, or tasks, that Slurm still knows, by one question; None while it is silent."""
        asked = ",".join(arrays_of(job_ids))
        question = ("squeue", "-h", "-r", "--all", "-t", "all", "-j", asked, "-o", SHOWN)
        answer = self._with_epochs()._ask(*question, timeout_s=timeout_s) if job_ids else None
        if answer is not None and not answer.ok and "Invalid job id" not in answer.stderr:
            return None
        return _by_ids(parse_shown(answer.stdout if answer else ""), job_ids)

    def accounted(self, job_ids: Sequence[str], since: str, timeout_s: float = ASK_TIMEOUT_S) -> dict[str, ShownJob]:
        """What accounting knows of jobs that began after ``since`` (``YYYY-MM-DDTHH:MM:SS``); empty without one.

        An older job may have had the same id. Of tasks it is asked by their array: it lists those that never began
        as one.
        """
        asked = ",".join(arrays_of(job_ids))
        words = ("--allocations", "--noheader", "--parsable2", f"--jobs={asked}", f"--starttime={since}")
        answer = self._with_epochs()._ask("sacct", *words, f"--format={ACCOUNTED}", timeout_s=timeout_s)
        return _by_ids(parse_accounted(answer.stdout), job_ids) if answer.ok else {}

    def use(
        self, job_ids: Sequence[str], since: str, timeout_s: float = ASK_TIMEOUT_S
    ) -> dict[str, list[AccountedUse]]:
        """What accounting knows of the use of jobs that began after ``since``, and of their steps."""
        words = ("--noheader", "--parsable2", f"--jobs={','.join(arrays_of(job_ids))}", f"--starttime={since}")
        answer = self._with_epochs()._ask("sacct", *words, f"--format={ACCOUNTED_USE}", timeout_s=timeout_s)
        return parse_use(answer.stdout) if answer.ok else {}

    def in_job(self, job_id: str, command: Sequence[str], timeout_s: float, *, is_het: bool = False) -> Completed:
        """What a short command says on each node of a running job, as a step beside those that run; it ends with that.

        It takes no CPUs or memory from the others, and sees the job's GPUs. Of a heterogeneous job, named by its first
        component, the nodes of that one are meant; said only there, since srun refuses it for others.
        """
        options = [f"--jobid={job_id}", "--overlap", "--ntasks-per-node=1", "--mem=0", "--time=1", "--export=ALL"]
        options += ["--het-group=0"] if is_het else []
        return self._ask("srun", *options, "--input=none", "--job-name=skyrl-look", *command, timeout_s=timeout_s)

    def here(self, command: Sequence[str], timeout_s: float) -> Completed:
        """The same on this host, outside of any job."""
        return self._ask(*command, timeout_s=timeout_s)

    def cancel(self, job_ids: Sequence[str], timeout_s: float = SUBMIT_TIMEOUT_S) -> str | None:
        """Cancel jobs; returns Slurm's complaint or None. A job that has ended already is none."""
        return self._complaint(self._ask("scancel", *job_ids, timeout_s=timeout_s)) if job_ids else None

    def signal_bodies(self, job_ids: Sequence[str], number: int, timeout_s: float = ASK_TIMEOUT_S) -> str | None:
        """A signal to the batch scripts of running jobs alone; returns Slurm's complaint or None.

        A KILL that is not meant for them alone Slurm takes for a cancellation, and gives the job KillWait.
        """
        name = signal.Signals(number).name.removeprefix("SIG")
        return self._complaint(self._ask("scancel", "--batch", f"--signal={name}", *job_ids, timeout_s=timeout_s))

    def cancel_pending(self, *job_ids: str, timeout_s: float = SUBMIT_TIMEOUT_S) -> str | None:
        """Cancel jobs only if they have not started; returns Slurm's complaint or None, which says nothing of them."""
        return self._complaint(self._ask("scancel", "--state=PENDING", *job_ids, timeout_s=timeout_s))

    @staticmethod
    def _complaint(answer: Completed) -> str | None:
        return None if answer.ok or "Invalid job id" in answer.stderr else answer.complaint

    def note(self, job_id: str, words: str) -> None:
        """Put words into a job's comment, which everybody may read, in place of our mark; a person's own comment stays.

        A Slurm that is silent does not get to know them.
        """
        said = self._ask("squeue", "-h", "--all", "-t", "all", "-j", job_id, "-o", "%k")
        if said.ok and re.match(rf"{PREFIX}|\(null\)$|$", said.stdout.strip()):
            self._ask("scontrol", "update", f"JobId={job_id}", f"Comment={words}")

    def end_steps(self, job_id: str) -> None:
        """SIGTERM to the processes of a job's steps, which are to end by themselves."""
        self._ask("scancel", "--signal=TERM", job_id)

    def hostnames(self, nodelist: str) -> list[str]:
        """The names in a list as Slurm writes it, such as ``gpu[1-3,7]``; ``EnvironmentProblem`` with Slurm's words."""
        answer = self._ask("scontrol", "show", "hostnames", nodelist)
        if not answer.ok or not answer.stdout.split():
            raise EnvironmentProblem(f"scontrol show hostnames {nodelist}: {answer.complaint}")
        return answer.stdout.split()

    def node_state(self, node: str) -> str:
        """Slurm's word for a node's state, such as ``mixed`` or ``down*``; empty while it does not answer."""
        return " ".join(self._ask("sinfo", "-h", "-n", node, "-o", "%T").stdout.split()[:1])

    def kill_wait_s(self) -> float:
        """Seconds between the TERM of a cancellation and the KILL (``KillWait``)."""
        match = re.search(r"^KillWait\s*=\s*(\d+)", self._config(ASK_TIMEOUT_S), re.MULTILINE)
        return float(match.group(1)) if match else DEFAULT_KILL_WAIT_S

    def facts(self, job_id: str, timeout_s: float = ASK_TIMEOUT_S) -> JobFacts:
        """What Slurm says about the job's time; nothing is known where it does not answer in time."""
        question = ("scontrol", "show", "job", job_id)
        facts = parse_facts(self._with_epochs()._ask(*question, timeout_s=timeout_s).stdout, job_id)
        return replace(facts, ends_at=self._here(facts.ends_at, timeout_s))

    def _config(self, timeout_s: float) -> str:
        """Slurm's configuration, which is dated: so the controller's clock is known beside this host's."""
        shown = self._with_epochs()._ask("scontrol", "show", "config", timeout_s=timeout_s).stdout
        dated = parse_config_time(shown)
        self._controllers_lead = self._controllers_lead if dated is None else dated - time.monotonic()
        return shown

    def _here(self, controllers: float | None, timeout_s: float) -> float | None:
        """A time of the controller's clock by this host's; None where the one is not known beside the other."""
        if controllers is not None and self._controllers_lead is None:
            self._config(timeout_s)
        if controllers is None or self._controllers_lead is None:
            return None
        return controllers - self._controllers_lead - time.monotonic() + time.time()

    def _with_epochs(self) -> Slurm:
        """The same commands, which print times as epoch seconds; a person's own format could not be read back."""
        return self.plus({"SLURM_TIME_FORMAT": "%s"})

    def shown(self, job_id: str, timeout_s: float = ASK_TIMEOUT_S) -> str | None:
        """What ``scontrol show job`` prints; empty for a job that Slurm does not know, None while it is silent."""
        answer = self._ask("scontrol", "show", "job", job_id, timeout_s=timeout_s)
        return answer.stdout if answer.ok or "Invalid job id" in answer.stderr else None

    def log_path(self, job_id: str, field: str = "StdOut", timeout_s: float = ASK_TIMEOUT_S) -> Path | None:
        """A log of a job of ours, ``StdOut`` or ``StdErr``; None where Slurm does not know it, or is silent."""
        return parse_log(self.shown(job_id, timeout_s) or "", job_id, field)

    def exit_code(self, job_id: str, timeout_s: float = ASK_TIMEOUT_S) -> int | None:
        """How the batch script of a job ended that has ended; None where Slurm has forgotten it, or is silent."""
        answer = self._ask("scontrol", "show", "job", job_id, timeout_s=timeout_s)
        records = re.split(r"^(?=JobId=)", answer.stdout.lstrip(), flags=re.MULTILINE)
        own = next((record for record in records if record.startswith(f"JobId={job_id} ")), "")
        match = re.search(r"\bExitCode=(\S+)", own)
        return parse_exit_code(match.group(1)) if match else None

    def mails(self, job_id: str, timeout_s: float = ASK_TIMEOUT_S) -> bool | None:
        """Whether Slurm sends mails about a job; None where it does not know the job, or is silent."""
        shown = self.shown(job_id, timeout_s)
        return parse_mails(shown) if shown else None

    def would_take(self, argv: Sequence[str]) -> Completed:
        """What Slurm says to ``sbatch --test-only``: nothing is queued."""
        asking = self.plus({"SLURM_TIME_FORMAT": "standard"})
        return asking._ask(*argv, timeout_s=QUESTION_TIMEOUT_S)

    def partitions(self) -> Completed:
        """A line ``partition|up or not|time limit|nodes|GRES|least-most nodes of a job`` for each group of nodes."""
        return self._ask("sinfo", "--noheader", "--all", "-o", "%R|%a|%l|%D|%G|%s", timeout_s=QUESTION_TIMEOUT_S)

    def version(self) -> Completed:
        """``slurm 22.05.8``, without asking the controller."""
        return self._ask("sinfo", "--version", timeout_s=QUESTION_TIMEOUT_S)

    def configuration(self) -> str:
        """What ``scontrol show config`` prints; empty while the controller is silent."""
        return self._config(QUESTION_TIMEOUT_S)

    def association_limits(self, user: str) -> Completed:
        """A line ``account|MaxJobs|MaxSubmitJobs`` for each association of a user; empty for no limit."""
        question = ("show", "associations", f"user={user}", "format=account,maxjobs,maxsubmit")
        return self._ask("sacctmgr", "--noheader", "--parsable2", *question, timeout_s=QUESTION_TIMEOUT_S)

    def associations(self, user: str) -> Completed:
        """A line ``account|partition|qos`` for each association of a user; fails where there is no accounting."""
        question = ("show", "associations", f"user={user}", "format=account,partition,qos")
        return self._ask("sacctmgr", "--noheader", "--parsable2", *question, timeout_s=QUESTION_TIMEOUT_S)


class LocalJobs:
    """The jobs of a local run: processes of this machine, known by pid and start time.

    ``record`` is the file in which the launcher keeps them, a line ``ID PID TICKS`` each.
    """

    FILE = "local_jobs.txt"
    KILL_WAIT_S = 8.0  # the launcher promises that nothing is left 10 s after its end

    def __init__(self, record: Path) -> None:
        self.record = record

    def _process(self, job_id: str) -> tuple[int, int] | None:
        try:
            text = self.record.read_text(errors="replace")
        except OSError:
            return None
        found = re.search(rf"^{re.escape(job_id)} (\d+) (\d+)$", text, re.MULTILINE | re.ASCII)  # others say nothing
        return (int(found[1]), int(found[2])) if found else None

    def status(self, job_id: str, timeout_s: float = ASK_TIMEOUT_S) -> JobStatus:
        process = self._process(job_id)
        if process is None:
            return JobStatus(JobState.UNKNOWN, "not started yet")
        pid, ticks = process
        alive = start_ticks(pid) == ticks
        if alive:
            return JobStatus(JobState.RUNNING, f"pid {pid}")
        return JobStatus(JobState.ENDED_BADLY, f"its process {pid} is gone")

    def cancel(self, job_ids: Sequence[str]) -> str | None:
        """Local jobs end with their launcher and with each other; nobody cancels a partner from outside."""
        return None

    def statuses(self, job_ids: Sequence[str]) -> dict[str, JobStatus]:
        """The status of each of several jobs."""
        return {job_id: self.status(job_id) for job_id in job_ids}

    def signal(self, job_ids: Sequence[str], number: int) -> None:
        """Send a signal to the bodies of jobs, as far as these are still the processes that the record names."""
        for job_id in job_ids:
            process = self._process(job_id)
            if process and start_ticks(process[0]) == process[1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process[0], number)

    def kill_wait_s(self) -> float:
        return self.KILL_WAIT_S

    def facts(self, job_id: str, timeout_s: float = ASK_TIMEOUT_S) -> JobFacts:
        """A process of this machine has no time limit."""
        return JobFacts()
