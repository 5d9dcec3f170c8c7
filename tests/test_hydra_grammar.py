"""Do we read and write overrides as Hydra does? Compared with its own parser."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from slurm.lib.hydra_grammar import Override, hydra_value, read_override, value_said

PARSER = OverridesParser.create()


def read_by_hydra(override: str) -> tuple[str, object]:
    """Name and value of an override as Hydra's own parser and OmegaConf give them to VERL."""
    parsed = PARSER.parse_override(override)
    assert not parsed.is_sweep_override()
    value = OmegaConf.create({"value": parsed.value()})
    return override.partition("=")[0], OmegaConf.to_container(value, resolve=True)["value"]  # type: ignore[index, call-overload]  # a mapping


# --- values survive Hydra ---------------------------------------------------------------------------------------------

# Whatever can stand in an argument of a program; the special characters more often than chance would have it.
TEXT = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    st.text(st.sampled_from("\\'\"${}[]()=,: \n\tab1.-+~#%ä漢")),
)
VALUE = st.one_of(TEXT, st.booleans(), st.integers(-(10**9), 10**9), st.floats(1e-12, 1e12), st.lists(TEXT, max_size=3))


@given(VALUE)
def test_every_value_reaches_verl_as_it_is(value: object) -> None:
    found = read_by_hydra(f"a.b={hydra_value(value)}")[1]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", ["true", "Null", "123", "1e-6", "nan", "-inf", "${a}", r"\${a}", "a\\", "~", ".5", ""])
def test_text_that_hydra_would_take_for_something_else(text: str) -> None:
    assert read_by_hydra(f"a.b={hydra_value(text)}")[1] == text


# --- what an override says --------------------------------------------------------------------------------------------

FORMS = [
    ("a.b=c", "c"),
    ("+a.b=c", "c"),
    ("++a.b=c", "c"),
    ("~a.b", None),
    ("~a.b=c", None),
    ("a.b=", ""),
    ("a.b=''", ""),
    ("a.b= c ", "c"),
    ("a.b= 'c d'", "c d"),
    ("a.b=c d", "c d"),
    ("a.b='c d'", "c d"),
    ('a.b="c d"', "c d"),
    ("a.b=' c '", " c "),
    ("a.b='x=1,y=[2]'", "x=1,y=[2]"),
    ("a.b=\"'c'\"", "'c'"),
    ("a.b='it\\'s'", "it's"),
    ('a.b="say \\"c\\""', 'say "c"'),
    ("a.b='say \\\\\"c\\\\\"'", 'say \\\\"c\\\\"'),
    ("a.b='c\\\\'", "c\\"),
    ("a.b='null'", "null"),
]


@pytest.mark.parametrize(("text", "value"), FORMS)
def test_each_form_is_read_as_hydra_reads_it(text: str, value: str | None) -> None:
    assert read_override(text) == Override("a.b", value)
    hydras = PARSER.parse_override(text)
    assert hydras.key_or_group == "a.b"
    assert (None if hydras.type is OverrideType.DEL else hydras.value()) == value


@pytest.mark.parametrize("value", ["true", "null", "1e-6", "[x, y]", "['x', 'y']", "{x: 1}"])
def test_what_is_no_text_for_hydra_stays_as_it_is_written(value: str) -> None:
    assert not isinstance(PARSER.parse_override(f"a={value}").value(), str)
    assert read_override(f"a={value}") == Override("a", value)


@given(TEXT.filter(lambda text: "${" not in text))
def test_what_is_written_is_read_back(text: str) -> None:
    """But for OmegaConf's references, whose backslashes are no affair of Hydra's grammar."""
    assert read_override(f"a={hydra_value(text)}") == Override("a", text)


@pytest.mark.parametrize(
    ("overrides", "value"),
    [
        ((), None),
        (("a.b=1",), None),
        (("a=1", "+a='2'"), "2"),
        (("a=1", "b=2"), "1"),
        (("a=",), ""),
        (("a=1", "~a"), None),
        (("~a", "++a=3"), "3"),
    ],
)
def test_the_last_one_counts(overrides: tuple[str, ...], value: str | None) -> None:
    assert value_said(overrides, "a") == value
