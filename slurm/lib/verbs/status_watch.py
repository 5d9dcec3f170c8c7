"""``launch.py status --watch``: looks at runs again and again, and says what has changed."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from slurm.lib.command_line import say
from slurm.lib.errors import EXIT_ENVIRONMENT, EXIT_OK
from slurm.lib.observe.run_view import RunView
from slurm.lib.observe.survey import Survey
from slurm.lib.runs import FoundRun
from slurm.lib.signals import SignalNotes
from slurm.lib.verbs.status_text import as_text, change_line, json_line, told

CLEAR = "\x1b[H\x1b[2J"


@dataclass
class Watch:
    """Looks at runs until all of them have ended; Ctrl-C raises ``Interrupted``."""

    survey: Survey
    runs: Sequence[FoundRun]
    every_s: float
    as_json: bool
    notes: SignalNotes
    _told: dict[str, object] = field(default_factory=dict)

    def go_on(self, views: Sequence[RunView]) -> int:
        """Show the runs, and again; returns the exit code."""
        show = self._redraw if sys.stdout.isatty() and not self.as_json else self._changes
        while True:
            if not say(show(views)):
                return EXIT_ENVIRONMENT
            if all(view.state.is_over or view.pair is None for view in views):
                return EXIT_OK
            self.notes.sleep(self.every_s)
            self.notes.check()
            views = self.survey.look(self.runs)
            self.notes.check()

    def _redraw(self, views: Sequence[RunView]) -> str:
        silent = "" if self.survey.heard else "; Slurm does not answer"
        title = f"every {self.every_s:g} s, now {time.strftime('%H:%M:%S')}{silent}; Ctrl-C ends this, not the runs\n\n"
        return CLEAR + title + as_text(views)

    def _changes(self, views: Sequence[RunView]) -> str:
        """A line for each run of which something has changed."""
        line = json_line if self.as_json else change_line
        changed = [view for view in views if self._told.get(view.record.name) != told(view)]
        self._told |= {view.record.name: told(view) for view in changed}
        return "".join(line(view) for view in changed)
