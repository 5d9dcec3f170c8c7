"""What the user asked for: ``.conf``, ``--set`` and environment → one checked ``Settings``.

Precedence: ``--set`` over the file over the environment over the default. Values of ``--set`` also stand in the
environment that the file is sourced in, so that ``${KEY:-…}`` in it sees them; what the file assigns plainly from its
own variables does not follow them.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from slurm.lib.conf_source import SourcedConf, Value, source_conf
from slurm.lib.errors import ConfigError, EnvironmentProblem, Problem
from slurm.lib.secrets import MASK, is_secret_name, secret_values
from slurm.lib.settings import KEYS, Key, Place, Settings, absolute, complete, contradictions, doubts

# What is wrong with settings as a whole: the keys involved, the one to change first, and a sentence.
Check = Callable[[Settings], Iterable[tuple[tuple[str, ...], str]]]
SURELY, POSSIBLY = 0.85, 0.6  # how alike two names are, as difflib counts
# Variables of the programs that a run starts: given on as anybody expects; a typo of ours only if very much alike.
FOREIGN = (
    *("_", "WANDB_", "HF_", "HUGGING", "NCCL_", "VLLM_", "VERL_", "TORCH", "CUDA_", "OPENAI_", "GLOO_", "FI_", "UV_"),
    *("RAY_", "TRITON_", "OMP_", "TRANSFORMERS_", "TOKENIZERS_", "PYTHON", "LD_", "SBATCH_", "SLURM_"),
)
CONFIG_DIR = "SKYRL_CONFIG_DIR"  # the shipped files' folder, for a file elsewhere that sources one of them
# Variables that this suite reads and that are no keys (docs/configuration.md).
NO_KEYS = frozenset({"SKYRL_VENV", "SKYRL_PYTHON", "SKYRL_AGENT_CACHE", "SKYRL_VERL_CACHE", "NO_COLOR"})


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration that holds no known mistake.

    ``exported``: everything that the file and --set assigned, as strings for the jobs' environment; an array that is a
    key's value is quoted as its parser reads it back, another one joined by newlines. ``sources``: key → ``FILE:LINE``,
    ``--set``, ``environment`` or ``default``. ``files``: the configuration and every file it sourced. ``unset``: names
    that the file removed from the environment; the jobs should not get them. ``warnings``: what is hardly meant.
    """

    settings: Settings
    exported: dict[str, str]
    sources: dict[str, str]
    files: tuple[Path, ...]
    warnings: tuple[Problem, ...]
    unset: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Said:
    """One value that somebody gave, and who did."""

    raw: Value
    source: str


def load_config(
    config: str | None,
    overrides: Sequence[str],
    environment: Mapping[str, str],
    config_folder: Path,
    now: datetime,
    project_root_default: Path,
    cwd: Path | None = None,
    contradictions: Check = contradictions,
) -> LoadedConfig:
    """Read and check a configuration; ``ConfigError`` with all its problems together.

    ``contradictions`` looks for what cannot hold together, and for what a command lacks.

    ``config`` is a bare name (``config_folder/NAME.conf``), a path (with a slash, or ending in ``.conf``), or None
    for environment and defaults alone. ``overrides`` are the ``KEY=VALUE`` of --set. Of the environment only known
    keys count. ``~`` is HOME, relative paths are relative to ``cwd`` (default: the current folder). The file finds
    ``config_folder`` as SKYRL_CONFIG_DIR.
    """
    place = Place(now, _home(environment), cwd or _current_folder(), project_root_default)
    set_values, problems = _parse_overrides(overrides)
    seen = {**environment, CONFIG_DIR: str(config_folder), **set_values}
    sourced = _source(config, seen, config_folder, place)
    said = _merge(set_values, sourced, environment)
    parsed, bad = _parse(said)
    settings = complete(Settings(**parsed), said.keys() - bad.keys(), place)  # type: ignore[arg-type]  # parsed by key
    problems += [*sourced.problems, *_associative_problems(sourced), *_lost_values(sourced), *bad.values()]
    problems += _unknown_overrides(set_values, said, sourced, environment)
    problems += _broken_paths(settings, said, bad)
    problems += _contradiction_problems(contradictions(settings), said, bad)
    if problems:
        raise ConfigError(sorted(problems, key=_reading_order))
    return LoadedConfig(
        settings=settings,
        exported=_exported(set_values, sourced),
        sources=_sources(said),
        files=sourced.files,
        warnings=(
            *_visible_secrets(set_values),
            *_file_warnings(set_values, sourced, environment),
            *_doubts(settings, said),
        ),
        unset=frozenset(sourced.unset - set_values.keys()),
    )


def _home(environment: Mapping[str, str]) -> Path:
    home = environment.get("HOME") or os.path.expanduser("~")  # noqa: PTH111  Path.home raises where there is none
    if home == "~":
        raise EnvironmentProblem("HOME is not set, and the user database knows no home of this user; set HOME")
    return Path(home)


def _current_folder() -> Path:
    try:
        return Path.cwd()
    except OSError as problem:
        raise EnvironmentProblem(
            f"the current folder cannot be used: {problem.strerror}; it may have been removed: cd to another one"
        ) from None


def _parse_overrides(overrides: Iterable[str]) -> tuple[dict[str, str], list[Problem]]:
    values, problems = {}, []
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            problems.append(Problem(f"--set {_shown(override)}", "must be KEY=VALUE, with a key like GPU_NODES"))
        else:
            values[name] = value
    return values, problems


def _shown(override: str) -> str:
    """An override for a message: of one that begins with a secret's name, the name."""
    name = re.split(r"\W", override, maxsplit=1)[0]
    return f"{name}={MASK}" if is_secret_name(name) and name != override else override


def _locate(config: str, config_folder: Path, place: Place) -> Path | Problem:
    """The file that --config means; the problem with an unknown name says which names there are."""
    if "/" in config or config.endswith(".conf"):
        return absolute(Path(config), place)
    path = config_folder / f"{config}.conf"
    if path.is_file():
        return path
    known = ", ".join(sorted(file.stem for file in config_folder.glob("*.conf"))) or "none"
    return Problem(
        f"--config {config}",
        f"there is no configuration of this name in {config_folder}; there are: {known}",
        f"a file elsewhere needs its path: --config ./{config}.conf",
    )


def _source(config: str | None, environment: Mapping[str, str], config_folder: Path, place: Place) -> SourcedConf:
    if config is None:
        return SourcedConf({}, {})
    path = _locate(config, config_folder, place)
    return source_conf(path, environment) if isinstance(path, Path) else SourcedConf({}, {}, (path,))


def _place_of(name: str, sourced: SourcedConf) -> str:
    file, line = sourced.lines[name]
    return f"{file}:{line}"


def _merge(set_values: Mapping[str, str], sourced: SourcedConf, environment: Mapping[str, str]) -> dict[str, _Said]:
    """What was said about each known key, by the one who counts. Saying nothing ("") stands for the default."""
    said = {name: _Said(environment[name], "environment") for name in KEYS if name in environment}
    said = {name: value for name, value in said.items() if name not in sourced.unset}
    said |= {name: _Said(sourced.values[name], _place_of(name, sourced)) for name in KEYS if name in sourced.values}
    said |= {name: _Said(set_values[name], "--set") for name in KEYS if name in set_values}
    return {name: value for name, value in said.items() if not isinstance(value.raw, str) or value.raw.strip()}


def _parse(said: Mapping[str, _Said]) -> tuple[dict[str, object], dict[str, Problem]]:
    """Attribute → value for what is right, key → problem for what is not."""
    parsed, bad = {}, {}
    for name, given in said.items():
        try:
            parsed[KEYS[name].attribute] = _value(KEYS[name], given.raw)
        except ValueError as problem:
            bad[name] = Problem(_where(name, given), f"{name}={_value_shown(name, given.raw)}: {problem}")
    return parsed, bad


def _value(key: Key, raw: Value) -> object:
    if not isinstance(raw, str) and not key.is_array:
        raise ValueError("must be one value, not a bash array")
    return key.parse(raw)


def _value_shown(name: str, raw: Value) -> str:
    if is_secret_name(name):
        return MASK
    return raw if isinstance(raw, str) else f"({shlex.join(raw)})"


def _where(name: str, given: _Said) -> str:
    if given.source != "--set":
        return given.source
    return f"--set {name}"


def _associative_problems(sourced: SourcedConf) -> list[Problem]:
    what = "{} is an associative array, which is not a value for a key; use KEY=value or KEY=(a b)"
    return [Problem(_place_of(name, sourced), what.format(name)) for name in KEYS if name in sourced.associative]


def _lost_values(sourced: SourcedConf) -> Iterator[Problem]:
    """Keys whose value has a space and no quotes, where its second word happens to be a command."""
    complained = {problem.where for problem in sourced.problems}
    for name, (file, line) in sourced.for_a_command.items():
        if name in KEYS and f"{file}:{line}" not in complained:
            sentence = f"{name} is set for the command behind its value alone, which bash has run, and then forgotten"
            fix = f'quote a value with a space: {name}="…"; or, if the command was meant: env {name}=… COMMAND'
            yield Problem(f"{file}:{line}", sentence, fix)


def _broken_paths(settings: Settings, said: Mapping[str, _Said], bad: Mapping[str, Problem]) -> Iterator[Problem]:
    """Paths that are made of the home, the current folder or the checkout, and that no job could read back."""
    for name, key in KEYS.items():
        value = getattr(settings, key.attribute)
        if isinstance(value, Path) and "\n" in str(value) and name not in bad:
            where = _where(name, said[name]) if name in said else "default"
            fix = "use a folder without a line end in its name, for the checkout and your home as well"
            yield Problem(where, f"{name}={value}: must be one path, not several lines", fix)


def _contradiction_problems(
    found: Iterable[tuple[tuple[str, ...], str]], said: Mapping[str, _Said], bad: Mapping[str, Problem]
) -> Iterator[Problem]:
    for keys, sentence in found:
        if not bad.keys() & set(keys):
            yield Problem(_where_any(keys, said), sentence)


def _doubts(settings: Settings, said: Mapping[str, _Said]) -> Iterator[Problem]:
    for keys, sentence, fix in doubts(settings):
        yield Problem(_where_any(keys, said), sentence, fix)


def _where_any(keys: Sequence[str], said: Mapping[str, _Said]) -> str:
    """Where the first of the keys that anybody gave was given."""
    given = next((name for name in keys if name in said), None)
    return _where(given, said[given]) if given else "default"


def _sources(said: Mapping[str, _Said]) -> dict[str, str]:
    return {name: said[name].source if name in said else "default" for name in KEYS}


def _exported(set_values: Mapping[str, str], sourced: SourcedConf) -> dict[str, str]:
    return {**{name: _as_text(name, value) for name, value in sourced.values.items()}, **set_values}


def _as_text(name: str, value: Value) -> str:
    if isinstance(value, str):
        return value
    return shlex.join(value) if name in KEYS else "\n".join(value)


def _reading_order(problem: Problem) -> tuple[str, int]:
    """The command line first, then each file from its top."""
    match = re.fullmatch(r"(/.*):(\d+)", problem.where)
    return (match[1], int(match[2])) if match else ("", 0)


def _visible_secrets(set_values: Mapping[str, str]) -> Iterator[Problem]:
    for name in (name for name in set_values if is_secret_name(name) and secret_values({name: set_values[name]})):
        sentence = "everyone on this host can read it in the process list"
        yield Problem(f"--set {name}", sentence, "write it into a file")


def _unknown_overrides(
    set_values: Mapping[str, str], said: Mapping[str, _Said], sourced: SourcedConf, environment: Mapping[str, str]
) -> Iterator[Problem]:
    """Names of --set that nobody would read: a typo, where nothing says that it is meant.

    Meant are names that the file or the TRAINING_COMMAND reads, and variables of other programs or of the environment
    that are not much like a key. Of a file that could not be read nothing is known.
    """
    unread = bool(sourced.problems) and not sourced.files
    command = said["TRAINING_COMMAND"].raw if "TRAINING_COMMAND" in said else ""
    used = _names_used(sourced.files) | (_names_in(command) if isinstance(command, str) else set())
    for name in (name for name in set_values if name not in KEYS and name not in used):
        expected = unread or _is_expected(name, environment)
        nearest = _nearest(name, SURELY if expected else POSSIBLY)
        if nearest or not expected:
            fix = f"did you mean {nearest}?" if nearest else f"export {name} before the launch if the jobs read it"
            yield Problem(f"--set {name}", f"not a key of this suite: {name}", fix)


def _is_expected(name: str, known: Collection[str]) -> bool:
    """Whether a name that is no key surprises nobody: it is ``known``, or another program's or ours."""
    return name in known or name in NO_KEYS or name.startswith(FOREIGN)


def _file_warnings(
    set_values: Mapping[str, str], sourced: SourcedConf, environment: Mapping[str, str]
) -> Iterator[Problem]:
    """A line for each key that looks misspelt, and one for all other unknown ones of a line of the file.

    A helper that the file itself uses, or a variable that the environment had before, is a surprise to nobody.
    """
    expected = _names_used(sourced.files) | environment.keys() | KEYS.keys() | set_values.keys()
    others: dict[str, list[str]] = {}
    unknown = [name for name in sourced.values if name not in KEYS and name not in set_values]
    for name in sorted(unknown, key=lambda name: (str(sourced.lines[name][0]), sourced.lines[name][1], name)):
        foreign = _is_expected(name, expected)
        nearest = _nearest(name, SURELY if foreign else POSSIBLY)
        if nearest:
            yield _unknown(_place_of(name, sourced), [name], f"did you mean {nearest}?")
        elif not foreign:
            others.setdefault(_place_of(name, sourced), []).append(name)
    fix = "remove it if nothing reads it"
    yield from (_unknown(place, names, fix) for place, names in others.items())


def _nearest(name: str, cutoff: float) -> str | None:
    import difflib  # 5 ms, spent only on unknown keys

    return next(iter(difflib.get_close_matches(name.upper(), KEYS, n=1, cutoff=cutoff)), None)


def _unknown(place: str, names: Sequence[str], fix: str) -> Problem:
    return Problem(place, f"not a key of this suite: {', '.join(names)} (given to the jobs all the same)", fix)


def _names_used(files: Iterable[Path]) -> set[str]:
    """The variables that the files read: ``$NAME`` or ``${NAME…}`` outside of comments at a line's start."""
    lines = [line for file in files for line in file.read_text(errors="replace").splitlines()]
    return _names_in("\n".join(line for line in lines if not line.lstrip().startswith("#")))


def _names_in(code: str) -> set[str]:
    return set(re.findall(r"\$\{?#?!?([A-Za-z_]\w*)", code))
