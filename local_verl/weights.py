"""Are these the same weights: one hash over all tensors of a model.

``python -m local_verl.weights FILE`` prints the hash of a checkpoint file (``model_world_size_1_rank_0.pt``), for
comparison with what was noted when it was saved and loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NOTES_NAME = "weights.jsonl"


def digest(state: Mapping[str, Any]) -> str:
    """SHA-256 over name, type, shape and bytes of every tensor, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = whole(state[name]).detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.flatten().view(_byte_type()).numpy().tobytes())
    return total.hexdigest()


def whole(tensor: Any) -> Any:
    """A tensor that FSDP2 has spread over ranks, put together; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _byte_type() -> Any:
    import torch  # only in VERL's environment

    return torch.uint8


def note(event: str, checkpoint: Path, model: Any) -> None:
    """Write what the weights are now beside the checkpoints (``weights.jsonl``), and into the log.

    :param event: "saved" or "loaded"
    :param checkpoint: the folder of one rank's files, ``global_step_N/actor``
    """
    line = {
        "event": event,
        "checkpoint": checkpoint.parent.name,
        "sha256": digest(model.state_dict()),
        "time": time.time(),
        "pid": os.getpid(),
    }
    with (checkpoint.parent.parent / NOTES_NAME).open("a", encoding="utf-8") as notes:
        notes.write(json.dumps(line) + "\n")
    print(f"weights {event} ({line['checkpoint']}): sha256 {line['sha256']}", flush=True)


def digest_of_file(path: Path) -> str:
    """The hash of a checkpoint file of one rank alone."""
    import torch
    from torch.distributed.tensor import DTensor  # noqa: F401  the file's tensors are of this class

    return digest(torch.load(path, map_location="cpu", weights_only=False))


if __name__ == "__main__":
    print(digest_of_file(Path(sys.argv[1])))
