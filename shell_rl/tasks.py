"""What is asked, and how much is an answer worth: tasks over random files, judged by what the sandbox really did."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from shell_rl.commands import RESULT_FILE
from shell_rl.errors import SandboxDied
from shell_rl.sandbox_program import Execution

PARTIAL = 0.1  # at most this for an answer that is right in part, or right in the wrong place
SETUP_FAILED = 97  # exit code of a script whose files could not be prepared: the sandbox is broken, not the command
NAMES = ("ada", "bob", "cleo", "dan", "eve", "finn", "gil", "hana", "ivo", "jane", "kai", "lea")
CITIES = ("Oslo", "Lima", "Kyoto", "Accra", "Quito", "Turin", "Perth", "Cairo")
LEVELS = ("ERROR", "INFO", "WARN")


@dataclass(frozen=True)
class World:
    """The random files of one rollout, before any command has run."""

    log: tuple[str, ...]
    numbers: tuple[int, ...]
    people: tuple[str, ...]
    config_folder: str


@dataclass(frozen=True)
class Task:
    """One question: the lines expected for a world, on stdout or (``in_file``) in ``result.txt``."""

    name: str
    question: str
    answer: Callable[[World], Sequence[str]]
    in_file: bool = False


@dataclass(frozen=True)
class Observation:
    """What a command did: exit code, stdout, and the content of ``result.txt`` (None where it made none)."""

    exit_code: int
    stdout: str
    result_file: str | None


TASKS: tuple[Task, ...] = (
    Task("count-lines", "How many lines has app.log?", lambda world: [str(len(world.log))]),
    Task("sort-numbers", "The numbers, largest first.", lambda world: [str(n) for n in sorted(world.numbers)[::-1]]),
    Task("extract-field", "The city of each person.", lambda world: [p.split(":")[1] for p in world.people]),
    Task("find-file", "Where is settings.cfg?", lambda world: [f"./{world.config_folder}/settings.cfg"]),
    Task("sum-numbers", "The sum of the numbers.", lambda world: [str(sum(world.numbers))]),
    Task("save-unique", "Each line of app.log once, sorted, in result.txt.", lambda world: sorted({*world.log}), True),
)


def make_world(rng: random.Random) -> World:
    """Random files; any two worlds differ in every answer with near certainty, so no fixed answer works."""
    codes = [rng.randrange(100, 1000) for _ in range(rng.randint(8, 12))]
    log = [f"{rng.choice(LEVELS)} code {rng.choice(codes)}" for _ in range(rng.randint(14, 60))]
    people = [f"{rng.choice(NAMES)}:{rng.choice(CITIES)}:{rng.randint(18, 80)}" for _ in range(rng.randint(5, 30))]
    numbers = rng.sample(range(1, 3000), rng.randint(8, 20))
    folder = f"conf/site/{rng.choice(NAMES)}{rng.randrange(10000)}/{rng.choice(NAMES)}{rng.randrange(10000)}"
    return World(tuple(log), tuple(numbers), tuple(people), folder)


def _file(path: str, lines: Sequence[object]) -> str:
    return f"cat > {path} <<'END'\n" + "".join(f"{line}\n" for line in lines) + "END\n"


def setup(world: World) -> str:
    """Shell text that makes the world's files in the current directory."""
    files: Mapping[str, Sequence[object]] = {
        "app.log": world.log,
        "numbers.txt": world.numbers,
        "people.txt": world.people,
        f"{world.config_folder}/settings.cfg": ["mode = test"],
    }
    return f"mkdir -p {world.config_folder}\n" + "".join(_file(path, lines) for path, lines in files.items())


def script(world: World, command: str, mark: str) -> str:
    """Shell text of a whole rollout: the files, the command, then ``mark`` and what stands in ``result.txt``."""
    return (
        f"( set -e\n{setup(world)}) || exit {SETUP_FAILED}\n"
        f"( {command} )\ncode=$?\n"
        f"printf '\\n%s\\n' {mark}\n"
        f"if [ -f {RESULT_FILE} ]; then printf 'file\\n'; cat {RESULT_FILE}; fi\nexit $code\n"
    )


def observe(execution: Execution, mark: str) -> Observation | None:
    """Read a rollout's output; None where the script did not get as far as its mark.

    :raises SandboxDied: the sandbox could not prepare the files
    """
    stdout, found, after = execution.stdout.rpartition(f"\n{mark}\n")
    if not found:
        if execution.exit_code == SETUP_FAILED:
            raise SandboxDied(f"A sandbox could not write a task's files: {execution.stderr.strip()[-200:]}")
        return None
    is_file = after.startswith("file\n")
    return Observation(execution.exit_code, stdout, after.removeprefix("file\n") if is_file else None)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines()]


def _share(expected: Sequence[str], got: Sequence[str]) -> float:
    """The share of lines that both have, in any order; lines too many count as misses."""
    return (Counter(expected) & Counter(got)).total() / max(len(expected), len(got))


def reward(task: Task, world: World, seen: Observation | None) -> float:
    """From 0 to 1: 1 for the right answer in the right place with exit code 0, at most ``PARTIAL`` for less.

    An exit code alone is worth nothing, and neither is an output that does not hold the answer.
    """
    if seen is None or seen.exit_code != 0:
        return 0.0
    expected = list(task.answer(world))
    there, elsewhere = seen.stdout, seen.result_file or ""
    if task.in_file:
        there, elsewhere = elsewhere, there
    if _lines(there) == expected:
        return 1.0
    if _lines(elsewhere) == expected:
        return PARTIAL
    return PARTIAL * _share(expected, _lines(there)) if len(expected) > 1 else 0.0
