"""What does a run's message to people say: the end of a job → one JSON body for every webhook, one mail; pure.

``text`` is read by Slack, Mattermost and their like, ``content`` by Discord; whoever takes JSON has the same facts as
fields of their own, ``NOTICE_FIELDS``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from slurm.lib.preflight.words import duration
from slurm.lib.restarts import Ended

SCHEMA = 1
LONGEST_REASON = 1200  # characters; Discord takes 2000 in all


@dataclass(frozen=True)
class Ending:
    """How the job ended that a run is about. ``exit_code`` is None where it could not say."""

    job_id: str
    ended: Ended
    exit_code: int | None
    reason: str


@dataclass(frozen=True)
class Notice:
    """One message: the run's name and directory, its end, the last step that the trainer said, and the time it took."""

    run: str
    directory: str
    ending: Ending
    step: int | None = None
    steps: int | None = None
    elapsed_s: int | None = None

    @property
    def reason(self) -> str:
        """The reason, shortened to what every receiver takes."""
        said = self.ending.reason
        return said if len(said) <= LONGEST_REASON else f"{said[: LONGEST_REASON - 1]}…"

    @property
    def title(self) -> str:
        """The message in a line: ``skyrl run 20260304_101500_12 failed (exit code 3) after 2 h, at step 12 of 300``."""
        code = self.ending.exit_code
        shown = f" (exit code {code})" if code else ""
        after = "" if self.elapsed_s is None else f" after {duration(self.elapsed_s)}"
        of = "" if self.steps is None else f" of {self.steps}"
        at = "" if self.step is None else f", at step {self.step}{of}"
        return f"skyrl run {self.run} {_VERBS[self.ending.ended]}{shown}{after}{at}"

    @property
    def text(self) -> str:
        """The message for people."""
        return f"{self.title}\n{self.reason}\n{self.directory}"

    def fields(self) -> dict[str, object]:
        """The message for programs."""
        return {
            "schema": SCHEMA,
            "run": self.run,
            "job_id": self.ending.job_id,
            "state": self.ending.ended.value,
            "exit_code": self.ending.exit_code,
            "reason": self.reason,
            "step": self.step,
            "steps": self.steps,
            "directory": self.directory,
            "elapsed": self.elapsed_s,
        }

    def body(self) -> str:
        """What is posted to a webhook."""
        return json.dumps({"text": self.text, "content": self.text, **self.fields()})

    def mail(self) -> str:
        """The message as a mail without its recipients."""
        from email.message import EmailMessage  # 20 ms, spent only where a mail is ours to send

        message = EmailMessage()
        message["Subject"] = " ".join(self.title.split())
        message.set_content(self.text + "\n")
        return message.as_string()


_VERBS = {
    Ended.COMPLETED: "completed",
    Ended.FAILED: "failed",
    Ended.CANCELLED: "was cancelled",
    Ended.INTERRUPTED: "was interrupted",
}
NOTICE_FIELDS = ("text", "content", *Notice("", "", Ending("", Ended.FAILED, None, "")).fields())


def elapsed_s(record: Mapping[str, Any], now: datetime) -> int | None:
    """Whole seconds since a run was launched, as its record has it; None where that is not known."""
    try:
        passed = now - datetime.fromisoformat(str(record.get("created")))
    except (TypeError, ValueError):
        return None
    return max(0, int(passed.total_seconds()))
