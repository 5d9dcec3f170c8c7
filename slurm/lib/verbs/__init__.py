"""The commands of launch.py, one module each: command line, printing, exit code."""

from __future__ import annotations
