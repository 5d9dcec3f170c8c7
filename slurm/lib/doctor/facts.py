"""What was found on one host, and what it was asked: plain values that travel between nodes as JSON.

Nothing is judged here. What could not be found out is empty or None, with the reason in a field of its own.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from slurm.lib.errors import EnvironmentProblem

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """What a node is asked to look at.

    ``sandboxes``: Podman and all around it; ``trainer``: GPUs and skyrl-agent's environment. ``share``: the folder
    below which runs are; ``folders``: key → path of what a job writes; ``base``: where our image may lie already.
    """

    sandboxes: bool = False
    trainer: bool = False
    gpus: bool = False
    share: str = ""
    base: str = ""
    local_scratch: str = ""
    cuda_modules: tuple[str, ...] = ()
    agent: str = ""
    folders: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """One act that was tried: how long it took; ``problem`` says why it failed, empty where it did not."""

    seconds: float = 0.0
    problem: str = ""


@dataclass(frozen=True)
class Limit:
    """Whether a limit of a container bites: its number was passed and the kernel acted. None: not found out."""

    name: str
    bites: bool | None
    problem: str = ""


@dataclass(frozen=True)
class Sandboxes:
    """Podman on a node.

    ``absent``: programs that are not on PATH; ``lacking``: files without a range for ``user``; ``scratch``: the folder
    for stores, its file system and free bytes; ``docker``: what a command of that name is; ``image``: whether our
    image was there or could be made; ``port``: where a container's published port is on this host, 0 for nowhere.
    """

    absent: tuple[str, ...] = ()
    user: str = ""
    uid: int = -1
    lacking: tuple[str, ...] = ()
    scratch: str = ""
    scratch_problem: str = ""
    file_system: str = ""
    free: int = 0
    version: str = ""
    driver: str = ""
    runtime: str = ""
    controllers: tuple[str, ...] = ()
    cgroups: str = ""
    network: str = ""
    info_problem: str = ""
    docker: str = ""
    image: Trial | None = None
    hello: Trial | None = None
    limits: tuple[Limit, ...] = ()
    port: int = 0
    port_problem: str = ""
    token: str = ""


@dataclass(frozen=True)
class Trainer:
    """What the trainer finds: ``visible`` is the job's CUDA_VISIBLE_DEVICES, None where nothing set it.

    ``cards``: a line of nvidia-smi for each (name, driver, memory, MIG mode); ``slices``: MIG slice → its card;
    ``efa``: folders of EFA's libraries; ``efa_devices``: its devices; ``python``: one with headers.
    """

    uv: str = ""
    visible: str | None = None
    visible_number: int | None = None
    cards: tuple[str, ...] = ()
    smi_problem: str = ""
    slices: Mapping[str, str] = field(default_factory=dict)
    nccl: tuple[int, ...] | None = None
    libcuda: str = ""
    module_problem: str = ""
    python: str = ""
    named_python: str = ""
    efa: tuple[str, ...] = ()
    efa_devices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Seen:
    """A folder as a node sees it (``preflight.places.Folder``)."""

    key: str
    path: str
    there: str
    is_folder: bool
    writable: bool


@dataclass(frozen=True)
class Report:
    """One host. ``mark``: its Python and our packages (``interpreter.mark``); ``limits``: name → soft limit, -1: none.

    ``share``: a small file made durable in the shared directory, and seen again, the median of several.
    """

    host: str = ""
    mark: str = ""
    share: Trial = Trial()
    share_file_system: str = ""
    folders: tuple[Seen, ...] = ()
    limits: Mapping[str, int] = field(default_factory=dict)
    sandboxes: Sandboxes | None = None
    trainer: Trainer | None = None


def to_text(value: object) -> str:
    """A dataclass of this module as one line of JSON."""
    return json.dumps(dataclasses.asdict(value))  # type: ignore[call-overload]  # one of ours


def from_text(kind: type[T], text: str) -> T:
    """The dataclass in a text; ``EnvironmentProblem`` where it is not whole or another release's."""
    try:
        return _built(kind, json.loads(text))  # type: ignore[no-any-return]  # of the kind, or it has raised
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        raise EnvironmentProblem(f"not a {kind.__name__.lower()} of this release: {problem}") from None


def _built(kind: Any, value: Any) -> Any:
    """``value``, of JSON, as the type that a field is declared with."""
    origin, words = typing.get_origin(kind), typing.get_args(kind)
    if origin in {typing.Union, types.UnionType}:
        return None if value is None else _built(next(word for word in words if word is not type(None)), value)
    if dataclasses.is_dataclass(kind):
        declared = typing.get_type_hints(kind)
        return kind(**{name: _built(declared[name], each) for name, each in value.items()})  # type: ignore[operator]
    if origin is tuple:
        return tuple(_built(words[0], each) for each in value)
    if not isinstance(value, dict if origin else (int, float) if kind is float else kind):
        raise TypeError(f"{value!r} is no {kind}")
    return value
