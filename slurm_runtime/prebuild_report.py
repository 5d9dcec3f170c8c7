"""What became of each image of a prebuild? One JSON file, whole after every image, which a later run goes on from."""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path

SCHEMA = 1
FETCHED, HERE, FAILED, MISSING = "fetched", "here", "failed", "missing"


@dataclass(frozen=True)
class Outcome:
    """One image: ``fetched`` in this run, ``here`` already, ``failed``, or ``missing`` so far."""

    status: str = MISSING
    name: str = ""
    id: str = ""
    digest: str = ""
    size_bytes: int = 0
    seconds: float = 0.0
    archive: str = ""
    error: str = ""

    @property
    def is_there(self) -> bool:
        return self.status in {FETCHED, HERE}


@dataclass
class Report:
    """The outcomes by image, and the file they are written to (None for nowhere)."""

    dataset: str
    path: Path | None
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @staticmethod
    def begun(dataset: str, images: Sequence[str], path: Path | None) -> Report:
        """One for these images, with what an earlier run noted of them; written at once, so that a bad path shows."""
        earlier = read(path) if path else {}
        noted = {image: replace(earlier.get(image, Outcome()), status=MISSING, error="") for image in images}
        report = Report(dataset, path, noted)
        report.write()
        return report

    def note(self, image: str, outcome: Outcome) -> None:
        self.outcomes[image] = outcome
        self.write()

    def counts(self) -> dict[str, int]:
        found = Counter(outcome.status for outcome in self.outcomes.values())
        return {status: found[status] for status in (FETCHED, HERE, FAILED, MISSING)}

    def as_json(self) -> str:
        whole = {
            "schema": SCHEMA,
            "dataset": self.dataset,
            "host": socket.gethostname(),
            "updated": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "complete": all(outcome.is_there for outcome in self.outcomes.values()),
            "counts": self.counts(),
            "images": {image: asdict(outcome) for image, outcome in self.outcomes.items()},
        }
        return json.dumps(whole, indent=1) + "\n"

    def write(self) -> None:
        """Replace the file as a whole; ``OSError`` where that cannot be done."""
        if self.path is None:
            return
        beside = self.path.with_name(f".{self.path.name}.{socket.gethostname()}.{os.getpid()}")
        try:
            beside.write_text(self.as_json(), encoding="utf-8")
            beside.replace(self.path)
        finally:
            beside.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Outcome]:
    """The outcomes in a report; none where there is no report that can be understood."""
    known = {entry.name for entry in fields(Outcome)}
    try:
        images = json.loads(path.read_text(encoding="utf-8"))["images"]
        return {
            str(image): Outcome(**{name: value for name, value in noted.items() if name in known})
            for image, noted in images.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
