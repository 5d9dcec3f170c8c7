"""Is every block of the documents what it is said to be, and every command line one that is accepted?

What is typed from them is run by test_slurm_documents.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import pytest
import yaml

from scripts.site_pages import ROOT, documents
from slurm.lib import cli
from slurm.lib.config import load_config
from slurm.lib.errors import UsageError
from tests.doc_blocks import (
    COMMANDS,
    Block,
    Mistake,
    all_blocks,
    blocks_of,
    exceptions,
    script,
    simple_commands,
    typed,
)

CONFIGURATIONS = ROOT / "slurm" / "config"
PARSED: dict[str, Callable[[str], object]] = {"json": json.loads, "yaml": yaml.safe_load, "python": ast.parse}
SHOWN = ("", "text")
BLOCKS = all_blocks()


def some(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


def place(block: Block) -> str:
    return block.place


# --- what blocks are -------------------------------------------------------------------------------------------------


def test_every_block_has_a_language_that_is_looked_at() -> None:
    unknown = [block.place for block in BLOCKS if block.language not in {*SHOWN, *COMMANDS, *PARSED}]
    assert not unknown, "say bash, console, json, yaml or python, or text for what is only shown"


def test_what_is_said_of_a_block_is_said_of_commands() -> None:
    assert not [block.place for block in BLOCKS if block.said and block.language not in COMMANDS]


@pytest.mark.parametrize("block", some(*COMMANDS), ids=place)
def test_bash_can_read_it(block: Block) -> None:
    text = "\n".join(block.commands) if block.language == "console" else block.text
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{block.place}: {done.stderr}"
    done = subprocess.run(["bash", "-n"], input=script([block]), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{block.place}, as it is run: {done.stderr}"


@pytest.mark.parametrize("block", some(*PARSED), ids=place)
def test_it_can_be_parsed(block: Block) -> None:
    PARSED[block.language](block.text)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.is_configuration], ids=place)
def test_a_configuration_is_loaded(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "reader.conf"
    file.write_text(block.text, encoding="utf-8")
    config = load_config(str(file), (), {"HOME": str(tmp_path)}, CONFIGURATIONS, datetime.now(), tmp_path, tmp_path)
    shipped = "".join(path.read_text(encoding="utf-8") for path in CONFIGURATIONS.glob("*.conf"))
    names = [name for warning in config.warnings for name in re.findall(r"[A-Z][A-Z_]+(?= \()", warning.what)]
    assert len(names) == len(config.warnings), config.warnings
    assert not [name for name in names if f"${{{name}" not in shipped], (
        "neither a key nor read by a shipped configuration"
    )
    said = set(re.findall(r"^([A-Z_]+)=", block.text, re.MULTILINE))
    assert said
    assert said <= {*config.sources, *names}


# --- what is said of them --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.said], ids=place)
def test_no_comment_is_dead(block: Block) -> None:
    """Each word that is replaced stands there, each command that is left out too, and some are left."""
    for word, instead in block.replaced.items():
        without = Block(
            block.place, block.language, block.text, tuple(s for s in block.said if s[1] != f"{word} = {instead}")
        )
        assert typed(without) != typed(block), f"{block.place}: {word} does not stand there"
    for command in block.left_out:
        assert any(line.startswith(command) for line in block.commands), f"{block.place}: no command begins {command}"
    words = {word for word, _ in block.said}
    assert block.is_run or len(words) == 1, f"{block.place}: it is not run, so all else has no effect"
    assert not block.is_run or typed(block).strip(), f"{block.place}: all is left out; say skip"


def test_the_tests_that_do_it_instead_are_there() -> None:
    named = {file for *_, reason in exceptions(BLOCKS) for file in re.findall(r"tests/[\w/]+\.py", reason)}
    assert not [file for file in named if not (ROOT / file).is_file()]


# --- command lines ---------------------------------------------------------------------------------------------------


class Accepted(BaseException):
    """The parser took the command line; nothing has been done."""


def shown_command_lines() -> list[tuple[str, str]]:
    """Each command line of launch.py in the documents, with its place: typed, shown with its output, or in the text."""
    found = [(block.place, line) for block in some(*COMMANDS) for line in block.commands if not block.is_configuration]
    for block in some(*SHOWN):
        found += [(block.place, line[2:]) for line in block.text.splitlines() if line.startswith("$ ")]
    for name in documents():
        text = re.sub(r"^```.*?^```$", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        found += [(name, " ".join(line.split())) for line in re.findall(r"`(\./slurm/launch\.py [^`]+)`", text)]
    return [(where, line) for where, line in dict.fromkeys(found) if "launch.py" in line]


def arguments_in(command: str) -> list[list[str]]:
    """The arguments of each launch.py in a command line."""
    found = []
    for words in simple_commands(command.replace("…", "")):
        at = [index for index, word in enumerate(words) if word.endswith("launch.py")]
        found += [words[at[0] + 1 :]] if at else []
    return found


def refused(argv: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Why launch.py refuses a command line; empty where it takes it. Nothing is done."""
    parse = argparse.ArgumentParser.parse_args

    def parse_alone(parser: argparse.ArgumentParser, *args: object, **more: object) -> None:
        try:
            parse(parser, *args, **more)
        except UsageError as problem:
            raise Accepted(str(problem)) from None
        raise Accepted("")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_alone)
    try:
        cli.main(argv)
    except Accepted as end:
        return str(end)
    except SystemExit as end:
        return f"exit code {end.code}" if end.code else ""
    raise AssertionError(f"{shlex.join(argv)} has not asked a parser")


def test_there_are_command_lines() -> None:
    assert len(shown_command_lines()) > 40


@pytest.mark.parametrize(("where", "command"), shown_command_lines(), ids=[line for _, line in shown_command_lines()])
def test_launch_takes_the_command_line(where: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for argv in arguments_in(command):
        assert not refused(argv, monkeypatch), f"{where}: {command}"
        name = argv[argv.index("--config") + 1] if "--config" in argv[:-1] else ""
        is_shipped = name.isascii() and name.islower() and "/" not in name and not name.endswith(".conf")
        assert not is_shipped or (CONFIGURATIONS / f"{name}.conf").is_file(), f"{where}: there is no {name}.conf"


@pytest.mark.parametrize("argv", [["--confg", "dev"], ["status", "--wach"], ["wait"], ["list", "--json=3"]])
def test_a_wrong_command_line_would_be_noticed(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(argv, monkeypatch)


def test_programs_of_the_checkout_are_there() -> None:
    typed_ones = [block for block in some(*COMMANDS) if not block.is_configuration]
    words = [words for block in typed_ones for line in block.commands for words in simple_commands(line)]
    modules = {part[part.index("-m") + 1] for part in words if "-m" in part and "python" in part[0]}
    files = {
        word for part in words for word in part if re.match(r"(\./)?(slurm|scripts|benchmarks|tests)/[\w/]+", word)
    }
    assert modules
    assert files
    stems = [ROOT / name.replace(".", "/") for name in modules - {"pytest", "pip"}]
    assert not [stem for stem in stems if not stem.with_suffix(".py").is_file() and not stem.is_dir()]
    assert not [name for name in files if not (ROOT / name).exists()]


# --- the reading itself ----------------------------------------------------------------------------------------------

TEXT = """\
Words.

<!-- run:
with: 102 = "$(newest_id)"
with: production = dev
leave out: ./never (it never ends)
before: touch before
then: touch after
-->
```bash
./launch --config production 102 1020 \\
    --more   # production
./never 102
cd there && ./go
```
"""


def test_a_block_becomes_what_its_reader_types() -> None:
    (block,) = blocks_of("x.md", TEXT)
    assert (block.place, block.document, block.language, block.is_run) == ("x.md:10", "x.md", "bash", True)
    assert typed(block).splitlines() == [
        './launch --config dev "$(newest_id)" 1020     --more   # dev',
        "cd there && ./go || false",
    ]
    assert script([block]).partition("\nat x.md:10\n")[2].splitlines()[0] == "touch before"
    assert script([block]).splitlines()[-1] == "touch after"
    assert list(exceptions([block])) == [("x.md", "./never", "it never ends")]


@pytest.mark.parametrize(
    "text",
    [
        "<!-- run: skip: why -->\n\n```bash\nx\n```\n",  # not right before it
        "<!-- run: skip: why -->\n",
        "<!-- run: skip -->\n```bash\nx\n```\n",  # no reason
        "<!-- run: skipp: why -->\n```bash\nx\n```\n",
        "<!-- run: leave out: x -->\n```bash\nx\n```\n",  # no reason
        "<!-- run: with: x -->\n```bash\nx\n```\n",
        "<!-- run:\n```bash\nx\n```\n",  # no end
        "<!-- run: -->\n```bash\nx\n```\n",
    ],
)
def test_a_comment_that_means_nothing_is_a_mistake(text: str) -> None:
    with pytest.raises(Mistake):
        list(blocks_of("x.md", text))


def test_a_command_of_a_console_is_what_follows_its_prompt() -> None:
    (block,) = blocks_of("x.md", "```console\n$ one | two\nits output\n$ three\n```\n")
    assert block.commands == ["one | two", "three"]
    assert simple_commands(block.commands[0]) == [["one"], ["two"]]


def typed_in_bash(text: str, folder: Path) -> tuple[int, str]:
    """The exit code of what the reader of a document types, and all that is printed."""
    argv = ["bash", "-c", script(list(blocks_of("x.md", text)))]
    done = subprocess.run(argv, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("false   # fails", 1),
        ("(exit 7)", 7),
        ("(exit 7) && echo on", 1),
        ("printf x | (exit 3)", 3),
        ("nowhere-to-be-found", 127),
    ],
)
def test_the_first_command_that_fails_ends_it_and_is_named(command: str, code: int, tmp_path: Path) -> None:
    ended, said = typed_in_bash(f"```bash\necho first\n{command}\necho last\n```\n", tmp_path)
    assert ended == code
    assert f"x.md:1: exit code {code} of: " in said
    assert "first\n" in said
    assert "last" not in said


def test_blocks_share_a_shell_and_what_may_fail_may_fail(tmp_path: Path) -> None:
    text = """\
```bash
mkdir -p there && cd there
export SAID=kept
```
<!-- run:
before: touch made
may end with: 7 (as one sees)
then: test -e made
-->
```bash
(exit 7)   # a remark
test "$SAID" = kept && test -e ../there/made
```
<!-- run: skip: never -->
```bash
exit 9
```
"""
    assert typed_in_bash(text, tmp_path)[0] == 0
    assert (tmp_path / "there" / "made").exists()
    assert typed_in_bash(text.replace("(exit 7)", "(exit 8)"), tmp_path)[0] == 1


def test_a_configuration_is_written_where_its_reader_writes_it(tmp_path: Path) -> None:
    text = "<!-- run: configuration: my.conf -->\n```bash\nA='$HOME'\n```\n```bash\ngrep -q 'A=.$HOME' my.conf\n```\n"
    assert typed_in_bash(text, tmp_path)[0] == 0
    assert (tmp_path / "my.conf").read_text() == "A='$HOME'\n"


def test_soon_waits_for_what_comes(tmp_path: Path) -> None:
    text = "```bash\n(sleep 0.5; touch it) &\nsoon test -e it\n```\n"
    assert typed_in_bash(text, tmp_path)[0] == 0
