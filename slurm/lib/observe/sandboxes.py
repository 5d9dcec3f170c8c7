"""How many sandboxes has a run's API server? It is asked itself, with the run's key and a short deadline."""

from __future__ import annotations

import re
from dataclasses import dataclass

from slurm.lib.observe.unknown import Unknown

_FIGURE = re.compile(r"^(skyrl_\w+)(?:\{[^}]*\})? (\d+(?:\.\d+)?(?:e\+?\d+)?)$", re.MULTILINE | re.ASCII)


@dataclass(frozen=True)
class Sandboxes:
    """Living sandboxes, the slots that they hold, all slots, and starts that wait for one."""

    living: int
    used: int
    slots: int
    waiting: int


def parse_metrics(text: str) -> Sandboxes | None:
    """The figures in a server's answer to GET /metrics; None where they are not those of our server."""
    sums: dict[str, float] = {}
    for name, value in _FIGURE.findall(text):
        sums[name] = sums.get(name, 0.0) + float(value)
    names = ("skyrl_sandboxes", "skyrl_slots_used", "skyrl_slots_total", "skyrl_starts_waiting")
    if not all(name in sums and sums[name] < 1e9 for name in names):
        return None
    return Sandboxes(*(int(sums[name]) for name in names))


def ask(url: str, key: str | None, timeout_s: float) -> Sandboxes | Unknown:
    """What the server at ``url`` says."""
    from slurm.lib.runtime_client import RuntimeClient  # its imports take 10 ms, and most runs have ended

    answer = RuntimeClient(url, key).page("/metrics", timeout_s)
    if not answer.status:
        return Unknown("its API server is not reachable from here")
    if answer.status in {401, 403}:
        return Unknown("its API server refuses the key in the run directory")
    found = parse_metrics(str(answer.body)) if answer.ok else None
    return found or Unknown("its API server does not tell (GET /metrics)")
