"""What is asked of the tiny model, in which words, and what is an answer worth.

The task is to count to a number. The answer's text becomes the arguments of a shell command, and what that prints is
compared with the lines that were wanted. The words below are the model's whole vocabulary, so that an untrained model
says a command that works every few answers, and rewards differ from the first step on.
"""

from __future__ import annotations

SPECIAL_WORDS = ("<pad>", "<eos>", "<user>", "<assistant>", "<unk>")
HIGHEST = 6
WORDS = (*SPECIAL_WORDS, "count", "to", *(str(number) for number in range(1, HIGHEST + 1)))


def question(number: int) -> str:
    """The prompt that asks to count to ``number``."""
    return f"count to {number}"


def script(answer: str) -> str:
    """The shell text that an answer is run as."""
    return f"seq {answer}\n"


def expected_output(number: int) -> str:
    """What the right command prints."""
    return "".join(f"{line}\n" for line in range(1, number + 1))


def reward(expected: str, exit_code: int, stdout: str) -> float:
    """From 0 to 1: the share of lines that are right in their place; 0 for a command that failed.

    Lines too many count as wrong ones.
    """
    wanted, got = expected.splitlines(), stdout.splitlines()
    if exit_code != 0:
        return 0.0
    right = sum(ours == theirs for ours, theirs in zip(wanted, got, strict=False))
    return right / max(len(wanted), len(got))
