"""What did each node of a runtime on several nodes do: rows of a table, for the text and for the page?"""

from __future__ import annotations

import math
import time

from slurm.lib.observe.run_report import AttemptReport, JobReport, RunReport, figure
from slurm.lib.observe.run_view import Stage
from slurm.lib.observe.sandbox_statistics import SandboxStatistics
from slurm.lib.observe.timeline import QUEUE
from slurm.lib.reports.report_words import gib, length, share, whole
from slurm.lib.reports.run_words import shortened

COLUMNS = ("node", "job", "served", "starts", "failed", "median", "99 %", "at once", "slots", "CPU", "memory", "end")
ALL = "all nodes"
MOST_NEWS = 20
TOGETHER_S = 15.0  # workers that leave so long before their runtime job stops end with it
LONGEST = 100  # characters of a sentence in a row


def node_rows(report: RunReport, attempt: AttemptReport) -> list[tuple[str, ...]]:
    """A row for each node that has run, and last one for all of them; none where the runtime has one node.

    Of all, quantiles are those of all starts, and what was alive at once is the sum of the nodes' peaks: no more than
    that was.
    """
    if not attempt.workers:
        return []
    rows = [_row(report, job) for job in attempt.servers]
    found = attempt.sandboxes
    figures = _figures(found) if isinstance(found, SandboxStatistics) else ("",) * 6
    return [*rows, (ALL, "", "", *figures, "", "", "")] if rows else []


def _row(report: RunReport, job: JobReport) -> tuple[str, ...]:
    found = job.sandboxes
    figures = _figures(found) if isinstance(found, SandboxStatistics) else ("unknown", *("",) * 5)
    return (job.job.node or "?", job.job.job_id, _served(report, job), *figures, *_use(job), _end(job))


def _figures(found: SandboxStatistics) -> tuple[str, ...]:
    seconds = found.start_seconds
    quantiles = (length(value) if value is not None else "" for value in (seconds.p50, seconds.p99))
    slots = "" if found.slots is None else str(found.slots)
    failed = str(sum(found.starts.failed.values()))
    return (str(found.starts.asked), failed, *quantiles, str(found.peak_living), slots)


def _use(job: JobReport) -> tuple[str, str]:
    cpu = figure(job.usages, lambda usage: usage.cpu_share)
    memory = figure(job.usages, lambda usage: usage.memory_peak_bytes)
    return share(cpu[0]) if cpu else "", gib(memory[0]) if memory else ""


def _served(report: RunReport, job: JobReport) -> str:
    """How long its API server served."""
    spans = [span.seconds(report.now) for span in job.spans if span.words == "serving"]
    return whole(sum(spans)) if spans else ""


def _end(job: JobReport) -> str:
    return shortened(job.job.end_reason, LONGEST) if job.job.kind == "worker" and job.job.stage is Stage.ENDED else ""


def news_of(attempt: AttemptReport) -> list[tuple[str, str]]:
    """What the head said of its nodes, but for their joining and the end of all: when, and what; the last ones."""
    runtime = attempt.job("runtime")
    spans, told = (runtime.spans, runtime.nodes) if runtime else ((), ())
    end = next((span.begin for span in spans if span.words == "stopping"), math.inf)
    said = [mark for mark in told if " joins " not in mark.words and mark.at < end - TOGETHER_S]
    return [(time.strftime("%H:%M:%S", time.localtime(mark.at)), mark.words) for mark in said[-MOST_NEWS:]]


def worker_lines(report: RunReport, attempt: AttemptReport) -> list[tuple[str, str]]:
    """How long each worker waited in the queue, and needed until it served; a label and words."""
    return [(job.job.job_id, _way_in(report, job)) for job in attempt.workers if job.started is not None]


def _way_in(report: RunReport, job: JobReport) -> str:
    before = [span for span in job.spans if span.words not in {QUEUE, "serving", "stopping"}]
    serves = next((span.begin for span in job.spans if span.words == "serving"), None)
    queue = job.queue_s(report.now)
    words = [f"{whole(queue)} in the queue"] if queue is not None else []
    if serves is not None and job.started is not None:
        words.append(f"joined {whole(max(0.0, serves - job.started))} after its start")
    elif before:
        words.append(f"did not join: {before[-1].words}")
    return ", ".join([f"on {job.job.node}" if job.job.node else "", *words]).removeprefix(", ")
