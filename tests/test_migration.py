"""Says ``docs/migration.md`` of everything that the bash scripts had what became of it, and is it so?

``bash_suite_inventory.json`` is what they had: options, environment, keys with their defaults, files, names of jobs,
flags of their programs, and the faults that were measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from slurm.lib.config import load_config
from slurm.lib.settings import KEYS, said
from tests.page_rows import ROOT, Row, rows, words

PAGE = ROOT / "docs" / "migration.md"
BASH: dict[str, Any] = json.loads((ROOT / "tests" / "bash_suite_inventory.json").read_text(encoding="utf-8"))
PLAIN = ("options", "environment", "keys", "prebuild_keys", "variables", "files", "jobs")


def names() -> set[str]:
    """What the first cells name as code."""
    return words(" ".join(row.cells[0] for row in rows(PAGE)))


@pytest.mark.parametrize("part", PLAIN)
def test_each_name_has_a_row(part: str) -> None:
    found = {word.split("=")[0] for word in names()}
    assert [name for name in BASH[part] if name not in found] == []


def test_each_fault_has_a_row() -> None:
    assert [row.cells[0] for row in rows(PAGE) if row.section == "What went wrong"] == BASH["faults"]


def offered(*command: str) -> str:
    argv = [sys.executable, *command, "--help"]
    environment = {**os.environ, "COLUMNS": "500"}
    return subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


def test_the_launcher_takes_each_option() -> None:
    found = offered("slurm/launch.py").replace(",", " ").split()
    assert [option for option in BASH["options"] if option not in found] == []


@pytest.mark.parametrize("module", BASH["flags"])
def test_the_programs_take_each_flag_and_the_page_names_it(module: str) -> None:
    found = offered("-m", module).replace(",", " ").split()
    assert [flag for flag in BASH["flags"][module] if flag not in found or flag not in names()] == []


def key_rows() -> list[Row]:
    return [row for row in rows(PAGE) if row.section == "Keys"]


def default_here(name: str) -> str:
    """A default as a person would write it, also one that depends on other keys."""
    key = KEYS[name]
    return (
        said(key, key.default) if not key.default_text.startswith(("$", "skyrl-")) else key.default_text.split(";")[0]
    )


@pytest.mark.parametrize("name", BASH["keys"])
def test_a_key_is_called_the_same_where_it_is(name: str) -> None:
    (row,) = (row for row in key_rows() if row.cells[0] == f"`{name}`")
    there: str = BASH["keys"][name]
    assert row.cells[1] == (f"`{there}`" if there else "–")
    assert row.cells[2].startswith("the same") == (default_here(name) == there), row


def test_a_configuration_with_all_old_keys_is_taken(tmp_path: Path) -> None:
    values = {name: value for name, value in BASH["keys"].items() if value and name != "MAX_MODEL_LEN"}
    file = tmp_path / "old.conf"
    file.write_text("\n".join(["DATA_DIR=/data", *(f'{name}="{value}"' for name, value in values.items()), ""]))
    place = (ROOT / "slurm" / "config", datetime(2026, 3, 4), tmp_path)
    loaded = load_config(str(file), [], {"HOME": str(tmp_path)}, *place)
    assert loaded.warnings == ()
    taken = loaded.settings.as_environment()
    expected = {name: value.replace("${DATA_DIR}", "/data") for name, value in values.items()}
    assert {name: taken[name] for name in expected} == expected


def test_its_environment_and_its_prebuild_keys_are_keys() -> None:
    assert {*BASH["environment"], *BASH["prebuild_keys"]} <= KEYS.keys()
