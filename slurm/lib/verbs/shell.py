"""``launch.py shell``: a shell, or a command, in a running sandbox of a run or on the node of one of its jobs.

On Slurm it is a step of the job, beside those that run: it takes nothing from them, and ends with the job.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from slurm.lib.command_line import Parser
from slurm.lib.coordination import host_name
from slurm.lib.errors import EnvironmentProblem, NotRunning, UsageError
from slurm.lib.job_environment import without_slurm
from slurm.lib.logs import log
from slurm.lib.observe import nodes, whereabouts
from slurm.lib.observe.job_log import node_in
from slurm.lib.observe.run_files import key_of, log_ends
from slurm.lib.observe.run_view import JobView, RunView, Stage
from slurm.lib.observe.survey import Survey
from slurm.lib.observe.unknown import Unknown
from slurm.lib.processes import attached
from slurm.lib.reports.run_words import job_words
from slurm.lib.runs import RunJob
from slurm.lib.scheduler import Slurm, shell_argv
from slurm.lib.signals import SignalNotes
from slurm.lib.verbs.named import HELP, is_worker, named, worker_name

GROUPS = {"training": 0, "runtime": 1}  # of a heterogeneous job's components
# What srun says of each step that ends with another code than 0; the code says it too.
_EXIT_LINE = re.compile(rb"srun: error: \S+: task \d+: (Exited with exit code \d+|Hangup|Terminated|Killed)\r?\n")
_BEGINNING = b"srun: error: "
EPILOG = """\
exit codes: that of the shell or the command; 2 the command line is wrong, there is no such run, or no such sandbox (the
message lists those that live); 69 the job does not run, or no sandbox lives; 71 this host has no Slurm commands, or it
is a local run of another host; 128+N ended by signal N.
"""


def build_parser() -> Parser:
    parser = Parser(
        prog="launch.py shell",
        description="A shell in a running sandbox, or without SANDBOX on the node of the training job (of the runtime "
        "job where that one does not run). It ends with the job.",
        epilog=EPILOG,
        usage="%(prog)s [OPTION…] RUN [SANDBOX] [-- COMMAND…]",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help=HELP)
    ids = "session id, runtime id or container of a living sandbox, or the beginning of one"
    parser.add_argument("sandbox", metavar="SANDBOX", nargs="?", help=ids)
    parser.add_argument("command", metavar="COMMAND", nargs="*", help="after --: this in place of a shell")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--training", action="store_const", const="training", dest="kind", help="on its node")
    kinds.add_argument(
        "--runtime", action="store_const", const="runtime", dest="kind", help="on its node; podman shows its sandboxes"
    )
    kinds.add_argument("--worker", metavar="N", type=worker_name, help="on that of the runtime's worker N")
    parser.add_argument("--node", metavar="NODE", default="", help="on this one of the job's nodes; default: the first")
    parser.add_argument("--debug", action="store_true", help="log more")
    parser.add_argument("--in-job", metavar="ID", help=argparse.SUPPRESS)  # on the job's node already
    return parser


def main(argv: Sequence[str], notes: SignalNotes) -> int:
    """The verb; returns the exit code of the shell, or of the command."""
    arguments, command = parsed(argv)
    if arguments.in_job:
        from slurm.lib.node_shell import enter

        return enter(arguments.in_job, arguments.sandbox, command, notes)
    if arguments.sandbox is not None and (arguments.kind == "training" or arguments.node):
        raise UsageError("SANDBOX goes with neither --training nor --node: sandboxes live on the runtime's nodes")
    slurm = Slurm(without_slurm(os.environ))
    survey = Survey(slurm, notes)
    (run,) = named([arguments.run], slurm)
    (view,) = survey.look([run], servers=False)
    worker = arguments.worker or ""
    if arguments.sandbox is not None and view.record.nodes > 1 and not worker and arguments.kind is None:
        worker = worker_with(view, arguments.sandbox)
    job = wanted_job(view, "runtime" if arguments.sandbox is not None else arguments.kind, worker)
    if RunJob(job.kind, job.job_id).is_local:
        return here(view, job, arguments.sandbox, command, notes)
    return as_step(view, job, arguments, command, notes, slurm)


def parsed(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and the command after ``--``."""
    words, dashes, command = list(argv), "--" in argv, []
    if dashes:
        at = words.index("--")
        words, command = words[:at], words[at + 1 :]
    arguments = build_parser().parse_args(words)
    if arguments.command:
        raise UsageError(f"{arguments.command[0]!r}: write -- before the command, as in: shell RUN SANDBOX -- ls -l")
    if dashes and not command:
        raise UsageError("there is no command after --")
    return arguments, command


def worker_with(view: RunView, sandbox: str) -> str:
    """The worker on whose node a sandbox lives; empty for the runtime job itself."""
    directory = view.record.directory
    url = directory.read_url() if directory else None
    if directory is None or url is None:
        raise NotRunning(f"the API server of {view.record.name} is not ready: launch.py status tells how far it is")
    key = key_of(directory)
    found = nodes.ask(url, key, whereabouts.ASK_S)
    if isinstance(found, Unknown):
        raise EnvironmentProblem(
            f"{found.why}, so on which node {sandbox} lives is not known: add --runtime or --worker N"
        )
    node = whereabouts.chosen(*whereabouts.sandboxes_of(found.nodes, key), sandbox)
    return node.job if view.pair and any(worker.job_id == node.job for worker in view.pair.workers) else ""


def wanted_job(view: RunView, kind: str | None, worker: str = "") -> JobView:
    """The job of the run that is meant; ``NotRunning`` with how it is, where it does not run."""
    jobs = view.pair.jobs if view.pair else ()
    candidates = [job for job in jobs if kind in {None, job.kind}]
    if worker:
        kind = f"worker {worker}"
        candidates = [one for one in (view.pair.workers if view.pair else ()) if is_worker(one.job_id, worker)]
    if not candidates:
        raise NotRunning(f"{view.record.name} has no {kind or ''} job".replace("  ", " "))
    running = next((job for job in candidates if job.stage is Stage.RUNNING and job.word != "COMPLETING"), None)
    found = running or next((job for job in candidates if job.stage is Stage.UNKNOWN), None)
    if found is None:
        words = "; ".join(f"{job.kind} job {job.job_id}: {job_words(job, time.time())}" for job in candidates)
        raise NotRunning(f"{view.record.name} ({view.state.value}) has no node to go to: {words}")
    return found


def here(view: RunView, job: JobView, sandbox: str | None, command: Sequence[str], notes: SignalNotes) -> int:
    """For a local run: at once, on this host."""
    if view.record.host not in {"", host_name()}:
        raise EnvironmentProblem(f"{view.record.name} is a local run on {view.record.host}: go there for a shell")
    from slurm.lib.node_shell import enter

    return enter(job.job_id, sandbox, command, notes)


def as_step(
    view: RunView,
    job: JobView,
    arguments: argparse.Namespace,
    command: Sequence[str],
    notes: SignalNotes,
    slurm: Slurm,
) -> int:
    """As a step of the job."""
    if not slurm.is_here:
        raise EnvironmentProblem("this host has no Slurm commands (srun): use a login node of the cluster")
    if job.kind == "worker":
        return on_worker(view, job, arguments, command, notes, slurm)
    if arguments.node and job.node and arguments.node not in (nodes := slurm.hostnames(job.node)):
        raise UsageError(f"--node {arguments.node}: the {job.kind} job {job.job_id} runs on {', '.join(nodes)}")
    if job.stage is Stage.UNKNOWN:
        log.warning("%s job %s: %s; trying it all the same", job.kind, job.job_id, job.why_unknown)
    leader = view.pair.job("training") if view.pair and view.record.pairing == "het" else None
    number, group = (leader or job).job_id, GROUPS[job.kind] if leader else None
    return _attached(view, job, Place(number, group, arguments.node), arguments, command, notes, slurm)


@dataclass(frozen=True)
class Place:
    """Where a step runs: Slurm's number of the job, a heterogeneous one's component, the node where one is said."""

    number: str
    group: int | None = None
    node: str = ""


def on_worker(
    view: RunView,
    job: JobView,
    arguments: argparse.Namespace,
    command: Sequence[str],
    notes: SignalNotes,
    slurm: Slurm,
) -> int:
    """As a step beside a worker: of its task, which srun takes by Slurm's own number alone, or of the runtime job."""
    if arguments.node:
        raise UsageError("--worker says the node: leave --node out")
    assert view.record.directory
    number, node = job.number, ""
    if not job.array:
        number, out = job.job_id.rpartition("_")[0], log_ends(view.record.directory.log("worker", job.job_id, "out"))
        node = "" if isinstance(out, Unknown) else node_in(out.head)
    if not number or not (job.array or node):
        raise EnvironmentProblem(f"where the worker {job.job_id} runs is not known: Slurm, or its log, does not say it")
    return _attached(view, job, Place(number, None, node), arguments, command, notes, slurm)


def _attached(
    view: RunView,
    job: JobView,
    place: Place,
    arguments: argparse.Namespace,
    command: Sequence[str],
    notes: SignalNotes,
    slurm: Slurm,
) -> int:
    from slurm.lib.verbs.launch import CHECKOUT, interpreter

    inner = [interpreter(), str(CHECKOUT / "slurm" / "launch.py"), "shell", "--in-job", job.job_id]
    inner += ["--debug"] if arguments.debug else []
    inner += [view.record.name, *([] if arguments.sandbox is None else [arguments.sandbox])]
    inner += ["--", *command] if command else []
    terminal = os.isatty(0) and os.isatty(1)
    assert view.record.directory
    step = shell_argv(
        place.number,
        place.group,
        node=place.node,
        cwd=view.record.directory.path,
        terminal=terminal,
        command=inner,
    )
    if terminal:
        log.info("%s job %s on %s; the shell ends with the job", job.kind, job.job_id, place.node or job.node)
    return attached(step, slurm.environment, notes, on_stderr=without_exit_lines)


def without_exit_lines(source: IO[bytes]) -> None:
    """Copy stderr as it comes, but for srun's lines about the exit code."""
    held = b""
    with source:
        while data := os.read(source.fileno(), 1 << 16):
            shown, held = split_exit_lines(held + data)
            _write(shown)
    _write(_EXIT_LINE.sub(b"", held))


def split_exit_lines(data: bytes) -> tuple[bytes, bytes]:
    """What of it can be shown now, and what may be, or become, such a line."""
    data = _EXIT_LINE.sub(b"", data)
    last = data.rpartition(b"\n")[2]
    may_become = bool(last) and (last.startswith(_BEGINNING) or _BEGINNING.startswith(last))
    return (data[: len(data) - len(last)], last) if may_become else (data, b"")


def _write(data: bytes) -> None:
    try:
        while data:
            data = data[os.write(sys.stderr.fileno(), data) :]
    except OSError:  # the terminal has gone
        return
