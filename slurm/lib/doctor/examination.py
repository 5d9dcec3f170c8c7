"""The doctor's round: nodes are looked at, messages exchanged with them, connections tried between them.

One loop that sees to all nodes by turns. Each is done when it has reported and all was tried with it, or when it is
certain that this will not be: its job ended, did not start in time, or stays silent. At the end each is called once
more, so that what was found out with a node's help, or without it, is not told of one that had ended meanwhile.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from slurm.lib.coordination import read_if_there
from slurm.lib.doctor.between import UNSEEN_S
from slurm.lib.doctor.containers import reach
from slurm.lib.doctor.exchange import Line, log_file, report_file
from slurm.lib.doctor.facts import Report, from_text
from slurm.lib.doctor.nodes import LOOK_S, Nodes, Wanted, ended_afterwards, not_ended
from slurm.lib.errors import EnvironmentProblem, SuiteError
from slurm.lib.logs import log
from slurm.lib.lookout import answered
from slurm.lib.scheduler import JobState, JobStatus
from slurm.lib.signals import SignalNotes

ECHOES = 3
PAUSE_S = 0.02
STATUS_EVERY_S = 1.0
LATE_REPORT_S = 20.0  # a job that has ended may have reported, and the file not be seen yet
GOODBYE_S = 5.0
HERE = "this host"


@dataclass
class Look:
    """What is known of one node.

    ``problem``: why there is no report, or why not all could be tried; ``waits`` if that is only the queue's.
    ``reached``: name of another look → why its page is not reached from here, empty where it is.
    """

    wanted: Wanted
    line: Line
    job_id: str = ""
    status: JobStatus | None = None
    report: Report | None = None
    problem: str = ""
    waits: bool = False
    is_deaf: bool = False
    reached: dict[str, str] = field(default_factory=dict)
    asked: str = ""
    begun: float = field(default_factory=time.monotonic)
    running_since: float | None = None
    ended_since: float | None = None

    @property
    def host(self) -> str:
        return self.report.host if self.report else ""

    @property
    def has_page(self) -> bool:
        """Whether a container's page is to be had there."""
        boxes = self.report.sandboxes if self.report else None
        return boxes is not None and boxes.port > 0 and not boxes.port_problem and not self.problem

    @property
    def is_settled(self) -> bool:
        """Whether it is known what there will be of a report."""
        return bool(self.problem) or self.report is not None

    @property
    def is_present(self) -> bool:
        """Whether its node answers, as far as was seen."""
        return self.report is not None and not self.problem and not self.is_deaf

    def untried(self, all_of_them: Sequence[Look]) -> list[Look]:
        """The pages on other hosts that this node has still to reach for."""
        pages = [look for look in all_of_them if look.has_page and look.host != self.host]
        return [look for look in pages if look.wanted.name not in self.reached]

    def is_done(self, all_of_them: Sequence[Look]) -> bool:
        """Whether nothing more is to come of it."""
        if self.problem or self.is_deaf:
            return True
        echoed = self.report is not None and len(self.line.echoes) >= ECHOES and not self.line.is_busy
        return echoed and all(look.is_settled for look in all_of_them) and not self.untried(all_of_them)

    def call(self) -> None:
        """Ask once more for a word: a page that was not reached may be that of a job which had ended by then."""
        if self.is_present and not self.line.is_busy:
            self.line.send()


def examine(nodes: Nodes, looks: Sequence[Look], folder: Path, wait_s: float, notes: SignalNotes) -> None:
    """Start a job for each look, and fill the looks in; at the end of it no job is left."""
    job_ids: list[str] = []
    with ended_afterwards(nodes, job_ids):
        for look in looks:
            notes.check()
            _start(nodes, look, job_ids)
        see_to_them = partial(_see_to_them, nodes, looks, folder, wait_s, notes)
        see_to_them(lambda: all(look.is_done(looks) for look in looks))
        _reach_from_here(looks)
        for look in looks:
            look.call()
        see_to_them(lambda: not any(look.is_present and look.line.is_busy for look in looks))
        _say_goodbye(nodes, looks, notes)


def _see_to_them(
    nodes: Nodes, looks: Sequence[Look], folder: Path, wait_s: float, notes: SignalNotes, done: Callable[[], bool]
) -> None:
    """See to one node after the other until all is done."""
    asked = 0.0
    while not done():
        notes.check()
        if time.monotonic() - asked > STATUS_EVERY_S:
            _see_statuses(nodes, looks, notes)
            asked = time.monotonic()
        for look in looks:
            _attend(look, looks, folder, wait_s)
        notes.sleep(PAUSE_S)


def _start(nodes: Nodes, look: Look, job_ids: list[str]) -> None:
    try:
        look.job_id = nodes.start(look.wanted)
    except SuiteError as problem:
        look.problem = str(problem)
        return
    job_ids.append(look.job_id)
    if look.wanted.partition:
        log.info("job %s is to look at a node of %s", look.job_id, look.wanted.place)


def _see_statuses(nodes: Nodes, looks: Sequence[Look], notes: SignalNotes) -> None:
    """Silence of the controller leaves what was known."""
    open_ones = [look for look in looks if look.job_id and not look.problem]
    if not open_ones:
        return
    statuses = answered(lambda: nodes.statuses([look.job_id for look in open_ones]), notes)
    for look in open_ones:
        status = statuses[look.job_id]
        if status.state is not JobState.UNKNOWN or look.status is None:
            look.status = status
        if status.state is JobState.RUNNING and look.running_since is None:
            look.running_since = time.monotonic()
        if status.state.is_final and look.ended_since is None:
            look.ended_since = time.monotonic()


def _attend(look: Look, looks: Sequence[Look], folder: Path, wait_s: float) -> None:
    """The next thing to do for one node."""
    if look.problem or look.is_deaf:
        return
    if look.report is None:
        _await_report(look, folder, wait_s)
        return
    if look.ended_since is not None:
        look.problem = f"job {look.job_id} ended while it was needed ({look.status.words if look.status else ''})"
        return
    _take_answer(look)
    if look.line.waiting_s > UNSEEN_S:
        look.is_deaf = True
    elif not look.line.is_busy:
        _send_next(look, looks)


def _await_report(look: Look, folder: Path, wait_s: float) -> None:
    text = read_if_there(report_file(folder, look.wanted.name))
    if text is not None:
        try:
            look.report = from_text(Report, text)
        except EnvironmentProblem as problem:
            look.problem = str(problem)
        return
    look.problem = why_none(look, last_words(log_file(folder, look.wanted.name)), wait_s, time.monotonic())
    look.waits = bool(look.problem) and look.running_since is None and look.ended_since is None


def why_none(look: Look, words: str, wait_s: float, now: float) -> str:
    """Why there will be no report; empty while there may be one."""
    shown = look.status.words if look.status else "Slurm has not said anything of it"
    if look.ended_since is not None:
        late = now - look.ended_since > (0 if words else LATE_REPORT_S)
        said = f": {words}" if words else "; its log is not to be seen here"
        return f"job {look.job_id} ended without a report ({shown}){said}" if late else ""
    if look.running_since is not None:
        silent = now - look.running_since > LOOK_S
        return f"job {look.job_id} runs ({shown}) and has reported nothing within {LOOK_S} s" if silent else ""
    waited = now - look.begun > wait_s
    return f"job {look.job_id} did not start within {wait_s:g} s ({shown}) and was taken back" if waited else ""


def last_words(path: Path) -> str:
    """The last line of a log that says something."""
    text = read_if_there(path) or ""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")[:400]


def _take_answer(look: Look) -> None:
    known = len(look.line.answers)
    look.line.look()
    if look.asked and len(look.line.answers) > known:
        look.reached[look.asked] = str(look.line.answers[-1].get("reached", "it gave no answer"))
        look.asked = ""


def _send_next(look: Look, looks: Sequence[Look]) -> None:
    """First what is measured, then what is to be reached, then only that the doctor lives."""
    if len(look.line.echoes) < ECHOES:
        look.line.send()
    elif untried := look.untried(looks):
        page = untried[0].report
        assert page and page.sandboxes
        look.asked = untried[0].wanted.name
        look.line.send(host=page.host, port=page.sandboxes.port, token=page.sandboxes.token)
    elif look.line.is_due:
        look.line.send()


def _reach_from_here(looks: Sequence[Look]) -> None:
    """The login node reaches for each page too: the page of a sandbox is looked at from there."""
    for look in looks:
        if look.has_page and look.report and look.report.sandboxes:
            look.reached[HERE] = reach(look.report.host, look.report.sandboxes.port, look.report.sandboxes.token)


def _say_goodbye(nodes: Nodes, looks: Sequence[Look], notes: SignalNotes) -> None:
    """Jobs end in order when they are told; those that do not are cancelled."""
    for look in looks:
        if look.report is not None:
            with contextlib.suppress(EnvironmentProblem):
                look.line.send(end=True)
    told = [look.job_id for look in looks if look.report is not None]
    end = time.monotonic() + GOODBYE_S
    while time.monotonic() < end and answered(lambda: not_ended(nodes, told), notes):
        notes.sleep(STATUS_EVERY_S / 2)
        notes.check()
