"""What is on this node that the trainer's environment depends on? Looked up here, decided in ``gpu_environment``.

Nothing is changed. Every command has a deadline; what cannot be found out is None or empty.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slurm.lib.errors import EnvironmentProblem, SuiteError
from slurm.lib.preflight.mig import slices
from slurm.lib.processes import run
from slurm.lib.settings import Settings

LIBCUDA = "libcuda.so.1"
# Where drivers put it: Debian, Red Hat, NVIDIA's container toolkit, WSL, the compatibility package of the toolkit.
LIBRARY_FOLDERS = tuple(
    map(
        Path,
        (
            "/usr/lib/x86_64-linux-gnu",
            "/usr/lib/aarch64-linux-gnu",
            "/usr/lib64",
            "/usr/lib64/nvidia",
            "/usr/lib/x86_64-linux-gnu/nvidia/current",
            "/usr/local/nvidia/lib64",
            "/usr/lib/wsl/lib",
            "/usr/local/cuda/compat",
        ),
    )
)
# Of AWS's EFA installer: libfabric, and the plug-in through which NCCL uses it.
EFA_FOLDERS = tuple(
    Path("/opt/amazon") / name for name in ("efa/lib", "efa/lib64", "ofi-nccl/lib", "ofi-nccl/lib/x86_64-linux-gnu")
)
DEFAULT_MODULES = ("cuda",)  # tried where there is no libcuda and CUDA_MODULES says nothing
COMMAND_TIMEOUT_S = 15.0
MODULE_TIMEOUT_S = 60.0  # a module tree on busy shared storage
# The lists of folders in which a module's additions go before what is there.
LISTS = frozenset(
    {"PATH", "LD_LIBRARY_PATH", "LIBRARY_PATH", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "MANPATH"}
    | {"PKG_CONFIG_PATH", "CMAKE_PREFIX_PATH", "LOADEDMODULES", "_LMFILES_", "MODULEPATH"}
)
SHELLS_OWN = frozenset({"_", "PWD", "OLDPWD", "SHLVL"})
MARK = "skyrl-modules"
MODULE_SCRIPT = f"""
type module >/dev/null 2>&1 || {{ echo "this node has no command 'module'" >&2; exit 1; }}
printf '{MARK}\\0'; env -0
for name; do module load "$name" >&2 || exit 1; done
printf '{MARK}\\0'; env -0
"""


@dataclass(frozen=True)
class Caches:
    """What the shared caches hold already.

    ``moved_has_model``: MODEL is in CACHE_DIR's Hugging Face cache. ``home_has_models``: some model is in the default
    one. ``home_token``: the login that `hf auth login` left there. ``home_has_uv``: uv's default cache is in use.
    """

    moved_has_model: bool = False
    home_has_models: bool = False
    home_token: Path | None = None
    home_has_uv: bool = False


@dataclass(frozen=True)
class NodeFacts:
    """What was found.

    ``folder``: this job's own on the node's disk, short enough for Ray (``ray_folder``). ``runtime_host``: the host
    of the API server. ``libcuda``: the folder of libcuda.so.1. ``modules``: what ``module load`` set, joined with what
    was there. ``module_complaint``: why a module could not be loaded. ``python``: a Python of skyrl-agent's version
    with its headers. ``cards``: MIG slice → its card. ``efa``: the folders of EFA's libraries. ``vllm``, ``nccl``:
    versions in skyrl-agent's environment.
    """

    folder: Path
    runtime_host: str
    libcuda: Path | None = None
    modules: Mapping[str, str] = field(default_factory=dict)
    module_complaint: str = ""
    python: Path | None = None
    cards: Mapping[str, str] = field(default_factory=dict)
    efa: tuple[Path, ...] = ()
    vllm: tuple[int, ...] | None = None
    nccl: tuple[int, ...] | None = None
    caches: Caches = Caches()


def look(settings: Settings, environment: Mapping[str, str], agent: Path, folder: Path, runtime_host: str) -> NodeFacts:
    """The facts for these settings; what no step asks for is not looked up.

    ``EnvironmentProblem`` if a module that CUDA_MODULES names cannot be loaded.
    """
    verl = not settings.training_command
    packages = site_packages(agent, environment) if verl else None
    libcuda, modules, complaint = (
        find_cuda(settings.cuda_modules, environment) if settings.gpus_per_node else (None, {}, "")
    )
    return NodeFacts(
        folder=folder,
        runtime_host=runtime_host,
        libcuda=libcuda,
        modules=modules,
        module_complaint=complaint,
        python=find_python(agent, environment) if verl and "UV_PYTHON" not in environment else None,
        cards=cards_of_slices(environment),
        efa=tuple(path for path in EFA_FOLDERS if path.is_dir()) if settings.skyrl_ld_library_path_export else (),
        vllm=version_of(packages, "vllm"),
        nccl=version_of(packages, "nvidia_nccl_cu*"),
        caches=look_at_caches(settings, environment),
    )


# --- CUDA -------------------------------------------------------------------------------------------------------------


def find_cuda(
    modules: Sequence[str], environment: Mapping[str, str], folders: Iterable[Path] = LIBRARY_FOLDERS
) -> tuple[Path | None, Mapping[str, str], str]:
    """The folder of libcuda.so.1, what modules set on the way, and why none could be loaded.

    Modules that are named are loaded in any case; without a name one is tried where there is no libcuda.
    """
    found = folder_of_libcuda(environment, folders)
    if found and not modules:
        return found, {}, ""
    loaded, complaint = load_modules(modules or DEFAULT_MODULES, environment)
    if modules and complaint:
        raise EnvironmentProblem(f"cannot load CUDA_MODULES={' '.join(modules)}: {complaint}; see `module avail`")
    return found or folder_of_libcuda({**environment, **loaded}, folders), loaded, complaint


def folder_of_libcuda(environment: Mapping[str, str], folders: Iterable[Path] = LIBRARY_FOLDERS) -> Path | None:
    """The first folder with libcuda.so.1: of the environment's, of the usual ones, of the linker's cache."""
    named = [Path(entry) for name in ("LD_LIBRARY_PATH", "LIBRARY_PATH") for entry in _entries(environment.get(name))]
    homes = [Path(environment[name]) for name in ("CUDA_HOME", "CUDA_PATH", "CUDA_ROOT") if environment.get(name)]
    of_toolkit = [home / sub for home in homes for sub in ("compat", "lib64")]
    for folder in (*named, *of_toolkit, *folders):
        if (folder / LIBCUDA).exists():
            return folder
    listed = parse_ldconfig(_output(("ldconfig", "-p"), environment))
    return listed.parent if listed and listed.exists() else None


def parse_ldconfig(text: str) -> Path | None:
    """Where ``ldconfig -p`` lists libcuda.so.1, of 64-bit ones the first."""
    found = re.search(rf"^\s*{re.escape(LIBCUDA)} \(.*64.*\) => (/.+)$", text, re.MULTILINE)
    return Path(found[1]) if found else None


def load_modules(names: Sequence[str], environment: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """What ``module load`` sets, joined with ``environment``; else why it failed.

    ``module`` is a function of the shell, so a login shell is asked.
    """
    try:
        done = run(
            ("bash", "-l", "-c", MODULE_SCRIPT, "bash", *names), timeout_s=MODULE_TIMEOUT_S, environment=environment
        )
    except SuiteError as problem:
        return {}, str(problem)
    parts = done.stdout.split(f"{MARK}\0")
    if not done.ok or len(parts) != 3:
        return {}, done.complaint
    return joined(_variables(parts[1]), _variables(parts[2]), environment), ""


def joined(before: Mapping[str, str], after: Mapping[str, str], base: Mapping[str, str]) -> dict[str, str]:
    """What changed from ``before`` to ``after``, as changes of ``base``; additions to lists go before its entries."""
    changed = {name: value for name, value in after.items() if before.get(name) != value}
    own = {name: value for name, value in changed.items() if name not in SHELLS_OWN and "%" not in name}

    def value_of(name: str, value: str) -> str:
        if name not in LISTS:
            return value
        added = [entry for entry in _entries(value) if entry not in _entries(before.get(name))]
        kept = [entry for entry in _entries(base.get(name)) if entry not in added]
        return os.pathsep.join([*added, *kept])

    return {name: value_of(name, value) for name, value in own.items()}


def _variables(text: str) -> dict[str, str]:
    return dict(entry.partition("=")[::2] for entry in text.split("\0") if "=" in entry)


def _entries(value: str | None) -> list[str]:
    return [entry for entry in (value or "").split(os.pathsep) if entry]


def _output(argv: Sequence[str], environment: Mapping[str, str]) -> str:
    """What a command prints; empty where it is missing, fails or takes too long."""
    path = f"{environment.get('PATH', os.defpath)}{os.pathsep}/usr/sbin{os.pathsep}/sbin"  # ldconfig's place
    try:
        done = run(("env", *argv), timeout_s=COMMAND_TIMEOUT_S, environment={**environment, "PATH": path})
    except SuiteError:
        return ""
    return done.stdout if done.ok else ""


def cards_of_slices(environment: Mapping[str, str]) -> dict[str, str]:
    """MIG slice → its card, where the job was given slices."""
    if not slices(environment.get("CUDA_VISIBLE_DEVICES", "")):
        return {}
    return parse_cards(_output(("nvidia-smi", "-L"), environment))


def parse_cards(text: str) -> dict[str, str]:
    """MIG slice → its card, from ``nvidia-smi -L``, which lists slices below their card."""
    cards, card = {}, ""
    for kind, uuid in re.findall(r"^\s*(GPU|MIG) .*\(UUID: ([^)]+)\)", text, re.MULTILINE):
        if kind == "GPU":
            card = uuid
        else:
            cards[uuid] = card
    return cards


# --- skyrl-agent's Python environment ---------------------------------------------------------------------------------


def project_environment(agent: Path, environment: Mapping[str, str]) -> Path:
    """The folder of the environment that uv uses for skyrl-agent."""
    return agent / (environment.get("UV_PROJECT_ENVIRONMENT") or ".venv")


def site_packages(agent: Path, environment: Mapping[str, str]) -> Path | None:
    """Where its packages lie, if it has been made."""
    return next(iter(sorted(project_environment(agent, environment).glob("lib/python3*/site-packages"))), None)


def version_of(packages: Path | None, pattern: str) -> tuple[int, ...] | None:
    """The version of an installed package, from the name of its dist-info folder; None if it is not there."""
    for path in sorted(packages.glob(f"{pattern}-*.dist-info")) if packages else []:
        numbers = re.match(r"\d+(\.\d+)*", path.name.removesuffix(".dist-info").rpartition("-")[2])
        if numbers:
            return tuple(map(int, numbers[0].split(".")))
    return None


def find_python(agent: Path, environment: Mapping[str, str]) -> Path | None:
    """A Python with its headers: the one under skyrl-agent's environment, else one of the same version that uv knows.

    Triton compiles with Python.h when a worker first runs a kernel; Debian's python3 comes without it.
    """
    base, version = base_python(project_environment(agent, environment))
    if base and has_headers(base, environment):
        return base
    text = _output(("uv", "python", "list", "--only-installed", "--output-format", "json"), environment)
    candidates = parse_uv_pythons(text, version) if version else []
    return next((path for path in candidates if has_headers(path, environment)), None)


def base_python(folder: Path) -> tuple[Path | None, str]:
    """The Python that an environment was made from, and its version as MAJOR.MINOR; (None, "") where there is none."""
    try:
        lines = (folder / "pyvenv.cfg").read_text().splitlines()
    except OSError:
        return None, ""
    values = {name.strip(): value.strip() for name, _, value in (line.partition("=") for line in lines)}
    version = ".".join((values.get("version_info") or values.get("version") or "").split(".")[:2])
    return (Path(values["home"]) / f"python{version}" if values.get("home") and version else None), version


def parse_uv_pythons(text: str, version: str) -> list[Path]:
    """The installed Pythons of this MAJOR.MINOR, from ``uv python list --output-format json``."""
    try:
        rows = json.loads(text or "[]")
    except ValueError:
        return []
    return [Path(row["path"]) for row in rows if row.get("path") and row["version"].startswith(f"{version}.")]


def has_headers(python: Path, environment: Mapping[str, str]) -> bool:
    """Whether this Python finds its Python.h."""
    code = "import os, sysconfig; print(os.path.isfile(os.path.join(sysconfig.get_path('include'), 'Python.h')))"
    return _output((str(python), "-I", "-c", code), environment).strip() == "True"


# --- caches -----------------------------------------------------------------------------------------------------------


def default_cache(environment: Mapping[str, str]) -> Path:
    """Where programs keep caches unless they are told otherwise."""
    return Path(environment.get("XDG_CACHE_HOME") or f"{environment.get('HOME', '/nonexistent')}/.cache")


def look_at_caches(settings: Settings, environment: Mapping[str, str]) -> Caches:
    """What the caches hold that CACHE_DIR is about."""
    if not settings.cache_dir:
        return Caches()
    home, uv = default_cache(environment) / "huggingface", default_cache(environment) / "uv"
    model = "models--" + settings.model.replace("/", "--")
    return Caches(
        moved_has_model=(settings.cache_dir / "huggingface" / "hub" / model / "snapshots").is_dir(),
        home_has_models=any(home.glob("hub/models--*/snapshots/*")),
        home_token=home / "token" if (home / "token").is_file() else None,
        home_has_uv=any(uv.glob("*-v*/*")),
    )
