"""A report as text: a page for a terminal, lines broken to its width."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from slurm.lib.observe.job_log import MOST_STEPS
from slurm.lib.observe.run_report import AttemptReport, JobReport, RunReport
from slurm.lib.observe.sandbox_statistics import SandboxStatistics
from slurm.lib.observe.steps import done_again, part_shares, rewards, step_times
from slurm.lib.observe.timeline import QUEUE
from slurm.lib.observe.unknown import Unknown
from slurm.lib.reports.node_rows import COLUMNS, news_of, node_rows, worker_lines
from slurm.lib.reports.report_words import (
    heading,
    latency_words,
    moment,
    part_words,
    peak_words,
    reasons,
    reward_words,
    slowest_words,
    span_words,
    sparkline,
    starts_words,
    step_words,
    summary_times,
    told_rewards,
    trend_words,
    troubled,
    use_lines,
)
from slurm.lib.reports.run_words import attempt_words, exit_code, lead_of, phase_words
from slurm.lib.verbs.table import GAP, Column, lines_of

INDENT, LABEL, TIME, SPARK = "  ", 11, 14, 40
NARROW = 30  # below that lines are not broken any more: words would be
Line = tuple[str, str]  # label, words


def as_text(report: RunReport, width: int | None) -> str:
    """The page; without a width every line is whole."""
    blocks = [_head(report), *(_attempt(report, one) for one in report.attempts)]
    blocks += [_steps(report), _sandboxes(report), *(_nodes(report, one, width) for one in report.attempts)]
    blocks += [_use(report), _unknown(report)]
    return "\n".join("".join(_fitted(line, width) for line in block) for block in blocks if block)


def _fitted(line: str | Line, width: int | None) -> str:
    """A heading, or a label with its words, which continue below themselves; the rows of a table are whole."""
    if isinstance(line, str) and line.startswith(INDENT):
        return f"{line}\n"
    if isinstance(line, str):
        return "".join(f"{part}\n" for part in _broken(line, width, ""))
    label, words = line
    indent = f"{INDENT}{label:<{LABEL}} "
    return "".join(f"{part}\n" for part in _broken(indent + words, width, " " * len(indent)))


def _broken(text: str, width: int | None, indent: str) -> list[str]:
    if width is None or len(text) <= width or width < NARROW:
        return [text.rstrip()]
    options = {"break_long_words": False, "break_on_hyphens": False, "drop_whitespace": True}
    return textwrap.wrap(text, width, subsequent_indent=indent, **options) or [""]  # type: ignore[arg-type]


def _head(report: RunReport) -> list[str | Line]:
    view = report.view
    lead, code = lead_of(view), exit_code(view)
    attempts = attempt_words(view)
    title = [view.record.name, view.state.value, f"attempt {attempts}" if attempts else "", view.record.config]
    lines: list[str | Line] = ["  ".join(filter(None, title))]
    lines.append(("launched", moment(report.launched) + _by(report)))
    if view.state.is_over and lead:
        why = f": {lead.end_reason}" if lead.end_reason else ""
        lines.append(("ended", (f"exit code {code}" if code is not None else "exit code unknown") + why))
    elif phase_words(view):
        lines.append(("phase", phase_words(view)))
    lines += summary_times(report)
    lines += [(f"{job.kind} says", job.error) for job in troubled(report)]
    lines += [("directory", str(view.record.directory.path))] if view.record.directory else []
    return lines


def _by(report: RunReport) -> str:
    record = report.view.record
    return (f" by {record.user}" if record.user else "") + (f" on {record.host}" if record.host else "")


def _attempt(report: RunReport, attempt: AttemptReport) -> list[str | Line]:
    title = f"Attempt {attempt.number}" if len(report.attempts) > 1 else "What took how long"
    if report.view.state.is_over and not any(job.spans for job in attempt.jobs):
        ids = ", ".join(job.job.job_id for job in attempt.jobs)
        return [title, ("", f"did not begin (jobs {ids})")]
    lines: list[str | Line] = [title]
    for job in reversed(attempt.jobs):
        lines += _job(report, job)
        lines += [("worker", f"{name} {words}") for name, words in _workers_of(report, attempt, job)]
    return lines


def _workers_of(report: RunReport, attempt: AttemptReport, job: JobReport) -> list[tuple[str, str]]:
    """The workers, after their runtime job."""
    return worker_lines(report, attempt) if job.job.kind == "runtime" else []


def _job(report: RunReport, job: JobReport) -> list[str | Line]:
    """A job with what it did; what took less than a second, as far as logs tell, in one line."""
    lines: list[str | Line] = [(job.job.kind, heading(report, job))]
    long = [span for span in job.spans if span.words == QUEUE or span.end is None or span.seconds(report.now) >= 1]
    lines += [("", f"{span_words(span, report.now):>{TIME}}  {span.words}") for span in long]
    if job.queue_s(report.now) is None and job.started is not None:
        lines.append(("", f"{'unknown':>{TIME}}  {QUEUE}"))
    short = ", ".join(span.words for span in job.spans if span not in long)
    lines += [("", f"{'under 1 s each':>{TIME}}  {short}")] if short else []
    return lines


def _steps(report: RunReport) -> list[str | Line]:
    steps = report.steps
    if not steps:
        return []
    times, earned, again = step_times(steps), rewards(steps), done_again(one.steps for one in report.attempts)
    of = f" of {steps[-1].of}" if steps[-1].of else ""
    lines: list[str | Line] = ["Steps", ("finished", f"{steps[-1].number}{of}")]
    lines += [("done again", f"{again}, after a restart")] if again else []
    if times:
        lines.append(("length", f"{step_words(times)} ({slowest_words(times)})"))
        lines += [("trend", trend_words(times))] if trend_words(times) else []
    shares = part_shares(steps)
    lines += [("parts", part_words(shares))] if shares else []
    if earned:
        curve = sparkline(told_rewards(steps), SPARK)
        lines.append(("reward", reward_words(earned)))
        lines += [("", curve)] if curve else []
    return lines


def _sandboxes(report: RunReport) -> list[str | Line]:
    lines: list[str | Line] = []
    jobs = [job for job in report.jobs if job.sandboxes is not None]
    for attempt in report.attempts:
        found, job = attempt.sandboxes, attempt.job("runtime")
        if isinstance(found, SandboxStatistics) and job:
            lines += [("", f"of runtime job {job.job.job_id}")] if len(jobs) > 1 else []
            lines += _statistics(found, len(attempt.servers))
            silent = [one for one in attempt.servers if not isinstance(one.sandboxes, SandboxStatistics)]
            lines += [("not known", f"of {len(silent)} of {len(attempt.servers)} nodes")] if silent else []
    return ["Sandboxes", *(lines or _why(jobs))] if jobs else []


def _nodes(report: RunReport, attempt: AttemptReport, width: int | None) -> list[str | Line]:
    """A table of the nodes of a runtime that has several, and what became of them."""
    rows = node_rows(report, attempt)
    if not rows:
        return []
    kept = [at for at in range(len(COLUMNS)) if any(row[at] for row in rows)]
    columns = [Column(COLUMNS[at].upper(), loss=_LOSS.index(COLUMNS[at])) for at in kept]
    room = None if width is None else width - len(INDENT)
    lines = lines_of(columns, [[row[at] for at in kept] for row in rows], room)
    title = f"Nodes of attempt {attempt.number}" if len(report.attempts) > 1 else "Nodes"
    told: list[str | Line] = [title, *(INDENT + GAP.join(line).rstrip() for line in lines)]
    return [*told, *(("at", f"{at} {words}") for at, words in news_of(attempt))]


# Which columns of that table are dropped last where there is no room.
_LOSS = ("node", "starts", "failed", "median", "99 %", "at once", "slots", "CPU", "memory", "served", "job", "end")


def _why(jobs: Sequence[JobReport]) -> list[str | Line]:
    reasons_why = dict.fromkeys(job.sandboxes.why for job in jobs if isinstance(job.sandboxes, Unknown))
    return [("unknown", why) for why in reasons_why]


def _statistics(found: SandboxStatistics, nodes: int) -> list[str | Line]:
    lines: list[str | Line] = [("starts", starts_words(found))]
    lines += [("failed", reasons(found.starts.failed))] if found.starts.failed else []
    lines += [("latency", latency_words(found))] if latency_words(found) else []
    lines.append(("peak", peak_words(found, nodes)))
    lines += [("ended", reasons(found.ended))] if found.ended else []
    return lines


def _use(report: RunReport) -> list[str | Line]:
    lines: list[str | Line] = []
    begun = [job for job in report.jobs if job.started is not None]
    for job in begun:
        told = use_lines(job)
        lines += [(job.job.kind, f"job {job.job.job_id}")] if told else []
        lines += [(label, f"{words}  ({source})") for label, words, source in told]
    silent = ", ".join(job.job.job_id for job in begun if not job.usages)
    lines += [("unknown", f"of {silent}: neither samples nor Slurm's accounting tell")] if silent else []
    return ["Use of what the jobs had", *lines] if lines else []


def _unknown(report: RunReport) -> list[str | Line]:
    problems: Sequence[str] = report.problems
    cut = [f"the steps after the first {MOST_STEPS} of job {job.job.job_id}" for job in report.jobs if job.cut_steps]
    found: list[str | Line] = [("not known", problem) for problem in (*problems, *cut)]
    return found
