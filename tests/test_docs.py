"""Do the documents still say what the code does?

Some tables are made from the code itself; ``python -m tests.test_docs`` writes them anew. The rest is compared:
options, exit codes, status codes, fields, metrics, helpers, routes, files of a run, links.
"""

from __future__ import annotations

import ast
import functools
import importlib
import itertools
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest

import shell_rl.errors
import slurm.lib.errors
import slurm_runtime
import slurm_runtime.agent.__main__
import slurm_runtime.api_server
import slurm_runtime.prebuild_images
from slurm.lib import cli, common
from slurm.lib.coordination import CoordinationDir
from slurm.lib.notice import NOTICE_FIELDS
from slurm.lib.observe.log_merge import Origin
from slurm.lib.observe.record import read_record
from slurm.lib.observe.run_report import read_report
from slurm.lib.observe.run_view import RunState, RunView
from slurm.lib.observe.steps import Step
from slurm.lib.observe.survey import with_logs, without_logs
from slurm.lib.preflight.checks import CHECKS
from slurm.lib.reports.run_words import run_dict
from slurm.lib.scheduler import Slurm
from slurm.lib.settings import KEYS, Key, said
from slurm.lib.signals import SignalNotes
from slurm.lib.verbs.completion import verb_parser
from slurm.lib.verbs.logs import line_dict
from slurm.lib.verbs.report_json import report_dict, step_dict
from slurm.lib.verl_command import ROWS
from slurm_runtime.app import create_app
from slurm_runtime.config import ServerConfig
from slurm_runtime.head.app import Head
from slurm_runtime.head.app import create_app as create_head_app
from slurm_runtime.head.config import HeadConfig
from slurm_runtime.head.metrics import Figures
from slurm_runtime.head.metrics import exposition as head_exposition
from slurm_runtime.heartbeats import Heartbeats
from slurm_runtime.metrics import Traffic, exposition
from slurm_runtime.models import FIELDS_WITHOUT_EFFECT, RuntimeAnswer, StartRequest
from slurm_runtime.openapi import MEANINGS
from slurm_runtime.page import HeadRow, Snapshot
from slurm_runtime.steps import STEPS, StepTimes
from tests.doc_blocks import all_blocks, exceptions
from tests.faults import CASES, measured
from tests.observed_runs import folder_of

ROOT = Path(__file__).resolve().parent.parent
README, LAUNCHER = ROOT / "README.md", ROOT / "slurm" / "README.md"
CONFIGURATION, ARCHITECTURE = ROOT / "docs" / "configuration.md", ROOT / "docs" / "architecture.md"
API_SERVER, IMAGES = ROOT / "docs" / "api-server.md", ROOT / "docs" / "images.md"
PREFLIGHT = ROOT / "docs" / "preflight.md"
RUNS = ROOT / "docs" / "runs.md"
DOCTOR = ROOT / "docs" / "doctor.md"
EXIT_CODES = ROOT / "docs" / "exit-codes.md"
RELIABILITY = ROOT / "docs" / "reliability.md"
CHANGELOG, CONTRIBUTING = ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"
DOCUMENTS = (README, LAUNCHER, CHANGELOG, CONTRIBUTING, *sorted((ROOT / "docs").glob("*.md")))
PACKAGES = (
    "slurm/lib",
    "slurm/lib/preflight",
    "slurm/lib/observe",
    "slurm/lib/doctor",
    "slurm/lib/reports",
    "slurm/lib/verbs",
    "slurm_runtime",
    "slurm_runtime/agent",
    "slurm_runtime/head",
    "slurm_runtime/warden",
    "shell_rl",
    "local_verl",
)
ANY_CODE = "any"
UPDATE = "python -m tests.test_docs"


# --- what is made from the code --------------------------------------------------------------------------------------


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def table(head: tuple[str, ...], rows: Iterator[str]) -> str:
    return "\n".join([row(*head), "|" + "---|" * len(head), *rows])


def summary(docstring: str | None) -> str:
    """What a docstring begins with, in one line and as Markdown writes code."""
    return " ".join((docstring or "").partition("\n\n")[0].split()).replace("``", "`")


# What a key takes, by the name of its parser.
VALUES = {
    "backend": "slurm, local",
    "boolean": "true, false",
    "experiment": "a folder's name",
    "fraction": "number between 0 and 1",
    "frequency": "whole number ≥ 1, or -1",
    "gres_type": "name",
    "lead_seconds": "whole number 1 to 65535",
    "patience_seconds": "whole number ≥ 60",
    "memory": "memory",
    "mirrors": "list of REGISTRY=MIRROR",
    "names": "list of names",
    "recipients": "mail addresses and webhooks",
    "node_memory": "memory, or 0",
    "non_negative_int": "whole number ≥ 0",
    "network_word": "private, deny",
    "optional_memory": "memory",
    "pairing_word": "jobs, het",
    "runtime_mode_word": "array, allocation",
    "path": "path",
    "pinning_word": "docker_cpuset, taskset, none",
    "port": "port",
    "port_range": "A-B",
    "positive_int": "whole number ≥ 1",
    "positive_number": "number > 0",
    "ray_ports": "A-B",
    "ray_word": "auto, on, off",
    "secret": "printable ASCII",
    "slurm_time": "Slurm time, or UNLIMITED",
    "start_word": "fork, exec",
    "switch": "1, 0",
    "text": "text",
    "url": "URL",
    "word": "text without spaces",
    "sbatch_words": "list",
    "words": "list",
    "hydra_overrides": "list",
}


def default_of(key: Key) -> str:
    value = "" if key.default_text else said(key, key.default).replace("\n", ",")
    return f"`{value}`" if value else key.default_text or "–"


# What a person calls the part that a module belongs to; modules that are not here read keys of all parts, or none.
PARTS = {
    "sbatch": ("plan.py",),
    "checks": ("preflight/*.py",),
    "runtime job": (
        "runtime_*.py",
        "api_server_child.py",
        "sandbox_room.py",
        "images.py",
        "idle.py",
        "watchers.py",
    ),
    "training job": (
        "training_job.py",
        "trainer.py",
        "gpu_environment.py",
        "node_environment.py",
        "node_facts.py",
        "task_yaml.py",
        "early_stop.py",
        "attempts.py",
        "deadlines.py",
    ),
    "Ray": ("ray_*.py",),
    "prebuild job": ("prebuild_job.py",),
    "launcher": ("verbs/launch.py",),
}
# What is read from the environment by its name, or is taken up by another key's default.
READ_BY_NAME = {
    "SKYRL_BACKEND": ("launcher",),
    "ALLHANDS_API_KEY": ("runtime job", "training job"),
    "SANDBOX_REMOTE_RUNTIME_API_URL": ("training job",),
    "DATA_DIR": ("`TRAIN_DATA`, `VAL_DATA`",),
    "LOCAL_SCRATCH": ("runtime job",),
    "VERL_OVERRIDES": ("VERL's command line",),
    "SKYRL_COORD_DIR": ("launcher", "training job"),
    "SKYRL_JOBS_BASE": ("launcher", "runtime job", "training job"),
    "SKYRL_DEBUG": ("launcher", "runtime job", "training job"),
    "VLLM_USE_V1": ("VERL's environment",),
}


def read_settings(tree: ast.AST, through: dict[str, set[str]]) -> set[str]:
    """The attributes of a ``settings`` that code reads, also ``through`` functions and properties of settings.py."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            found |= {node.attr, *through.get(node.attr, ())} if owner in {"settings", "self"} else set()
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found |= through.get(node.func.id, set())
    return found


@functools.cache
def parts_of_keys() -> dict[str, list[str]]:
    """Key → what it reaches: parts whose modules read it, and the overrides of VERL that it becomes."""
    lib = ROOT / "slurm" / "lib"
    source = ast.parse((lib / "settings.py").read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(source) if isinstance(node, ast.FunctionDef)]
    through = {node.name: read_settings(node, {}) for node in functions if node.name != "complete"}
    reached: dict[str, list[str]] = {name: list(READ_BY_NAME.get(name, ())) for name in KEYS}
    for part, patterns in PARTS.items():
        paths = [path for pattern in patterns for path in sorted(lib.glob(pattern))]
        read = set().union(*(read_settings(ast.parse(path.read_text(encoding="utf-8")), through) for path in paths))
        for name, key in KEYS.items():
            reached[name] += [part] if key.attribute in read and part not in reached[name] else []
    others = [path for path in sorted(lib.glob("*.py")) if path.name != "settings.py"]
    elsewhere = set().union(*(read_settings(ast.parse(path.read_text(encoding="utf-8")), {}) for path in others))
    for name, parts in reached.items():
        parts += ["jobs"] if not parts and KEYS[name].attribute in elsewhere else []
        overrides = [f"`{verl.name}`" for verl in ROWS if name in verl.keys]
        parts += [f"VERL: {', '.join(overrides)}"] if overrides else []
    return reached


def sections_of_keys() -> dict[str, list[Key]]:
    """The keys by the headings that their declaration has."""
    sections: dict[str, list[Key]] = {}
    for line in (ROOT / "slurm" / "lib" / "settings.py").read_text(encoding="utf-8").splitlines():
        if heading := re.fullmatch(r"    # (.+)", line):
            sections[heading[1]] = keys = []
        if declared := re.match(r"    (\w+): .*= setting\(", line):
            keys += [key for key in KEYS.values() if key.attribute == declared[1]]
    return {heading: keys for heading, keys in sections.items() if keys}


def key_table() -> str:
    """One row a key, in the order of their declaration and under its headings."""

    def rows(keys: Iterable[Key]) -> Iterator[str]:
        for key in keys:
            unit = f" Unit: {key.unit}." if key.unit in {"s", "tokens", "steps"} else ""
            reaches = ", ".join(parts_of_keys()[key.name])
            yield row(f"`{key.name}`", default_of(key), VALUES[key.parse.__name__], key.doc + unit, reaches)

    head = ("Key", "Default", "Value", "Meaning", "Reaches")
    return "\n\n".join(f"### {name}\n\n{table(head, rows(keys))}" for name, keys in sections_of_keys().items())


def uses(tree: ast.Module, package: str) -> list[str]:
    """The modules of the same package that a module imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            parent, _, module = node.module.rpartition(".")
            found |= {module} if parent == package else set()
            found |= {alias.name for alias in node.names} if node.module == package else set()
    return sorted(found)


def module_table(folder: str) -> str:
    """One row a module: the sentence that its docstring begins with, and what it imports of its package."""

    def rows() -> Iterator[str]:
        for path in sorted((ROOT / folder).glob("[!_]*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            siblings = {other.stem for other in path.parent.glob("[!_]*.py")}
            arrows = [name for name in uses(tree, folder.replace("/", ".")) if name in siblings]
            yield row(f"`{path.name}`", summary(ast.get_docstring(tree)), ", ".join(arrows) or "–")

    return table(("Module", "What it does, or which question it answers", "Uses"), rows())


def check_table() -> str:
    """One row a check, in the order in which they are shown."""
    rows = (
        row(f"`{check.name}`", check.question, summary(check.concerns.__doc__)) for check in CHECKS if check.question
    )
    return table(("Check", "Question", "Concerns"), rows)


def fault_table() -> str:
    """One row a case of the fault matrix, by its number there."""
    rows = (
        row(
            str(case.row),
            case.fault,
            case.outcome,
            f"{case.bound_s:g} {case.unit}" if case.bound_s < math.inf else "–",
            f"{measured(case):.1f} {case.unit}" if case.bound_s < math.inf else "–",
            f"`… {case.shown or case.reads} …`" if case.reads else "–",
        )
        for case in sorted(CASES, key=lambda case: case.row)
    )
    return table(("No.", "What happens", "What then holds", "Within", "Measured", "What you read"), rows)


def exception_table() -> str:
    """One row for each command of the documents that no test runs."""
    rows = (row(place, f"`{command}`", reason) for place, command, reason in exceptions(all_blocks()))
    return table(("Document", "Command", "Why not"), rows)


def exit_code_table() -> str:
    """One row a code of ours, in the order of their declaration."""
    errors = list(error_classes())
    source = (ROOT / "slurm" / "lib" / "errors.py").read_text(encoding="utf-8")
    comments = dict(re.findall(r"^(EXIT_\w+) = \d+  # (.*)$", source, re.MULTILINE))

    def rows() -> Iterator[str]:
        for name, code in vars(slurm.lib.errors).items():
            if name.startswith("EXIT_"):
                shown = "128+N" if name == "EXIT_SIGNAL_BASE" else str(code)
                named = ", ".join(f"`{error.__name__}`" for error in errors if error.exit_code == code)
                yield row(shown, f"`{name}`", comments[name], named or "–", slurm.lib.errors.WHAT_TO_DO[code] or "–")

    return table(("Code", "Name", "Meaning", "Errors", "What to do"), rows())


def error_classes() -> Iterator[type[slurm.lib.errors.SuiteError]]:
    """Every error that a person may see, of whatever module, by name."""
    for path in sorted((ROOT / "slurm" / "lib").rglob("*.py")):
        if re.search(r"^class \w+\(\w*(Error|Problem|Timeout)\):", path.read_text(encoding="utf-8"), re.MULTILINE):
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    found, left = [], [slurm.lib.errors.SuiteError]
    while left:
        found += left
        left = [below for error in left for below in error.__subclasses__()]
    ours = {error for error in found if error.__module__.startswith("slurm.lib.")}
    return iter(sorted(ours, key=lambda error: error.__name__))


def verb_epilogs() -> Iterator[tuple[str, str]]:
    """The commands, and what their ``--help`` ends with."""
    yield "launch.py --config …", cli.EPILOG
    for name in sorted(cli.VERBS):
        yield f"launch.py {name}", verb_parser(name).epilog or ""


def codes_in(epilog: str) -> list[tuple[str, str]]:
    """The exit codes that an epilog explains, each with its meaning."""
    _, _, text = " ".join(epilog.split()).partition("exit codes: ")
    said = re.split(r"(?:^|; )(?=\d|that of )", text.removesuffix("."))
    pairs = [re.match(r"(\d+(?:\+N)?) (.+)", part) or re.match(r"(?P<any>)(that of .+)", part) for part in said if part]
    return [(match[1] or ANY_CODE, match[2]) for match in pairs if match]


def command_code_table() -> str:
    """One row for each code of each command, from what its ``--help`` says."""
    rows = (row(f"`{name}`", code, said) for name, epilog in verb_epilogs() for code, said in codes_in(epilog))
    return table(("Command", "Code", "Meaning"), rows)


GENERATED: dict[Path, dict[str, Callable[[], str]]] = {
    CONTRIBUTING: {"exceptions": exception_table},
    CONFIGURATION: {"keys": key_table},
    PREFLIGHT: {"checks": check_table},
    RELIABILITY: {"faults": fault_table},
    EXIT_CODES: {"exit codes": exit_code_table, "exit codes of commands": command_code_table},
    ARCHITECTURE: {folder: lambda folder=folder: module_table(folder) for folder in PACKAGES},  # type: ignore[misc]
}


def updated(path: Path) -> str:
    """The document with its made parts as they are now."""
    text = path.read_text(encoding="utf-8")
    for name, make in GENERATED[path].items():
        begin, end = f"<!-- made from the code: {name} -->\n", f"<!-- end: {name} -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        assert found, f"{path} lacks the lines {begin!r} and {end!r}"
        text = f"{before}{begin}\n{make()}\n\n{end}{after}"
    return text


@pytest.mark.parametrize("path", GENERATED, ids=lambda path: path.name)
def test_the_tables_made_from_the_code_are_current(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == updated(path), f"out of date; write it anew with: {UPDATE}"


def test_every_key_is_in_the_reference_and_read_by_somebody() -> None:
    listed = [key.name for keys in sections_of_keys().values() for key in keys]
    assert listed == list(KEYS)
    assert [name for name, parts in parts_of_keys().items() if not parts] == []
    assert parts_of_keys()["TOTAL_EPOCHS"] == ["checks", "VERL: `trainer.total_epochs`"]
    assert parts_of_keys()["GPU_PARTITION"][0] == "sbatch"


# --- what is compared ------------------------------------------------------------------------------------------------


def first_cells(path: Path, section: str) -> list[str]:
    """The first cells of the first table below a heading, without back ticks."""
    _, found, rest = path.read_text(encoding="utf-8").partition(f"# {section}\n")
    assert found, f"{path} has no section {section!r}"
    lines = rest.partition("\n#")[0].splitlines()
    below = itertools.dropwhile(lambda line: not line.startswith("|"), lines)
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), below))[2:]
    return [re.split(r"(?<!\\)\|", line)[1].strip().replace("`", "").replace("\\|", "|") for line in rows]


COMMANDS = {
    ("slurm/launch.py",): (LAUNCHER, "Options"),
    ("slurm/launch.py", "cancel"): (LAUNCHER, "Options of cancel"),
    ("slurm/launch.py", "clean"): (RUNS, "Options of clean"),
    ("slurm/launch.py", "list"): (RUNS, "Options of list"),
    ("slurm/launch.py", "report"): (RUNS, "Options of report"),
    ("slurm/launch.py", "logs"): (RUNS, "Options of logs"),
    ("slurm/launch.py", "status"): (RUNS, "Options of status"),
    ("slurm/launch.py", "open"): (RUNS, "Options of open"),
    ("slurm/launch.py", "shell"): (RUNS, "Options of shell"),
    ("slurm/launch.py", "wait"): (RUNS, "Options of wait"),
    ("slurm/launch.py", "doctor"): (DOCTOR, "Options"),
    ("slurm/launch.py", "completion"): (LAUNCHER, "Options of completion"),
    ("slurm/jobs/runtime_server.py",): (LAUNCHER, "Options of the job files"),
    ("slurm/jobs/verl_training.py",): (LAUNCHER, "Options of the job files"),
    ("slurm/jobs/prebuild_images.py",): (LAUNCHER, "The prebuild job"),
    ("-m", "slurm_runtime.api_server"): (API_SERVER, "Flags"),
    ("-m", "slurm_runtime.head"): (API_SERVER, "Flags of the head"),
    ("-m", "slurm_runtime.agent"): (API_SERVER, "The command for agent trees"),
    ("-m", "slurm_runtime.prebuild_images"): (IMAGES, "Options of prebuild_images"),
    ("-m", "shell_rl.train"): (LAUNCHER, "The RL loop as a check of a new cluster"),
}


def options_in(text: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z-]*", text))


def offered_options(command: tuple[str, ...]) -> set[str]:
    """The options that ``--help`` of a command and of its verbs explains: those that begin a line."""
    environment = {**os.environ, "COLUMNS": "500"}  # else argparse breaks lines inside of options
    argv = [sys.executable, *command, "--help"]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = options_in("\n".join(re.findall(r"^  (-.*?)(?:  |$)", done.stdout, re.MULTILINE)))
    verbs = re.search(r"^  \{([a-z,]+)\}$", done.stdout, re.MULTILINE)
    return found.union(*(offered_options((*command, verb)) for verb in verbs[1].split(","))) if verbs else found


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
def test_the_options_are_those_of_help(command: tuple[str, ...]) -> None:
    path, section = COMMANDS[command]
    assert options_in("\n".join(first_cells(path, section))) == offered_options(command)


def exit_codes(module: ModuleType) -> set[str]:
    """The codes that a module names, as the documents write them; 0 and argparse's 2 need no name."""
    codes = {name: value for name, value in vars(module).items() if name.startswith("EXIT_")}
    return {"0", "2"} | {"128+N" if name == "EXIT_SIGNAL_BASE" else str(value) for name, value in codes.items()}


@pytest.mark.parametrize(
    ("module", "path", "section"),
    [
        (slurm.lib.errors, LAUNCHER, "Exit codes"),
        (slurm_runtime.api_server, API_SERVER, "Exit codes"),
        (slurm_runtime.agent.__main__, API_SERVER, "Exit codes for agent trees"),
        (slurm_runtime.prebuild_images, IMAGES, "Exit codes of prebuild_images"),
        (shell_rl.errors, LAUNCHER, "Exit codes of the RL loop"),
    ],
)
def test_the_exit_codes_are_those_of_the_code(module: ModuleType, path: Path, section: str) -> None:
    assert set(first_cells(path, section)) == exit_codes(module)


def test_the_exit_codes_of_the_head_are_those_of_a_server_that_leaves_nothing() -> None:
    assert set(first_cells(API_SERVER, "Exit codes of the head")) == exit_codes(slurm_runtime.api_server) - {"75"}


def test_every_error_and_code_has_its_row() -> None:
    """The table is made of what is found; here it is looked at from the other side."""
    page = EXIT_CODES.read_text(encoding="utf-8")
    tree = ast.parse((ROOT / "slurm" / "lib" / "errors.py").read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    errors = [node.name for node in classes if any("Error" in ast.unparse(base) for base in node.bases)]
    assert "NotRunning" in errors
    assert not [name for name in errors if f"`{name}`" not in page and name != "SuiteError"]
    assert set(slurm.lib.errors.WHAT_TO_DO) == {
        value for name, value in vars(slurm.lib.errors).items() if name.startswith("EXIT_")
    }
    known = {ANY_CODE, *exit_codes(slurm.lib.errors)}
    for name, epilog in verb_epilogs():
        codes = dict(codes_in(epilog))
        assert "2" in codes, f"{name} --help does not end with its exit codes"
        assert set(codes) <= known, name


def test_the_states_and_fields_of_runs_are_those_of_the_code() -> None:
    def named(section: str) -> list[str]:
        return [name for cell in first_cells(RUNS, section) for name in cell.split(", ")]

    assert named("States") == [state.value for state in RunState]
    fields = run_dict(view_of_a_run())
    (job, *_) = cast(list[dict[str, object]], fields["jobs"])
    assert set(named("JSON")) == set(fields)
    assert set(named("A job in JSON")) == set(job)


def test_the_fields_of_a_report_are_those_of_the_code() -> None:
    fields: Any = report_dict(read_report(view_of_a_run(), Slurm({"PATH": ""}), SignalNotes()))
    (attempt, *_) = fields["attempts"]
    named = {
        "A report in JSON": set(fields),
        "A job in a report": set(attempt["jobs"][0]),
        "A step in a report": set(step_dict(Step(1))),
    }
    for section, wanted in named.items():
        assert {name for cell in first_cells(RUNS, section) for name in cell.split(", ")} == wanted


def test_the_fields_of_a_line_of_a_log_are_those_of_the_code() -> None:
    named = {name for cell in first_cells(RUNS, "A line of a log in JSON") for name in cell.split(", ")}
    assert named == set(line_dict(Origin("training", "12", 1, "out"), "", "", True))


def view_of_a_run() -> RunView:
    return with_logs(without_logs(read_record(CoordinationDir(folder_of("chained"))), {}))


def test_the_helpers_are_those_of_common() -> None:
    wanted = {f"{name} {words}".strip() for name, (words, _run) in common.COMMANDS.items()}
    assert set(first_cells(LAUNCHER, "Helpers for shell scripts")) == wanted


def test_the_functions_are_those_of_bash() -> None:
    defined = re.findall(r"^(\w+)\(\) \{$", common.SHELL_ONLY, re.MULTILINE)
    assert {cell.split()[0] for cell in first_cells(LAUNCHER, "Functions for bash alone")} == set(defined)


def test_the_endpoints_are_the_routes() -> None:
    app = create_app(cast(Any, None), ServerConfig(), Heartbeats())
    routes = {f"{method} {route.path}" for route in app.routes for method in route.methods - {"HEAD"}}  # type: ignore[attr-defined]
    assert set(first_cells(API_SERVER, "Endpoints")) == routes


def test_the_endpoints_of_the_head_are_those_of_a_server_and_of_its_nodes() -> None:
    config = HeadConfig("key")
    app = create_head_app(Head.of(config), config)
    routes = {f"{method} {route.path}" for route in app.routes for method in route.methods - {"HEAD"}}  # type: ignore[attr-defined]
    of_a_node = {"GET /node", "GET /changes", "POST /drain"}
    served = set(first_cells(API_SERVER, "Endpoints")) - of_a_node
    assert served | set(first_cells(API_SERVER, "Routes of the head")) == routes


def test_the_status_codes_are_those_of_the_schema() -> None:
    assert set(first_cells(API_SERVER, "Status codes")) == {str(code) for code in MEANINGS}


def test_the_fields_are_those_of_the_wire() -> None:
    def names(section: str) -> set[str]:
        return {name for cell in first_cells(API_SERVER, section) for name in cell.split(", ")}

    assert names("Request of /start") == set(StartRequest.model_fields)
    assert names("Answer") == set(RuntimeAnswer.model_fields)
    section = prose(API_SERVER).partition("# Request of /start\n")[2].partition("\n#")[0]
    assert not [name for name in FIELDS_WITHOUT_EFFECT if f"`{name}`" not in section]


def test_the_metrics_are_those_of_prometheus() -> None:
    traffic = Traffic()
    traffic.note({"method": "GET"}, 200, 0.1)
    node = Snapshot(until=1e9, head=HeadRow("http://cpu-a:8000", registered=True, heard_s_ago=1.0))
    body, _ = exposition(lambda: node, traffic, StepTimes())
    families = re.findall(r"^# TYPE (\w+) ", body.decode(), re.MULTILINE)
    ours = {name for name in families if name.startswith("skyrl_") and not name.endswith("_created")}
    cells = first_cells(API_SERVER, "Operator's view")
    assert {name for cell in cells for name in cell.split(", ")} - {"process_*"} == ours
    assert all(f"`{step}`" in API_SERVER.read_text(encoding="utf-8") for step in STEPS)


def test_the_metrics_of_the_head_are_named() -> None:
    nothing = Figures((), Counter(), Counter(), 0)
    body, _ = head_exposition(lambda: nothing, Traffic())
    families = set(re.findall(r"^# TYPE (skyrl_\w+) ", body.decode(), re.MULTILINE))
    section = prose(API_SERVER).partition("# Routes of the head\n")[2].partition("\n#")[0]
    assert families > {"skyrl_nodes", "skyrl_slots_used"}
    assert not [name for name in families if f"`{name}`" not in section and not name.startswith("skyrl_http_")]


def test_every_file_of_a_run_is_listed() -> None:
    """All that ``CoordinationDir`` names, its methods for logs and heartbeats included."""
    directory = CoordinationDir(Path("DIR"))
    names = [
        getattr(directory, name).name for name, kind in vars(CoordinationDir).items() if isinstance(kind, property)
    ]
    kinds = ("runtime", "worker", "training")
    names += [directory.log(kind, "ID", suffix).name for kind in kinds for suffix in ("out", "err")]
    names += [directory.heartbeat(job, "ID").name for job in ("runtime", "training")]
    names += [directory.ray_log("ID", "NODE").name, directory.ray_head("ID").name]
    listed = first_cells(LAUNCHER, "The run directory")
    missing = [
        name
        for name in names
        if not any(name in cell.replace("<id>", "ID").replace("<node>", "NODE") for cell in listed)
    ]
    assert not missing, f"the run directory's table lacks {missing}"


def test_every_field_of_a_notice_is_listed() -> None:
    cells = first_cells(ROOT / "docs" / "notify.md", "What is sent, and when")
    assert {name for cell in cells for name in cell.split(", ")} == set(NOTICE_FIELDS)


def test_the_version_is_the_same_everywhere() -> None:
    project = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    newest = re.search(r"^## (\d\S*)", CHANGELOG.read_text(encoding="utf-8"), re.MULTILINE)
    assert project and newest
    assert {project[1], newest[1], slurm_runtime.__version__} == {cli.VERSION}


# --- the documents themselves ----------------------------------------------------------------------------------------


def test_the_first_screen_of_the_readme_has_the_commands() -> None:
    screen = "\n".join(README.read_text(encoding="utf-8").splitlines()[:40])
    for command in ("scripts/quickstart", "scripts/test", "./slurm/launch.py --config check"):
        assert command in screen


def prose(path: Path) -> str:
    """The text outside of code blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_heading_and_no_row_of_a_table_comes_twice(path: Path) -> None:
    """As where two additions were joined."""
    tables = re.findall(r"(?m)(?:^\|.*\n)+", prose(path))
    headings = re.findall(r"(?m)^#+ .*$", prose(path))
    assert [one for one, count in Counter(headings).items() if count > 1 and path != CHANGELOG] == []
    twice = [[line for line, count in Counter(table.splitlines()).items() if count > 1] for table in tables]
    assert list(filter(None, twice)) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_resolves(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{path}: {link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{path}: {target.name} has no heading for {link}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_path_of_a_developers_machine(path: Path) -> None:
    found = re.search(r"/work\b|/root\b|\.pyenv|/home/(dev|skyrl-test)\b", path.read_text(encoding="utf-8"))
    assert found is None, found


if __name__ == "__main__":
    for document in GENERATED:
        document.write_text(updated(document), encoding="utf-8")
        sys.stdout.write(f"{document}\n")


def test_the_readme_leads_to_every_document() -> None:
    text = README.read_text(encoding="utf-8")
    assert [path.name for path in sorted((ROOT / "docs").glob("*.md")) if f"(docs/{path.name})" not in text] == []
