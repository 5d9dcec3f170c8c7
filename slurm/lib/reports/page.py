"""The page of a report: one HTML file that loads nothing and runs nothing, for a screen by day and night and for print.

Whatever comes from a run is escaped; a policy in the page forbids scripts and any request all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from slurm.lib.observe.run_report import AttemptReport, JobReport, RunReport, first_step_at
from slurm.lib.observe.sandbox_statistics import SandboxStatistics
from slurm.lib.observe.steps import PARTS, part_shares, rewards, step_times
from slurm.lib.observe.timeline import QUEUE
from slurm.lib.reports import MARK
from slurm.lib.reports.node_rows import COLUMNS, news_of, node_rows
from slurm.lib.reports.plots import Plot, plots
from slurm.lib.reports.report_words import (
    PART_WORDS,
    heading,
    latency_words,
    length,
    moment,
    number,
    peak_words,
    reasons,
    share,
    span_words,
    starts_words,
    summary_times,
    troubled,
    use_lines,
    whole,
)
from slurm.lib.reports.run_words import attempt_words, exit_code, lead_of, phase_words

STYLE = Path(__file__).with_name("page.css")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
TONES = {
    **dict.fromkeys(["running", "serving", "completed"], "good"),
    **dict.fromkeys(["failed", "interrupted"], "bad"),
}


def page(report: RunReport) -> str:
    """The whole file."""
    name = escape(report.view.record.name)
    shown = plots(report)
    body = [_head(report), _tiles(report), _errors(report), *_figures(shown), _tables(report), _foot(report)]
    text = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
{MARK}
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{name} – run report</title>
<style>
{STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
{"".join(body)}</main>
</body>
</html>
"""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # a path may be no UTF-8


def _head(report: RunReport) -> str:
    view = report.view
    record, lead, code = view.record, lead_of(view), exit_code(view)
    attempts = attempt_words(view)
    told = [
        record.config,
        f"launched {moment(report.launched)}",
        f"by {record.user}" if record.user else "",
        f"on {record.host}" if record.host else "",
        f"attempt {attempts}" if attempts else "",
    ]
    end = phase_words(view)
    if view.state.is_over and lead:
        end = (f"Exit code {code}" if code is not None else "Exit code unknown") + (
            f": {lead.end_reason}" if lead.end_reason else ""
        )
    tone = TONES.get(view.state.value, "plain")
    return (
        f'<header><h1>{escape(record.name)} <span class="state {tone}">{view.state.value}</span></h1>\n'
        f'<p class="meta">{escape(" · ".join(filter(None, told)))}</p>\n'
        + (f"<p>{escape(end)}</p>\n" if end else "")
        + "</header>\n"
    )


def _tiles(report: RunReport) -> str:
    tiles = [(value, name) for name, value in _figures_first(report)]
    cells = "".join(f"<div><dd>{escape(value)}</dd><dt>{escape(name)}</dt></div>\n" for value, name in tiles)
    return f'<dl class="tiles">\n{cells}</dl>\n' if cells else ""


def _figures_first(report: RunReport) -> list[tuple[str, str]]:
    """The figures that people ask for first: name and value."""
    times, earned, first = step_times(report.steps), rewards(report.steps), first_step_at(report)
    found = [("in all", value) for name, value in summary_times(report) if name == "took"]
    queue = [job.queue_s(report.now) for job in report.jobs if job.job.kind == "training"][:1]
    found += [("training in the queue", whole(seconds)) for seconds in queue if seconds is not None]
    if first is not None and report.launched is not None:
        found.append(("from launch to first step", whole(max(0.0, first - report.launched))))
    if report.steps:
        of = f" of {report.steps[-1].of}" if report.steps[-1].of else ""
        found.append(("steps", f"{report.steps[-1].number}{of}"))
    if times:
        found.append(("a step, median", length(times.median)))
    if earned:
        found.append(("reward, mean of the last tenth", number(earned.late_mean)))
    statistics = [one.sandboxes for one in report.attempts if isinstance(one.sandboxes, SandboxStatistics)]
    if statistics:
        failed = sum(sum(one.starts.failed.values()) for one in statistics)
        name = "sandboxes started" + (f", {failed} failed" if failed else "")
        found.append((name, str(sum(one.starts.succeeded for one in statistics))))
    return found


def _errors(report: RunReport) -> str:
    jobs = troubled(report)
    lines = "".join(f"<p>{escape(job.kind)} job {escape(job.job_id)}: <q>{escape(job.error)}</q></p>\n" for job in jobs)
    return f'<section class="error"><h2>Last error</h2>\n{lines}</section>\n' if lines else ""


def _figures(shown: Sequence[Plot]) -> Iterable[str]:
    yield '<div class="plots">\n'
    for plot in shown:
        yield _figure(plot)
    yield "</div>\n"


def _figure(plot: Plot) -> str:
    """A plot with its title and what it shows; without a drawing the reason why there is none."""
    kind = (" wide" if plot.is_wide else "") + ("" if plot.svg else " empty")
    words = f"<figcaption>{escape(plot.words)}</figcaption>\n" + _legend(plot)
    drawing = plot.svg
    if drawing:
        label = f' role="img" aria-label="{escape(f"{plot.title}. {plot.words}")}"'
        drawing = f'<div class="drawing">{drawing.replace("<svg", f"<svg{label}", 1)}</div>\n'
    return f'<figure class="card{kind}" id="{plot.name}"><h2>{escape(plot.title)}</h2>\n{words}{drawing}</figure>\n'


def _legend(plot: Plot) -> str:
    swatches = (f'<li><i class="{colour}"></i>{escape(name)}</li>' for name, colour in plot.legend)
    return f'<ul class="legend">{"".join(swatches)}</ul>\n' if plot.legend else ""


# --- tables -----------------------------------------------------------------------------------------------------------


def _tables(report: RunReport) -> str:
    parts = [_phases(report), _parts(report), _statistics(report), _nodes(report), _use(report), _unknown(report)]
    return "".join(parts)


def _section(title: str, inner: str, *, is_open: bool = True) -> str:
    return f'<section class="card"><h2>{escape(title)}</h2>\n{inner}</section>\n' if inner else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int = 1) -> str:
    """A table; its column ``numbers`` stands to the right."""

    def cells(row: Sequence[str], tag: str) -> str:
        kinds = (' class="number"' if at == numbers else "" for at in range(len(row)))
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    lines = "".join(f"<tr>{cells(row, 'td')}</tr>\n" for row in rows)
    top = f"<thead><tr>{cells(head, 'th')}</tr></thead>"
    return f'<div class="table"><table>\n{top}\n<tbody>\n{lines}</tbody></table></div>\n'


def _phases(report: RunReport) -> str:
    inner = ""
    for attempt in report.attempts:
        begun = [job for job in reversed(attempt.jobs) if job.spans or not report.view.state.is_over]
        inner += f"<h3>Attempt {attempt.number}</h3>\n" if len(report.attempts) > 1 else ""
        inner += '<div class="pair">\n' + "".join(_job(report, job) for job in begun) + "</div>\n"
        inner += "" if begun else f"<p>It did not begin ({_ids(attempt)}).</p>\n"
    return _section("What took how long", inner)


def _ids(attempt: AttemptReport) -> str:
    return escape("jobs " + ", ".join(job.job.job_id for job in attempt.jobs))


def _job(report: RunReport, job: JobReport) -> str:
    rows = [(span.words, span_words(span, report.now)) for span in job.spans]
    if job.queue_s(report.now) is None and job.started is not None:
        rows = [(QUEUE, "unknown"), *rows]
    words = f"{job.job.kind}, {heading(report, job)}"
    return f"<div><p>{escape(words)}</p>\n{_table(('phase', 'time'), rows)}</div>\n"


def _parts(report: RunReport) -> str:
    shares = part_shares(report.steps)
    rows = [
        (PART_WORDS.get(name, name), share(part), f"timing_s/{name}" if name in PARTS else "") for name, part in shares
    ]
    return _section("Where a step's time goes", _table(("part", "share", "in VERL's log"), rows) if rows else "")


def _statistics(report: RunReport) -> str:
    rows: list[tuple[str, str]] = []
    for attempt in report.attempts:
        found = attempt.sandboxes
        if not isinstance(found, SandboxStatistics):
            continue
        rows.append(("starts", starts_words(found)))
        rows += [("failed", reasons(found.starts.failed))] if found.starts.failed else []
        rows += [("latency", latency_words(found))] if latency_words(found) else []
        rows.append(("peak", peak_words(found, len(attempt.servers))))
        rows += [("ended", reasons(found.ended))] if found.ended else []
    return _section("Sandboxes", _table(("", "of the API server"), rows, numbers=-1) if rows else "")


def _nodes(report: RunReport) -> str:
    """A table of the nodes of a runtime that has several, and what became of them."""
    inner = ""
    for attempt in report.attempts:
        rows = node_rows(report, attempt)
        inner += f"<h3>Attempt {attempt.number}</h3>\n" if rows and len(report.attempts) > 1 else ""
        inner += _table(COLUMNS, rows, numbers=-1) if rows else ""
        inner += "".join(f"<p>{escape(f'{at} {words}')}</p>\n" for at, words in news_of(attempt)) if rows else ""
    return _section("Nodes", inner)


def _use(report: RunReport) -> str:
    rows = [
        (f"{job.job.kind} job {job.job.job_id}", name, words, source)
        for job in report.jobs
        for name, words, source in use_lines(job)
    ]
    return _section("Use of what the jobs had", _table(("job", "", "use", "source"), rows, numbers=-1) if rows else "")


def _unknown(report: RunReport) -> str:
    lines = "".join(f"<li>{escape(problem)}</li>\n" for problem in report.problems)
    return _section("Not known", f"<ul>\n{lines}</ul>\n" if lines else "")


def _foot(report: RunReport) -> str:
    where = report.view.record.directory
    path = f" from {where.path}" if where else ""
    return f"<footer>{escape(f'Made {moment(report.now)}{path}')}</footer>\n"
