"""What is asked of the tiny model, in which words, and what is an answer worth.

The task is to count to a number. The answer's text is a shell script, and what that prints is compared with the lines
that were wanted. The words are the model's whole vocabulary, so that an untrained model says a running command every
few answers, and rewards differ from the first step on.
"""

from __future__ import annotations

SPECIAL_WORDS = ("<pad>", "<eos>", "<user>", "<assistant>", "<unk>")
HIGHEST = 6
COMMAND_WORDS = ("seq", "echo", ";")
WORDS = (*SPECIAL_WORDS, "count", "to", *COMMAND_WORDS, *(str(number) for number in range(1, HIGHEST + 1)))
RAN = 0.1  # for a command that printed something and succeeded, whatever it printed


def question(number: int) -> str:
    """The prompt that asks to count to ``number``."""
    return f"count to {number}"


def expected_output(number: int) -> str:
    """What the right command prints."""
    return "".join(f"{line}\n" for line in range(1, number + 1))


def reward(expected: str, exit_code: int, stdout: str) -> float:
    """From 0 to 1: 0 for a command that failed or printed nothing, 1 for the right output.

    Between them it grows from ``RAN`` with the share of lines that are right in their place; lines too many count as
    wrong ones.
    """
    wanted, got = expected.splitlines(), stdout.splitlines()
    if exit_code != 0 or not got:
        return 0.0
    right = sum(ours == theirs for ours, theirs in zip(wanted, got, strict=False))
    return RAN + (1 - RAN) * right / max(len(wanted), len(got))
