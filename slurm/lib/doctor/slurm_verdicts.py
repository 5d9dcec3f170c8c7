"""What Slurm itself is and allows: version, configuration, associations and their limits, partitions.

Asked on the login node by ``ask``, judged by the rest, which is pure.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from slurm.lib.doctor.verdict import Verdict, fail, of_findings, ok, warn
from slurm.lib.preflight.cluster import account_findings, parse_groups, partition_findings, shapes
from slurm.lib.preflight.places import SLURM_PROGRAMS
from slurm.lib.processes import Completed
from slurm.lib.scheduler import Slurm
from slurm.lib.settings import Settings
from slurm.lib.worker_plan import fleet

OLDEST = (20, 11)
SHORT_KILL_WAIT_S = 5
JOBS_OF_A_RUN = 2


@dataclass(frozen=True)
class SlurmFacts:
    """Slurm's own words; ``absent`` are its commands that are not on PATH."""

    absent: tuple[str, ...]
    version: Completed
    configuration: Mapping[str, str]
    partitions: Completed
    associations: Completed
    limits: Completed
    user: str


def ask(slurm: Slurm, user: str) -> SlurmFacts:
    """All questions at the same time; each has a deadline of its own."""
    path = slurm.environment.get("PATH")
    with ThreadPoolExecutor(5) as pool:
        version, configuration = pool.submit(slurm.version), pool.submit(slurm.configuration)
        partitions = pool.submit(slurm.partitions)
        associations, limits = pool.submit(slurm.associations, user), pool.submit(slurm.association_limits, user)
    return SlurmFacts(
        absent=tuple(name for name in SLURM_PROGRAMS if not shutil.which(name, path=path)),
        version=version.result(),
        configuration=parse_configuration(configuration.result()),
        partitions=partitions.result(),
        associations=associations.result(),
        limits=limits.result(),
        user=user,
    )


def parse_configuration(text: str) -> dict[str, str]:
    """Key → value of ``scontrol show config``."""
    rows = re.findall(r"^(\w+)\s*= (.*?)\s*$", text, re.MULTILINE)
    return dict(rows)


def slurm_verdicts(facts: SlurmFacts, settings: Settings) -> list[Verdict]:
    """All of them; a controller that is silent leaves only that to be said."""
    if facts.absent:
        sentence = f"not on PATH: {', '.join(facts.absent)}"
        return [fail("slurm", sentence, "load the site's Slurm; without one, try --config local")]
    if not facts.configuration:
        return [fail("slurm", f"Slurm does not answer: {facts.partitions.complaint}", "is SLURM_CONF set? see sinfo")]
    return [
        version_verdict(facts.version),
        kill_wait_verdict(facts.configuration),
        *array_verdicts(facts.configuration, settings),
        *partition_verdicts(facts.partitions, settings),
        *association_verdicts(facts, settings),
    ]


def version_verdict(answer: Completed) -> Verdict:
    """Slurm's release against the oldest one that the suite knows."""
    found = re.search(r"(\d+)\.(\d+)\S*", answer.stdout)
    if not answer.ok or found is None:
        return warn("slurm", f"Slurm's version is not known: {answer.complaint}", "see sinfo --version")
    shown = f"Slurm {found[0]}"
    if (int(found[1]), int(found[2])) < OLDEST:
        return warn("slurm", f"{shown} is older than any that was tried (20.11)", "look closely at a small run first")
    return ok("slurm", shown)


def kill_wait_verdict(configuration: Mapping[str, str]) -> Verdict:
    """The time that a cancelled job has to end in order."""
    found = re.match(r"\d+", configuration.get("KillWait", ""))
    if found is None:
        return warn("killwait", "Slurm does not tell its KillWait", "see scontrol show config")
    shown = f"a job that is ended has {found[0]} s (KillWait)"
    if int(found[0]) < SHORT_KILL_WAIT_S:
        return warn("killwait", f"{shown}, too little for a trainer to save", "save often; ask for KillWait=30")
    return ok("killwait", shown)


def array_verdicts(configuration: Mapping[str, str], settings: Settings) -> list[Verdict]:
    """Whether Slurm takes the job arrays of a runtime on several nodes; nothing of a runtime that needs none."""
    last = workers_of(settings)
    if not last:
        return []
    found = re.fullmatch(r"\d+", configuration.get("MaxArraySize", ""), re.ASCII)
    if found is None:
        return [warn("arrays", "Slurm does not tell its MaxArraySize", "see scontrol show config")]
    most = int(found[0])
    if most > last:
        return [ok("arrays", f"job arrays may have tasks up to {most - 1} (MaxArraySize); RUNTIME_NODES needs {last}")]
    shown = (
        f"job arrays may have tasks up to {most - 1} (MaxArraySize={most})" if most > 1 else "it takes no job arrays"
    )
    fix = "set RUNTIME_MODE=allocation" + (f", or RUNTIME_NODES={most} at most" if most > 1 else "")
    return [fail("arrays", f"{shown}, and RUNTIME_NODES={settings.runtime_nodes} needs tasks up to {last}", fix)]


def workers_of(settings: Settings) -> int:
    """How many jobs a run has beside its pair, which is the number of the last task, too."""
    return sum(map(len, fleet(settings).by_kind.values()))


def partition_verdicts(answer: Completed, settings: Settings) -> list[Verdict]:
    """CPU_PARTITION and GPU_PARTITION against time, nodes and GPUs that they have."""
    groups = parse_groups(answer.stdout)
    if not groups:
        return [warn("partition", f"sinfo names no partition: {answer.complaint}", "does `sinfo` answer?")]
    verdicts = []
    for job in shapes(settings):
        well = f"{job.key}={','.join(job.partitions)} has what the {job.kind} job asks for"
        verdicts += of_findings("partition", partition_findings(settings, job, groups), well)
    return verdicts


def association_verdicts(facts: SlurmFacts, settings: Settings) -> list[Verdict]:
    """Whose account the jobs are, and whether a run of two jobs is allowed."""
    if "slurmdbd" not in facts.configuration.get("AccountingStorageType", ""):
        return [ok("account", "no accounting here: every user may submit, and sacct knows nothing")]
    rows = [line.split("|") for line in facts.associations.stdout.splitlines() if line.count("|") >= 2]
    if not facts.associations.ok:
        fix = "sbatch still says whether ACCOUNT will do: launch.py --check"
        return [warn("account", f"associations are not told: {facts.associations.complaint}", fix)]
    if not rows:
        return [_without_association(facts)]
    shown = ", ".join(sorted({row[0] for row in rows}))
    verdicts = of_findings(
        "account", account_findings(settings, facts.associations, facts.user), f"{facts.user}: {shown}"
    )
    return [*verdicts, *_limit_verdicts(facts.limits, settings)]


def _without_association(facts: SlurmFacts) -> Verdict:
    sentence = f"{facts.user} has no association"
    if "associations" in facts.configuration.get("AccountingStorageEnforce", "").casefold():
        return fail("account", f"{sentence}, and jobs need one here", "ask the administrator to be added to an account")
    return warn("account", f"{sentence}: jobs run, and are charged to nobody", "ask for one if quotas matter to you")


def _limit_verdicts(answer: Completed, settings: Settings) -> list[Verdict]:
    """MaxJobs and MaxSubmitJobs of an association: a run is two jobs at once, and one for each worker."""
    few, workers = [], workers_of(settings)
    needed = JOBS_OF_A_RUN + workers
    for row in (line.split("|") for line in answer.stdout.splitlines() if line.count("|") >= 2):
        named = zip(("MaxJobs", "MaxSubmitJobs"), row[1:3], strict=False)
        few += [f"{name}={n} in {row[0]}" for name, n in named if n.isdigit() and int(n) < needed]
    if not few:
        return []
    if workers:
        sentence = f"a run with RUNTIME_NODES={settings.runtime_nodes} is {needed} jobs at once: {', '.join(few)}"
        return [fail("account", sentence, "set RUNTIME_MODE=allocation, or ask for a higher limit")]
    return [
        fail("account", f"a run is two jobs at once: {', '.join(few)}", "set PAIRING=het, or ask for a higher limit")
    ]
