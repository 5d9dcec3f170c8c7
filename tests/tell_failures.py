"""Writes what failed into the file ``TELL_FAILURES`` names, a short paragraph each (``pytest -p tests.tell_failures``).

CI shows that file last: a log that is cut keeps its end, and a test that fails beside others is not seen again soon.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

MOST = 1200  # characters of one failure: its beginning, and twice as much of its end
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def paragraph(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The test, when it failed, and the message, without the empty lines and the middle of a long one."""
    crash = getattr(report.longrepr, "reprcrash", None)
    message = ANSI.sub("", crash.message if crash else str(report.longrepr))
    text = "\n".join(f"  {line}" for line in message.splitlines() if line.strip())
    if len(text) > MOST:
        text = f"{text[: MOST // 3]}\n  […]\n{text[-2 * MOST // 3 :]}"
    place = f"{crash.path}:{crash.lineno}" if crash else ""
    return f"FAILED {report.nodeid} ({report.when}) {place}\n{text}\n"


def _tell(report: pytest.TestReport | pytest.CollectReport) -> None:
    place = os.environ.get("TELL_FAILURES")
    if place and report.failed:
        with Path(place).open("a", encoding="utf-8") as file:
            file.write(paragraph(report))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _tell(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _tell(report)
