"""Slurm's commands as small programs on PATH that record what they are asked, for tests of what a launcher asks."""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMMANDS = ("sbatch", "scontrol", "scancel", "squeue", "sinfo", "sacctmgr", "sacct")
# What is asked before a submission: questions, which change nothing and count as no call.
QUESTIONS = frozenset({"sbatch --test-only", "squeue --user", "sinfo", "sacctmgr", "sacct", "scontrol show config"})
SINFO = "".join(f"{name}|up|infinite|4|gpu:8\n" for name in ("test", "gpu_test", "shared", "gpu"))

# Answers the nth call of a command with the nth entry of answers.json; by default as Slurm does when all is well.
PROGRAM = """
import contextlib, fcntl, json, os, sys, time
home, name, argv, sinfo = sys.argv[1], sys.argv[2], sys.argv[4:], sys.argv[3]
name += " --test-only" if "--test-only" in argv else " show config" if argv[:2] == ["show", "config"] else ""
name += " --user" if any(word.startswith("--user=") for word in argv) else ""
calls = os.path.join(home, "calls.jsonl")
record = open(calls, "r+")
fcntl.flock(record, fcntl.LOCK_EX)  # the checks ask several things at the same time
before = sum(json.loads(line)["name"] == name for line in record)
with open(os.path.join(home, "answers.json")) as file:
    answers = json.load(file).get(name, [])
dated = "Configuration data as of %d\\n" % time.time()
said = {"sbatch": "%d\\n" % (101 + before), "sinfo": sinfo, "scontrol show config": dated}.get(name, "")
if argv[-1] == "%i|%A":  # the components of a heterogeneous job; their numbers are the next ones
    said = "".join("%s+%d|%d\\n" % (argv[-3], n, int(argv[-3]) + n) for n in range(2))
answer = {"stdout": said, **dict(enumerate(answers)).get(before, {})}
watched = os.path.join(home, "jobs")
found = [os.path.join(root, entry) for root, folders, files in os.walk(watched) for entry in folders + files]
modes = {}
for path in found:
    with contextlib.suppress(FileNotFoundError):  # another command removes it meanwhile
        modes[os.path.relpath(path, watched)] = os.lstat(path).st_mode & 0o777
call = {"name": name, "argv": argv, "environment": dict(os.environ), "modes": modes}
with record:
    record.seek(0, os.SEEK_END)
    record.write(json.dumps(call) + "\\n")
if "signal" in answer:
    os.kill(os.getppid(), answer["signal"])
    time.sleep(answer.get("pause_s", 0.2))
time.sleep(answer.get("after_s", 0))
sys.stdout.write(answer["stdout"] + (answer.get("hidden", "") if "--all" in argv else ""))
sys.stderr.write(answer.get("stderr", ""))
sys.exit(answer.get("code", 0))
"""


@dataclass(frozen=True)
class Call:
    """One call of a command: its arguments, its environment, the modes of all files below the jobs base."""

    name: str
    argv: list[str]
    environment: dict[str, str]
    modes: dict[str, int]

    @property
    def words(self) -> list[str]:
        return [self.name, *self.argv]


@dataclass
class FakeSlurm:
    """The commands in ``folder/bin``; ``jobs`` is the folder that they watch."""

    folder: Path
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bin.mkdir(parents=True)
        (self.folder / "calls.jsonl").touch()
        program = self.folder / "program.py"
        program.write_text(PROGRAM)
        self._write()
        for name in COMMANDS:
            words = [sys.executable, "-IS", str(program), str(self.folder), name, SINFO]
            script = self.bin / name
            script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
            script.chmod(0o755)

    @property
    def bin(self) -> Path:
        return self.folder / "bin"

    @property
    def jobs(self) -> Path:
        return self.folder / "jobs"

    @property
    def path(self) -> str:
        """PATH with these commands first."""
        return f"{self.bin}{os.pathsep}{os.environ['PATH']}"

    def answer(self, name: str, *answers: dict[str, Any]) -> None:
        """What the calls of a command, in order, say; ``{}`` for what Slurm says when all is well.

        ``hidden`` is about jobs in hidden partitions: it is said only where all are asked for.
        """
        self.answers[name] = list(answers)
        self._write()

    def _write(self) -> None:
        (self.folder / "answers.json").write_text(json.dumps(self.answers))

    @property
    def calls(self) -> list[Call]:
        """All calls but the questions before a submission."""
        return [call for call in self.everything if call.name not in QUESTIONS]

    @property
    def questions(self) -> list[Call]:
        """What was asked before a submission; ``sbatch --test-only`` and ``squeue --user`` have names of their own."""
        return [call for call in self.everything if call.name in QUESTIONS]

    @property
    def everything(self) -> list[Call]:
        lines = (self.folder / "calls.jsonl").read_text().splitlines()
        return [Call(**json.loads(line)) for line in lines]

    def forget(self) -> None:
        """Forget all calls; the numbers begin anew."""
        (self.folder / "calls.jsonl").write_text("")

    def of(self, name: str) -> list[Call]:
        return [call for call in self.calls if call.name == name]

    @property
    def names(self) -> list[str]:
        """The commands called, in order; of scontrol with its verb."""
        return [" ".join(call.words[:2]) if call.name == "scontrol" else call.name for call in self.calls]
