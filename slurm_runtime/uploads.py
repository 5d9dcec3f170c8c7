"""How does the context of a build get from a multipart body onto the disk? Piece by piece, never whole in memory."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from slurm_runtime.guard import MOST_CONTEXT_BYTES
from slurm_runtime.wishes import BadRequest

GZIP = b"\x1f\x8b"
WRITE_BYTES = 1 << 20
MOST_FIELD_BYTES = 4096
MOST_FIELDS = 128
WHITE = b" \t\r\n"


class TooLarge(Exception):
    """The context is larger than this server takes."""


@dataclass(frozen=True)
class Upload:
    """What a client sent to be built: the context as a tar.gz on the disk, and the names of the image."""

    context: Path
    target_image: str
    tags: tuple[str, ...]


class Base64Pieces:
    """Decodes base64 text that comes in pieces, line ends allowed; ``BadRequest`` where it is none."""

    def __init__(self) -> None:
        self._left = b""
        self._ended = False

    def decode(self, piece: bytes) -> bytes:
        text = self._left + piece.translate(None, WHITE)
        whole = len(text) - len(text) % 4
        self._left = text[whole:]
        if self._ended and text:
            raise BadRequest("context is not base64 text: it goes on after its padding")
        self._ended = text[:whole].endswith(b"=")
        try:
            return base64.b64decode(text[:whole], validate=True)
        except (binascii.Error, ValueError):
            raise BadRequest("context is not base64 text of a tar.gz") from None

    def finish(self) -> None:
        if self._left:
            raise BadRequest("context is not base64 text: its end is missing")


@dataclass
class Form:
    """The parts of a multipart body as they arrive: fields are kept, the context is decoded into ``pending``."""

    most_bytes: int
    fields: list[tuple[str, str]] = field(default_factory=list)
    pending: bytearray = field(default_factory=bytearray)
    size: int = 0
    is_complete: bool = False
    has_context: bool = False
    _header: bytes = b""
    _value: bytes = b""
    _name: str = ""
    _text: bytes = b""
    _pieces: Base64Pieces = field(default_factory=Base64Pieces)

    def on_part_begin(self) -> None:
        self._name, self._text = "", b""
        if len(self.fields) >= MOST_FIELDS:
            raise BadRequest(f"the body has more than {MOST_FIELDS} fields")

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            options = parse_options_header(self._value)[1]
            self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._header, self._value = b"", b""

    def on_headers_finished(self) -> None:
        if self._name == "context" and self.has_context:
            raise BadRequest("context is there twice")
        self.has_context = self.has_context or self._name == "context"

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "context":
            self._take(self._pieces.decode(data[start:end]))
        elif len(self._text) + end - start > MOST_FIELD_BYTES:
            raise BadRequest(f"field {self._name[:100]!r} is longer than {MOST_FIELD_BYTES} bytes")
        else:
            self._text += data[start:end]

    def _take(self, decoded: bytes) -> None:
        if self.size == 0 and decoded and not GZIP.startswith(decoded[:2]):
            raise BadRequest("context is base64 text, but of something else than a tar.gz")
        self.size += len(decoded)
        self.pending += decoded
        if self.size > self.most_bytes:
            raise TooLarge(f"the context is larger than {self.most_bytes} bytes; leave data out of it (.dockerignore)")

    def on_part_end(self) -> None:
        if self._name == "context":
            self._pieces.finish()
        else:
            self.fields.append((self._name, self._text.decode("utf-8", "replace")))

    def on_end(self) -> None:
        self.is_complete = True

    def values(self, name: str) -> tuple[str, ...]:
        return tuple(value for key, value in self.fields if key == name and value)


async def receive(
    pieces: AsyncIterator[bytes], content_type: str, folder: Path, most_bytes: int = MOST_CONTEXT_BYTES
) -> Upload:
    """Read a body into ``folder``; ``BadRequest`` or ``TooLarge`` says what is wrong with it."""
    form, context = Form(most_bytes), folder / "context.tar.gz"
    parser = _parser(form, content_type)
    with context.open("wb") as file:
        async for piece in pieces:
            _feed(parser, piece)
            if len(form.pending) > WRITE_BYTES:
                await asyncio.to_thread(file.write, bytes(form.pending))
                form.pending.clear()
        file.write(form.pending)
    return _checked(form, context)


def _parser(form: Form, content_type: str) -> MultipartParser:
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise BadRequest("the body is not multipart/form-data with the fields context and target_image")
    names = [name for name in vars(Form) if name.startswith("on_")]
    try:
        callbacks: Any = {name: getattr(form, name) for name in names}
        return MultipartParser(boundary, callbacks)
    except FormParserError as problem:
        raise BadRequest(f"the body's boundary cannot be used: {problem}") from None


def _feed(parser: MultipartParser, piece: bytes) -> None:
    try:
        parser.write(piece)
    except FormParserError as problem:
        raise BadRequest(f"the body is not multipart/form-data: {problem}") from None


def _checked(form: Form, context: Path) -> Upload:
    if not form.is_complete:
        raise BadRequest("the body ends before its last part does")
    if not form.size:
        raise BadRequest("context is missing: the base64 text of a tar.gz with a Dockerfile")
    targets = form.values("target_image")
    if len(targets) != 1:
        raise BadRequest("target_image is missing" if not targets else "target_image is there twice")
    return Upload(context, targets[0], form.values("tags"))
