"""VERL's reward function: runs each answer in a sandbox of its own and judges what it did there.

VERL's ``batch`` reward manager loads this file and calls ``compute_scores`` with a whole batch. As for the agents of
SkyRL-agent, one trajectory has one sandbox, asked for, used and stopped through the run's API server.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from local_verl.tasks import reward, script
from shell_rl.errors import SandboxDied
from shell_rl.sandbox import RuntimeApi
from shell_rl.sandbox_program import Execution

SANDBOXES_AT_ONCE = 4  # of the eight that the configuration allows on two CPUs, where VERL computes too
ATTEMPTS = 3  # an answer is tried in this many sandboxes before the run gives up


@dataclass(frozen=True)
class Run:
    """What an answer did, and in which sandbox."""

    runtime_id: str
    execution: Execution


def api_of(environment: Mapping[str, str]) -> RuntimeApi:
    """The run's API server, as its environment names it."""
    names = ("SANDBOX_REMOTE_RUNTIME_API_URL", "ALLHANDS_API_KEY", "CONTAINER_IMAGE")
    return RuntimeApi(*(environment[name] for name in names))


def run_once(api: RuntimeApi, text: str) -> Run:
    """Run shell text in a new sandbox, which is stopped afterwards.

    :raises SandboxesUnavailable: there is none to be had, or it died
    """
    session_id = f"local-verl-{uuid.uuid4()}"
    try:
        sandbox = api.start(session_id, threading.Event())
        return Run(sandbox.runtime_id, sandbox.run(text))
    finally:
        api.stop(session_id)


def run(api: RuntimeApi, text: str) -> Run:
    """The same, in another sandbox where one died.

    :raises SandboxesUnavailable: there is none to be had, or ``ATTEMPTS`` of them died
    """
    for _ in range(ATTEMPTS - 1):
        try:
            return run_once(api, text)
        except SandboxDied as problem:
            print(f"{problem} The answer is tried in another one.", file=sys.stderr, flush=True)
    return run_once(api, text)


def compute_scores(
    data_sources: Sequence[str],
    solution_strs: Sequence[str],
    ground_truths: Sequence[str],
    extra_infos: Sequence[object],
    **_: object,
) -> list[dict[str, object]]:
    """The score of each answer, with what VERL writes into its record of the rollouts beside it.

    :raises SandboxesUnavailable: an answer could not be run; VERL ends with that
    """
    begin, api = time.monotonic(), api_of(os.environ)
    with ThreadPoolExecutor(SANDBOXES_AT_ONCE) as threads:
        runs = list(threads.map(lambda answer: run(api, script(answer)), solution_strs))
    scores = [
        reward(expected, done.execution.exit_code, done.execution.stdout)
        for expected, done in zip(ground_truths, runs, strict=True)
    ]
    print(
        f"ran {len(runs)} answers in sandboxes in {time.monotonic() - begin:.1f} s: "
        f"mean reward {sum(scores) / len(scores):.3f}",
        flush=True,
    )
    return [
        {
            "score": score,
            "exit_code": done.execution.exit_code,
            "stdout": done.execution.stdout,
            "runtime_id": done.runtime_id,
        }
        for score, done in zip(scores, runs, strict=True)
    ]
