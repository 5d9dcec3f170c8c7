"""What does the trainer need in its environment on a GPU node, and why? Named steps, composed in one list; pure.

Each step is a function from settings, what was found on the node and the environment so far to the variables that it
sets or unsets. A variable that the user set (shell, .conf, skyrl-agent's .env) stays, unless the step's reason says
otherwise; a key of the configuration wins over all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from slurm.lib.job_environment import without_proxy
from slurm.lib.node_facts import Caches, NodeFacts
from slurm.lib.preflight.mig import SEVERAL_RANKS_A_CARD, slices
from slurm.lib.settings import Settings

LATER = "<on the node>"
VLLM_READS_UUIDS = (0, 24)  # 0.22 still converts each entry with int(); vllm issues 20939, 41848 and pull request 45026
AMD_NAMES = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
EFA = "efa"
INTERFACE_NAMES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
COMPILE_CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "VLLM_CACHE_ROOT": "vllm",
    "CUDA_CACHE_PATH": "cuda",
}
Changes = Mapping[str, str | None]  # None unsets
Environment = Mapping[str, str]


def always(_settings: Settings) -> bool:
    """For every trainer."""
    return True


def with_verl(settings: Settings) -> bool:
    """Only for VERL."""
    return not settings.training_command


def with_gpus(settings: Settings) -> bool:
    """Only where the job has GPUs."""
    return settings.gpus_per_node > 0


@dataclass(frozen=True)
class Step:
    """One thing that the environment needs: its name, its reason, what it changes, and for which runs.

    ``on_node``: the variables whose values only the node knows, for the dry run; without any, the changes do not
    depend on the node. ``yields``: a variable that is set already stays as it is.
    """

    name: str
    reason: str
    change: Callable[[Settings, NodeFacts, Environment], Changes]
    applies: Callable[[Settings], bool] = always
    on_node: Changes = field(default_factory=dict)
    yields: bool = False

    def left(self, wanted: Changes, environment: Environment) -> Changes:
        """What of ``wanted`` remains to be done in this environment."""
        return {name: value for name, value in wanted.items() if not (self.yields and name in environment)}

    @property
    def why(self) -> str:
        """The reason, and whether the user's own value stays."""
        return f"{self.reason}; unless set" if self.yields else self.reason


@dataclass(frozen=True)
class Applied:
    """A step and what it really changed."""

    step: Step
    changes: Changes

    @property
    def set(self) -> dict[str, str]:
        return {name: value for name, value in self.changes.items() if value is not None}

    @property
    def unset(self) -> list[str]:
        return [name for name, value in self.changes.items() if value is None]


def composed(settings: Settings, facts: NodeFacts, base: Environment) -> tuple[dict[str, str], list[Applied]]:
    """``base`` after all steps, and the steps that changed something."""
    environment, applied = dict(base), []
    for step in STEPS:
        if step.applies(settings):
            wanted = step.left(step.change(settings, facts, environment), environment)
            changes = {name: value for name, value in wanted.items() if environment.get(name) != value}
            environment = changed(environment, changes)
            applied += [Applied(step, changes)] if changes else []
    return environment, applied


def changed(environment: Environment, changes: Changes) -> dict[str, str]:
    """The environment with these variables set, or unset where the value is None."""
    kept = {name: value for name, value in environment.items() if name not in changes}
    return {**kept, **{name: value for name, value in changes.items() if value is not None}}


def planned(settings: Settings, base: Environment) -> list[Applied]:
    """The steps as the login node knows them; ``LATER`` stands for a value that only the node knows."""
    nothing = NodeFacts(Path(LATER), LATER)
    found = []
    for step in STEPS:
        if step.applies(settings):
            changes = step.left(step.on_node or step.change(settings, nothing, base), base)
            found += [Applied(step, changes)] if changes else []
    return found


def wants_integers(settings: Settings, facts: NodeFacts) -> bool:
    """Whether the trainer's vLLM reads the names of devices as integers; one whose version is not known may."""
    reads_uuids = facts.vllm is not None and facts.vllm >= VLLM_READS_UUIDS
    return with_verl(settings) and with_gpus(settings) and not reads_uuids


def integer_devices(environment: Environment) -> Changes:
    """The MIG slices in CUDA_VISIBLE_DEVICES as ``0,1,…``; nothing where there are none."""
    found = slices(environment.get("CUDA_VISIBLE_DEVICES", ""))
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(len(found))))} if found else {}


def without_amd(environment: Environment) -> Changes:
    """Takes AMD's names of devices out where NVIDIA's are set."""
    return {name: None for name in AMD_NAMES if name in environment and "CUDA_VISIBLE_DEVICES" in environment}


def doubts(settings: Settings, facts: NodeFacts, environment: Environment) -> list[str]:
    """What is missing on the node, a sentence each with what to do about it."""
    found = []
    if with_gpus(settings) and with_verl(settings) and facts.libcuda is None:
        why = f" ({facts.module_complaint})" if facts.module_complaint else ""
        found.append(
            f"no libcuda.so.1 on this node{why}: VERL runs without its flash-attention cross entropy, and Triton may "
            "not compile; name the site's modules in CUDA_MODULES, or set TRITON_LIBCUDA_PATH"
        )
    if with_verl(settings) and "UV_PYTHON" not in environment and facts.python is None:
        found.append(
            "no Python with its headers (Python.h) for skyrl-agent: Triton cannot compile in Ray's workers; run `uv "
            "python install` and `uv sync` in skyrl-agent, or set UV_PYTHON"
        )
    if settings.skyrl_ld_library_path_export and settings.fi_provider == EFA and not facts.efa:
        found.append(
            "SKYRL_LD_LIBRARY_PATH_EXPORT=1, but this node has no EFA libraries in /opt/amazon; set it to 0, and "
            "FI_PROVIDER=tcp, where there is no EFA"
        )
    return found


# --- the steps --------------------------------------------------------------------------------------------------------


def _proxy(_settings: Settings, facts: NodeFacts, environment: Environment) -> Changes:
    exempt = without_proxy(environment, facts.runtime_host)
    return {name: exempt[name] for name in ("no_proxy", "NO_PROXY")}


def _litellm(_settings: Settings, _facts: NodeFacts, _environment: Environment) -> Changes:
    return {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}


def _devices(settings: Settings, facts: NodeFacts, environment: Environment) -> Changes:
    return integer_devices(environment) if wants_integers(settings, facts) else {}


def _several_slices(_settings: Settings, facts: NodeFacts, environment: Environment) -> Changes:
    able = facts.nccl is not None and facts.nccl >= SEVERAL_RANKS_A_CARD
    several = len(slices(environment.get("CUDA_VISIBLE_DEVICES", ""))) > 1
    return {"NCCL_MULTI_RANK_GPU_ENABLE": "1"} if able and several else {}


def _amd(_settings: Settings, _facts: NodeFacts, environment: Environment) -> Changes:
    return without_amd(environment)


def _modules(_settings: Settings, facts: NodeFacts, _environment: Environment) -> Changes:
    return facts.modules


def _libcuda(_settings: Settings, facts: NodeFacts, environment: Environment) -> Changes:
    if facts.libcuda is None:
        return {}
    return with_libcuda(facts.libcuda, environment)


def with_libcuda(folder: Path, environment: Environment) -> dict[str, str]:
    """What leads Triton to the folder of libcuda.so.1; a TRITON_LIBCUDA_PATH that is set stays."""
    lists = {name: _with_last(environment.get(name), str(folder)) for name in ("LD_LIBRARY_PATH", "LIBRARY_PATH")}
    return {"TRITON_LIBCUDA_PATH": environment.get("TRITON_LIBCUDA_PATH", str(folder)), **lists}


def _flash_attention(_settings: Settings, facts: NodeFacts, _environment: Environment) -> Changes:
    return {"VERL_DISABLE_FLASH_ATTN_CE": "1"} if facts.libcuda is None else {}


def _python(_settings: Settings, facts: NodeFacts, _environment: Environment) -> Changes:
    return {"UV_PYTHON": str(facts.python)} if facts.python else {}


def _fabric(settings: Settings, _facts: NodeFacts, _environment: Environment) -> Changes:
    asked = settings.skyrl_ld_library_path_export or settings.fi_provider != EFA
    return {"FI_PROVIDER": settings.fi_provider if asked else None}


def _efa(_settings: Settings, facts: NodeFacts, environment: Environment) -> Changes:
    entries = [*map(str, facts.efa), *(environment.get("LD_LIBRARY_PATH") or "").split(os.pathsep)]
    unique = dict.fromkeys(entry for entry in entries if entry)
    return {"LD_LIBRARY_PATH": os.pathsep.join(unique)} if facts.efa else {}


def _interface(settings: Settings, _facts: NodeFacts, _environment: Environment) -> Changes:
    return dict.fromkeys(INTERFACE_NAMES, settings.network_interface) if settings.network_interface else {}


def _ray_folder(_settings: Settings, facts: NodeFacts, _environment: Environment) -> Changes:
    return {"RAY_TMPDIR": str(facts.folder)}


def _ray_address(_settings: Settings, _facts: NodeFacts, _environment: Environment) -> Changes:
    return {"RAY_ADDRESS": "local"}


def _hugging_face(settings: Settings, facts: NodeFacts, environment: Environment) -> Changes:
    return hugging_face(settings, facts.caches, environment)


def hugging_face(settings: Settings, caches: Caches, environment: Environment) -> Changes:
    """Where models are looked for, and downloaded to, if CACHE_DIR is set; nothing where that is left as it is."""
    stays = caches.home_has_models and not caches.moved_has_model
    if stays or "HF_HOME" in environment or "HF_HUB_CACHE" in environment:
        return {}
    login = {"HF_TOKEN_PATH": str(caches.home_token)} if caches.home_token else {}
    return {"HF_HOME": f"{settings.cache_dir}/huggingface", **login}


def _uv_cache(settings: Settings, facts: NodeFacts, _environment: Environment) -> Changes:
    return {} if facts.caches.home_has_uv else {"UV_CACHE_DIR": f"{settings.cache_dir}/uv"}


def compile_caches(folder: Path, environment: Environment) -> dict[str, str]:
    """Where compiled kernels go on a node, below ``folder``, for what is not in ``environment``."""
    return {name: str(folder / sub) for name, sub in COMPILE_CACHES.items() if name not in environment}


def _compile_caches(_settings: Settings, facts: NodeFacts, environment: Environment) -> Changes:
    return compile_caches(facts.folder, environment)


def _with_last(value: str | None, folder: str) -> str:
    entries = [entry for entry in (value or "").split(os.pathsep) if entry]
    return os.pathsep.join(entries if folder in entries else [*entries, folder])


def _later(*names: str) -> Changes:
    return dict.fromkeys(names, LATER)


STEPS: tuple[Step, ...] = (
    Step(
        "proxy",
        "the API server is inside the cluster, where no HTTP proxy leads",
        _proxy,
        on_node=_later("no_proxy", "NO_PROXY"),
    ),
    Step("LiteLLM", "else every process asks the internet for prices", _litellm, yields=True),
    Step(
        "several MIG slices",
        "NCCL takes several ranks on one card only if told so, and from 2.30 on",
        _several_slices,
        lambda settings: with_verl(settings) and settings.gpus_per_node > 1,
        _later("NCCL_MULTI_RANK_GPU_ENABLE"),
        yields=True,
    ),
    Step(
        "MIG slices",
        "vLLM before 0.24 reads the names of devices as integers, so UUIDs of slices become 0,1,…",
        _devices,
        lambda settings: with_verl(settings) and with_gpus(settings),
        _later("CUDA_VISIBLE_DEVICES"),
    ),
    Step(
        "AMD's names",
        "Slurm may set them beside CUDA_VISIBLE_DEVICES, and VERL ends when it finds both",
        _amd,
        with_gpus,
        dict.fromkeys(AMD_NAMES),
    ),
    Step(
        "modules",
        "CUDA_MODULES, else `module load cuda` where no libcuda is found",
        _modules,
        with_gpus,
        _later("PATH", "LD_LIBRARY_PATH"),
    ),
    Step(
        "libcuda",
        "Triton links with it and does not find it on every node; a TRITON_LIBCUDA_PATH of your own stays",
        _libcuda,
        with_gpus,
        _later("TRITON_LIBCUDA_PATH", "LD_LIBRARY_PATH", "LIBRARY_PATH"),
    ),
    Step(
        "flash attention",
        "without libcuda VERL's cross entropy in Triton cannot be compiled",
        _flash_attention,
        lambda settings: with_verl(settings) and with_gpus(settings),
        _later("VERL_DISABLE_FLASH_ATTN_CE"),
        yields=True,
    ),
    Step(
        "Python",
        "Triton compiles with Python.h, which not every Python has",
        _python,
        with_verl,
        _later("UV_PYTHON"),
        yields=True,
    ),
    Step(
        "libfabric",
        "FI_PROVIDER is the key's; efa only with SKYRL_LD_LIBRARY_PATH_EXPORT=1; that of .env does not count",
        _fabric,
    ),
    Step(
        "EFA",
        "SKYRL_LD_LIBRARY_PATH_EXPORT=1: AWS's libfabric and its plug-in for NCCL come first",
        _efa,
        lambda settings: settings.skyrl_ld_library_path_export,
        _later("LD_LIBRARY_PATH"),
    ),
    Step("interface", "NETWORK_INTERFACE, for NCCL, gloo and TensorPipe", _interface),
    Step(
        "Ray's folder",
        "the job's own, on the node's disk, short enough for Ray's sockets, gone with the job",
        _ray_folder,
        on_node=_later("RAY_TMPDIR"),
        yields=True,
    ),
    Step(
        "Ray's address",
        "a cluster of its own on one node; Ray would join any other that it finds on the host",
        _ray_address,
        lambda settings: with_verl(settings) and settings.gpu_nodes == 1,
    ),
    Step(
        "Hugging Face",
        "to CACHE_DIR, but for a HF_HUB_CACHE of your own, and for models in the default cache while CACHE_DIR has "
        "not MODEL",
        _hugging_face,
        lambda settings: settings.cache_dir is not None,
        _later("HF_HOME", "HF_TOKEN_PATH"),
        yields=True,
    ),
    Step(
        "uv's cache",
        "to CACHE_DIR, but for a default cache that is in use",
        _uv_cache,
        lambda settings: settings.cache_dir is not None,
        _later("UV_CACHE_DIR"),
        yields=True,
    ),
    Step(
        "compiled kernels",
        "on the node's disk: many processes at once are slow on a home, and fill it",
        _compile_caches,
        lambda settings: with_gpus(settings) and settings.gpu_nodes == 1,
        _later(*COMPILE_CACHES),
        yields=True,
    ),
)
