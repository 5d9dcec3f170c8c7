"""Which image does a row of a dataset name, by the rules of SkyRL-agent and its fork? Pure.

Both put the same names together; they differ in how much of a name they write out, which ``full_name`` evens out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from slurm_runtime.references import full_name

# The columns that are looked at; all others, such as prompts and patches, are not even read.
COLUMNS = ("data_source", "instance", "extra_info", "instance_id", "docker_image", "image_name")
PREFIX = "docker.io/xingyaoww/"
SMITH_OWNER = "docker.io/jyangballin"
Row = Mapping[str, Any]


class NoImages(ValueError):
    """A dataset names no images, or a row of it none that can be understood."""


@dataclass(frozen=True)
class Kind:
    """One kind of dataset: how it is told from the others, and the name of a row's image with a given prefix."""

    name: str
    source: re.Pattern[str]
    looks_so: Callable[[Row], bool]
    image: Callable[[Row, str], str]


def _text(instance: Row, name: str) -> str:
    value = instance.get(name)
    return value if isinstance(value, str) else ""


def _r2e_image(instance: Row, _prefix: str) -> str:
    """An instance is called by its image: ``namanjain12/REPOSITORY_final:COMMIT``."""
    identity = _text(instance, "instance_id")
    return identity if "/" in identity else _text(instance, "docker_image")


def _smith_image(instance: Row, _prefix: str) -> str:
    """One image for each repository, not for each instance; Docker Hub takes no double underscores."""
    name = _text(instance, "image_name").rpartition("/")[2]
    name = name or f"swesmith.x86_64.{_text(instance, 'instance_id').rpartition('.')[0]}"
    return f"{SMITH_OWNER}/{name.replace('__', '_1776_')}".lower()


def _swe_image(instance: Row, prefix: str) -> str:
    identity = _text(instance, "instance_id")
    return f"{prefix.rstrip('/')}/sweb.eval.x86_64.{identity.replace('__', '_s_')}".lower() if identity else ""


KINDS = (
    Kind(
        "r2e-gym",
        re.compile("r2e", re.I),
        lambda instance: re.search("/.*:", _text(instance, "instance_id")) is not None,
        _r2e_image,
    ),
    Kind(
        "swe-smith",
        re.compile("smith", re.I),
        lambda instance: "swesmith" in _text(instance, "image_name"),
        _smith_image,
    ),
    Kind("swe-gym, swe-bench", re.compile(""), lambda _instance: True, _swe_image),
)


def kind_of(source: str, instance: Row) -> Kind:
    """By its ``data_source``; without one, by how an instance looks."""
    return next(kind for kind in KINDS if (kind.source.search(source) if source else kind.looks_so(instance)))


def instance_of(row: Row) -> Row:
    """The part of a row that describes the instance: a column, or inside of one, perhaps as JSON text."""
    extra = _mapping(row.get("extra_info"))
    candidates = (_mapping(row.get("instance")), _mapping(extra.get("instance")), extra, row)
    return next((found for found in candidates if found.get("instance_id") or found.get("image_name")), {})


def _mapping(value: object) -> Row:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return {}
    return value if isinstance(value, Mapping) else {}


def image_of(row: Row, prefix: str) -> str:
    """The full name of a row's image; ``NoImages`` says what the row lacks."""
    instance = instance_of(row)
    source = _text(row, "data_source")
    kind = kind_of(source, instance)
    name = kind.image(instance, prefix)
    if not name:
        raise NoImages(f"it names no instance_id{' or docker_image' if kind.name == 'r2e-gym' else ''}")
    try:
        return full_name(name)
    except ValueError as problem:
        raise NoImages(f"as a row of {kind.name} it names no image: {problem}") from None


def images_of(rows: Iterable[Row], prefix: str) -> list[str]:
    """The images of all rows in the order of their first row, each once."""
    found: dict[str, None] = {}
    for number, row in enumerate(rows, 1):
        try:
            found[image_of(row, prefix)] = None
        except NoImages as problem:
            raise NoImages(f"row {number}: {problem}") from None
    return list(found)
