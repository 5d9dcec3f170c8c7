"""What a forked agent server copies of the memory of its fork server, under the agent tree's Python."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from slurm_runtime.agent.tree import AgentTree
from slurm_runtime.warden import immortal
from tests.runtime.real_clients import HERE

ROOT = Path(__file__).parents[2]
DRIVER = HERE / "shared_memory.py"


@pytest.fixture(scope="module")
def told(agent_tree: AgentTree) -> Any:
    words = agent_tree.python_command((str(DRIVER), str(ROOT)), at=agent_tree.root)
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr  # it also ended as every program does
    return json.loads(done.stdout.removeprefix("RESULT "))


@pytest.mark.podman
def test_a_child_that_reads_what_its_parent_made_copies_none_of_it(told: Any) -> None:
    assert told["known"], "the tree's Python is one whose counting is known"
    assert told["objects"] > 400_000
    assert told["count"] == immortal.IMMORTAL
    assert told["mortal_kb"] > 10_000
    assert told["immortal_kb"] < told["mortal_kb"] / 10


@pytest.mark.podman
def test_what_a_child_makes_is_not_made_in_the_gaps_of_shared_pages(told: Any) -> None:
    assert told["in_gaps_kb"] > 500
    assert told["apart_kb"] < told["in_gaps_kb"] / 3


@pytest.mark.podman
def test_everything_works_as_before(told: Any) -> None:
    assert told["work"] == [True, "later", "JSONDecodeError", "a<1>", '{"b": [null]}']
    assert told["ended"] == ["ended"], "what was in the midst of its run ends with its last reference"
    assert told["let go"], "and gives back what it held"


PLAIN: Any = (("cpython", 3, 13), (8, "little"), False, immortal.IMMORTAL)


@pytest.mark.parametrize(
    ("place", "other"),
    [
        (0, ("cpython", 3, 11)),
        (0, ("cpython", 3, 14)),
        (0, ("pypy", 3, 12)),
        (1, (4, "little")),
        (1, (8, "big")),
        (2, True),
        (3, 3 << 30),
    ],
)
def test_a_python_that_counts_otherwise_is_not_known(place: int, other: object) -> None:
    assert immortal.counts_so(*PLAIN)
    assert immortal.counts_so(("cpython", 3, 12), *PLAIN[1:])
    found = list(PLAIN)
    found[place] = other
    assert not immortal.counts_so(*found)


def test_a_python_that_is_not_known_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(immortal, "is_known", lambda: False)
    assert immortal.immortalise() == 0
