"""What a head knows of one node: the answers of GET /changes, applied as slurm_runtime/node_models.py says."""

from __future__ import annotations

from dataclasses import dataclass, field

from slurm_runtime.models import RuntimeAnswer
from slurm_runtime.node_models import ChangesAnswer


@dataclass
class Replica:
    """``sandboxes`` by runtime id, ``newest`` their session's; ``images`` as they were told last."""

    upto: int = -1
    boot: str = ""
    sandboxes: dict[str, RuntimeAnswer] = field(default_factory=dict)
    newest: dict[str, str] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)
    completes: int = 0

    def apply(self, told: ChangesAnswer) -> None:
        if told.complete:
            self.completes += 1
            self.sandboxes, self.newest = {}, {}
        for runtime_id in told.gone:
            self._drop(runtime_id)
            self.sandboxes.pop(runtime_id, None)
        for sandbox in told.sandboxes:
            self.sandboxes[sandbox.runtime_id] = sandbox
            if sandbox.runtime_id in told.earlier:
                self._drop(sandbox.runtime_id)
            else:
                self.newest[sandbox.session_id] = sandbox.runtime_id
        if told.node.images is not None:
            self.images = told.node.images
        self.upto, self.boot = told.upto, told.node.boot

    def _drop(self, runtime_id: str) -> None:
        """It is not its session's any more."""
        for session_id in [one for one, newest in self.newest.items() if newest == runtime_id]:
            del self.newest[session_id]

    def living(self) -> set[str]:
        return {one.runtime_id for one in self.sandboxes.values() if one.status != "stopped"}
