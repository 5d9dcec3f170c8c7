"""Which checks are there, whom do they concern, and how are they run: all at the same time, each with a deadline.

A check is added by one entry of ``CHECKS``. What it must ask for first (files, Slurm) it asks in its own thread; one
that gets no answer in time, or cannot be answered, says so as a warning.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slurm.lib.coordination import CoordinationDir
from slurm.lib.errors import ConfigError, EnvironmentProblem, SuiteError, UsageError
from slurm.lib.preflight import (
    checkpoint,
    cluster,
    data,
    dotenv,
    environment,
    images,
    joined,
    memory,
    mig,
    model,
    places,
    shape,
    snapshot,
    task,
)
from slurm.lib.preflight import verl as release
from slurm.lib.preflight.asked import Asked
from slurm.lib.preflight.finding import Finding, Level, error, warning
from slurm.lib.scheduler import Slurm
from slurm.lib.trainer import task_example, task_file

DEADLINE_S = 10.0  # more than a question to Slurm may take; shared storage that is slower says nothing for minutes
AT_LEISURE_S = 60.0  # with --check
PARTS = "parts"  # without these nothing can be submitted at all
CONFIGURATION = "config"  # read before anything else, so that there is nothing to leave out
ALWAYS = frozenset({PARTS, CONFIGURATION})
CheckRun = Callable[[Asked], Sequence[Finding]]


@dataclass(frozen=True)
class Check:
    """One check: its name, the question that it answers, whom it concerns, and how it is answered."""

    name: str
    question: str
    concerns: Callable[[Asked], bool]
    run: CheckRun


def everybody(asked: Asked) -> bool:
    """Every launch."""
    return True


def notified(asked: Asked) -> bool:
    """Launches with NOTIFY."""
    return bool(asked.settings.notify)


def snapshots(asked: Asked) -> bool:
    """Launches of a training with SNAPSHOT=1."""
    return asked.settings.snapshot and asked.plan.training is not None


def runtimes(asked: Asked) -> bool:
    """Launches with a runtime job."""
    return asked.brings_runtime


def verl(asked: Asked) -> bool:
    """Launches that train with VERL."""
    return asked.trains_with_verl


def verl_there(asked: Asked) -> bool:
    """Launches that train with VERL, where skyrl-agent is there; ``parts`` says where it is not."""
    return asked.trains_with_verl and asked.agent_folder.is_dir()


def verl_at_leisure(asked: Asked) -> bool:
    """Launches that train with VERL, with `--check` alone: it takes seconds."""
    return asked.at_leisure and verl_there(asked)


def verl_with_runtime(asked: Asked) -> bool:
    """Launches that train with VERL and bring its runtime."""
    return asked.trains_with_verl and asked.brings_runtime


def joining(asked: Asked) -> bool:
    """Launches that join a runtime which runs already."""
    return asked.plan.runtime is None


def on_slurm(asked: Asked) -> bool:
    """Launches on Slurm, where it is."""
    return asked.uses_slurm and shutil.which("sbatch", path=asked.environment.get("PATH")) is not None


def _configuration(asked: Asked) -> list[Finding]:
    """What is wrong with it has ended the launch before."""
    return [warning(CONFIGURATION, doubt.sentence, doubt.fix) for doubt in asked.plan.config.warnings]


def _parts(asked: Asked) -> list[Finding]:
    return [error(PARTS, part.sentence, part.fix) for part in places.missing_here(asked.plan, asked.checkout)]


def _facts(asked: Asked) -> model.ModelFacts:
    """With skyrl-agent's .env, as the node sees it."""
    read = dotenv.read_dot_env(asked.agent_folder / ".env", asked.environment)
    return model.look_at_model(asked.settings, {**asked.environment, **read.given})


def _model(asked: Asked) -> list[Finding]:
    return model.model_findings(asked.settings, _facts(asked))


def _memory(asked: Asked) -> list[Finding]:
    return memory.memory_findings(asked.settings, _facts(asked))


def _resume(asked: Asked) -> list[Finding]:
    base = asked.settings.checkpoint_dir
    folder = base / asked.settings.wandb_experiment if base else None
    saved = checkpoint.look_at_folder(folder) if folder else checkpoint.Saved(None, (), frozenset())
    if saved.tracker is None:
        return checkpoint.resume_findings(asked.settings, folder, saved)
    footer = data.read_footer(asked.settings.train_data)
    steps = None if footer.problem else data.total_steps(asked.settings, footer.rows)
    wanted = checkpoint.Wanted(steps, _facts(asked).model)
    return checkpoint.resume_findings(asked.settings, folder, saved, wanted)


def _space(asked: Asked) -> list[Finding]:
    folder = asked.settings.checkpoint_dir or asked.settings.skyrl_jobs_base
    facts = _facts(asked)
    return checkpoint.space_findings(asked.settings, facts, *checkpoint.free_space(folder))


def _data(asked: Asked) -> list[Finding]:
    settings = asked.settings
    train, val = data.read_footer(settings.train_data), data.read_footer(settings.val_data)
    return data.data_findings(settings, train, val, joins=not asked.brings_runtime)


def _folders(asked: Asked) -> list[Finding]:
    return places.folder_findings(places.look_at_folders(asked.settings))


def _storage(asked: Asked) -> list[Finding]:
    scratch = asked.settings.local_scratch
    found = places.scratch_findings(places.look_at_scratch(scratch)) if scratch else []
    return [*found, *places.id_findings(places.look_at_ids())]


def _release(asked: Asked) -> list[Finding]:
    return release.verl_findings(asked.settings, asked.plan.verl)


def _task(asked: Asked) -> list[Finding]:
    """``parts`` misses an example that is not there."""
    example = task_example(asked.settings)
    if example and not example.is_file():
        return []
    original = replace(asked.settings, snapshot=False)  # there is no copy yet
    file = example or task_file(original, CoordinationDir(Path(asked.plan.directory)))
    return task.task_file_findings(asked.settings, file, asked.plan.config.sources)


def _dot_env(asked: Asked) -> list[Finding]:
    read = dotenv.read_dot_env(asked.agent_folder / ".env", asked.environment)
    return dotenv.dot_env_findings(asked.settings, asked.environment, read)


def _environment(asked: Asked) -> list[Finding]:
    installed = environment.look_at_environment(asked.agent_folder, asked.environment)
    return environment.environment_findings(installed, syncs=not asked.settings.snapshot)


def _import(asked: Asked) -> list[Finding]:
    installed = environment.look_at_environment(asked.agent_folder, asked.environment)
    return environment.import_findings(installed, {**asked.plan.inherited, **asked.plan.environment})


def _snapshot(asked: Asked) -> list[Finding]:
    return snapshot.snapshot_findings(asked.settings, snapshot.look_at_tree(asked.agent_folder))


def _recipients(asked: Asked) -> list[Finding]:
    from slurm.lib.notify import mail_program  # with urllib: some 40 ms of a launch
    from slurm.lib.preflight import recipients

    settings, environment = asked.settings, asked.environment
    unknown = recipients.unknown_hosts(settings.webhooks, environment)
    return recipients.recipient_findings(settings, unknown, mail_program(environment))


def _images(asked: Asked) -> list[Finding]:
    settings = asked.settings
    logins = images.login_findings(settings.registry_auth_file, images.mode_of(settings.registry_auth_file))
    agent = images.agent_findings(settings, asked.environment) if asked.trains_with_verl else []
    return [*images.image_findings(settings, images.absent_files(settings)), *logins, *agent]


def _slurm_of(asked: Asked) -> Slurm:
    return Slurm({**asked.plan.inherited, **asked.plan.environment})


def _submissions(asked: Asked) -> list[Finding]:
    return cluster.submissions_asked(_slurm_of(asked), asked.plan)


def _partitions(asked: Asked) -> list[Finding]:
    return cluster.partitions_asked(_slurm_of(asked), asked.plan)


def _runtime(asked: Asked) -> list[Finding]:
    return joined.joined_findings(asked.plan, _slurm_of(asked))


def _account(asked: Asked) -> list[Finding]:
    return cluster.account_asked(_slurm_of(asked), asked.settings, places.user_name())


# In the order in which findings are shown. Entries of the same name are skipped together.
CHECKS: tuple[Check, ...] = (
    Check(CONFIGURATION, "Are all keys known, their values right, and do they hold together? Never skipped.", everybody,
          _configuration),
    Check(PARTS, "Is what the run cannot do without on this machine? Never skipped.", everybody, _parts),
    Check("slots", "Has the runtime a slot for every sandbox that a step starts, and CPUs and memory for them?",
          verl_with_runtime, lambda asked: shape.slot_findings(asked.settings)),
    Check("batch", "Can a step's trajectories be divided among GPUs and mini-batches?", verl,
          lambda asked: shape.batch_findings(asked.settings)),
    Check("parallel", "Does TP_SIZE fit a node's GPUs, and are there CPUs for all of VERL's processes?", verl,
          lambda asked: shape.parallel_findings(asked.settings)),
    Check("lengths", "Is MAX_MODEL_LEN long enough for prompt and response?", verl,
          lambda asked: shape.length_findings(asked.settings)),
    Check("model", "Do the model's heads and context fit TP_SIZE, SP_SIZE and the lengths (config.json at hand)?", verl,
          _model),
    Check("verl", "Can the VERL that skyrl-agent has do what it is told?", verl_there, _release),
    Check("task", "Does SkyRL-agent's task file say the same rollouts, lengths and agents?", verl_there, _task),
    Check("mig", "Would several MIG slices of one card be as many ranks?", verl,
          lambda asked: mig.mig_findings(asked.settings)),
    Check("memory", "Is there enough memory on GPUs and hosts for model, optimizer and one sequence's cache?", verl,
          _memory),
    Check("resume", "From which step does it start, and does that checkpoint fit this run?", verl, _resume),
    Check("space", "Is there room for the checkpoints that are kept?", verl, _space),
    Check("data", "Are the data files there, with columns, rows, and slots for a validation?", verl, _data),
    Check("folders", "Can the run's folders be made and written?", everybody, _folders),
    Check("dotenv", "Does skyrl-agent's .env still hold placeholders, and can wandb log in?", verl, _dot_env),
    Check("environment", "Are uv and skyrl-agent's environment there?", verl, _environment),
    Check("import", "Can VERL be imported in that environment?", verl_at_leisure, _import),
    Check("snapshot", "Does git track all of skyrl-agent that SNAPSHOT=1 has to copy?", snapshots, _snapshot),
    Check("notify", "Can the people in NOTIFY be told?", notified, _recipients),
    Check(joined.CHECK, "Is the runtime there and alive, and does it take the key?", joining, _runtime),
    Check("storage", "Can Podman keep its storage: LOCAL_SCRATCH on a local disk, ranges of subordinate ids?", runtimes,
          _storage),
    Check("images", "Are images, archives, logins and the agent server what they are said to be?", runtimes, _images),
    Check("slurm", "Would Slurm take the jobs, and have partitions the time, nodes and GPUs?", on_slurm, _partitions),
    Check("slurm", "", on_slurm, _submissions),
    Check("account", "Has the user an association with ACCOUNT and QOS?", on_slurm, _account),
)  # fmt: skip


def names() -> tuple[str, ...]:
    """The names that --no-check takes."""
    return tuple(dict.fromkeys(check.name for check in CHECKS if check.name not in ALWAYS))


def skipped_names(given: Sequence[str | None] | None) -> frozenset[str]:
    """What the values of --no-check leave out; None among them leaves out all.

    ``UsageError`` for a name that is unknown, and for a value without any.
    """
    wanted: set[str] = set()
    for value in given or ():
        named = set(names()) if value is None else {name.strip() for name in value.split(",")} - {""}
        if not named:
            raise UsageError(f"--no-check={value} names no check; there are: {', '.join(names())}; for all: --no-check")
        wanted |= named
    unknown = sorted(wanted - set(names()))
    if unknown:
        raise UsageError(f"--no-check: there is no check {', '.join(unknown)}; there are: {', '.join(names())}")
    return frozenset(wanted)


class _Running:
    """A check in a thread of its own, which is left behind when its time is over."""

    def __init__(self, check: Check, asked: Asked) -> None:
        self.check = check
        self.asked = asked
        self.found: Sequence[Finding] = ()
        self.fault: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name=f"check {check.name}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.found = self.check.run(self.asked)
        except (OSError, SuiteError) as problem:
            fix = f"look yourself, or leave it out: --no-check={self.check.name}"
            self.found = [warning(self.check.name, f"could not be answered: {problem}", fix)]
        except BaseException as fault:
            self.fault = fault

    def result(self, end: float, deadline_s: float) -> Sequence[Finding]:
        self.thread.join(max(0.0, end - time.monotonic()))
        if self.thread.is_alive():
            fix = f"see whether storage and Slurm answer, or leave it out: --no-check={self.check.name}"
            return [warning(self.check.name, f"not answered within {deadline_s:g} s", fix)]
        if self.fault is not None:
            raise self.fault
        return self.found


def concerning(asked: Asked, skipped: Collection[str] = (), checks: Sequence[Check] = CHECKS) -> list[Check]:
    """The checks that concern this launch and are not skipped."""
    return [check for check in checks if check.name not in skipped and check.concerns(asked)]


def run_checks(
    asked: Asked,
    skipped: Collection[str] = (),
    checks: Sequence[Check] = CHECKS,
    deadline_s: float | None = None,
) -> list[Finding]:
    """The findings of all checks that concern this launch and are not skipped, in the order of ``checks``."""
    deadline_s = deadline_s or (AT_LEISURE_S if asked.at_leisure else DEADLINE_S)
    end = time.monotonic() + deadline_s
    running = [_Running(check, asked) for check in concerning(asked, skipped, checks)]
    found = (finding for check in running for finding in check.result(end, deadline_s) if finding.check not in skipped)
    return list(dict.fromkeys(found))  # the three that ask Slurm may have the same to say, one of them for `mig`


class Refused(UsageError):
    """The checks found errors: nothing was queued."""


def of_failure(problem: SuiteError) -> list[Finding]:
    """What ended a launch before any check could run, as findings: each mistake of a configuration is one."""
    if isinstance(problem, ConfigError):
        return [
            error(CONFIGURATION, mistake.sentence, mistake.fix or "correct it there") for mistake in problem.problems
        ]
    return [error(CONFIGURATION, str(problem), "correct the command line or what the message names")]


def refuse(found: Sequence[Finding]) -> None:
    """Raise one error that names all errors: ``EnvironmentProblem`` where this machine lacks something."""
    errors = [finding for finding in found if finding.level is Level.ERROR]
    if not errors:
        return
    lines = [f"{len(errors)} {'error' if len(errors) == 1 else 'errors'} before submission; nothing was queued:"]
    message = "\n".join([*lines, *(f"  {finding}" for finding in errors)])
    kind = EnvironmentProblem if any(finding.check == PARTS for finding in errors) else Refused
    raise kind(message)
