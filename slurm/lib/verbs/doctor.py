"""``launch.py doctor``: does this site have what runs need? Looked at here and, by small jobs, on the nodes.

A minute or so where nodes are free. Nothing of it outlives the command: its jobs are cancelled, its folder removed. If
it is killed, its jobs end by themselves, and the next doctor removes the folder.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from slurm.lib.command_line import Parser, say
from slurm.lib.config import LoadedConfig, load_config
from slurm.lib.coordination import write_atomically
from slurm.lib.doctor.examination import Look, examine
from slurm.lib.doctor.exchange import PRIVATE, Line, question_file
from slurm.lib.doctor.facts import Question, to_text
from slurm.lib.doctor.node import look
from slurm.lib.doctor.nodes import Command, Nodes, OwnHost, SlurmNodes, Wanted, wanted_nodes
from slurm.lib.doctor.report import as_json, as_text, counted
from slurm.lib.doctor.sections import between_section, login_verdicts, node_section
from slurm.lib.doctor.slurm_verdicts import ask, slurm_verdicts
from slurm.lib.doctor.verdict import Health, Section, Verdict
from slurm.lib.errors import EXIT_ENVIRONMENT, EXIT_OK, EnvironmentProblem, UsageError
from slurm.lib.interpreter import mark
from slurm.lib.job_environment import without_slurm
from slurm.lib.logs import log, wants_colour
from slurm.lib.lookout import answered
from slurm.lib.plan import split_environment
from slurm.lib.preflight.places import user_name
from slurm.lib.scheduler import Slurm
from slurm.lib.secrets import secret_values
from slurm.lib.settings import Settings
from slurm.lib.signals import SignalNotes
from slurm.lib.trainer import agent_folder
from slurm.lib.verbs.launch import CHECKOUT, interpreter

WAIT_S = 120.0
OLD_S = 3600.0  # no doctor takes so long: what is older is a killed one's
EPILOG = """\
exit codes: 0 nothing fails (there may be warnings); 2 the command line or the configuration is wrong; 71 something
fails; 128+N stopped by signal N, and the jobs are cancelled.
"""


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="launch.py doctor",
        description="Has this site what runs need? Looked at here and, by a small job on each partition, on the nodes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--config", metavar="NAME|PATH", help="whose partitions and folders; default: the keys' defaults")
    made.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="one key; wins over the file")
    made.add_argument(
        "--wait", metavar="S", type=float, default=WAIT_S, help="seconds in the queue at most (%(default)g)"
    )
    made.add_argument("--json", action="store_true", help="print verdicts as JSON")
    made.add_argument("--debug", action="store_true", help="log more")
    return made


def main(argv: Sequence[str], notes: SignalNotes) -> int:
    """Run the verb; returns its exit code."""
    arguments = parser().parse_args(argv)
    if not 0 < arguments.wait <= OLD_S / 2:
        raise UsageError(f"--wait {arguments.wait:g}: must be more than 0 and at most {OLD_S / 2:g} seconds")
    environment = without_slurm(os.environ)
    config = load_config(
        arguments.config, arguments.set, environment, CHECKOUT / "slurm" / "config", datetime.now(), CHECKOUT.parent
    )
    sections = examined(Doctor(config, environment, arguments.wait), notes)
    columns = shutil.get_terminal_size().columns if wants_colour(sys.stdout) else None
    if not say(as_json(sections) if arguments.json else as_text(sections, columns)):
        return EXIT_ENVIRONMENT
    return EXIT_ENVIRONMENT if counted(sections)[Health.FAIL] else EXIT_OK


@dataclass(frozen=True)
class Doctor:
    """What an examination is made with."""

    config: LoadedConfig
    environment: Mapping[str, str]
    wait_s: float

    @property
    def settings(self) -> Settings:
        return self.config.settings

    @property
    def share(self) -> Path:
        return self.settings.skyrl_jobs_base

    @property
    def open_environment(self) -> dict[str, str]:
        """What the nodes find in their environment: no secret."""
        said = {**self.environment, **self.config.exported}
        values = secret_values(said) | secret_values(self.settings.as_environment())
        return split_environment(said, values)[0]

    def question(self, wanted: Wanted | None = None) -> Question:
        """What a node is asked, or this host where none is named."""
        settings, here = self.settings, wanted is not None and wanted.kind == "local"
        trainer = wanted is not None and (here or wanted.kind == "training")
        written = {"CHECKPOINT_DIR": settings.checkpoint_dir, "ROLLOUT_DIR": settings.rollout_dir} if trainer else {}
        return Question(
            sandboxes=wanted is not None and (here or wanted.kind == "runtime"),
            trainer=trainer,
            gpus=trainer and settings.gpus_per_node > 0,
            share=str(self.share),
            base=str(self.share),
            local_scratch=str(settings.local_scratch or ""),
            cuda_modules=settings.cuda_modules,
            agent=str(agent_folder(settings)),
            folders={key: str(path) for key, path in written.items() if path is not None},
        )


def examined(doctor: Doctor, notes: SignalNotes) -> list[Section]:
    """All verdicts, by place. Where Slurm or the shared directory fails here, no node is looked at."""
    settings = doctor.settings
    on_slurm = settings.skyrl_backend == "slurm"
    slurm = Slurm(doctor.open_environment)
    here: list[Verdict] = []
    if on_slurm:
        facts = answered(lambda: ask(slurm, user_name()), notes)
        here += slurm_verdicts(facts, settings)
    blocked = any(verdict.health is Health.FAIL and verdict.check == "slurm" for verdict in here)
    with examination_folder(doctor.share) as folder:
        here += login_verdicts(look(doctor.question(), doctor.open_environment), doctor.share) if on_slurm else ()
        looks = [] if blocked else looked_at(doctor, slurm, folder, notes)
    nodes = [node_section(each, settings, mark()) for each in looks]
    login = [Section(f"{os.uname().nodename} (this host)", tuple(here))] if here else []
    return [*login, *nodes, *between_section(looks)]


def looked_at(doctor: Doctor, slurm: Slurm, folder: Path, notes: SignalNotes) -> list[Look]:
    """The nodes, looked at."""
    command = Command(interpreter(), CHECKOUT, folder)
    looks = []
    for wanted in wanted_nodes(doctor.settings):
        write_atomically(question_file(folder, wanted.name), to_text(doctor.question(wanted)), PRIVATE)
        looks.append(Look(wanted, Line(folder, wanted.name)))
    nodes: Nodes
    if doctor.settings.skyrl_backend == "local":
        nodes = OwnHost(command, doctor.open_environment)
    else:
        nodes = SlurmNodes(slurm, doctor.settings, command, doctor.wait_s)
        log.info("small jobs look at the nodes; each waits at most %g s in the queue (--wait)", doctor.wait_s)
    examine(nodes, looks, folder, doctor.wait_s, notes)
    return looks


@contextlib.contextmanager
def examination_folder(share: Path) -> Iterator[Path]:
    """A folder of this examination on shared storage; those that killed doctors left go."""
    home = share / ".cache" / "doctor"
    try:
        home.mkdir(parents=True, exist_ok=True)
        _sweep(home)
        folder = Path(tempfile.mkdtemp(dir=home))
    except OSError as problem:
        sentence = f"SKYRL_JOBS_BASE={share}: cannot make a folder in {home}: {problem.strerror}"
        raise EnvironmentProblem(f"{sentence}; set it to a folder of yours that all nodes share") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another examination's folder is there
            home.rmdir()


def _sweep(home: Path) -> None:
    for entry in home.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - entry.stat().st_mtime > OLD_S:
                shutil.rmtree(entry, ignore_errors=True)
