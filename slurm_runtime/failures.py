"""Which sandboxes had failed, and why? Kept in a file, so that a server which follows a killed one knows it too.

A line of JSON for each, the newest last. Parts of sandboxes' logs are in it: the file is open to its owner alone.
``parse`` and ``line_of`` are pure.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from slurm_runtime.logs import log
from slurm_runtime.sandbox import Dialect, Sandbox, Specification, State

MOST_KEPT = 200  # the file has at most twice as many lines, each with the last lines of a log, at most 16 KiB


@dataclass(frozen=True)
class Failed:
    """A sandbox that had failed; ``is_last``: its session had no other one after it."""

    sandbox: Sandbox
    is_last: bool


def line_of(sandbox: Sandbox, is_last: bool = True) -> str:
    """What is kept of a sandbox that has failed. Its key is not: nobody answers to it any more."""
    wish = sandbox.specification
    kept = {
        "runtime_id": wish.runtime_id,
        "session_id": wish.session_id,
        "image": wish.image,
        "dialect": wish.dialect.name,
        "factor": wish.resource_factor,
        "url": sandbox.url,
        "reason": sandbox.reason,
        "last_lines": sandbox.last_lines,
        "restart_reasons": sandbox.restart_reasons,
        "is_last": is_last,
    }
    return json.dumps(kept, separators=(",", ":"))


def parse(lines: Iterable[str]) -> list[Failed]:
    """The failed sandboxes, in the order in which they failed; a line that is broken says nothing."""
    found: dict[str, Sandbox] = {}
    last: dict[str, str] = {}
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            kept = json.loads(line)
            if "again" in kept:
                last.pop(kept["again"], None)
                continue
            sandbox = _sandbox(kept)
            found[sandbox.specification.runtime_id] = sandbox
            if kept.get("is_last", True):
                last[sandbox.specification.session_id] = sandbox.specification.runtime_id
    return [Failed(one, last.get(one.specification.session_id) == name) for name, one in found.items()]


def _sandbox(kept: dict[str, object]) -> Sandbox:
    wish = Specification(
        runtime_id=str(kept["runtime_id"]),
        session_id=str(kept["session_id"]),
        session_api_key="",
        image=str(kept["image"]),
        command=None,
        working_dir="/",
        environment={},
        resource_factor=float(str(kept["factor"])),
        pull_policy="never",
        dialect=Dialect[str(kept["dialect"])],
        container_port=0,
    )
    reasons = kept["restart_reasons"]
    if not isinstance(reasons, list):
        raise TypeError("restart_reasons is no list")
    return Sandbox(
        wish,
        State.FAILED,
        str(kept["reason"]),
        None if kept["url"] is None else str(kept["url"]),
        str(kept["last_lines"]),
        tuple(map(str, reasons)),
    )


class Failures:
    """The file, if there is to be one; what cannot be written is said once and stops nobody."""

    def __init__(self, path: Path | None, goes_on: bool) -> None:
        """``goes_on``: with what a killed server has written; else it begins anew."""
        self.path = path
        self._said = False
        if path is not None and not goes_on:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        lines = self._lines()
        self.known = parse(lines)
        self._count = len(lines)
        self._sessions = {one.sandbox.specification.session_id for one in self.known if one.is_last}

    def note(self, sandbox: Sandbox) -> None:
        """A sandbox has failed."""
        self._sessions.add(sandbox.specification.session_id)
        self._append(line_of(sandbox))

    def note_again(self, session_id: str) -> None:
        """A session has another sandbox, whatever becomes of that one."""
        if session_id in self._sessions:
            self._sessions.discard(session_id)
            self._append(json.dumps({"again": session_id}))

    def _lines(self) -> list[str]:
        with contextlib.suppress(OSError):
            if self.path is not None:
                return self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        return []

    def _append(self, line: str) -> None:
        if self.path is None:
            return
        try:
            self._write(self.path, os.O_APPEND, f"\n{line}")  # one whose writer was killed spoils no other
            self._count += 1
            if self._count > 2 * MOST_KEPT:
                self._shorten(self.path)
        except OSError as problem:
            if not self._said:
                log.warning("a next server will not know which sandboxes had failed: %s", problem)
            self._said = True

    def _shorten(self, path: Path) -> None:
        """What says only that a session has another sandbox is told by the failed one's own line from then on."""
        kept = [line_of(one.sandbox, one.is_last) for one in parse(self._lines())[-MOST_KEPT:]]
        beside = path.with_name(f".{path.name}")
        self._write(beside, os.O_TRUNC, "\n".join(kept))
        beside.replace(path)
        self._count = len(kept)

    @staticmethod
    def _write(path: Path, how: int, text: str) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | how, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
