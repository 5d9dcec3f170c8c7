"""All verdicts of an examination by place, in the order in which they are shown; pure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slurm.lib.doctor.between import clock_verdict, reach_verdict, visibility_verdict
from slurm.lib.doctor.examination import HERE, Look
from slurm.lib.doctor.facts import Report
from slurm.lib.doctor.host_verdicts import (
    folder_verdicts,
    limit_verdicts,
    python_verdict,
    sandbox_verdicts,
    share_verdicts,
    trainer_verdicts,
)
from slurm.lib.doctor.verdict import Section, Verdict, fail, warn
from slurm.lib.settings import Settings

NEVER_STARTED = "wait for free nodes (--wait SECONDS), or see why in squeue --me and sinfo"
DIED = "see why in its job's log and in sacct, and run the doctor again"
NO_REPORT = "see these words; are SKYRL_JOBS_BASE and the Python environment on storage that this node shares?"


def node_verdicts(report: Report, settings: Settings, mark: str) -> tuple[Verdict, ...]:
    """What is judged of a node by its own report."""
    verdicts = [
        python_verdict(report, mark),
        *limit_verdicts(report.limits),
        *share_verdicts(report, settings.skyrl_jobs_base),
        *folder_verdicts(report),
    ]
    verdicts += sandbox_verdicts(report.sandboxes, settings.container_image) if report.sandboxes else []
    verdicts += trainer_verdicts(report.trainer, settings) if report.trainer else []
    return tuple(verdicts)


def node_section(look: Look, settings: Settings, mark: str) -> Section:
    """One node; where there is no report, only why there is none."""
    kind = warn if look.waits else fail
    fix = NEVER_STARTED if look.waits else DIED if look.report else NO_REPORT
    problem = (kind("job", look.problem, fix),) if look.problem else ()
    if look.report is None:
        return Section(look.wanted.place, problem)
    return Section(f"{look.host} ({look.wanted.place})", (*problem, *node_verdicts(look.report, settings, mark)))


def between_section(looks: Sequence[Look]) -> list[Section]:
    """What is judged of two hosts; nothing where all is on this one."""
    remote = [look for look in looks if look.wanted.partition and look.report]
    verdicts: list[Verdict] = []
    for look in remote:
        verdicts.append(visibility_verdict(look.host, () if look.is_deaf else look.line.echoes))
        verdicts += clock_verdict(look.host, look.line.echoes)
    for page in (look for look in looks if look.has_page):
        verdicts += _port_verdicts(page, looks)
    return [Section("between nodes", tuple(verdicts))] if verdicts else []


def _port_verdicts(page: Look, looks: Sequence[Look]) -> list[Verdict]:
    """The page of one node, from every other place that needs it."""
    verdicts = []
    for look in looks:
        if look.wanted.kind == "training" and (not look.report or look.host != page.host):
            source = look.host or look.wanted.place
            verdicts.append(reach_verdict(source, page.host, look.reached.get(page.wanted.name)))
    if HERE in page.reached and page.wanted.partition:
        verdicts.append(reach_verdict(HERE, page.host, page.reached[HERE]))
    return verdicts


def login_verdicts(report: Report, share: Path) -> tuple[Verdict, ...]:
    """What is judged of this host by its own report."""
    return (*limit_verdicts(report.limits), *share_verdicts(report, share), *folder_verdicts(report))
