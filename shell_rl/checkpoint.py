"""Where did a run get to: its parameters and step, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from shell_rl.commands import fingerprint
from shell_rl.errors import UsageError
from shell_rl.learner import Score
from shell_rl.tasks import TASKS

VERSION = 1


@dataclass(frozen=True)
class Settings:
    """What decides a run's course; a checkpoint of other settings is not resumed. The number of steps is not among
    them: a finished run can be continued with more."""

    seed: int
    rollouts: int
    learning_rate: float
    evaluation: int

    def fingerprint(self) -> str:
        """A digest of these settings, the grammar and the tasks."""
        text = repr((asdict(self), fingerprint(), [(task.name, task.question) for task in TASKS]))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Checkpoint:
    """The state after ``step`` steps. With the seed, the step is also the state of the random numbers (``learner``).

    ``commands`` and ``seconds`` count the whole run so far, ``untrained`` is the evaluation before the first step.
    """

    settings: str
    seed: int
    step: int
    commands: int
    seconds: float
    untrained: Score
    logits: Mapping[str, list[float]]


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it appears complete or not at all, also after a power cut.

    :raises UsageError: it cannot be written
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    except OSError as error:
        raise UsageError(f"Cannot write {path}: {error.strerror}; choose another --output.") from error
    finally:
        beside.unlink(missing_ok=True)


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint."""
    write_whole(path, json.dumps({"version": VERSION, **asdict(checkpoint)}) + "\n")


def load(path: Path) -> Checkpoint | None:
    """Read a checkpoint; None where there is none.

    :raises UsageError: the file is not a checkpoint of this version
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.pop("version") != VERSION:
            raise ValueError("another version")
        return Checkpoint(**{**fields, "untrained": Score(**fields["untrained"])})
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}; choose another --output or --no-resume.") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{path} is not a checkpoint of this loop ({error}); remove it or use --no-resume.") from error
