"""What VERL 0.5.0 must be told otherwise to train on a CPU: changed right after its modules are imported, in memory.

VERL takes NCCL and ``torch.cuda`` for granted. No file of it is touched; ``install`` puts a finder in front of the
import system that runs one of ``CHANGES`` on a module once that is there, in the driver and in all of Ray's workers.
"""

from __future__ import annotations

import copy
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

MEMORY_BYTES = 1 << 34  # what a device says it has, where VERL logs it
NO_OPERATIONS = frozenset({"empty_cache", "synchronize", "set_device", "reset_peak_memory_stats", "ipc_collect"})
COUNTERS = frozenset({"memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"})


class CpuDevice:
    """Answers what VERL asks of ``torch.cuda``."""

    def __getattr__(self, name: str) -> Any:
        import torch

        if name in NO_OPERATIONS:
            return lambda *_, **__: None
        if name in COUNTERS:
            return lambda *_, **__: 0
        return getattr(torch.cpu, name)

    def mem_get_info(self, *_: object) -> tuple[int, int]:
        return MEMORY_BYTES, MEMORY_BYTES

    def get_rng_state(self, *_: object) -> Any:
        import torch

        return torch.get_rng_state()

    def set_rng_state(self, state: Any, *_: object) -> None:
        import torch

        torch.set_rng_state(state)

    def manual_seed(self, seed: int) -> Any:
        import torch

        return torch.manual_seed(seed)

    def is_available(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def get_device_name(self, *_: object) -> str:
        return "CPU"


def answer_for_the_gpu(module: ModuleType) -> None:
    """``verl.utils.device``: gloo in place of NCCL, and the CPU in place of a GPU."""
    import torch.distributed

    device = CpuDevice()
    changed: Any = module
    changed.is_cuda_available = False  # also where there is one, with a CUDA build of torch
    changed.get_nccl_backend = lambda: "gloo"
    changed.get_torch_device = lambda: device
    changed.get_device_id = lambda: "cpu"
    start: Callable[..., Any] = torch.distributed.init_process_group

    def init_process_group(backend: str | None = None, *arguments: Any, **more: Any) -> Any:
        # VERL asks for one backend of the CPU and one of the GPU, "cpu:gloo,cpu:gloo" now, which torch refuses.
        return start("gloo" if backend and backend.count("gloo") > 1 else backend, *arguments, **more)

    torch.distributed.init_process_group = init_process_group


def generate_once(module: ModuleType) -> None:
    """``verl.workers.rollout.hf_rollout``: one answer for each prompt, since the trainer has repeated the prompts.

    VERL 0.5.0 asks its HF rollout for ``rollout.n`` more, and then fails on a batch of n times the size.
    """
    from omegaconf import open_dict

    rollout: Any = module.__dict__["HFRollout"]
    make = rollout.__init__

    def __init__(self: Any, module: Any, config: Any) -> None:
        own = copy.deepcopy(config)
        with open_dict(own):
            own.n = 1
        make(self, module, own)

    rollout.__init__ = __init__


def note_weights(module: ModuleType) -> None:
    """``verl.utils.checkpoint.fsdp_checkpoint_manager``: a hash of the weights at each save and after each load."""
    from local_verl.weights import note

    manager: Any = module.__dict__["FSDPCheckpointManager"]
    save, load = manager.save_checkpoint, manager.load_checkpoint

    def save_checkpoint(self: Any, local_path: str | None, *arguments: Any, **more: Any) -> Any:
        result = save(self, local_path, *arguments, **more)
        if local_path is not None:
            note("saved", Path(local_path), self.model)
        return result

    def load_checkpoint(self: Any, local_path: str | None, *arguments: Any, **more: Any) -> Any:
        result = load(self, local_path, *arguments, **more)
        if local_path is not None:
            note("loaded", Path(local_path), self.model)
        return result

    manager.save_checkpoint, manager.load_checkpoint = save_checkpoint, load_checkpoint


Change = Callable[[ModuleType], None]
CHANGES: Mapping[str, Change] = {
    "verl.utils.device": answer_for_the_gpu,
    "verl.workers.rollout.hf_rollout": generate_once,
    "verl.utils.checkpoint.fsdp_checkpoint_manager": note_weights,
}


class ChangingLoader(importlib.abc.Loader):
    """Loads a module as ``loader`` does, then has it changed."""

    def __init__(self, loader: Any, change: Change) -> None:
        self.loader = loader
        self.change = change

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.change(module)


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of ``changes`` as everyone else would, and has them changed once they are loaded."""

    def __init__(self, changes: Mapping[str, Change]) -> None:
        self.changes = changes

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.changes:
            return None
        spec = _found_by_others(self, fullname)
        if spec is None or spec.loader is None:
            return spec
        spec.loader = ChangingLoader(spec.loader, self.changes[fullname])
        return spec


def _found_by_others(finder: Finder, name: str) -> ModuleSpec | None:
    sys.meta_path.remove(finder)
    try:
        return importlib.util.find_spec(name)
    finally:
        sys.meta_path.insert(0, finder)


def install(changes: Mapping[str, Change] = CHANGES) -> Finder:
    """Put the finder first."""
    finder = Finder(changes)
    sys.meta_path.insert(0, finder)
    return finder
