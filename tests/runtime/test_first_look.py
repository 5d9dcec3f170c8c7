"""The held first look at a command, in the agent server that is mounted and in the newest one that clients bring."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slurm_runtime.agent.tree import AgentTree
from slurm_runtime.warden import first_look
from tests.runtime import real_clients
from tests.runtime.real_clients import HERE, NEWEST

DRIVER = HERE / "look_at_commands.py"
MODULE = Path(first_look.__file__)
TOLD = {
    "later look": [],
    "another command": [[0, 6, None, None]],
    "held": True,
    "first look": [[0, 5, None, None]],
    "look beyond the bound": [],
}
EXIT_CODES = [0, 3, 4, 0, -9, -1, -1]


def of_the_tree(tree: AgentTree) -> Any:
    """The driver's result under the tests' agent tree."""
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENHANDS_SUPPRESS_BANNER": "1"}
    words = tree.python_command((str(DRIVER), str(MODULE)), at=tree.root)
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240, check=False)
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert results, done.stderr[-2000:]
    return json.loads(results[-1].removeprefix("RESULT "))


def of_a_client(venv: str) -> Any:
    lacks = real_clients.missing()
    if lacks:
        pytest.skip(f"real clients: this machine lacks {lacks}")
    return real_clients.installed().run(venv, DRIVER, f"/mnt/{MODULE.name}", files=(MODULE,))


@pytest.mark.podman
@pytest.mark.parametrize("version", ["tree", NEWEST])
def test_only_the_time_of_the_first_look_changes(version: str, request: pytest.FixtureRequest) -> None:
    told = of_the_tree(request.getfixturevalue("agent_tree")) if version == "tree" else of_a_client(version)
    for without, with_hold in told["same"]:
        assert without == with_hold
    assert [events[-1][1] for _, events in told["same"]] == EXIT_CODES
    assert len(told["same"][3][0]) > 1
    assert told["holding"] == TOLD


async def _nothing(*_: Any, **__: Any) -> None: ...


@pytest.mark.parametrize(
    "made_otherwise",
    [
        None,
        SimpleNamespace(start_bash_command=_nothing),
        SimpleNamespace(start_bash_command=lambda: None, search_bash_events=_nothing),
        SimpleNamespace(start_bash_command=_nothing, search_bash_events=_nothing),
    ],
    ids=["none", "no search", "not asynchronous", "no command to ask for"],
)
def test_a_version_that_is_made_otherwise_keeps_its_own(made_otherwise: Any) -> None:
    before = dict(vars(made_otherwise)) if made_otherwise else {}
    first_look.hold(made_otherwise)
    assert (dict(vars(made_otherwise)) if made_otherwise else {}) == before
