"""What a kept diff does not have: changes of .env files, and values that their names say are secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from slurm.lib.diff_text import open_diff
from slurm.lib.git import git_state
from tests.test_git import git, repository

VALUE = "hf_abcDEF123456"


def diff_of(name: str, *lines: str, heading: str = "") -> str:
    body = "".join(f"+{line}\n" for line in lines)
    return f"diff --git a/{name} b/{name}\n--- a/{name}\n+++ b/{name}\n@@ -0,0 +1,{len(lines)} @@{heading}\n{body}"


def kept(name: str, line: str) -> str:
    return open_diff(diff_of(name, line), ())[0].splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("mine.conf", "HF_TOKEN=VALUE"),
        ("mine.conf", 'HF_TOKEN="VALUE" # of the group'),
        ("mine.conf", "# export HF_TOKEN=VALUE"),
        ("mine.conf", "export PLACE=x HF_TOKEN=VALUE"),
        ("mine.conf", "TOKEN_FILE=x HF_TOKEN=VALUE"),
        ("mine.conf", 'HF_TOKEN="${HF_TOKEN:-VALUE}"'),
        ("mine.conf", "KEYS+=(VALUE b)"),
        ("mine.conf", "NOTIFY='https://hooks.example/VALUE'"),
        ("run.sh", "HF_TOKEN=VALUE python train.py"),
        ("run.sh", 'curl -H "Authorization: Bearer VALUE"'),
        ("a.yaml", "  api_key: VALUE"),
        ("a.yaml", "place: x, api_key: VALUE"),
        ("a.yaml", "password: two words VALUE"),
        ("a.json", '"wandb_api_key": "VALUE",'),
        ("a.json", '{"place": "x", "api-key": "VALUE"}'),
        ("a.json", '"keys": ["VALUE"]'),
        ("a.toml", 'secret = "VALUE"'),
        ("Dockerfile", "ENV HF_TOKEN=VALUE"),
        ("a.py", 'HF_TOKEN = "VALUE"'),
        ("a.py", "login(token='VALUE')"),
        ("a.py", 'api_key: str | None = "VALUE"'),
        ("a.py", 'os.environ["HF_TOKEN"] = "VALUE"'),
        ("a.py", 'os.environ.get("HF_TOKEN", "VALUE")'),
        ("a.py", 'x = {"place": x, "token": "VALUE"}'),
        ("a.ipynb", '    "token = \\"VALUE\\"\\n",'),
        ("README.md", "HF_TOKEN=VALUE slurm/launch.py"),
        ("a.py", 'proxy = "http://me:VALUE@proxy:3128"'),
        ("pip.conf", "index-url = https://me:VALUE@pypi.example/simple"),
    ],
)
def test_a_value_goes_and_its_name_stays(name: str, line: str) -> None:
    said = kept(name, line.replace("VALUE", VALUE))
    assert VALUE not in said
    assert "***" in said
    assert said.startswith(f"+{line[:4]}")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("a.py", "rows.sort(key=len_of_response, reverse=True)"),
        ("a.py", "token = tokenizer.decode(ids)"),
        ("a.py", 'tokenizer = load(pad_token="<pad>", eos_token="</s>", mask="[MASK]")'),
        ("a.py", "max_tokens: int = 4096"),
        ("a.py", 'token = os.environ["HF_TOKEN"]'),
        ("a.py", "if key == 'response_length':"),
        ("a.py", "for key, value in rows.items():"),
        ("mine.conf", 'MODEL="Qwen/Qwen3-1.7B"'),
        ("mine.conf", "HF_TOKEN=$MY_TOKEN"),
        ("mine.conf", 'HF_TOKEN="${HF_TOKEN-}"'),
        ("run.sh", 'if [[ $key == "x" ]]; then'),
        ("run.sh", "token=$(cat ~/.token)"),
        ("a.yaml", "max_token: 5"),
    ],
)
def test_code_stays_as_it_is(name: str, line: str) -> None:
    assert kept(name, line) == f"+{line}"


def test_the_heading_of_a_hunk_repeats_a_line() -> None:
    assert VALUE not in open_diff(diff_of("mine.conf", "A=1", heading=f" HF_TOKEN={VALUE}"), ())[0]


def test_a_private_key_goes_whole() -> None:
    lines = ("A=1", "-----BEGIN OPENSSH PRIVATE KEY-----", VALUE, VALUE, "-----END OPENSSH PRIVATE KEY-----", "B=2")
    said = open_diff(diff_of("notes", *lines), ())[0]
    assert VALUE not in said
    assert "+A=1\n" in said and said.endswith("+B=2\n")


def test_what_is_known_to_be_secret_goes_wherever_it_stands() -> None:
    assert kept("a.py", f"# {VALUE}") == f"+# {VALUE}"
    assert VALUE not in open_diff(diff_of("a.py", f"# {VALUE}"), (VALUE,))[0]


def test_env_files_are_left_out_and_named(tmp_path: Path) -> None:
    """With the real git: text or not, new, renamed, or gone; the rest can still be applied."""
    tree = repository(tmp_path / "tree")
    (tree / "sub dir").mkdir()
    for name in (".env", "sub dir/.env.local", ".env.example", "moved"):
        (tree / name).write_text("A=1\nB=2\nC=3\n")
    git(tree, "add", "-f", ".")
    git(tree, "commit", "-qm", "x")
    git(tmp_path, "clone", "-q", str(tree), str(tmp_path / "again"))
    (tree / ".env").write_text(f"A={VALUE}\n")
    (tree / "sub dir" / ".env.local").write_bytes(bytes(range(256)))
    (tree / ".env.example").write_text("A=2\n")
    (tree / "a.py").write_text("two\n")
    (tree / "moved").rename(tree / ".envrc")
    git(tree, "add", "-f", ".")
    text, left_out = open_diff((git_state(tree).diff or b"").decode(), ())
    assert sorted(left_out) == [".env", ".envrc", "sub dir/.env.local"]
    assert VALUE not in text
    (tmp_path / "diff").write_text(text)
    git(tmp_path / "again", "apply", str(tmp_path / "diff"))
    assert (tmp_path / "again" / "a.py").read_text() == "two\n"
    assert (tmp_path / "again" / ".env.example").read_text() == "A=2\n"


def test_a_quoted_name_is_one_too() -> None:
    text = 'diff --git "a/x\\ty/.env" "b/x\\ty/.env"\n--- "a/x\\ty/.env"\n+++ "b/x\\ty/.env"\n@@ -1 +1 @@\n-A=1\n+A=2\n'
    assert open_diff(text, ()) == ("", ["x\\ty/.env"])
