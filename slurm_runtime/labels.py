"""What do a container's labels say of its sandbox? The server that comes after a killed one reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from slurm_runtime.sandbox import Dialect

JOB_LABEL = "skyrl.job"
SESSION_LABEL = "skyrl.session"
SANDBOX_LABEL = "skyrl.sandbox"


@dataclass(frozen=True)
class Notes:
    """What Podman does not tell of a sandbox: its slots, its words on the wire, how its server was started.

    ``dialect`` and ``start`` are names of ``Dialect`` and ``agent_support.Start``. ``image`` is the name it was asked
    with, ``agent_folder`` the folder of this server that is mounted into it (--agent-image), empty for none. No secret
    is among them: labels are open to whoever may list containers.
    """

    slots: tuple[int, ...]
    factor: float
    dialect: str
    start: str
    url: str
    image: str
    container_port: int
    agent_folder: str = ""


def written(notes: Notes) -> str:
    """The label's value. Pure."""
    return json.dumps(asdict(notes), separators=(",", ":"))


def read(labels: Mapping[str, str]) -> Notes | None:
    """The notes in a container's labels; None where there are none that this version understands. Pure."""
    try:
        found = json.loads(labels.get(SANDBOX_LABEL, ""))
        Dialect[found["dialect"]]
        return Notes(
            slots=tuple(int(number) for number in found["slots"]),
            factor=float(found["factor"]),
            dialect=str(found["dialect"]),
            start=str(found["start"]),
            url=str(found["url"]),
            image=str(found["image"]),
            container_port=int(found["container_port"]),
            agent_folder=str(found.get("agent_folder") or ""),
        )
    except (ValueError, KeyError, TypeError):
        return None


class Labels:
    """The labels of every container of this server; ``common`` holds its mark, the job and the user."""

    def __init__(self, common: Mapping[str, str]) -> None:
        self.common = common

    @property
    def job(self) -> str:
        return self.common.get(JOB_LABEL, "")

    def of(self, session_id: str, notes: Notes | None = None) -> dict[str, str]:
        """The labels of one container; ``notes`` for one that a later server can take over."""
        noted = {SANDBOX_LABEL: written(notes)} if notes else {}
        return {**self.common, SESSION_LABEL: session_id, **noted}
