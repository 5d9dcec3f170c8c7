"""Sourcing a ``.conf`` with real bash: exact values, exact lines, every failure reported."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slurm.lib.conf_source import SourcedConf, source_conf

ENVIRONMENT = {"PATH": os.environ["PATH"], "HOME": "/home/someone", "SAME": "as before", "OTHER": "x"}
Source = Callable[..., SourcedConf]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    def run(text: str, timeout_s: float = 10, **environment: str) -> SourcedConf:
        path = tmp_path / "x.conf"
        path.write_bytes(os.fsencode(text))
        return source_conf(path, {**ENVIRONMENT, **environment}, timeout_s)

    return run


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("X=5  # a comment", "X", "5"),
        ("X='single $HOME'", "X", "single $HOME"),
        ('A=/a\nX="${A}/x y"', "X", "/a/x y"),
        ("X=${NOT_THERE:-y z}", "X", "y z"),
        ("X=${OTHER:-y}", "X", "x"),
        (": ${X:=given}", "X", "given"),
        ("X=$(echo out; echo noise >&2)", "X", "out"),
        ("X=$((3 * 4))", "X", "12"),
        ("X='two\nlines\n'", "X", "two\nlines\n"),
        ("X=$'tab\\there'", "X", "tab\there"),
        ("X=ünïcödé→", "X", "ünïcödé→"),
        ("X=a;X+=b", "X", "ab"),
        ("export X=5", "X", "5"),
        ("declare -rx X='5 6'", "X", "5 6"),
        ("declare -i X=2+3", "X", "5"),
        ("printf -v X %s made", "X", "made"),
        ("read -r X <<< 'a b'", "X", "a b"),
        ("if true; then X=yes; fi", "X", "yes"),
        ("f() { X=$1; }\nf inside", "X", "inside"),
        ("set -euo pipefail\nX=1", "X", "1"),
        ("X=''", "X", ""),
        ("SAME='as before'", "SAME", "as before"),
        ("X=(a 'b c' '')", "X", ("a", "b c", "")),
        ("X=([5]=late [2]=early)", "X", ("early", "late")),
        ("X=(one)\nX+=('two\nlines')", "X", ("one", "two\nlines")),
        ("X=()", "X", ()),
        ('set -f; IFS=,; X="a,b"', "X", "a,b"),
        ("printf() { :; }; X=1", "X", "1"),
        ("exec 3>/dev/null; X=1", "X", "1"),
        ("set -x; X=1; set +x; Y=2", "X", "1"),
        ("echo X=printed; X=real", "X", "real"),
    ],
)
def test_what_bash_does_comes_back(source: Source, text: str, name: str, value: object) -> None:
    conf = source(text)
    assert conf.problems == ()
    assert conf.values[name] == value


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scalars=st.lists(TEXT, min_size=1, max_size=12), array=st.lists(TEXT, max_size=6))
def test_any_string_round_trips(source: Source, scalars: list[str], array: list[str]) -> None:
    scalars = [value.replace("\r\n", "\r") for value in scalars]  # a file with Windows line ends is refused
    array = [value.replace("\r\n", "\r") for value in array]
    lines = [f"X{number}={shlex.quote(value)}" for number, value in enumerate(scalars)]
    lines.append(f"ARRAY=({' '.join(map(shlex.quote, array))})")
    conf = source("\n".join(lines) + "\n")
    assert conf.problems == ()
    assert conf.values == {**{f"X{number}": value for number, value in enumerate(scalars)}, "ARRAY": tuple(array)}


def test_bytes_that_are_not_utf8_survive(source: Source) -> None:
    assert source("X='\udcff'").values["X"] == "\udcff"


def test_only_what_the_file_did_is_a_value(source: Source) -> None:
    conf = source("X=1\ncd /\nLC_ALL=C true\nOTHER=temporary true\n(Y=1)\nZ=$(W=2; echo 3)\nf() { local V=1; }\nf")
    assert conf.values == {"X": "1", "Z": "3"}


def test_lines_are_where_the_assignment_begins(source: Source, tmp_path: Path) -> None:
    text = (
        "# c\nA=1\nB='x\ny\nz'\n\nC=(a\n b)\nf() {\n  D=1\n}\nf\nread -r E <<< e\n: ${F:=1}\nexport G='q\nr' H=2\nA=2\n"
    )
    lines = {name: line for name, (file, line) in source(text).lines.items() if file == tmp_path / "x.conf"}
    assert lines == {"A": 17, "B": 3, "C": 7, "D": 10, "E": 13, "F": 14, "G": 15, "H": 16}


def test_a_sourced_file_counts_with_its_own_lines(source: Source, tmp_path: Path) -> None:
    (tmp_path / "base.conf").write_text("\nBASE=1\nBOTH=1\n")
    conf = source('source "$(dirname "${BASH_SOURCE[0]}")/base.conf"\nBOTH=2\n')
    assert conf.values == {"BASE": "1", "BOTH": "2"}
    assert conf.lines == {"BASE": (tmp_path / "base.conf", 2), "BOTH": (tmp_path / "x.conf", 2)}
    assert conf.files == (tmp_path / "x.conf", tmp_path / "base.conf")


def test_a_function_of_the_environment_counts_where_it_is_called(source: Source, tmp_path: Path) -> None:
    conf = source("\nmodule load cuda\n", **{"BASH_FUNC_module%%": "() { eval 'CUDA_HOME=/cuda'; }"})
    assert conf.values == {"CUDA_HOME": "/cuda"}
    assert conf.lines == {"CUDA_HOME": (tmp_path / "x.conf", 2)}


def test_unset_and_associative_arrays_are_told_apart(source: Source) -> None:
    conf = source("unset OTHER\ndeclare -A MAP=([a]=1)\nX=${MAP[a]}\n")
    assert conf.values == {"X": "1"}
    assert conf.unset == {"OTHER"}
    assert conf.associative == {"MAP"}


def test_bash_start_up_files_do_not_run(source: Source, tmp_path: Path) -> None:
    (tmp_path / "rc").write_text("FROM_RC=1\n")
    rc = str(tmp_path / "rc")
    assert source("X=1", BASH_ENV=rc, ENV=rc, SHELLOPTS="noexec").values == {"X": "1"}


def test_what_the_file_prints_is_no_value_and_not_on_stdout(source: Source, capfd: pytest.CaptureFixture[str]) -> None:
    conf = source("echo to-stdout\necho to-stderr >&2\nX=1")
    out, err = capfd.readouterr()
    assert (conf.values, out) == ({"X": "1"}, "")
    assert "to-stdout" in err and "to-stderr" in err


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("A=1\nTIME_LIMIT =5\n", 2, "write TIME_LIMIT=VALUE"),
        ("A=1\n\nTIME_LIMIT= 5\n", 3, "write TIME_LIMIT=VALUE"),
        ("no-such-command-here\n", 1, "command not found"),
        ("X=$(no-such-command-here)\n", 1, "command not found"),
        ("A=1\nif then\n", 2, "syntax error"),
        ("A=1\nB='never closed\n", 2, "unexpected EOF"),
        ("set -u\nX=$NOT_THERE\n", 2, "unbound variable"),
        ("X=$((1 / 0))\n", 1, "division by 0"),
        ("source ./not-there.conf\n", 1, "No such file"),
        ("A=1\nexit 3\nB=2\n", 2, "exit code 3"),
        ("set -e\nfalse\nB=2\n", 2, "exit code 1"),
        ("A=1\nreturn 4\n", 2, "return 4"),
        ("readonly A=1\nA=2\n", 2, "readonly variable"),
    ],
)
def test_what_bash_rejects_is_a_problem_with_its_line(
    source: Source, tmp_path: Path, text: str, line: int, words: str
) -> None:
    (problem, *_) = source(text).problems
    assert problem.where == f"{tmp_path / 'x.conf'}:{line}"
    assert words in problem.what


@pytest.mark.parametrize(
    "text",
    [
        "X=$(no-such-command-here 2>/dev/null || echo 2)",
        "command -v no-such-command-here >/dev/null || X=2",
        "X=2\n[[ -n $NOT_THERE ]] && Y=1",
        "X=2\nreturn\nnonsense here",
        "X=2\nfalse",
    ],
)
def test_what_people_write_on_purpose_is_no_problem(source: Source, text: str) -> None:
    conf = source(text)
    assert (conf.problems, conf.values) == ((), {"X": "2"})


def test_a_rejected_line_with_a_secret_is_not_quoted(source: Source) -> None:
    for text in ("ALLHANDS_API_KEY= sk-hidden\n", "API_KEY=(sk-hidden &\n"):
        problems = source(text).problems
        assert problems
        assert "sk-hidden" not in "".join(map(str, problems))


@pytest.mark.parametrize(("content", "words"), [(b"X=1\r\nY=2\r\n", "Windows line ends"), (b"X=\0", "not a text file")])
def test_files_that_are_no_text_of_bash(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x.conf").write_bytes(content)
    (problem,) = source_conf(tmp_path / "x.conf", ENVIRONMENT).problems
    assert words in problem.what


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "absent.conf", "No such file"), (tmp_path, "directory")):
        (problem,) = source_conf(path, ENVIRONMENT).problems
        assert words in problem.what


def test_what_can_be_read_only_once_is_refused(tmp_path: Path) -> None:
    """A pipe without a writer would be waited for; one with a writer is empty once we have looked into it."""
    fifo = tmp_path / "fifo.conf"
    os.mkfifo(fifo)
    reading, writing = os.pipe()
    os.write(writing, b"GPU_NODES=7\n")
    os.close(writing)
    (tmp_path / "link.conf").symlink_to(fifo)
    regular = os.open(__file__, os.O_RDONLY)
    try:
        paths = [fifo, tmp_path / "link.conf", Path("/dev/null"), *(Path(f"/dev/fd/{fd}") for fd in (reading, regular))]
        for path in paths:
            (problem,) = source_conf(path, ENVIRONMENT).problems
            assert "is not a regular file" in problem.what, path
        assert os.read(reading, 100) == b"GPU_NODES=7\n", "nothing has been taken from it"
    finally:
        os.close(reading)
        os.close(regular)


def test_a_link_to_a_file_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.conf").write_text("X=1\n")
    (tmp_path / "link.conf").symlink_to(tmp_path / "x.conf")
    assert source_conf(tmp_path / "link.conf", ENVIRONMENT).values == {"X": "1"}


def test_a_path_with_spaces_and_quotes(tmp_path: Path) -> None:
    path = tmp_path / 'it\'s a "file" $HOME.conf'
    path.write_text("\nX=1\n")
    conf = source_conf(path, ENVIRONMENT)
    assert (conf.values, conf.lines) == ({"X": "1"}, {"X": (path, 2)})


def test_the_deadline_ends_the_file_and_its_children(source: Source, tmp_path: Path) -> None:
    conf = source(f"X=1\nsleep 300 & echo $! > {tmp_path}/pid\nsleep 300\n", timeout_s=0.5)
    (problem,) = conf.problems
    assert problem.where == f"{tmp_path / 'x.conf'}:3"
    assert "after 0.5 s" in problem.what
    assert _is_gone(int((tmp_path / "pid").read_text()))


def test_a_child_left_behind_is_ended_and_not_waited_for(source: Source, tmp_path: Path) -> None:
    conf = source(f"sleep 300 & echo $! > {tmp_path}/pid\nX=1\n")
    assert (conf.values["X"], conf.problems) == ("1", ())
    assert _is_gone(int((tmp_path / "pid").read_text()))


def _is_gone(pid: int) -> bool:
    """Whether the process has ended (a zombie has), given five seconds for the kernel's bookkeeping."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False
