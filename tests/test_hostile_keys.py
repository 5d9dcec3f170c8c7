"""Hostile values of the keys that the suite knows: carried exactly or refused by name, and never run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slurm.lib import settings as parsers
from slurm.lib.config import LoadedConfig, load_config
from slurm.lib.errors import ConfigError
from slurm.lib.settings import KEYS, Key
from tests import faults
from tests.faults import within

pytestmark = pytest.mark.faults

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "slurm" / "config"
NOW = datetime(2026, 3, 4, 5, 6, 7)
ENVIRONMENT = {"PATH": os.environ["PATH"], "HOME": "/home/me"}
CWD = Path("/srv/here")
# Those that take words that nobody can foresee. All others know what they take: numbers, names, choices, addresses.
FREE = {
    *(parsers.text, parsers.word, parsers.path, parsers.words, parsers.sbatch_words, parsers.hydra_overrides),
    *(parsers.secret, parsers.experiment),
}
TEXT = st.text(st.characters(exclude_characters="\0"), max_size=30)  # with lone surrogates, as bytes that are no UTF-8


def hostile(canary: Path) -> list[str]:
    """Values by which a shell, or Slurm, would make the file ``canary``."""
    touch = f"touch {canary}"
    whole = touch.replace(" ", "${IFS}")
    return [
        *(f"$({touch})", f"`{touch}`", f"; {touch};", f"' ; {touch} ; '", f'" ; {touch} ; "', f"x\n{touch}\n"),
        *(f"$({whole})", f"a;{whole}", f"${{X:=$({whole})}}", f"&&{whole}", f"|{whole}", f"'$({whole})", f'"`{whole}`'),
        *(f"x=$({whole})", f"--wrap=$({whole})", f"--help;{whole}", f"%j\\$({whole})", f"\udcff$({whole})", "\\\n\\"),
        *(
            f"a[$({whole})]",
            f"$'\\x24({whole})'",
            f"=({whole})",
            f"<({whole})",
            f"!{whole}!!",
            f"~{whole}",
            f"({whole}",
        ),
    ]


def loaded(overrides: list[str], **environment: str) -> LoadedConfig:
    return load_config(None, overrides, {**ENVIRONMENT, **environment}, SHIPPED, NOW, Path("/project"), cwd=CWD)


def carried(key: Key, value: str, overridden: bool) -> bool:
    """Whether the key takes a value: then exactly, and so that a job reads the same; else the refusal names it."""
    try:
        found = loaded([f"{key.name}={value}"]) if overridden else loaded([], **{key.name: value})
    except ConfigError as refusal:
        assert any(key.name in str(problem) for problem in refusal.problems), str(refusal)
        return False
    got = getattr(found.settings, key.attribute)
    as_path = key.parse is parsers.path or re.match(r"[/.~]", value)
    if value.strip() and key.parse is parsers.text and not as_path:
        assert got == value, key.name
    if value.strip() and key.parse is parsers.path and not value.startswith("~"):
        assert str(got) == os.path.normpath(CWD / value), key.name
    said = found.settings.as_environment()
    assert loaded([], **said).settings == found.settings, key.name
    return True


@pytest.mark.parametrize("name", KEYS)
def test_a_key_carries_a_hostile_value_exactly_or_refuses_it(tmp_path: Path, name: str) -> None:
    key, canary = KEYS[name], tmp_path / "canary"
    for value in hostile(canary):
        for overridden in (False, True):
            taken = carried(key, value, overridden)
            assert not taken or key.parse in FREE, f"{name}={value}"
            assert taken or key.parse is not parsers.text, f"{name}={value}"
    assert not canary.exists()


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(KEYS)), value=TEXT, overridden=st.booleans())
def test_a_key_carries_any_text_exactly_or_refuses_it(name: str, value: str, overridden: bool) -> None:
    carried(KEYS[name], value, overridden)


def quoted(value: str) -> str:
    return "'" + value.replace("'", "'\\''") + "'"


def launched(conf: Path, values: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    """A launch with these values in its file."""
    text = "".join(f"{name}={quoted(value)}\n" for name, value in values.items())
    conf.write_bytes(os.fsencode(text))
    argv = [sys.executable, str(ROOT / "slurm" / "launch.py"), "--config", str(conf), *options]
    environment = {"PATH": os.environ["PATH"], "HOME": str(conf.parent)}
    return subprocess.run(
        argv, cwd=conf.parent, env=environment, capture_output=True, errors="surrogateescape", timeout=60, check=False
    )


def test_a_launch_names_every_key_that_it_refuses_and_shows_the_others(tmp_path: Path) -> None:
    """A third of the values, one of each kind: a launch takes half a second."""
    canary, conf = tmp_path / "canary", tmp_path / "mine.conf"
    for value in hostile(canary)[::3]:
        every = dict.fromkeys(KEYS, value)
        done = launched(conf, every, "--dry-run")
        assert done.returncode == 2, done.stderr
        refused = {name for name in KEYS if re.search(rf":\d+: {name}=", done.stderr)}
        assert refused >= {name for name, key in KEYS.items() if key.parse not in FREE}, done.stderr
        others = {name: value for name in KEYS if name not in refused}
        for number in range(3):  # what only shows once the rest is right, such as an address of a backslash
            done = launched(conf, others, "--dry-run")
            assert "Traceback" not in done.stderr
            if done.returncode == 0:
                break
            named = {name for name in others if f"{name}=" in done.stderr}
            assert done.returncode == 2, done.stderr
            assert named, f"{number}: {done.stderr}"
            others = {name: value for name, value in others.items() if name not in named}
        assert done.returncode == 0, done.stderr
        masked = "ALLHANDS_API_KEY" in others  # then wherever it stands
        assert (shlex.quote(value) in done.stdout) is not masked, value
        checked = launched(
            conf, {**others, "TRAINING_COMMAND": ""}, "--check"
        )  # of VERL, which there is most to say of
        assert checked.returncode == 2, checked.stderr
        assert "Traceback" not in checked.stderr
        assert not canary.exists(), value
    within(faults.HOSTILE_KEYS, 0.0)
