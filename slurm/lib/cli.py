"""The command line of launch.py: which verb is meant, and the options of a launch, which has none.

What a verb needs is imported when it is called: the start of Python and ``--help`` are felt.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
from collections.abc import Mapping, Sequence

from slurm.lib.command_line import Parser
from slurm.lib.edge import exit_code_of
from slurm.lib.errors import UsageError
from slurm.lib.logs import setup_command_logging
from slurm.lib.signals import SignalNotes

VERSION = "0.1.0"
EPILOG = """\
verbs, each with its own --help:
  cancel RUN…      end runs, within 15 s; --all: all that live; --after-checkpoint: each once it has saved
  clean            remove the directories of old runs, but no checkpoint
  completion SHELL print what makes bash, zsh or fish complete all this
  doctor           look at the site: this node, the compute nodes, the shared directory
  list             list runs
  logs RUN         show the logs of a run's jobs by time; -f: until it has ended
  open RUN         tell how to look at a run's sandbox page, also from your laptop
  shell RUN […]    open a shell in a sandbox, or on a job's node
  report RUN       what a run was like: times, steps, sandboxes, use; --html FILE: with plots
  status [RUN…]    show how runs are; --watch: again and again
  wait RUN         wait until a run has ended, and end with its trainer's exit code
RUN is a run's directory, the beginning of its name, the id of any of its jobs, or latest.

exit codes: 0 submitted, or for a local run the trainer's code; 2 the command line or the configuration is wrong,
or a check found an error (also with --check); 69 the partner job is gone; 70 a fault of this suite; 71 something is
missing on this machine; 73 Slurm did not take the jobs, or did not answer (the message names what may be left); 74 a
node of the training job was lost; 75 a deadline passed; 76 a restart did not begin; 128+N ended by signal N.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch.py",
        description="Launch a training run: a runtime job with sandboxes and a training job that waits for it.",
        usage="%(prog)s --config NAME|PATH [OPTION…]\n       %(prog)s VERB …   (below)",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="NAME|PATH", help="slurm/config/NAME.conf, or a path (required)")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="one key; wins over the file")
    parser.add_argument("--check", action="store_true", help="run the checks before submission alone; 2: errors found")
    parser.add_argument("--json", action="store_true", help="with --check: findings as JSON")
    parser.add_argument(
        "--no-check", metavar="NAME,…", action="append", nargs="?", help="leave out all checks, or these"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would happen; touch nothing")
    parser.add_argument("--runtime-only", action="store_true", help="submit only the runtime job")
    parser.add_argument(
        "--skip-runtime", action="store_true", help="submit only the training job, for a runtime that runs"
    )
    parser.add_argument("--runtime-url", metavar="URL", help="that runtime's address (implies --skip-runtime)")
    parser.add_argument("--api-key-file", metavar="FILE", help="file with that runtime's key")
    parser.add_argument("--api-key", metavar="KEY", help="the key itself; argv is public, prefer --api-key-file")
    parser.add_argument("--debug", action="store_true", help="log more (SKYRL_DEBUG=1)")
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    return parser


def _launch(argv: Sequence[str], notes: SignalNotes) -> int:
    parser = build_parser()
    if {"--help", "-h", "--version"} & set(argv):
        with contextlib.suppress(UsageError):  # which is answered below
            parser.parse_args(argv)
    from slurm.lib.verbs import launch

    return launch.main(argv, notes, parser)


# What comes before everything else on the command line, and the module of each; without a verb it is a launch.
VERBS: Mapping[str, str] = {
    "cancel": "slurm.lib.verbs.cancel",
    "clean": "slurm.lib.verbs.clean",
    "completion": "slurm.lib.verbs.completion",
    "doctor": "slurm.lib.verbs.doctor",
    "list": "slurm.lib.verbs.list_runs",
    "logs": "slurm.lib.verbs.logs",
    "open": "slurm.lib.verbs.open_page",
    "shell": "slurm.lib.verbs.shell",
    "report": "slurm.lib.verbs.report",
    "status": "slurm.lib.verbs.status",
    "wait": "slurm.lib.verbs.wait",
}

END_WITH_US = frozenset({"open", "shell"})  # what they begin ends with them
ONLY_LOOK = frozenset({"list", "status"})  # they leave nothing that would have to be tidied up at the process's end


def _verb(name: str, argv: Sequence[str], notes: SignalNotes) -> int:
    code: int = importlib.import_module(VERBS[name]).main(argv, notes)
    return code


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    if "_ARGCOMPLETE" in os.environ:  # a shell asks how the line could go on
        from slurm.lib.verbs.completion import complete

        complete()
    setup_command_logging("--debug" in argv)
    if argv and argv[0] in VERBS:
        goes_on = "" if argv[0] in END_WITH_US else "; what was begun goes on"
        return exit_code_of(lambda notes: _verb(argv[0], argv[1:], notes), f"stopped by %s{goes_on}")
    stopped = "stopped by %s; nothing was submitted, or it was taken back"
    return exit_code_of(lambda notes: _launch(argv, notes), stopped)
