"""What is known of runs, for commands that only look: read from run directories, asked of Slurm and of API servers.

Pure functions make frozen dataclasses of texts; what reads and asks stands apart, in ``run_files``, ``sandboxes`` and
``survey``. Whatever is missing, unreadable or strange is ``Unknown`` with the reason, never an error.
"""

from __future__ import annotations
