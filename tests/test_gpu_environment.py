"""The trainer's environment on a GPU node: what each step decides, and what is found on a node."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import pytest

from slurm.lib import node_facts
from slurm.lib.config import load_config
from slurm.lib.errors import EnvironmentProblem
from slurm.lib.gpu_environment import (
    COMPILE_CACHES,
    LATER,
    STEPS,
    composed,
    doubts,
    integer_devices,
    planned,
    wants_integers,
)
from slurm.lib.node_environment import for_trainer, lines
from slurm.lib.node_facts import Caches, NodeFacts, find_cuda, folder_of_libcuda, joined, load_modules
from slurm.lib.preflight.finding import Level
from slurm.lib.preflight.mig import is_mig_type, mig_findings, visible_findings
from slurm.lib.ray_folder import choose
from slurm.lib.settings import Settings
from tests.runs import until

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("/tmp/skyray-0-7t")
OTHER = ("TRAINING_COMMAND=true",)


def settings_of(*overrides: str, config: str | None = None, home: str = "/home/me") -> Settings:
    """One node with two GPUs and VERL, unless said otherwise."""
    now = datetime(2026, 3, 4)
    words = ("GPUS_PER_NODE=2", *overrides)
    return load_config(config, words, {"HOME": home}, ROOT / "slurm" / "config", now, Path("/project")).settings


def facts(**found: object) -> NodeFacts:
    return NodeFacts(**{"folder": FOLDER, "runtime_host": "cpu1", **found})  # type: ignore[arg-type]


def after(
    base: Mapping[str, str], *overrides: str, found: NodeFacts | None = None, config: str | None = None
) -> dict[str, str]:
    return composed(settings_of(*overrides, config=config), found or facts(), base)[0]


def program(folder: Path, name: str, output: str = "") -> Path:
    """A folder for PATH with a program that prints this."""
    tool = folder / "bin" / name
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{output}END\n")
    tool.chmod(0o755)
    return tool.parent


# --- devices ----------------------------------------------------------------------------------------------------------

A, B = "MIG-11111111-aaaa", "MIG-22222222-bbbb"
DEVICES = [
    ("0,1", None, (), "0,1"),
    (A, None, (), "0"),
    (f"{A},{B}", None, (), "0,1"),
    (f"{A},{B}", (0, 8, 5), (), "0,1"),
    (f"{A},{B}", (0, 22, 0), (), "0,1"),
    (f"{A},{B}", (0, 24, 0), (), f"{A},{B}"),
    (A, (0, 25, 1), (), A),
    (f"{A},{B}", None, OTHER, f"{A},{B}"),
]


@pytest.mark.parametrize(("visible", "vllm", "overrides", "expected"), DEVICES)
def test_slices_become_integers_where_vllm_wants_them(
    visible: str, vllm: tuple[int, ...] | None, overrides: tuple[str, ...], expected: str
) -> None:
    found = after({"CUDA_VISIBLE_DEVICES": visible}, *overrides, found=facts(vllm=vllm))
    assert found["CUDA_VISIBLE_DEVICES"] == expected


@pytest.mark.parametrize(
    ("overrides", "vllm", "wanted"),
    [
        ((), (0, 8, 5), True),
        ((), None, True),
        ((), (0, 24), False),
        (OTHER, (0, 8, 5), False),
        (("GPUS_PER_NODE=0", *OTHER), None, False),
    ],
)
def test_who_wants_integers(overrides: tuple[str, ...], vllm: tuple[int, ...] | None, wanted: bool) -> None:
    assert wants_integers(settings_of(*overrides), facts(vllm=vllm)) is wanted


@pytest.mark.parametrize("visible", ["0,1", "", "NoDevFiles", "GPU-1111"])
def test_names_of_what_is_no_slice_stay(visible: str) -> None:
    assert integer_devices({"CUDA_VISIBLE_DEVICES": visible}) == {}


def test_no_devices_are_made_up() -> None:
    assert "CUDA_VISIBLE_DEVICES" not in after({})


@pytest.mark.parametrize(
    ("nccl", "visible", "expected"),
    [((2, 21, 5), f"{A},{B}", None), ((2, 30, 4), f"{A},{B}", "1"), ((2, 32), A, None), (None, f"{A},{B}", None)],
)
def test_a_newer_nccl_is_told_of_several_ranks_a_card(
    nccl: tuple[int, ...] | None, visible: str, expected: str | None
) -> None:
    found = after({"CUDA_VISIBLE_DEVICES": visible}, found=facts(nccl=nccl))
    assert found.get("NCCL_MULTI_RANK_GPU_ENABLE") == expected


def test_amds_names_go_where_cudas_are_set() -> None:
    amd = {"ROCR_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": "0"}
    assert not amd.keys() & after({**amd, "CUDA_VISIBLE_DEVICES": "0"}).keys()
    assert amd.items() <= after(amd).items()


@pytest.mark.parametrize(
    ("gpu_type", "is_mig"),
    [
        *[(name, True) for name in ("1g.20gb", "a100_1g.5gb", "nvidia_h100_80gb_hbm3_3g.40gb", "mig", "1c.3g.20gb")],
        *[(name, False) for name in ("", "a100", "h100-80gb", "migrated", "gh200", "nvidia_a100_80gb_pcie")],
    ],
)
def test_types_that_name_a_slice(gpu_type: str, is_mig: bool) -> None:
    assert is_mig_type(gpu_type) is is_mig


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        (("GPU_TYPE=1g.20gb",), 1),
        (("GPU_TYPE=1g.20gb", "GPUS_PER_NODE=1", "TP_SIZE=1", "SP_SIZE=1"), 0),
        (("GPU_TYPE=1g.20gb", "GPUS_PER_NODE=1", "GPU_NODES=2"), 1),
        (("GPU_TYPE=a100",), 0),
        (("GPU_TYPE=1g.20gb", *OTHER), 0),
    ],
)
def test_several_slices_are_mentioned_before_queueing(overrides: tuple[str, ...], count: int) -> None:
    found = mig_findings(settings_of(*overrides))
    assert [finding.level for finding in found] == [Level.WARNING] * count
    assert all("GPUS_PER_NODE=1" in finding.fix for finding in found)


SAME, APART = {A: "GPU-1", B: "GPU-1"}, {A: "GPU-1", B: "GPU-2"}


@pytest.mark.parametrize(
    ("visible", "cards", "nccl", "level"),
    [
        (A, SAME, (2, 21), None),
        ("0,1", {}, (2, 21), None),
        (f"{A},{B}", SAME, (2, 21, 5), Level.ERROR),
        (f"{A},{B}", SAME, (2, 30, 4), Level.WARNING),
        (f"{A},{B}", SAME, None, Level.WARNING),
        (f"{A},{B}", APART, (2, 21, 5), Level.WARNING),
        (f"{A},{B}", {}, (2, 21, 5), Level.WARNING),
    ],
)
def test_slices_are_an_error_only_where_nccl_surely_refuses(
    visible: str, cards: dict[str, str], nccl: tuple[int, ...] | None, level: Level | None
) -> None:
    found = visible_findings(visible, cards, nccl)
    assert [finding.level for finding in found] == ([level] if level else [])


def test_the_cards_of_slices() -> None:
    text = (
        "GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-1)\n"
        f"  MIG 3g.20gb     Device  0: (UUID: {A})\n"
        f"  MIG 3g.20gb     Device  1: (UUID: {B})\n"
        "GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-2)\n  MIG 7g.40gb     Device  0: (UUID: MIG-3)\n"
    )
    assert node_facts.parse_cards(text) == {A: "GPU-1", B: "GPU-1", "MIG-3": "GPU-2"}


def agent_with(folder: Path, *packages: str) -> Path:
    """A skyrl-agent whose environment holds these packages, as far as names of folders tell."""
    for package in packages:
        (folder / ".venv" / "lib" / "python3.12" / "site-packages" / f"{package}.dist-info").mkdir(parents=True)
    return folder


def test_the_node_refuses_what_its_nccl_cannot(tmp_path: Path) -> None:
    """Through everything that is looked up: the packages' folders, and a real program called nvidia-smi."""
    listing = "".join(f" MIG 1g.5gb Device 0: (UUID: {uuid})\n" for uuid in (A, B))
    tools = program(tmp_path, "nvidia-smi", f"GPU 0: X (UUID: GPU-1)\n{listing}")
    base = {"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": f"{A},{B}"}
    old = agent_with(tmp_path / "old", "vllm-0.8.5.post1", "nvidia_nccl_cu12-2.21.5")
    with pytest.raises(EnvironmentProblem, match=r"2 MIG slices.*NCCL 2\.21\.5 refuses.*GPUS_PER_NODE=1"):
        for_trainer(settings_of(), base, old, FOLDER, "cpu1")
    new = agent_with(tmp_path / "new", "vllm-0.25.1", "nvidia_nccl_cu13-2.30.4")
    found = for_trainer(settings_of(), base, new, FOLDER, "cpu1")
    variables = found.variables
    assert (variables["CUDA_VISIBLE_DEVICES"], variables["NCCL_MULTI_RANK_GPU_ENABLE"]) == (f"{A},{B}", "1")
    assert not found.integer_devices
    other = for_trainer(settings_of(*OTHER), base, old, FOLDER, "cpu1")
    assert (other.variables["CUDA_VISIBLE_DEVICES"], other.integer_devices) == (f"{A},{B}", False)


def test_the_other_nodes_are_told_what_this_nodes_packages_want(tmp_path: Path) -> None:
    """Whatever names this node has: those of the others are their own."""
    old = agent_with(tmp_path, "vllm-0.8.5.post1")
    for visible, expected in ((A, "0"), ("0", "0"), ("", "")):
        base = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": visible}
        found = for_trainer(settings_of(), base, old, FOLDER, "cpu1")
        assert (found.variables["CUDA_VISIBLE_DEVICES"], found.integer_devices) == (expected, True)


# --- CUDA -------------------------------------------------------------------------------------------------------------


def test_triton_is_told_of_libcuda() -> None:
    found = after({"LD_LIBRARY_PATH": "/mine"}, found=facts(libcuda=Path("/drv")))
    assert found["TRITON_LIBCUDA_PATH"] == "/drv"
    assert found["LD_LIBRARY_PATH"] == "/mine:/drv"
    assert found["LIBRARY_PATH"] == "/drv"
    assert "VERL_DISABLE_FLASH_ATTN_CE" not in found
    mine = {"TRITON_LIBCUDA_PATH": "/own", "LD_LIBRARY_PATH": "/drv:/mine"}
    assert mine.items() <= after(mine, found=facts(libcuda=Path("/drv"))).items()


@pytest.mark.parametrize(
    ("overrides", "expected"), [((), "1"), (OTHER, None), (("GPUS_PER_NODE=0", *OTHER), None)], ids=str
)
def test_without_libcuda_verl_does_without_triton(overrides: tuple[str, ...], expected: str | None) -> None:
    assert after({}, *overrides).get("VERL_DISABLE_FLASH_ATTN_CE") == expected
    assert any("no libcuda" in sentence for sentence in doubts(settings_of(*overrides), facts(), {})) is bool(expected)


def test_libcuda_is_looked_for_in_order(tmp_path: Path) -> None:
    usual, mine, toolkit = (tmp_path / name for name in ("usual", "mine", "cuda/compat"))
    for folder in (usual, mine, toolkit):
        folder.mkdir(parents=True)
    (usual / "libcuda.so.1").touch()
    environment = {"PATH": os.environ["PATH"], "LD_LIBRARY_PATH": f":{mine}", "CUDA_HOME": str(tmp_path / "cuda")}
    assert folder_of_libcuda(environment, [tmp_path / "none", usual]) == usual
    (toolkit / "libcuda.so.1").touch()
    assert folder_of_libcuda(environment, [usual]) == toolkit
    (mine / "libcuda.so.1").touch()
    assert folder_of_libcuda(environment, [usual]) == mine


def test_the_linkers_cache_is_asked_last(tmp_path: Path) -> None:
    library = tmp_path / "odd" / "libcuda.so.1"
    library.parent.mkdir()
    tools = program(tmp_path, "ldconfig", f"\tlibcuda.so.1 (libc6,x86-64) => {library}\n")
    environment = {"PATH": f"{tools}:{os.environ['PATH']}"}
    assert folder_of_libcuda(environment, []) is None  # listed, but not there
    library.touch()
    assert folder_of_libcuda(environment, []) == library.parent


def test_a_line_of_ldconfig() -> None:
    text = (
        "\tlibcuda.so.1 (libc6) => /lib/i386/libcuda.so.1\n"
        "\tlibcuda.so.1 (libc6,x86-64) => /usr/lib64/libcuda.so.1\n"
        "\tlibcudart.so.13 (libc6,x86-64) => /c/libcudart.so.13\n"
    )
    assert node_facts.parse_ldconfig(text) == Path("/usr/lib64/libcuda.so.1")
    assert node_facts.parse_ldconfig("") is None


def with_modules(home: Path, **scripts: str) -> dict[str, str]:
    """An environment whose login shell has `module load` for these names, as a site's profile defines it."""
    cases = "\n".join(f"{name}) {script} ;;" for name, script in scripts.items())
    profile = (
        'echo "a greeting on stdout"\nexport PATH="/profiles/own:$PATH"\n'
        f'module() {{ case "$2" in\n{cases}\n*) echo "unable to locate a modulefile for $2" >&2; return 1 ;; esac; }}\n'
    )
    home.mkdir(exist_ok=True)
    (home / ".bash_profile").write_text(profile)
    return {"HOME": str(home), "PATH": "/mine:/usr/bin:/bin", "LD_LIBRARY_PATH": "/my/lib"}


def test_modules_are_loaded_by_a_real_login_shell(tmp_path: Path) -> None:
    environment = with_modules(
        tmp_path / "home",
        cuda="export CUDA_HOME=/c 'ODD=two\nlines' LD_LIBRARY_PATH=/c/lib64:$LD_LIBRARY_PATH PATH=/c/bin:$PATH",
        gcc="export CC=gcc-13 PATH=/g/bin:$PATH",
    )
    found, complaint = load_modules(("cuda", "gcc"), environment)
    assert complaint == ""
    assert found == {
        "CUDA_HOME": "/c",
        "ODD": "two\nlines",
        "CC": "gcc-13",
        "PATH": "/g/bin:/c/bin:/mine:/usr/bin:/bin",  # without what the profile does to every login shell
        "LD_LIBRARY_PATH": "/c/lib64:/my/lib",
    }


def test_a_module_that_is_not_there(tmp_path: Path) -> None:
    environment = with_modules(tmp_path / "home", cuda="export CUDA_HOME=/c")
    with pytest.raises(EnvironmentProblem, match=r"CUDA_MODULES=cuda nosuch: .*unable to locate .* nosuch"):
        find_cuda(("cuda", "nosuch"), environment)
    bare = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    assert load_modules(("cuda",), bare) == ({}, "this node has no command 'module'")


def test_a_module_is_tried_only_where_there_is_no_libcuda(tmp_path: Path) -> None:
    library = tmp_path / "toolkit" / "libcuda.so.1"
    library.parent.mkdir()
    library.touch()
    environment = with_modules(tmp_path / "home", cuda=f"export LD_LIBRARY_PATH={library.parent} LOADED=1")
    environment["PATH"] = f"{program(tmp_path, 'ldconfig')}:{environment['PATH']}"  # knows of no libcuda
    folder, changes, complaint = find_cuda((), environment, [])
    assert (folder, changes["LOADED"], complaint) == (library.parent, "1", "")
    assert find_cuda((), {**environment, **changes}, []) == (library.parent, {}, "")
    assert find_cuda((), environment, [library.parent]) == (library.parent, {}, "")
    assert find_cuda(("cuda",), environment, [library.parent])[1]["LOADED"] == "1"


def test_only_what_a_module_adds_goes_into_lists() -> None:
    before = {"PATH": "/profile:/bin", "PWD": "/a", "X": "1", "GONE": "1"}
    changed = {"PATH": "/new:/profile:/bin", "PWD": "/b", "X": "2", "BASH_FUNC_f%%": "() { :; }", "MANPATH": "/m:"}
    assert joined(before, changed, {"PATH": "/mine"}) == {"PATH": "/new:/mine", "X": "2", "MANPATH": "/m"}


# --- Python, network, Ray ---------------------------------------------------------------------------------------------


def test_a_python_with_headers(tmp_path: Path) -> None:
    """Real Pythons: the header's presence is theirs to say."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / ".venv")], check=True)
    environment = {"PATH": "/nonexistent", "HOME": str(tmp_path)}
    base, version = node_facts.base_python(tmp_path / ".venv")
    assert base and version == ".".join(map(str, sys.version_info[:2]))
    has = Path(
        subprocess.check_output([base, "-c", "import sysconfig as s; print(s.get_path('include'))"], text=True).strip()
    )
    found = node_facts.find_python(tmp_path, {**environment, "PATH": "/usr/bin:/bin"})
    assert (found == base) is (has / "Python.h").is_file()
    assert node_facts.find_python(tmp_path / "none", environment) is None


def test_the_pythons_that_uv_knows() -> None:
    text = (
        '[{"version": "3.12.7", "path": "/a"}, {"version": "3.1.2", "path": "/b"}, {"version": "3.12.1", "path": null}]'
    )
    assert node_facts.parse_uv_pythons(text, "3.12") == [Path("/a")]
    assert node_facts.parse_uv_pythons("", "3.12") == node_facts.parse_uv_pythons("not JSON", "3.12") == []


def test_uv_is_told_of_it_unless_somebody_did() -> None:
    assert after({}, found=facts(python=Path("/p/python3.12")))["UV_PYTHON"] == "/p/python3.12"
    assert after({"UV_PYTHON": "3.12"}, found=facts(python=Path("/p")))["UV_PYTHON"] == "3.12"
    assert "UV_PYTHON" not in after({}, *OTHER, found=facts(python=Path("/p")))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), None),
        (("FI_PROVIDER=efa",), None),
        (("FI_PROVIDER=tcp",), "tcp"),
        (("SKYRL_LD_LIBRARY_PATH_EXPORT=1",), "efa"),
        (("SKYRL_LD_LIBRARY_PATH_EXPORT=1", "FI_PROVIDER=tcp"), "tcp"),
    ],
)
@pytest.mark.parametrize("base", [{}, {"FI_PROVIDER": "efa"}, {"FI_PROVIDER": "verbs"}], ids=str)
def test_efa_is_used_only_where_it_is_asked_for(
    overrides: tuple[str, ...], expected: str | None, base: dict[str, str]
) -> None:
    """Whatever skyrl-agent's .env says."""
    assert after(base, *overrides).get("FI_PROVIDER") == expected


def test_efas_libraries_come_first() -> None:
    found = facts(efa=(Path("/e/lib"), Path("/n/lib")))
    on = "SKYRL_LD_LIBRARY_PATH_EXPORT=1"
    assert after({"LD_LIBRARY_PATH": "/mine:/e/lib"}, on, found=found)["LD_LIBRARY_PATH"] == "/e/lib:/n/lib:/mine"
    assert "LD_LIBRARY_PATH" not in after({}, found=found)
    assert any("no EFA libraries" in sentence for sentence in doubts(settings_of(on), facts(), {}))
    assert not any("EFA" in sentence for sentence in doubts(settings_of(on, "FI_PROVIDER=tcp"), facts(), {}))


def test_the_interface_is_said_to_all_who_ask() -> None:
    names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
    found = after({"NCCL_SOCKET_IFNAME": "eth0"}, "NETWORK_INTERFACE=ib0")
    assert [found[name] for name in names] == ["ib0"] * 3
    assert not set(names) & after({}).keys()


def test_an_interface_that_is_not_there(tmp_path: Path) -> None:
    settings = settings_of("NETWORK_INTERFACE=nosuch9", "GPUS_PER_NODE=0", *OTHER)
    with pytest.raises(EnvironmentProblem, match=r"NETWORK_INTERFACE=nosuch9: .* which has .*lo"):
        for_trainer(settings, {"PATH": os.environ["PATH"]}, tmp_path, FOLDER, "cpu1")


def test_ray_never_meets_anothers() -> None:
    found = after({"RAY_ADDRESS": "10.0.0.1:6379"})
    assert (found["RAY_ADDRESS"], found["RAY_TMPDIR"]) == ("local", str(FOLDER))
    assert after({"RAY_TMPDIR": "/mine"})["RAY_TMPDIR"] == "/mine"
    assert "RAY_ADDRESS" not in after({}, "GPU_NODES=2")  # the cluster's own address comes later
    assert after({"RAY_ADDRESS": "mine"}, *OTHER)["RAY_ADDRESS"] == "mine"


def test_the_runtime_is_reached_past_any_proxy() -> None:
    found = after({"http_proxy": "http://p:1", "no_proxy": "a,b"}, *OTHER)
    assert (found["no_proxy"], found["NO_PROXY"]) == ("a,b,cpu1", "cpu1")
    assert after(found, *OTHER)["no_proxy"] == "a,b,cpu1"


OWNER = """
import sys, time
from pathlib import Path
from slurm.lib.config import load_config
from slurm.lib.coordination import CoordinationDir
from slurm.lib.guardian import guarded
from slurm.lib.job_context import JobContext
from slurm.lib.node_environment import job_folder
from slurm.lib.scheduler import LocalJobs
from slurm.lib.settings import Settings
scratch, code = Path(sys.argv[1]), Path(sys.argv[2])
job = JobContext("7", CoordinationDir(scratch), Settings(local_scratch=scratch), {}, LocalJobs(scratch), code, True)
with guarded(code) as guardian, job_folder(job, guardian) as folder:
    guardian.await_detached()
    (folder / "ray" / "session").mkdir(parents=True)
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["an orderly end", "kill -9"])
def test_the_jobs_folder_goes_with_the_job(end: str) -> None:
    scratch = Path(tempfile.mkdtemp(dir="/tmp"))  # short, as Ray needs it; pytest's own folders are not
    argv = [sys.executable, "-c", OWNER, str(scratch), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as owner:
        assert owner.stdout and owner.stdin
        folder = Path(owner.stdout.readline().strip())
        assert folder.parent == scratch
        assert folder.stat().st_mode & 0o777 == 0o700
        assert len(str(folder / "ray")) <= 43
        if end == "kill -9":
            owner.kill()
    until("the folder's end", lambda: not folder.exists(), 20)
    scratch.rmdir()  # nothing else was left in it


def test_without_room_for_rays_sockets_the_next_folder_is_taken(tmp_path: Path) -> None:
    name = "skyray-0-7t"
    assert choose([str(tmp_path / ("x" * 40)), "/tmp"], f"{name}/ray") == Path("/tmp")
    with pytest.raises(EnvironmentProblem, match=r"path too long for Ray's sockets.*LOCAL_SCRATCH"):
        choose([f"/{'x' * 40}"], f"{name}/ray")


# --- caches -----------------------------------------------------------------------------------------------------------

MOVED = "CACHE_DIR=/c"


@pytest.mark.parametrize(
    ("caches", "base", "expected"),
    [
        (Caches(), {}, "/c/huggingface"),
        (Caches(home_has_models=True), {}, None),
        (Caches(home_has_models=True, moved_has_model=True), {}, "/c/huggingface"),
        (Caches(), {"HF_HOME": "/mine"}, "/mine"),
        (Caches(), {"HF_HUB_CACHE": "/mine"}, None),
    ],
)
def test_models_that_are_there_stay_in_sight(caches: Caches, base: dict[str, str], expected: str | None) -> None:
    assert after(base, MOVED, found=facts(caches=caches)).get("HF_HOME") == expected


def test_a_login_stays_valid() -> None:
    token = Caches(home_token=Path("/home/me/.cache/huggingface/token"))
    assert after({}, MOVED, found=facts(caches=token))["HF_TOKEN_PATH"] == "/home/me/.cache/huggingface/token"
    assert "HF_TOKEN_PATH" not in after({"HF_HOME": "/mine"}, MOVED, found=facts(caches=token))
    assert after({"HF_TOKEN_PATH": "/t"}, MOVED, found=facts(caches=token))["HF_TOKEN_PATH"] == "/t"


def test_what_caches_hold_is_seen(tmp_path: Path) -> None:
    settings = settings_of(f"CACHE_DIR={tmp_path}/c", "MODEL=Qwen/Qwen3-8B")
    environment = {"HOME": str(tmp_path)}
    assert node_facts.look_at_caches(settings, environment) == Caches()
    default = tmp_path / ".cache"
    (tmp_path / "c/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/1").mkdir(parents=True)
    (default / "huggingface/hub/models--a--b/snapshots/1").mkdir(parents=True)
    (default / "huggingface/token").touch()
    (default / "uv/archive-v0/x").mkdir(parents=True)
    found = node_facts.look_at_caches(settings, environment)
    assert found == Caches(True, True, default / "huggingface/token", True)
    assert not node_facts.look_at_caches(settings, {**environment, "XDG_CACHE_HOME": "/nowhere"}).home_has_models


def test_uvs_cache() -> None:
    assert after({}, MOVED)["UV_CACHE_DIR"] == "/c/uv"
    assert "UV_CACHE_DIR" not in after({}, MOVED, found=facts(caches=Caches(home_has_uv=True)))
    assert after({"UV_CACHE_DIR": "/u"}, MOVED)["UV_CACHE_DIR"] == "/u"


@pytest.mark.parametrize(("base", "expected"), [("/shared/jobs", "/shared/jobs/.cache"), ("/home/me/jobs", None)])
def test_caches_are_shared_off_the_home(base: str, expected: str | None) -> None:
    found = settings_of(f"SKYRL_JOBS_BASE={base}").cache_dir
    assert found == (Path(expected) if expected else None)


def test_compiled_kernels_lie_on_the_node() -> None:
    assert {after({})[name] for name in COMPILE_CACHES} == {f"{FOLDER}/{sub}" for sub in COMPILE_CACHES.values()}
    assert after({"TRITON_CACHE_DIR": "/t"})["TRITON_CACHE_DIR"] == "/t"
    several = after({}, "GPU_NODES=2")  # each node has a folder of its own: slurm/lib/ray_node.py
    assert not COMPILE_CACHES.keys() & several.keys()


# --- all together -----------------------------------------------------------------------------------------------------


def test_a_trainer_without_gpus_gets_what_concerns_it() -> None:
    environment = after({"HOME": "/h"}, "GPUS_PER_NODE=0", *OTHER)
    assert environment == {
        "HOME": "/h",
        "no_proxy": "cpu1",
        "NO_PROXY": "cpu1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "RAY_TMPDIR": str(FOLDER),
    }


def test_steps_twice_are_steps_once() -> None:
    found = facts(libcuda=Path("/drv"), efa=(Path("/e"),), python=Path("/p"), modules={"PATH": "/m:/bin"})
    base = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": A, "ROCR_VISIBLE_DEVICES": "0"}
    settings = settings_of(MOVED, "NETWORK_INTERFACE=ib0", config="production")
    once, applied = composed(settings, found, base)
    assert applied
    assert composed(settings, found, once) == (once, [])


@pytest.mark.parametrize("config", ["dev", "production", "check", "local"])
def test_the_dry_run_names_all_that_the_node_will_do(config: str) -> None:
    """Every variable that a step can set on a node is in the plan, with its value unless only the node knows it."""
    settings = settings_of(config=config)
    found = facts(
        libcuda=Path("/drv"), efa=(Path("/e"),), python=Path("/p"), nccl=(2, 32), caches=Caches(home_token=Path("/t"))
    )
    base = {"CUDA_VISIBLE_DEVICES": f"{A},{B}", "ROCR_VISIBLE_DEVICES": "0"}
    _, applied = composed(settings, found, base)
    plan = {one.step.name: one.changes for one in planned(settings, {})}
    for one in applied:
        assert one.changes.keys() <= plan[one.step.name].keys()
        for name, value in one.changes.items():
            assert plan[one.step.name][name] in {value, LATER}


def test_what_is_set_already_is_not_announced() -> None:
    names = {
        name for one in planned(settings_of(MOVED), {"HF_HOME": "/mine", "UV_PYTHON": "x"}) for name in one.changes
    }
    assert not names & {"HF_HOME", "UV_PYTHON"}
    assert "UV_CACHE_DIR" in names


def test_every_step_has_a_name_and_a_reason_of_its_own() -> None:
    assert len({step.name for step in STEPS}) == len({step.reason for step in STEPS}) == len(STEPS)


def test_the_log_shows_values_and_no_secret() -> None:
    base = {"API_KEY": "sk-0123456789", "no_proxy": "sk-0123456789"}
    _, applied = composed(settings_of("FI_PROVIDER=tcp"), facts(), base)
    text = "\n".join(lines(applied, base))
    assert "FI_PROVIDER=tcp  # libfabric: " in text
    assert f"RAY_TMPDIR={FOLDER}" in text
    assert "sk-0123456789" not in text
