"""What a launch will do, as a value: settings → ``LaunchPlan``; touches nothing.

``--dry-run`` prints a plan, submitting carries out the same plan. What a plan cannot know, the ids of the runtime job
and of the workers' array, stands in it as ``<runtime job id>`` and ``<workers job id>``; Slurm fills in ``%j`` by
itself. The ids of a local run are made of its launcher's pid.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from slurm.lib.config import LoadedConfig
from slurm.lib.coordination import AGENT, JOINED_AGENT, STAMP_FORMAT, CoordinationDir
from slurm.lib.gpu_environment import planned
from slurm.lib.interpreter import MARK_NAME
from slurm.lib.job_environment import without_slurm
from slurm.lib.launch_mark import PREFIX
from slurm.lib.ray_steps import RAY, node_step, ray_python, wanted
from slurm.lib.run_record import MORE_WORKERS, WORKER_NAME, WORKERS
from slurm.lib.secrets import is_secret_name, mask_values, masked, secret_values
from slurm.lib.settings import Settings, gpu_gres, slurm_seconds
from slurm.lib.trainer import snapshot_variables, trainer_of
from slurm.lib.verl_versions import VerlVersion
from slurm.lib.worker_plan import array_option, fleet, has_arrays, has_head, started

RUNTIME_ID, TRAINING_ID = "<runtime job id>", "<training job id>"
WORKERS_ID, MORE_WORKERS_ID = "<workers job id>", "<more_workers job id>"
SHOWN_IDS = {"runtime": RUNTIME_ID, "workers": WORKERS_ID, "more_workers": MORE_WORKERS_ID, "training": TRAINING_ID}
MARK = "<mark>"  # which launcher submits it (launch_mark.py)
ATTEMPT, AFTER = "SKYRL_ATTEMPT", "SKYRL_AFTER_JOB_ID"  # of a pair of jobs that may be restarted, or is a restart
# The file in the run's directory that a job's secrets are in; absent where it has none, so that a job that sees no such
# file knows whether it is still to come. (A name that ends in FILE is not taken for a secret's.)
SECRETS_FILE = "SKYRL_SECRETS_FILE"
AGENT_COPY = "SKYRL_AGENT_COPY"  # the folder in the run's directory with SNAPSHOT's copy, for a training that joins
WORKER_STEP = "SKYRL_WORKER_STEP"  # the id of the runtime job that a worker is a step of
# Not for the jobs that a job of ours, or a process of a local run, submits.
OF_ONE_JOB = frozenset({ATTEMPT, AFTER, SECRETS_FILE, AGENT_COPY, WORKER_STEP}) | frozenset(
    {"SKYRL_RUNTIME_JOB_ID", "SKYRL_JOB_ID", "SKYRL_LOCAL_JOBS"}
)
LOCAL_PID = "<pid>"
DEPENDENCY, BEGIN = ("dependency", "d"), ("begin", "b")  # options of sbatch, in long and short
SIGNAL_EARLY_S, SLOWEST_START_S = 60.0, 60.0  # of a signal of Slurm's before its time; of a job body on a busy node
OWN_ID = "%j"  # Slurm's name for the id of the job that it belongs to; the job bodies know it too
ARRAY_TASK_ID = "%A_%a"  # the same of a task of an array


@dataclass(frozen=True)
class Restart:
    """A further attempt at a run: its number (the launch's own is 1), and the training job whose end it waits for."""

    attempt: int
    after: str


@dataclass(frozen=True)
class Requeue:
    """A pair of jobs whose training has not begun, in the queue once more.

    Which attempt it is, and after which training job, stays as it was. Its runtime job waits for the end of
    ``instead_of``, the one that gives its node back, and does not start within the next ``begin_in_s`` seconds.
    """

    attempt: int
    after: str
    instead_of: str
    begin_in_s: int


@dataclass(frozen=True)
class Request:
    """What the command line asks for beside the configuration.

    ``attach_dir`` is the directory of a running runtime job to join and ``attach_id`` that job's id;
    ``runtime_url`` is the address of any other server. ``settings_words`` are the options that named the settings of a
    runtime launched alone, for the line that says how to join it. ``restart`` or ``requeue`` is set for a pair that
    goes on with the run in ``attach_dir``.
    """

    runtime: bool = True
    training: bool = True
    attach_dir: Path | None = None
    attach_id: str = ""
    settings_words: tuple[str, ...] = ()
    runtime_url: str | None = None
    restart: Restart | None = None
    requeue: Requeue | None = None

    @property
    def goes_on(self) -> bool:
        """Whether the jobs find in ``attach_dir`` all that a launch would make."""
        return self.restart is not None or self.requeue is not None

    @property
    def agent_name(self) -> str:
        """The folder of SNAPSHOT's copy: a training that joins leaves alone the one that others may be using."""
        return JOINED_AGENT if self.attach_dir and not self.goes_on else AGENT


@dataclass(frozen=True)
class JobPlan:
    """One job: what Slurm is told, and the environment that goes with it (over the launch's common one).

    ``tasks``: the numbers of its tasks, where it is an array.
    """

    kind: str
    argv: tuple[str, ...]
    script: Path
    directory: str
    environment: Mapping[str, str]
    tasks: tuple[int, ...] = ()

    def with_ids(self, jobs: Mapping[str, str]) -> JobPlan:
        """The same job with the ids filled in of the jobs, by kind, that were submitted before it."""

        def filled(text: str) -> str:
            for kind in ("runtime", WORKERS):
                text = text.replace(SHOWN_IDS[kind], jobs.get(kind, ""))
            return text

        return replace(
            self,
            argv=tuple(map(filled, self.argv)),
            directory=filled(self.directory),
            environment={name: filled(value) for name, value in self.environment.items()},
        )

    def with_mark(self, mark: str) -> JobPlan:
        """The same job with the mark of its submission filled in."""
        return replace(self, argv=tuple(word.replace(MARK, mark) for word in self.argv))

    def with_local_ids(self, ids: Mapping[str, str]) -> JobPlan:
        """The same job as a process of this machine, where nobody fills in ``%j``."""
        job = self.with_ids(ids)
        own = ids[self.kind]
        environment = {name: value.replace(OWN_ID, own) for name, value in job.environment.items()}
        return replace(job, directory=job.directory.replace(OWN_ID, own), environment=environment)


@dataclass(frozen=True)
class LaunchPlan:
    """Everything that a launch will do.

    ``environment`` is what both jobs get (secrets taken out), ``secrets`` what reaches them by a 0600 file.
    ``directory`` is the run's directory, with the id of its first job still open. ``verl`` is the VERL that skyrl-agent
    has, where it is known. ``combined`` is the one heterogeneous job of a launch with PAIRING=het, whose components
    are ``training`` and ``runtime`` (then as they would be submitted one by one, for questions about either).
    ``workers`` are the arrays of the runtime's further nodes, by kind ``workers`` and ``more_workers``.
    """

    config: LoadedConfig
    request: Request
    stamp: str
    directory: str
    runtime: JobPlan | None
    training: JobPlan | None
    environment: Mapping[str, str]
    inherited: Mapping[str, str]
    secrets: Mapping[str, str]
    verl: VerlVersion | None = None
    combined: JobPlan | None = None
    workers: tuple[JobPlan, ...] = ()

    @property
    def settings(self) -> Settings:
        return self.config.settings

    def local_ids(self, pid: object) -> dict[str, str]:
        """The ids of a local run's jobs by kind, for a launcher with this pid."""
        return {job.kind: f"local{pid}.{number}" for number, job in enumerate(self.jobs)}

    @property
    def secret_values(self) -> frozenset[str]:
        """What must not be shown wherever it stands."""
        return secret_values({**self.inherited, **self.environment, **self.secrets})

    @property
    def jobs(self) -> tuple[JobPlan, ...]:
        """The pair that a run is, or the one of it that is launched; without workers."""
        return tuple(job for job in (self.runtime, self.training) if job)

    @property
    def planned_directory(self) -> CoordinationDir:
        """The run's directory as far as it is known."""
        return CoordinationDir(Path(self.directory), self.request.agent_name.replace(OWN_ID, TRAINING_ID))

    @property
    def submissions(self) -> tuple[JobPlan, ...]:
        """What sbatch is asked to take, in this order, held; the release of the first lets them start."""
        pair = self.jobs
        return (self.combined,) if self.combined else (*pair[:1], *self.workers, *pair[1:])

    @property
    def pairing(self) -> str:
        """How the jobs of this launch belong together, as ``PAIRING`` has it; ``jobs`` for one alone."""
        return "het" if self.combined else "jobs"


def _options(pairs: Iterable[tuple[str, object]]) -> tuple[str, ...]:
    return tuple(f"--{name}={value}" for name, value in pairs if value not in (None, "", ()))


def _literal(path: str) -> str:
    """A path as Slurm's file name pattern takes it: a per cent sign of its own is doubled."""
    return path.replace("%", "%%")


def _site_options(settings: Settings) -> tuple[str, ...]:
    return _options(
        [
            ("account", settings.account),
            ("qos", settings.qos),
            ("constraint", settings.constraint),
            ("reservation", settings.reservation),
            ("exclude", settings.exclude_nodes),
            ("time", settings.time_limit),
            ("signal", f"B:USR1@{settings.restart_lead}" if _is_signalled(settings) else None),
        ]
    )


def _is_signalled(settings: Settings) -> bool:
    """Whether Slurm is to tell each job's own process that the time limit is near, as the job's own clock does.

    Slurm may do so up to a minute early (sbatch(1)): not where that would kill a process that has just been started.
    """
    left_before = slurm_seconds(settings.time_limit) - settings.restart_lead
    return bool(settings.restarts) and left_before > SIGNAL_EARLY_S + SLOWEST_START_S


def _logs(kind: str, base: Path, directory: str, job_id: str = OWN_ID) -> tuple[str, ...]:
    """Log paths below the run's directory, which need not exist before the job starts."""
    folder = f"{_literal(str(base))}/{directory}"
    return _options(
        [(stream, f"{folder}/{kind}_{job_id}.{suffix}") for stream, suffix in (("output", "out"), ("error", "err"))]
    )


def runtime_options(settings: Settings) -> tuple[str, ...]:
    """The resources of the runtime job: of one node, or of all with RUNTIME_MODE=allocation.

    Then the end of a node is not the job's: without ``--no-kill`` Slurm would end all.
    """
    whole = has_head(settings) and settings.runtime_mode == "allocation"
    return (
        _node_options(settings, "skyrl-runtime", settings.runtime_nodes if whole else 1)
        + (("--no-kill",) if whole else ())
        + _site_options(settings)
        + settings.cpu_sbatch_args
    )


def worker_options(settings: Settings) -> tuple[str, ...]:
    """The resources of each task of a worker array: those of the runtime job.

    Without what that one has waited for, and without the signal by which a training saves.
    """
    site = [word for word in _site_options(settings) if not word.startswith("--signal=")]
    options = (*_node_options(settings, WORKER_NAME, 1), *site, *settings.cpu_sbatch_args)
    return parted(parted(options, *DEPENDENCY)[0], *BEGIN)[0]


def _node_options(settings: Settings, name: str, nodes: int) -> tuple[str, ...]:
    pairs = [
        ("job-name", name),
        ("partition", settings.cpu_partition),
        ("nodes", nodes),
        ("ntasks", nodes),
        ("ntasks-per-node", 1 if nodes > 1 else None),
        ("cpus-per-task", settings.cpus_for_runtime),
        ("mem", settings.runtime_memory),
    ]
    return _options(pairs)


def training_options(settings: Settings) -> tuple[str, ...]:
    """The resources of the training job."""
    pairs = [
        ("job-name", "skyrl-train"),
        ("partition", settings.gpu_partition),
        ("nodes", settings.gpu_nodes),
        ("ntasks-per-node", 1),
        ("gres", gpu_gres(settings)),
        ("cpus-per-task", settings.training_cpus),
        ("mem", settings.training_memory),
    ]
    return _options(pairs) + _site_options(settings) + settings.gpu_sbatch_args


def mail_options(settings: Settings) -> tuple[str, ...]:
    """Slurm's own mail for NOTIFY, for the one job that a run is about.

    One mail is sent: END is for jobs that have completed or were cancelled, FAIL for all others, after a time limit too
    (slurmctld/job_mgr.c, 22.05).
    """
    addresses = ",".join(settings.mail_addresses)
    return _options([("mail-type", "END,FAIL" if addresses else ""), ("mail-user", addresses)])


def parted(words: Sequence[str], option: str, letter: str) -> tuple[tuple[str, ...], list[str]]:
    """Options of sbatch without one of them, in any of its forms, and the values that it had."""
    kept, values, rest = [], [], iter(words)
    for word in rest:
        if word in {f"--{option}", f"-{letter}"}:
            values += [next(rest, "")]
        elif word.startswith(f"--{option}="):
            values += [word.partition("=")[2]]
        elif word.startswith(f"-{letter}"):
            values += [word[2:]]
        else:
            kept.append(word)
    return tuple(kept), values


SBATCH = ("sbatch", "--parsable", "--no-requeue", "--export=ALL")


# A job needs these before it can read the file that the secrets are in.
NEEDED_EARLY = frozenset({"PATH", "HOME", "LD_LIBRARY_PATH", "PYTHONPATH"})
NEEDED_EARLY_PREFIXES = ("SKYRL_", "SLURM_", "SBATCH_")
LOGIN_NAME = "SLURM_JWT"  # sbatch itself shows it to Slurm, so no file can carry it
SURELY_SECRET = 8  # characters; a shorter value may stand in others by chance


def split_environment(environment: Mapping[str, str], values: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """What may stand in a job's environment as Slurm keeps it, and the secrets, which go by a file.

    A variable whose value holds one of the secret ``values`` is a secret too: ``HEADER="Bearer $API_KEY"``.
    """
    telling = [value for value in values if len(value) >= SURELY_SECRET]

    def is_secret(name: str, value: str) -> bool:
        early = name in NEEDED_EARLY or name.startswith(NEEDED_EARLY_PREFIXES)
        if name == LOGIN_NAME:
            return False
        return is_secret_name(name) or (not early and any(secret in value for secret in telling))

    secrets = {name: value for name, value in environment.items() if value and is_secret(name, value)}
    return {name: value for name, value in environment.items() if name not in secrets}, secrets


def make_plan(
    config: LoadedConfig,
    request: Request,
    environment: Mapping[str, str],
    checkout: Path,
    python: str,
    now: datetime,
    verl: VerlVersion | None = None,
    mark: str = "",
) -> LaunchPlan:
    """The plan for these settings; pure. ``mark`` tells which versions ``python`` has (``interpreter``)."""
    settings = config.settings
    stamp = now.strftime(STAMP_FORMAT)
    shell, said = without_slurm(environment), {**config.exported, **settings.as_environment()}
    values = secret_values(shell) | secret_values(said)
    overruled = said.keys() | config.unset | OF_ONE_JOB
    passed_on = {name: value for name, value in shell.items() if name not in overruled}
    inherited, shell_secrets = split_environment(passed_on, values)
    ours, own_secrets = split_environment(said, values)
    secrets = {**shell_secrets, **own_secrets}
    where = environment.get(SECRETS_FILE, "") if request.goes_on else secrets_file(request) if secrets else ""
    marked = not {**shell, **said}.get("SBATCH_COMMENT")  # a person's own comment stays, as in *_SBATCH_ARGS
    builder = _Builder(settings, request, stamp, checkout, python, mark, where, marked)
    return LaunchPlan(
        config=config,
        request=request,
        stamp=stamp,
        directory=builder.shown_directory(),
        runtime=builder.runtime() if request.runtime else None,
        training=builder.training() if request.training else None,
        environment=ours,
        inherited=inherited,
        secrets=secrets,
        verl=verl,
        combined=builder.combined() if builder.is_het else None,
        workers=builder.workers(),
    )


def secrets_file(request: Request) -> str:
    """The name of the file that a launch puts its secrets into; what a shell knows that joins goes to its own job."""
    return f"secrets_{OWN_ID}.json" if request.attach_dir else "secrets.json"


@dataclass(frozen=True)
class _Builder:
    settings: Settings
    request: Request
    stamp: str
    checkout: Path
    python: str
    mark: str
    secrets_file: str
    marked: bool

    @property
    def sbatch(self) -> tuple[str, ...]:
        """How each job is submitted: held until all is ready, with the mark of its launcher."""
        return (*SBATCH, *_options([("comment", f"{PREFIX}{MARK}" if self.marked else None)]), "--hold")

    @property
    def base(self) -> Path:
        attach = self.request.attach_dir
        return attach.parent if attach else self.settings.skyrl_jobs_base

    def directory_of(self, job_id: str) -> str:
        return self.request.attach_dir.name if self.request.attach_dir else f"{self.stamp}_{job_id}"

    def shown_directory(self) -> str:
        job_id = RUNTIME_ID if self.request.runtime and not self.is_het else TRAINING_ID
        return f"{self.base}/{self.directory_of(job_id)}"

    def script(self, name: str) -> Path:
        """In the checkout; of a run that goes on in its own copy of the code, since the checkout may have changed."""
        attach = self.request.attach_dir
        code = CoordinationDir(attach).code if attach and self.request.goes_on else self.checkout
        return code / "slurm" / "jobs" / name

    @property
    def is_pair(self) -> bool:
        return self.request.runtime and self.request.training and self.settings.skyrl_backend == "slurm"

    @property
    def is_het(self) -> bool:
        return self.is_pair and self.settings.pairing == "het"

    def environment(self, directory: str) -> dict[str, str]:
        """What every job is told: where it meets the other, its code, its interpreter, its secrets, its attempt."""
        return {
            "SKYRL_COORD_DIR": f"{self.base}/{directory}",
            "SKYRL_CODE_DIR": f"{self.base}/{directory}/code",
            "SKYRL_CHECKOUT": str(self.checkout),
            "SKYRL_PYTHON": self.python,
            **({MARK_NAME: self.mark} if self.mark else {}),
            **({SECRETS_FILE: self.secrets_file} if self.secrets_file else {}),
            **self.attempt(),
        }

    def attempt(self) -> dict[str, str]:
        """For a pair of jobs that may be restarted or is a restart: which attempt it is, and after which job."""
        if not self.is_pair or not self.settings.restarts:
            return {}
        known = self.request.restart or self.request.requeue
        return {ATTEMPT: str(known.attempt if known else 1)} | ({AFTER: known.after} if known and known.after else {})

    def options_of(self, kind: str) -> tuple[str, ...]:
        """A job's options.

        The user's come last, and of --dependency and --begin the last one counts. What these say has been waited for
        when the run goes on.
        """
        options = (runtime_options if kind == "runtime" else training_options)(self.settings)
        if kind == ("training" if self.request.training else "runtime"):
            options = mail_options(self.settings) + options
        if not self.request.goes_on:
            return options
        return parted(parted(options, *DEPENDENCY)[0], *BEGIN)[0]

    @property
    def waits(self) -> tuple[str, ...]:
        """What the job that is submitted first waits for beside its release."""
        requeue, restart = self.request.requeue, self.request.restart
        after = restart.after if restart else requeue.instead_of if requeue else None
        begin = f"now+{requeue.begin_in_s}" if requeue and requeue.begin_in_s else None
        return _options([("dependency", f"afterany:{after}" if after else None), ("begin", begin)])

    def combined(self) -> JobPlan:
        """Both jobs as one: the training, whose body is the batch script, and the runtime, which that one starts.

        Its id is the training's, and so is the directory's name. What is not about sizes (hold, dependency) sbatch
        passes on from the first component to the second.
        """
        directory = self.directory_of(OWN_ID)
        script = self.script("verl_training.py")
        training = self.options_of("training") + _logs("training", self.base, directory)
        # Without a log, which its body's step writes, and without a signal, which is the batch script's alone.
        runtime = [word for word in self.options_of("runtime") if not word.startswith("--signal=B:")]
        environment = self.environment(directory)
        argv = (*self.sbatch, *self.waits, *training, ":", *runtime, str(script))
        return JobPlan("training", argv, script, f"{self.base}/{directory}", environment)

    def runtime(self) -> JobPlan:
        directory = self.directory_of(OWN_ID)
        script = self.script("runtime_server.py")
        options = self.options_of("runtime") + _logs("runtime", self.base, directory)
        environment = self.environment(directory)
        return JobPlan(
            "runtime",
            (*self.sbatch, *self.waits, *options, str(script)),
            script,
            f"{self.base}/{directory}",
            environment,
        )

    def workers(self) -> tuple[JobPlan, ...]:
        """The arrays of the runtime's further nodes; each task starts once the runtime job has, whose head it joins."""
        if not self.request.runtime or not has_arrays(self.settings):
            return ()
        return tuple(self._array(kind, tasks) for kind, tasks in fleet(self.settings).by_kind.items())

    def _array(self, kind: str, tasks: tuple[int, ...]) -> JobPlan:
        directory = self.directory_of(RUNTIME_ID)
        script = self.script("runtime_worker.py")
        # Slurm may start a task of each array in turn: what is not needed would take the place of what is.
        needed = fleet(self.settings).needed if kind == MORE_WORKERS else ()
        dependency = f"--dependency={started(RUNTIME_ID, WORKERS_ID, needed)}"
        first = (dependency, "--kill-on-invalid-dep=yes", array_option(tasks))
        options = worker_options(self.settings) + _logs("worker", self.base, directory, ARRAY_TASK_ID)
        environment = self.environment(directory) | {"SKYRL_RUNTIME_JOB_ID": RUNTIME_ID}
        argv = (*self.sbatch, *first, *options, str(script))
        return JobPlan(kind, argv, script, f"{self.base}/{directory}", environment, tasks)

    def training(self) -> JobPlan:
        """With a runtime job of its own it waits for that one's start, so that it never holds GPUs before.

        It waits for the start of the workers too without which there is not enough room for its sandboxes.

        It is held too: the end of a runtime job that is taken back would let it start.
        """
        paired = self.request.runtime
        directory = self.directory_of(RUNTIME_ID if paired else OWN_ID)
        script = self.script("verl_training.py")
        restart = self.request.restart
        # A restart's runtime job may be cancelled while it is queued, which fulfils `after` (Slurm 22.05).
        runs = started(RUNTIME_ID, WORKERS_ID, fleet(self.settings).needed)
        both = f"{runs},afterany:{restart.after}" if restart else runs
        options, theirs = self.options_of("training"), list[str]()
        if paired:
            options, theirs = parted(options, *DEPENDENCY)
        both = ",".join([both, *theirs])
        first = (f"--dependency={both}", "--kill-on-invalid-dep=yes") if paired else ()
        options += _logs("training", self.base, directory)
        partner = RUNTIME_ID if paired else self.request.attach_id
        environment = self.environment(directory) | ({"SKYRL_RUNTIME_JOB_ID": partner} if partner else {})
        if self.settings.snapshot and self.request.agent_name != AGENT:
            environment[AGENT_COPY] = self.request.agent_name
        argv = (*self.sbatch, *first, *options, str(script))
        return JobPlan("training", argv, script, f"{self.base}/{directory}", environment)


def shown(plan: LaunchPlan) -> str:
    """The plan for people: command lines, environment, trainer, directory; secrets masked."""
    plan = _as_local(plan) if plan.settings.skyrl_backend == "local" else plan
    sections = [
        *_command_lines(plan),
        *_environment_lines(plan),
        *_ray_lines(plan),
        *_trainer_lines(plan),
        *_node_lines(plan),
        f"run directory: {plan.directory}",
    ]
    return mask_values("\n".join(sections), plan.secret_values) + "\n"


def _as_local(plan: LaunchPlan) -> LaunchPlan:
    """A local run's plan with its ids, as far as they are known before it."""
    ids = plan.local_ids(LOCAL_PID)
    runtime, training = (job.with_local_ids(ids) if job else None for job in (plan.runtime, plan.training))
    directory = plan.directory.replace(RUNTIME_ID, ids[plan.jobs[0].kind])
    return replace(plan, directory=directory, runtime=runtime, training=training)


def local_argv(job: JobPlan) -> tuple[str, ...]:
    """The job as a process of this machine: the run's copy of the same script."""
    return (job.environment["SKYRL_PYTHON"], f"{job.environment['SKYRL_CODE_DIR']}/slurm/jobs/{job.script.name}")


def _command_lines(plan: LaunchPlan) -> list[str]:
    lines = []
    if plan.settings.skyrl_backend == "local":
        for job in plan.jobs:
            what = f"a process of this machine ({LOCAL_PID}: its launcher's)"
            lines += [f"# {job.kind} job, {what}", _readable(local_argv(job)), ""]
        return lines
    for job in plan.submissions:
        lines += [f"# {_title(plan, job)}", _readable(job.argv), ""]
    first, *others = plan.submissions
    lines += ["# then, with the run directory complete"]
    for job in others:
        lines += [f"scontrol release {shlex.quote(SHOWN_IDS[job.kind])}", ""]
    lines += [f"# and last, which lets {'all' if plan.workers else 'both'} start"] if others else []
    lines += [f"scontrol release {shlex.quote(SHOWN_IDS[first.kind])}", ""]
    return lines


def _title(plan: LaunchPlan, job: JobPlan) -> str:
    if plan.combined:
        return "both jobs, as one heterogeneous job"
    if not job.tasks:
        return f"{job.kind} job"
    awaited = "whose start the training waits for" if job.kind == WORKERS else "which join when Slurm starts them"
    return f"{job.kind}: further nodes of the runtime, {awaited}"


def _readable(argv: tuple[str, ...]) -> str:
    """A command line that a shell would take, a word of it a line."""
    return " \\\n    ".join(shlex.quote(word) for word in argv)


def _environment_lines(plan: LaunchPlan) -> list[str]:
    lines = ["# environment of the jobs: set by this launch"]
    own: dict[str, str] = dict(plan.environment)
    for job in plan.submissions:
        own |= job.environment
    lines += [f"{name}={shlex.quote(value)}" for name, value in sorted(masked(own).items())]
    lines += [f"{name}=***  # by a 0600 file" for name in sorted(plan.secrets)]
    lines += ["", "# environment of the jobs: passed on from this shell"]
    lines += [f"{name}={shlex.quote(value)}" for name, value in sorted(masked(plan.inherited).items())]
    return [*lines, ""]


def _ray_lines(plan: LaunchPlan) -> list[str]:
    """The job step that brings Ray up on each node; what it is told besides is known only in the job."""
    if not plan.training or not wanted(plan.settings):
        return []
    cwd = trainer_of(plan.settings, plan.planned_directory, plan.verl).cwd
    python = plan.training.environment["SKYRL_PYTHON"]
    starts = shlex.join((*ray_python(plan.settings), *RAY))
    return [
        "# Ray, started by the training job before the trainer: on each of its nodes a step, which runs and ends",
        f"# {starts} …",
        _readable(node_step(plan.settings, "<node>", cwd, python, "<ports, folder, and where the head is>")),
        "",
    ]


def _trainer_lines(plan: LaunchPlan) -> list[str]:
    if not plan.training:
        return []
    trainer = trainer_of(plan.settings, plan.planned_directory, plan.verl)
    return [f"# the trainer, in {trainer.cwd}", _readable(trainer.argv), ""]


def _node_lines(plan: LaunchPlan) -> list[str]:
    """What the training job will set on its node, a comment with the reason before each step."""
    if not plan.training:
        return []
    lines = ["# the trainer's environment: what the training job sets on its node"]
    environment = {**plan.inherited, **plan.environment}
    lines += [f"export {name}={shlex.quote(v)}" for name, v in snapshot_variables(plan.settings, environment).items()]
    for one in planned(plan.settings, environment):
        lines += [f"# {one.step.name}: {one.step.why}"]
        lines += [f"export {name}={shlex.quote(value)}" for name, value in masked(one.set).items()]
        lines += [f"unset {' '.join(one.unset)}"] if one.unset else []
    return [*lines, ""]
