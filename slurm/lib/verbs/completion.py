"""``launch.py completion``: what a shell is told so that TAB completes verbs, options, configurations, runs, sandboxes.

By argcomplete: the shell starts launch.py with the line so far, which answers from the parsers that the verbs have, and
from what there is at that moment. It is always the launch.py that was registered: one of this name that lies in some
folder is not started by a TAB, only its ``config`` folder is read.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from slurm.lib.command_line import Parser, say
from slurm.lib.errors import EXIT_ENVIRONMENT, EXIT_OK, EnvironmentProblem
from slurm.lib.signals import SignalNotes

SCRIPT = Path(__file__).resolve().parent.parent.parent / "launch.py"
SHELLS = ("bash", "zsh", "fish")
MOST_RUNS = 100  # offered, the newest first
SERVER_S = 0.5  # a person waits at a TAB
# By the name of a key's parser: what it can be.
CHOICES = {
    "backend": ("slurm", "local"),
    "boolean": ("true", "false"),
    "network_word": ("private", "deny"),
    "pairing_word": ("jobs", "het"),
    "pinning_word": ("docker_cpuset", "taskset", "none"),
    "runtime_mode_word": ("array", "allocation"),
    "ray_word": ("auto", "on", "off"),
    "start_word": ("fork", "exec"),
    "switch": ("1", "0"),
}
EPILOG = """\
bash:  echo 'source <(PATH/TO/slurm/launch.py completion bash)' >>~/.bashrc
zsh:   echo 'source <(PATH/TO/slurm/launch.py completion zsh)' >>~/.zshrc     (after compinit)
fish:  PATH/TO/slurm/launch.py completion fish >~/.config/fish/completions/launch.py.fish

exit codes: 0 printed; 2 there is no such shell; 71 the environment lacks argcomplete.
"""


def build_parser() -> Parser:
    parser = Parser(
        prog="launch.py completion",
        description="Print what makes a shell complete launch.py, by whatever path it is called.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help="bash, zsh or fish")
    return parser


def main(argv: Sequence[str], notes: SignalNotes) -> int:
    """The verb; returns its exit code."""
    arguments = build_parser().parse_args(argv)
    return EXIT_OK if say(code_for(arguments.shell)) else EXIT_ENVIRONMENT


def code_for(shell: str, script: Path = SCRIPT) -> str:
    """The shell's code, under names of our own: a person may have argcomplete's for other programs."""
    try:
        from argcomplete.shell_integration import shellcode
    except ModuleNotFoundError:
        raise EnvironmentProblem("the environment lacks argcomplete; scripts/setup brings it") from None
    if shell == "fish":
        quoted = _fish_quoted(str(script))
        code = shellcode([script.name], shell="fish", argcomplete_script=quoted)  # noqa: S604  no subprocess
    else:
        code = shellcode([script.name]).replace("_python_argcomplete", "_skyrl_launch")
        code = code.replace('local script=""', f"local script={shlex.quote(str(script))}")
    return f"# Completion of launch.py, for {shell}; made by: launch.py completion {shell}\n{code.strip()}\n"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


# --- at a TAB ---------------------------------------------------------------------------------------------------------


def complete() -> NoReturn:
    """Answer the shell, which has put the line into the environment, and end."""
    try:
        import argcomplete
        from argcomplete.completers import SuppressCompleter
        from argcomplete.lexers import split_line
    except ModuleNotFoundError:
        sys.exit(EXIT_ENVIRONMENT)
    words = split_line(os.environ.get("COMP_LINE", ""), int(os.environ.get("COMP_POINT", "0")))[3]
    argcomplete.autocomplete(
        parser_of(words),
        default_completer=SuppressCompleter(),
        always_complete_options="long" if len(words) == 1 else False,
        exit_method=os._exit,
    )
    sys.exit(EXIT_OK)


def parser_of(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for a line whose words before the cursor are these, the first of them the program."""
    from slurm.lib import cli

    if len(words) > 1 and words[1] in cli.VERBS:
        parser: argparse.ArgumentParser = Parser(prog="launch.py")
        of_verb = with_completers(verb_parser(words[1]), words[0])
        parser.add_subparsers().add_parser(words[1], parents=[of_verb], add_help=False)
        return parser
    parser = with_completers(cli.build_parser(), words[0] if words else "")
    if len(words) == 1:
        parser.add_argument("verb", nargs="?", choices=sorted(cli.VERBS))
    return parser


def verb_parser(name: str) -> argparse.ArgumentParser:
    """The parser of a verb, as its module makes it."""
    from slurm.lib import cli

    module = importlib.import_module(cli.VERBS[name])
    make: Callable[[], argparse.ArgumentParser] = getattr(module, "build_parser", None) or module.parser
    return make()


def with_completers(parser: argparse.ArgumentParser, program: str) -> argparse.ArgumentParser:
    """The parser, each of whose arguments knows what it can be, by its name in the help."""
    known: Mapping[str, object] = {
        "RUN": run_names,
        "NAME|PATH": lambda prefix, **_more: config_names(prefix, program),
        "KEY=VALUE": keys,
        "SANDBOX": sandbox_names,
        "N": worker_numbers,
        "FILE": lambda prefix, **_more: paths(prefix),
        "DIR": lambda prefix, **_more: paths(prefix, only_folders=True),
    }
    for action in parser._actions:
        if isinstance(action.metavar, str) and action.metavar in known:
            action.completer = known[action.metavar]  # type: ignore[attr-defined]  # argcomplete reads it there
    return parser


def config_names(prefix: str, program: str) -> Iterable[str]:
    """The names in the ``config`` folder of the launch.py that is being typed, else of ours; or files."""
    if "/" in prefix or prefix.startswith((".", "~")):
        return paths(prefix, ".conf")
    typed = Path(program).expanduser().parent / "config"
    folder = typed if typed.is_dir() else SCRIPT.parent / "config"
    return sorted(path.stem for path in folder.glob("*.conf"))


def paths(prefix: str, suffix: str = "", *, only_folders: bool = False) -> list[str]:
    """What there is that begins so: folders, and files that end in ``suffix``.

    Not by argcomplete's completers, which ask a shell: it reads a name that it may not understand, such as ``$(…)``.
    """
    typed, slash, beginning = prefix.rpartition("/")
    folder = os.path.expanduser(typed + slash) or "."  # noqa: PTH111  Path.expanduser raises for an unknown user
    with contextlib.suppress(OSError, ValueError), os.scandir(folder) as entries:
        found = [
            typed + slash + entry.name + ("/" if entry.is_dir() else "")
            for entry in entries
            if entry.name.startswith(beginning) and (beginning or not entry.name.startswith("."))
            if entry.is_dir() or (entry.name.endswith(suffix) and not only_folders)
        ]
        return sorted(found)
    return []


def run_names(prefix: str, **_more: object) -> Iterable[str]:
    """``latest``, and this user's runs below SKYRL_JOBS_BASE, the newest first; or directories."""
    if "/" in prefix or prefix.startswith((".", "~")):
        return paths(prefix, only_folders=True)
    from slurm.lib.coordination import jobs_base
    from slurm.lib.verbs.named import runs_below

    return ["latest", *(run.name for run in runs_below(jobs_base(os.environ))[:MOST_RUNS])]


def keys(prefix: str, **_more: object) -> Iterable[str]:
    """The keys of a configuration with ``=``, and what one can be that is a choice."""
    from slurm.lib.settings import KEYS

    name, equals, _value = prefix.partition("=")
    if not equals:
        return [f"{key}=" for key in KEYS]
    key = KEYS.get(name)
    return [f"{name}={word}" for word in CHOICES.get(key.parse.__name__, ())] if key else []


def worker_numbers(prefix: str, parsed_args: argparse.Namespace, action: argparse.Action, **_more: object) -> list[str]:
    """The numbers of the workers of the run before ``--worker``, as its record has them."""
    if action.option_strings != ["--worker"] or not getattr(parsed_args, "run", None):
        return []
    from slurm.lib.coordination import jobs_base
    from slurm.lib.runs import find
    from slurm.lib.scheduler import Slurm

    jobs = find(str(parsed_args.run), jobs_base(os.environ), Slurm(), SERVER_S).jobs()
    return [job.job_id.rpartition("_")[2] for job in jobs if job.kind == "worker"]


def sandbox_names(prefix: str, parsed_args: argparse.Namespace, **_more: object) -> Iterable[str]:
    """The living sandboxes of the run before it, by the word of its API server."""
    from slurm.lib.coordination import jobs_base
    from slurm.lib.runs import find
    from slurm.lib.runtime_client import RuntimeClient
    from slurm.lib.scheduler import Slurm

    directory = find(str(parsed_args.run), jobs_base(os.environ), Slurm(), SERVER_S).directory
    url = directory.read_url() if directory else None
    if directory is None or url is None:
        return []
    body = RuntimeClient(url, directory.read_key()).ask("GET", "/list", SERVER_S).body
    listed = body.get("runtimes") if isinstance(body, dict) else None
    return [str(one.get("session_id")) for one in listed or [] if isinstance(one, dict)]
