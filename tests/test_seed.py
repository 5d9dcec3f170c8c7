"""Has each part of the document that this suite grew from a row in ``docs/seed.md``, and each row a test?

``seed_inventory.json`` is what the document names: its sections, commands, files and settings, taken out of it by hand
(``…`` for the folders of its site). The tests that the rows name run what they say; most are in
``test_seed_commands.py``. That those which ``docs/migration.md`` names exist is seen to here as well.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from slurm.lib.config import load_config
from slurm.lib.settings import KEYS
from tests.page_rows import ROOT, collected_tests, named_tests, rows, words

PAGE, MIGRATION = ROOT / "docs" / "seed.md", ROOT / "docs" / "migration.md"
SEED: dict[str, Any] = json.loads((ROOT / "tests" / "seed_inventory.json").read_text(encoding="utf-8"))


def test_each_section_has_its_place() -> None:
    headings = re.findall(r"^#+ (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[1:] == SEED["sections"]


@pytest.mark.parametrize("part", ["commands", "files", "settings"])
def test_each_word_has_a_row(part: str) -> None:
    named = SEED[part] if part != "settings" else {key for block in SEED[part].values() for key in block}
    assert sorted(set(named) - words(" ".join(row.cells[0] for row in rows(PAGE)))) == []


def test_each_row_has_a_test_and_each_test_is_collected() -> None:
    assert [row for row in rows(PAGE) if len(row.cells) != 3 or not named_tests(row.cells[2])] == []
    faults = [row for row in rows(MIGRATION) if row.section == "What went wrong"]
    assert [row for row in faults if not named_tests(row.cells[-1])] == []
    named = {test for page in (PAGE, MIGRATION) for test in named_tests(page.read_text(encoding="utf-8"))}
    assert sorted(named - collected_tests({file for file, _ in named})) == []


@pytest.mark.parametrize("block", SEED["settings"])
def test_its_settings_make_a_configuration(tmp_path: Path, block: str) -> None:
    """As they stand there, in a file that reads ours first; each is one of our keys, and no word of them is doubted."""
    said: dict[str, str] = {key: value.replace("…", "/data") for key, value in SEED["settings"][block].items()}
    assert set(said) <= KEYS.keys()
    file = tmp_path / "seed.conf"
    lines = [f'{key}="{value}"' for key, value in said.items()]
    file.write_text("\n".join(['source "$SKYRL_CONFIG_DIR/dev.conf"', *lines, ""]))
    place = (ROOT / "slurm" / "config", datetime(2026, 3, 4), tmp_path)
    loaded = load_config(str(file), [], {"HOME": str(tmp_path)}, *place)
    assert loaded.warnings == ()
    taken = loaded.settings.as_environment()
    expected = {key: value.replace("${DATA_DIR}", said.get("DATA_DIR", "")) for key, value in said.items()}
    assert {key: taken[key] for key in expected} == expected
