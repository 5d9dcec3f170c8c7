"""Secrets: which names hold one, and that no spelling of a value gets through."""

from __future__ import annotations

import base64
import json
import os
import shlex
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm.lib.conf_source import source_conf
from slurm.lib.secrets import is_secret_name, mask_values, masked, redact_conf, secret_values

KEY = "sk-Pl4nted+key/0123456789~é"
SHIPPED = sorted((Path(__file__).parent.parent / "slurm" / "config").glob("*.conf"))


SECRET = """
    ALLHANDS_API_KEY WANDB_API_KEY HF_TOKEN hf_token GITHUB_TOKEN AWS_SECRET_ACCESS_KEY AWS_ACCESS_KEY_ID DB_PASSWORD
    MYSQL_PASSWD PGPASSWORD OPENAI_APIKEY apiKey authToken GOOGLE_APPLICATION_CREDENTIALS DB_PASS GH_PAT
    SSH_PASSPHRASE SLURM_JWT DOCKER_AUTH_CONFIG CREDENTIAL KEY
"""
HARMLESS = """
    MAX_TOKENS MAX_TOKEN TOKENIZERS_PARALLELISM KEYBOARD SSH_AUTH_SOCK MONKEY PATH PWD OLDPWD API_KEY_FILE BYPASS
    TOKEN_LIMIT PASS_THROUGH KEYMAP XAUTHORITY SECRETARY MODEL HF_HOME _
"""


@pytest.mark.parametrize("name", SECRET.split())
def test_secret_names(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", HARMLESS.split())
def test_other_names(name: str) -> None:
    assert not is_secret_name(name)


def _spellings(value: str) -> list[str]:
    raw = value.encode()
    encoded = [base64.b64encode(part) for part in (raw, b"u:" + raw, b"us:" + raw, b"use:" + raw, raw + b"\n")]
    return [
        value,
        json.dumps(value),
        shlex.quote(value),
        quote(value, safe=""),
        *[text.decode() for text in encoded],
        base64.urlsafe_b64encode(raw).decode(),
    ]


@pytest.mark.parametrize("spelling", _spellings(KEY))
def test_every_spelling_is_masked(spelling: str) -> None:
    shown = mask_values(f"before {spelling} after", {KEY})
    assert shown.startswith("before ") and shown.endswith(" after") and "***" in shown
    assert KEY not in shown
    core = base64.b64encode(KEY.encode()).decode()[4:-6]
    assert core not in shown


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=4), st.text(), st.text())
def test_a_value_never_survives(value: str, before: str, after: str) -> None:
    shown = mask_values(before + value + after, {value})
    if value.strip() and len(value.strip()) >= 4 and "*" not in value:
        assert value not in shown


def test_short_values_and_no_values_change_nothing() -> None:
    assert mask_values("a=123 b=", {"123", ""}) == "a=123 b="
    assert mask_values("text", set()) == "text"


def test_a_value_within_another_is_masked_whole() -> None:
    assert mask_values("x abcdef y", {"abcd", "abcdef"}) == "x *** y"


def test_masked_by_name_and_by_value() -> None:
    shown = masked({"API_KEY": KEY, "CURL": f"curl -H 'X-Key: {KEY}'", "N": "4", "PIN_KEY": "1", "EMPTY_KEY": ""})
    assert shown == {"API_KEY": "***", "CURL": "curl -H 'X-Key: ***'", "N": "4", "PIN_KEY": "***", "EMPTY_KEY": ""}


def test_a_password_in_a_url_is_a_secret() -> None:
    environment = {"https_proxy": "http://me:hunter22@proxy:3128", "API_KEY": "abcd"}
    assert secret_values(environment) == {"hunter22", "abcd"}
    assert masked(environment)["https_proxy"] == "http://me:***@proxy:3128"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_conf_without_secrets_stays_as_it_is(path: Path) -> None:
    assert redact_conf(path.read_text(), {KEY}) == path.read_text()


LEFT_OUT = [
    ("API_KEY=abc", "API_KEY=${API_KEY-}"),
    ("export API_KEY='a b' # why\nX=1", "export API_KEY=${API_KEY-} # why\nX=1"),
    ('API_KEY="a \'b\' $(echo ")") c"; X=1', "API_KEY=${API_KEY-}; X=1"),
    ("API_KEY=a'b c'\"d e\"\\ f X=1", "API_KEY=${API_KEY-} X=1"),
    ("API_KEY='a\nb\nc' X=1\nY=2", "API_KEY=${API_KEY-}\\\n\\\n X=1\nY=2"),
    ("KEYS=(a\n 'b c')\nX=1", "KEYS=${KEYS-}\\\n\nX=1"),
    ("API_KEY+=abc", "API_KEY=${API_KEY-}"),
    ("# API_KEY=old one\nX=1", "# API_KEY=${API_KEY-}\nX=1"),
    ("X=${API_KEY:-abc}/x", "X=${API_KEY:-}/x"),
    ("X=\"${API_KEY:-it's}\" Y='kept'", "X=\"${API_KEY:-}\" Y='kept'"),
    (': "${API_KEY:=abc}"', ': "${API_KEY:=}"'),
    ("X='API_KEY=abc other' Y=1", "X='API_KEY=${API_KEY-} other' Y=1"),
    ("if true; then API_KEY=abc; fi", "if true; then API_KEY=${API_KEY-}; fi"),
    ("declare -x API_KEY=$'a\\'b' X=1", "declare -x API_KEY=${API_KEY-} X=1"),
    ("API_KEY=$(cat <<<abc)\n", "API_KEY=${API_KEY-}\n"),
    ("API_KEY=`cat abc`\n", "API_KEY=${API_KEY-}\n"),
]


@pytest.mark.parametrize(("text", "copy"), LEFT_OUT)
def test_secret_assignments_are_left_out(text: str, copy: str) -> None:
    assert redact_conf(text, set()) == copy
    assert redact_conf(copy, set()) == copy
    assert copy.count("\n") == text.count("\n")


@pytest.mark.parametrize(
    "text",
    [
        "MAX_TOKENS=5\n",
        'echo "$API_KEY" ${API_KEY} ${#API_KEY}\n',
        "[[ $API_KEY == x ]]\n",
        "it='a # b'  # don't\nX=\"# no\"\n",
        "API_KEY=\n",
        "X=1\\\n  Y=2\n",
    ],
)
def test_everything_else_is_byte_identical(text: str) -> None:
    assert redact_conf(text, {KEY}) == text


def test_values_found_elsewhere_are_masked() -> None:
    encoded = base64.b64encode(KEY.encode()).decode()
    text = f"# the key is {KEY}\nHEADER='X-Session-API-Key: {KEY}'\nB64={encoded}\n"
    assert redact_conf(text, {KEY}) == "# the key is ***\nHEADER='X-Session-API-Key: ***'\nB64=***\n"


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=4).map(lambda s: "sk-" + s))
def test_any_quoted_secret_is_gone_and_its_neighbours_stay(value: str) -> None:
    before, after = "X='it'\"s\"\n", " # comment\nY=2\n"
    copy = redact_conf(f"{before}export API_KEY={shlex.quote(value)}{after}", set())
    assert copy.replace("\\\n", "") == f"{before}export API_KEY=${{API_KEY-}}{after}"


def test_a_copy_still_runs_and_takes_the_key_from_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "copy.conf"
    path.write_text(redact_conf(f"A=1\nexport API_KEY='{KEY}\nmore' B=2  # c\nC=3\n", {KEY}))
    conf = source_conf(path, {"PATH": os.environ["PATH"], "API_KEY": "theirs"})
    assert (conf.problems, conf.values) == ((), {"A": "1", "API_KEY": "theirs", "B": "2", "C": "3"})
    assert conf.lines["C"] == (path, 4)
