"""A report for scripts (schema 1). Times are epoch seconds, lengths seconds; what is not known is null."""

from __future__ import annotations

from dataclasses import asdict

from slurm.lib.observe.run_report import AttemptReport, JobReport, RunReport, first_step_at
from slurm.lib.observe.sandbox_statistics import SandboxStatistics
from slurm.lib.observe.steps import Step, done_again, part_shares, rewards, step_times
from slurm.lib.observe.timeline import Mark
from slurm.lib.observe.unknown import Unknown
from slurm.lib.reports.run_words import run_dict

SCHEMA = 1


def report_dict(report: RunReport) -> dict[str, object]:
    """The report for scripts."""
    steps = report.steps
    times, earned, first = step_times(steps), rewards(steps), first_step_at(report)
    return {
        "schema": SCHEMA,
        "slurm_answers": report.heard,
        "made": report.now,
        "run": run_dict(report.view),
        "launched": report.launched,
        "finished": report.finished,
        "first_step": first,
        "attempts": [_attempt(report, one) for one in report.attempts],
        "step_times": asdict(times) if times else None,
        "part_shares": dict(part_shares(steps)),
        "rewards": asdict(earned) if earned else None,
        "done_again": done_again(one.steps for one in report.attempts),
        "problems": list(report.problems),
    }


def _attempt(report: RunReport, attempt: AttemptReport) -> dict[str, object]:
    return {
        "attempt": attempt.number,
        "jobs": [_job(report, job) for job in attempt.jobs],
        "workers": [{**_job(report, job), "array": job.job.array or None} for job in attempt.workers],
        "sandboxes": _sandboxes(attempt),
        "nodes_news": [{"at": mark.at, "text": mark.words} for mark in _news(attempt)],
        "steps": [step_dict(step) for step in attempt.steps],
    }


def _job(report: RunReport, job: JobReport) -> dict[str, object]:
    return {
        "kind": job.job.kind,
        "id": job.job.job_id,
        "stage": job.job.stage.value,
        "node": job.job.node or None,
        "submitted": job.submitted,
        "started": job.started,
        "ended": job.ended,
        "queue_s": job.queue_s(report.now),
        "exit_code": job.job.exit_code,
        "end_reason": job.job.end_reason or None,
        "last_error": job.job.error or None,
        "phases": [
            {"name": span.words, "begin": span.begin, "end": span.end, "about": span.is_about} for span in job.spans
        ],
        "use": [asdict(usage) for usage in job.usages],
        "sandboxes": _sandboxes(job),
        "steps_left_out": job.cut_steps,
    }


def _sandboxes(of: JobReport | AttemptReport) -> object:
    """What one server has counted, or those of all nodes together."""
    found = of.sandboxes
    if isinstance(found, SandboxStatistics):
        return asdict(found)
    return {"unknown": found.why} if isinstance(found, Unknown) else None


def _news(attempt: AttemptReport) -> tuple[Mark, ...]:
    """What the head said of its nodes."""
    runtime = attempt.job("runtime")
    return runtime.nodes if runtime else ()


def step_dict(step: Step) -> dict[str, object]:
    return {
        "step": step.number,
        "of": step.of,
        "seconds": step.seconds,
        "stands_for": step.stands_for,
        "reward": step.reward,
        "parts": dict(step.parts),
        "ended": step.at,
        "about": step.is_about,
    }
