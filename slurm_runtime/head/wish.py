"""What does the head look at of a POST /start? Its session, its size, its image and its client's patience. Pure."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TypeVar

from pydantic import ValidationError

from slurm_runtime.app import validation_sentence
from slurm_runtime.head.choice import Wanted
from slurm_runtime.models import StartRequest, Wire
from slurm_runtime.references import full_name
from slurm_runtime.sandbox import Dialect, dialect_of
from slurm_runtime.slots import units_for
from slurm_runtime.wishes import BadRequest

T = TypeVar("T", bound=Wire)


@dataclass(frozen=True)
class StartWish:
    """One start: the body that a node gets, and what the head has read in it."""

    session_id: str
    body: bytes
    wanted: Wanted
    factor: float
    image: str
    is_string: bool


def parsed(kind: type[T], body: bytes) -> T:
    """A request's body; ``BadRequest`` in the words of an API server."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as problem:
        raise BadRequest(validation_sentence(problem.errors())) from None


def read_start(body: bytes) -> StartWish:
    """The wish in a request's body; ``BadRequest`` where there is none.

    The body is passed on as it came, but for a session without a name, which gets one here: else it could be found
    again on no node whose answer is lost.
    """
    wish = parsed(StartRequest, body)
    session_id = wish.session_id
    if session_id is None:
        session_id = f"session-{secrets.token_hex(8)}"
        wish.session_id = session_id
        body = wish.model_dump_json(exclude_unset=True).encode("utf-8", "replace")
    factor = wish.resource_factor or 1.0
    image = wish.image or ""
    is_string = dialect_of(wish.command) is Dialect.SDK
    return StartWish(session_id, body, Wanted(units_for(factor), named(image)), factor, image, is_string)


def named(image: str) -> str:
    """The full name of an image, as nodes tell those that they have; what cannot be one stays as it is."""
    try:
        return full_name(image) if image else ""
    except ValueError:
        return image
