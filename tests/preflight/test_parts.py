"""The checks' pure parts, by tables: models, memory, checkpoints, Slurm's answers, what a node says."""

from __future__ import annotations

import math
import os
import re
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slurm.lib.api_server_child import common_flags
from slurm.lib.checkpoints import TRACKER
from slurm.lib.errors import EnvironmentProblem
from slurm.lib.preflight import checkpoint, cluster, data, dotenv, memory, mig, model, node, places
from slurm.lib.preflight.checkpoint import Saved, resume_findings, space_findings
from slurm.lib.preflight.finding import Finding, Level
from slurm.lib.preflight.model import ModelFacts
from slurm.lib.preflight.words import duration, number_of, size
from slurm.lib.processes import Completed
from slurm.lib.sandbox_room import sandbox_room
from slurm.lib.settings import Settings
from slurm_runtime.config import ServerConfig
from slurm_runtime.slots import share_out
from tests.preflight.world import World

ERROR, WARNING, ESTIMATE = Level.ERROR, Level.WARNING, Level.ESTIMATE
G = 1024**3


def levels(found: list[Finding]) -> list[Level]:
    return [finding.level for finding in found]


@pytest.mark.parametrize(("number", "said"), [(0, "0 nodes"), (1, "1 node"), (2, "2 nodes")])
def test_numbers_of_things(number: int, said: str) -> None:
    assert number_of(number, "node") == said


@pytest.mark.parametrize(("amount", "said"), [(0, "0"), (1024, "1K"), (1536 * 1024**2, "1.5G"), (4e12, "3.64T")])
def test_sizes(amount: float, said: str) -> None:
    assert size(amount) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (105, "105 s"),
        (3599, "59 min"),
        (3600, "1 h"),
        (12000, "3 h 20 min"),
        (86400, "1 d"),
        (187500, "2 d 4 h"),
    ],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_a_start_waits_as_long_as_the_server_says() -> None:
    assert ServerConfig().list_patience_s == data.START_WAIT_S


# --- sandboxes --------------------------------------------------------------------------------------------------------


def runtime(cpus: int, each: float, wanted: int, most: int | None) -> Settings:
    return Settings(
        cpus_for_runtime=cpus, cpus_per_worker=each, train_batch_size=wanted, rollout_n=1, max_parallel_agents=most
    )


@pytest.mark.parametrize(
    ("cpus", "each", "wanted", "most", "slots", "share"),
    [
        (128, 0.25, 512, None, 512, 0.25),
        (128, 8, 512, None, 512, 0.25),  # CPUs are shared
        (128, 8, 512, 16, 512, 0.25),  # 16 is what the CPUs allow, said again
        (128, 8, 512, 15, 15, 8),  # a limit of the user's own
        (128, 8, 512, 96, 96, 1.333333),  # another one
        (64, 1, 96, None, 96, 0.666666),  # rounded down: 64 / 0.666667 would be 95 slots
        (32, 8, 2, None, 4, 8),
        (32, 8, 2, 4, 4, 8),
    ],
)
def test_the_room(cpus: int, each: float, wanted: int, most: int | None, slots: int, share: float) -> None:
    room = sandbox_room(runtime(cpus, each, wanted, most))
    assert (room.slots, room.cpus_each) == (slots, share)
    flags = common_flags(runtime(cpus, each, wanted, most))
    told = float(flags[flags.index("--cpus-per-worker") + 1])
    assert share_out(range(cpus), cpus, 0, told, most and room.slots)[0].total == slots, "the server makes so many"


@pytest.mark.parametrize(
    ("nodes", "cpus", "each", "wanted", "most", "slots", "share"),
    [
        (4, 128, 0.25, 512, None, (512,) * 4, 0.25),  # what fits may exist
        (2, 128, 8, 512, None, (256, 256), 0.5),  # the nodes share what is wanted, each its CPUs
        (3, 128, 8, 512, None, (171,) * 3, 0.748538),
        (32, 128, 8, 512, None, (16,) * 32, 8),
        (32, 128, 8, 512, 16, (16,) * 32, 8),  # what one node's CPUs allow, said again
        (32, 128, 8, 512, 512, (16,) * 32, 8),  # what all allow
        (4, 32, 8, 10, 14, (4, 4, 3, 3), 8),  # a bound of the user's own, for all nodes together
        (4, 32, 8, 10, 6, (2, 2, 1, 1), 8),
    ],
)
def test_the_room_on_several_nodes(
    nodes: int, cpus: int, each: float, wanted: int, most: int | None, slots: tuple[int, ...], share: float
) -> None:
    settings = replace(runtime(cpus, each, wanted, most), runtime_nodes=nodes)
    room = sandbox_room(settings)
    assert (room.slots_of_nodes, room.all_slots, room.cpus_each) == (slots, sum(slots), share)
    assert [sandbox_room(settings, node=node).slots for node in range(nodes)] == list(slots)


@pytest.mark.parametrize(
    ("nodes", "cpus", "each", "wanted", "least", "first", "first_slots", "in_full"),
    [
        (1, 128, 8, 512, None, 1, 512, 32),
        (32, 128, 8, 512, None, 32, 512, 32),  # all that is wanted has to be there
        (40, 128, 8, 512, None, 32, 512, 32),  # further nodes are not waited for
        (4, 128, 0.25, 512, None, 1, 512, 1),
        (4, 32, 8, 8, 5, 2, 8, 2),
        (4, 32, 8, 8, 999, 4, 16, 2),
        (2, 32, 3, 100, None, 2, 100, 10),
    ],
)
def test_which_nodes_are_waited_for_and_how_many_give_all_in_full(
    nodes: int, cpus: int, each: float, wanted: int, least: int | None, first: int, first_slots: int, in_full: int
) -> None:
    many = replace(runtime(cpus, each, wanted, None), runtime_nodes=nodes, runtime_min_slots=least)
    room = sandbox_room(replace(many, memory_per_worker="1M"))
    assert (room.nodes_for(room.min_slots), room.first_slots, room.nodes_in_full) == (first, first_slots, in_full)


@pytest.mark.parametrize(("memory", "nodes"), [("512G", 8), ("100G", 43), ("0", 1)])
def test_nodes_that_give_each_its_memory(memory: str, nodes: int) -> None:
    settings = replace(runtime(128, 0.25, 512, None), runtime_memory=memory, memory_per_worker="8G")
    assert sandbox_room(settings).nodes_in_full == nodes


def test_a_users_command_wants_what_it_wants() -> None:
    assert sandbox_room(Settings(training_command="true", cpus_for_runtime=32, cpus_per_worker=8)).slots == 4


# --- models -----------------------------------------------------------------------------------------------------------

QWEN_05B: dict[str, Any] = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}
LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
}
MIXTRAL: dict[str, Any] = {**LLAMA_8B, "num_local_experts": 8, "vocab_size": 32000}


@pytest.mark.parametrize(
    ("config", "billions"), [(QWEN_05B, 0.494), (LLAMA_8B, 8.03), (MIXTRAL, 46.7)], ids=["qwen", "llama", "mixtral"]
)
def test_parameters_are_counted_from_shapes(config: dict[str, Any], billions: float) -> None:
    """Against the numbers that the models' own cards give."""
    assert model.model_of(config).parameters / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        (None, 32768),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        ({"rope_type": "linear", "factor": 2.0}, 65536),
        ({"rope_type": "llama3", "factor": 8.0}, 32768),
        ({"rope_type": "default"}, 32768),
    ],
)
def test_the_context_with_rope_scaling(scaling: dict[str, Any] | None, context: int) -> None:
    assert model.model_of({**QWEN_05B, "rope_scaling": scaling}).context == context


@pytest.mark.parametrize(
    ("name", "billions"),
    [("Qwen/Qwen3-1.7B", 1.7), ("a/b-32b-instruct", 32), ("Mixtral-8x7B", 56), ("gpt-2", 0), ("x/7Bit", 0)],
)
def test_a_name_tells_a_number(name: str, billions: float) -> None:
    assert model.parameters_by_name(name) == billions * 1e9


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"])
def test_the_cache_is_found_where_the_hub_keeps_it(tmp_path: Path, variable: str) -> None:
    below = {"HF_HUB_CACHE": ".", "HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}
    hub = tmp_path / below.get(variable, ".cache/huggingface/hub")
    folder = hub / "models--Qwen--Qwen3-8B"
    config = folder / "snapshots" / "abc" / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text("{}")
    assert model.config_file("Qwen/Qwen3-8B", {variable: str(tmp_path)}) == config
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("other")
    assert model.config_file("Qwen/Qwen3-8B", {variable: str(tmp_path)}) is None


def cached(hub: Path, name: str) -> None:
    config = hub / f"models--{name.replace('/', '--')}" / "snapshots" / "abc" / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text("{}")


@pytest.mark.parametrize(
    ("moved", "home", "environment", "is_there", "names"),
    [
        ((), (), {}, False, True),
        (("m/M",), (), {}, True, True),
        (("m/M",), ("m/M",), {}, True, True),
        ((), ("m/M",), {}, True, False),
        ((), ("o/Other",), {}, False, False),
        (("m/M",), ("o/Other",), {}, True, True),
        (("m/M",), (), {"HF_HOME": "/nowhere"}, False, False),
    ],
)
def test_models_are_looked_for_where_the_node_will(
    tmp_path: Path,
    moved: tuple[str, ...],
    home: tuple[str, ...],
    environment: dict[str, str],
    is_there: bool,
    names: bool,
) -> None:
    for folder, models in (("cache/huggingface/hub", moved), (".cache/huggingface/hub", home)):
        for name in models:
            cached(tmp_path / folder, name)
    settings = Settings(model="m/M", cache_dir=tmp_path / "cache")
    facts = model.look_at_model(settings, {"HOME": str(tmp_path), **environment})
    assert (facts.model is not None, facts.moved) == (is_there, tmp_path / "cache/huggingface" if names else None)
    said = " ".join(finding.fix for finding in model.model_findings(settings, facts))
    assert (f"HF_HOME={tmp_path}/cache/huggingface hf download m/M" in said) == (names and not is_there)


@pytest.mark.parametrize(
    ("name", "fix"),
    [("models/Q17", "write ./models/Q17"), ("https://huggingface.co/Org/Name", "write Org/Name"), ("./models/Q17", "")],
)
def test_a_model_by_a_name_that_verl_takes_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fix: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "Q17").mkdir(parents=True)
    (tmp_path / "models" / "Q17" / "config.json").write_text("{}")
    settings = Settings(model=name, skyrl_project_root=tmp_path / "project")
    found = model.model_findings(settings, model.look_at_model(settings, {}))
    assert [(finding.level, finding.fix) for finding in found] == ([(ERROR, fix)] if fix else [])


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        ("a100", (40, 80)),
        ("nvidia_a100_3g.20gb", (20, 20)),
        ("nvidia-h100-80gb-hbm3", (80, 80)),
        ("tesla_v100", (16, 32)),
        ("h200", (141, 141)),
        ("", None),
        ("mystery", None),
    ],
)
def test_the_memory_of_a_gpu(kind: str, known: tuple[int, int] | None) -> None:
    assert memory.gpu_memory(kind) == (known and (known[0] * G, known[1] * G))


def test_needs_are_what_the_sizes_give() -> None:
    facts = ModelFacts(model.model_of(QWEN_05B), folder=True)
    settings = Settings(gpu_nodes=2, gpus_per_node=2, tp_size=2, max_model_len=1000, fsdp_param_offload=False)
    need = memory.needs(settings, facts, 1_000_000)
    cache = 1000 * 24 * 2 * 2 * 64 * 2  # tokens, layers, keys and values, their heads, size of a head, bytes
    assert (need.update, need.host, need.resting) == (4e6, 4e6, 1e6)
    assert need.inference == (2e6 + cache) / 2


@pytest.mark.parametrize("kind", ["1g.10gb", "a100_2g.10gb"])
def test_more_slices_are_no_help(kind: str) -> None:
    settings = Settings(
        model="m/M-7B", gpu_type=kind, gpus_per_node=1, training_memory="1G", fsdp_optimizer_offload=True
    )
    found = [one for one in memory.memory_findings(settings, ModelFacts(None, False)) if one.level is ERROR]
    assert found
    assert all(mig.SMALL_MODEL in one.fix and "GPU_NODES" not in one.fix for one in found), found


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "epochs", "overrides", "steps"),
    [
        (9, 2, (), 4),
        (3, 2, (), 0),
        (9, 2, ("trainer.total_training_steps=3",), 3),
        (9, 2, ("+trainer.total_training_steps=30",), 4),
        (9, 2, ("trainer.total_training_steps=null",), 4),
    ],
)
def test_the_steps_in_all(rows: int, epochs: int, overrides: tuple[str, ...], steps: int) -> None:
    settings = Settings(train_batch_size=4, total_epochs=epochs, verl_overrides=overrides)
    assert data.total_steps(settings, rows) == steps


# --- checkpoints ------------------------------------------------------------------------------------------------------

FOUR = Settings(gpu_nodes=1, gpus_per_node=4)
WHOLE = frozenset(
    {"data.pt"} | {f"actor/{part}_world_size_4_rank_{n}.pt" for part in checkpoint.PARTS for n in range(4)}
)
LESS = frozenset(name.replace("world_size_4", "world_size_2") for name in WHOLE)


@pytest.mark.parametrize(
    ("saved", "found", "said"),
    [
        (Saved(None, (), frozenset()), [ESTIMATE], "starts from scratch"),
        (Saved("5", (4, 5), WHOLE), [ESTIMATE], "resumes from step 5"),
        (Saved("5", (5,), WHOLE - {"data.pt"}), [ESTIMATE, WARNING], "has no data.pt"),
        (Saved(None, (4, 5), frozenset()), [ERROR], "has steps 4, 5 and no latest_checkpointed_iteration.txt"),
        (Saved("five", (5,), frozenset()), [ERROR], "'five', which is no step"),
        (Saved("6", (5,), frozenset()), [ERROR], "names step 6"),
        (Saved("5", (5,), LESS), [ERROR], "was saved on 2 GPUs; this run has GPU_NODES × GPUS_PER_NODE = 4"),
        (Saved("5", (5,), frozenset({"data.pt"})), [ERROR], "has no model files"),
        (Saved("5", (5,), WHOLE - {"actor/optim_world_size_4_rank_3.pt"}), [ERROR], "lacks 1 of 12 files (actor/optim"),
    ],
)
def test_resuming(saved: Saved, found: list[Level], said: str) -> None:
    result = resume_findings(FOUR, Path("/ckpt"), saved)
    assert levels(result) == found
    assert said in " ".join(finding.sentence for finding in result)


SMALL, OTHER = model.model_of(QWEN_05B), model.model_of(LLAMA_8B)


@pytest.mark.parametrize(
    ("saved", "steps", "wanted", "said"),
    [
        (SMALL, 6, SMALL, ""),
        (SMALL, None, None, ""),
        (SMALL, None, model.model_of({}), ""),
        (None, None, SMALL, ""),
        (None, 5, None, "is at step 5 of at most 5: this training is complete"),
        (None, 4, None, "of at most 4: this training is complete"),
        (SMALL, 6, OTHER, "a model of 24 layers with hidden_size 896, MODEL=Qwen/Qwen3-8B has 32 with 4096"),
    ],
)
def test_resuming_what_is_another_or_complete(
    saved: model.Model | None, steps: int | None, wanted: model.Model | None, said: str
) -> None:
    found = resume_findings(FOUR, Path("/ckpt"), Saved("5", (5,), WHOLE, saved), checkpoint.Wanted(steps, wanted))
    assert levels(found) == [ERROR if said else ESTIMATE]
    assert said in found[0].sentence


def test_starting_over_on_purpose() -> None:
    settings = Settings(gpu_nodes=1, gpus_per_node=4, verl_overrides=("trainer.resume_mode=disable",))
    assert levels(resume_findings(settings, Path("/ckpt"), Saved("5", (5,), WHOLE))) == [WARNING]


def test_a_checkpoint_folder_is_read_as_verl_writes_it(tmp_path: Path) -> None:
    for name in WHOLE:
        path = tmp_path / "global_step_5" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "global_step_4").mkdir()
    (tmp_path / TRACKER).write_text("5\n")
    saved = checkpoint.look_at_folder(tmp_path)
    assert (saved.tracker, saved.steps) == ("5", (4, 5))
    assert saved.files >= WHOLE
    assert levels(resume_findings(FOUR, tmp_path, saved)) == [ESTIMATE]


@pytest.mark.parametrize(
    ("keep", "free_gb", "level"), [(1, 3000, ESTIMATE), (10, 3000, WARNING), (1, 500, WARNING)]
)  # 32e9 × 12 bytes are 384 GB
def test_room_for_checkpoints(keep: int, free_gb: int, level: Level) -> None:
    settings = Settings(model="Qwen/Qwen3-32B", max_ckpt_to_keep=keep)
    (found,) = space_findings(settings, ModelFacts(None, False), Path("/ckpt"), free_gb * 10**9)
    assert found.level is level


def test_no_checkpoints_need_no_room() -> None:
    settings = Settings(model="Qwen/Qwen3-32B", save_freq=-1)
    assert space_findings(settings, ModelFacts(None, False), Path("/ckpt"), 0) == []


# --- .env -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "netrc", "shell", "loggers", "found"),
    [
        ("WANDB_API_KEY=abc\n", "", {}, ("wandb",), []),
        ('WANDB_API_KEY="<REPLACE>"\n', "", {}, ("wandb",), [ERROR]),
        ('WANDB_API_KEY="<REPLACE>"\n', "", {"WANDB_API_KEY": "x"}, ("wandb",), []),
        ('WANDB_API_KEY="<REPLACE>"\n', "", {}, ("console",), []),
        ("", "machine api.wandb.ai login user password x\n", {}, ("wandb",), []),
        ("", "machine api.wandb.ai login user password x\n", {"WANDB_BASE_URL": "https://own"}, ("wandb",), [WARNING]),
        ("", "machine own login user password x\n", {"WANDB_BASE_URL": "https://own:8080/"}, ("wandb",), []),
        ("", "machine own:8080 login user password x\n", {"WANDB_BASE_URL": "https://own:8080"}, ("wandb",), []),
        ("", "machine own login user password x\n", {"WANDB_BASE_URL": "https://api.wandb.ai"}, ("wandb",), [ERROR]),
        ("WANDB_BASE_URL=http://own\n", "machine own login user password x\n", {}, ("wandb",), []),
        ("", "", {"WANDB_MODE": "offline"}, ("wandb",), []),
        ("ALLHANDS_API_KEY=<REPLACE>\nSANDBOX_REMOTE_RUNTIME_API_URL=<REPLACE>\n", "", {}, ("console",), []),
    ],
)
def test_dot_env(
    tmp_path: Path, content: str, netrc: str, shell: dict[str, str], loggers: tuple[str, ...], found: list[Level]
) -> None:
    (tmp_path / ".env").write_text(content)
    (tmp_path / ".netrc").write_text(netrc)
    read = dotenv.read_dot_env(tmp_path / ".env", {"HOME": str(tmp_path)})
    assert levels(dotenv.dot_env_findings(Settings(loggers=loggers), shell, read)) == found


@pytest.mark.parametrize(("login", "found"), [("own", []), ("api.wandb.ai", [WARNING])])
def test_a_login_where_wandb_is_told_to_look(tmp_path: Path, login: str, found: list[Level]) -> None:
    settings = tmp_path / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nbase_url = https://own:8080\n")
    (tmp_path / "mine").write_text(f"machine {login} login user password x\n")
    read = dotenv.read_dot_env(tmp_path / ".env", {"HOME": str(tmp_path), "NETRC": "~/mine"})
    assert levels(dotenv.dot_env_findings(Settings(loggers=("wandb",)), {}, read)) == found


@pytest.mark.parametrize("text", ["no section", "[default]\nentity = me\n", "[default]\nbase_url=%(x)s\n"])
def test_wandbs_settings_without_a_server(tmp_path: Path, text: str) -> None:
    (tmp_path / "settings").write_text(text)
    read = dotenv.read_dot_env(tmp_path / ".env", {"WANDB_CONFIG_DIR": str(tmp_path)})
    assert read.base_url in {"", "%(x)s"}


def test_a_dot_env_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"A=\xff\n")
    (found,) = dotenv.dot_env_findings(Settings(), {}, dotenv.read_dot_env(tmp_path / ".env", {}))
    assert found.level is ERROR


# --- folders and storage ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("is_folder", "writable", "found"), [(True, True, []), (True, False, [ERROR]), (False, True, [ERROR])]
)
def test_folders(is_folder: bool, writable: bool, found: list[Level]) -> None:
    folder = places.Folder("ROLLOUT_DIR", Path("/a/b"), Path("/a"), is_folder, writable)
    assert levels(places.folder_findings([folder])) == found


@pytest.mark.parametrize(
    ("path", "file_system", "found"),
    [
        ("/scratch", "ext4", []),
        ("/scratch", "", []),
        ("/scratch", "nfs4", [WARNING]),
        ("/s" + "x" * 50, "xfs", [WARNING]),
    ],
)
def test_storage(path: str, file_system: str, found: list[Level]) -> None:
    assert levels(places.scratch_findings(places.Scratch(Path(path), file_system, 1000))) == found


@pytest.mark.parametrize(("lacking", "here", "there"), [((), [], []), (("/etc/subuid",), [WARNING], [ERROR])])
def test_subordinate_ids(lacking: tuple[str, ...], here: list[Level], there: list[Level]) -> None:
    """On the login node a warning, since a compute node may have other files; there an error."""
    ids = places.SubordinateIds("me", 1000, lacking)
    assert (levels(places.id_findings(ids)), levels(node.node_id_findings(ids))) == (here, there)


# --- Slurm's answers --------------------------------------------------------------------------------------------------

SINFO = """\
test|up|12:00:00|2|(null)|1-1
gpu|up|1-00:00:00|3|gpu:a100:4(S:0-1),nic:1
gpu|up|1-00:00:00|2|gpu:a100:4,gpu:h100:2|1-infinite
plain|up|infinite|1|gpu:8
gpux|drain|infinite|1|gpu:8
a line of a site's own
"""


def test_sinfo_is_read() -> None:
    groups = cluster.parse_groups(SINFO)
    assert [(group.partition, group.up, group.nodes) for group in groups] == [
        ("test", True, 2),
        ("gpu", True, 3),
        ("gpu", True, 2),
        ("plain", True, 1),
        ("gpux", False, 1),
    ]
    assert [group.limit_s for group in groups] == [43200, 86400, 86400, math.inf, math.inf]
    assert [group.most_nodes for group in groups] == [1] + [math.inf] * 4
    assert [dict(group.gpus) for group in groups] == [{}, {"a100": 4}, {"a100": 4, "h100": 2}, {"": 8}, {"": 8}]


def shape(partition: str, nodes: int = 1, gpus: int = 0, kind: str = "") -> cluster.JobShape:
    return cluster.JobShape("training", "GPU_PARTITION", tuple(partition.split(",")), nodes, gpus, kind)


@pytest.mark.parametrize(
    ("job", "limit", "said"),
    [
        (shape("gpu", 5, 4), "12:00:00", ""),
        (shape("gpu", 5, 4, "a100"), "1-0", ""),
        (shape("gpu", 2, 2, "h100"), "1-0", ""),
        (shape("test,gpu"), "1-0", ""),
        (shape("nope"), "1", "there is no such partition; there are: gpu, gpux, plain, test"),
        (shape("gpux"), "1", "is not up"),
        (shape("test"), "12:00:01", "TIME_LIMIT=12:00:01 is more than GPU_PARTITION=test allows (12 h)"),
        (shape("test"), "UNLIMITED", "never starts"),
        (shape("gpu", 6), "1", "wants 6 nodes, GPU_PARTITION=gpu has 5"),
        (shape("gpu", 1, 5), "1", "wants 1 node with 5 GPUs each"),
        (shape("gpu", 3, 2, "h100"), "1", "has 2 of them"),
        (shape("gpu", 1, 1, "v100"), "1", "; GPU_TYPE can be a100, h100 there"),
        (shape("gpu", 1, 5, "a100"), "1", "; change GPU_NODES, GPUS_PER_NODE, GPU_TYPE"),
        (shape("plain", 1, 1, "a100"), "1", "; leave GPU_TYPE unset"),
        (shape("test", 1, 1), "1", "2 with no GPU"),
        (shape("test", 2), "1", "gives a job at most 1 (MaxNodes); change GPU_NODES"),
    ],
)
def test_partitions(job: cluster.JobShape, limit: str, said: str) -> None:
    found = cluster.partition_findings(Settings(time_limit=limit), job, cluster.parse_groups(SINFO))
    assert levels(found) == ([ERROR] if said else [])
    assert all(said in f"{finding.sentence}; {finding.fix}" for finding in found)


def test_a_qos_may_allow_more_than_its_partition() -> None:
    settings = Settings(time_limit="2-0", qos="long")
    for job in (shape("gpu"), shape("test", 2)):
        found = cluster.partition_findings(settings, job, cluster.parse_groups(SINFO))
        assert set(levels(found)) == {WARNING}


@pytest.mark.parametrize(
    ("words", "level", "said"),
    [
        ({"runtime_nodes": 2}, None, ""),
        ({"runtime_nodes": 3, "runtime_min_slots": 1}, WARNING, "never join; lower RUNTIME_NODES to 2"),
        ({"runtime_nodes": 3}, WARNING, "never join, and the training waits for them"),
        ({"runtime_nodes": 3, "runtime_mode": "allocation"}, ERROR, "has 2 of them"),
        ({"runtime_nodes": 2, "runtime_mode": "allocation"}, ERROR, "at most 1 (MaxNodes); change RUNTIME_NODES or"),
    ],
)
def test_the_runtimes_nodes_against_their_partition(words: dict[str, Any], level: Level | None, said: str) -> None:
    settings = replace(runtime(8, 1, 24, None), cpu_partition="test", time_limit="1", **words)
    (job,) = cluster.shapes(settings, training=False)
    found = cluster.partition_findings(settings, job, cluster.parse_groups(SINFO))
    assert any(said in str(finding) for finding in found) or not said
    assert set(levels(found)) == ({level} if level else set())


@pytest.mark.parametrize(("nodes", "found"), [(1001, []), (1002, [ERROR])])
def test_the_runtimes_nodes_against_the_numbers_of_an_array(nodes: int, found: list[Level]) -> None:
    shown = "MaxArraySize            = 1001\n"
    assert levels(cluster.array_findings(Settings(runtime_nodes=nodes), shown)) == found


@pytest.mark.parametrize("words", [("-p", "x"), ("--partition=x",), ("--gres=gpu:1",), ("-t5",), ("--clusters=b",)])
def test_options_that_say_otherwise_leave_the_word_to_sbatch(tmp_path: Path, words: tuple[str, ...]) -> None:
    world = World(tmp_path)
    assert [job.kind for job in cluster.job_shapes(world.plan("GPU_SBATCH_ARGS=--comment=x"))] == [
        "runtime",
        "training",
    ]
    assert [job.kind for job in cluster.job_shapes(world.plan(f"GPU_SBATCH_ARGS={' '.join(words)}"))] == ["runtime"]


def test_the_question_is_the_submission(tmp_path: Path) -> None:
    plan = World(tmp_path).plan()
    asked = [cluster.question_argv(job.argv) for job in plan.jobs]
    for words, job in zip(asked, plan.jobs, strict=True):
        assert words[:2] == ("sbatch", "--test-only")
        assert not any(word.startswith(("--hold", "--parsable", "--dependency", "--kill-on")) for word in words)
        assert set(job.argv) >= set(words) - {"--test-only"}


@pytest.mark.parametrize(
    ("code", "words", "found"),
    [
        (
            0,
            "sbatch: Job 5 to start at 2026-11-25T10:00:00 using 2 processors on nodes cpu-a in partition test",
            [ESTIMATE],
        ),
        (0, "", []),
        (1, "allocation failure: Invalid partition name specified", [ERROR]),
        (
            1,
            "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
            [WARNING],
        ),
        (124, "sbatch: no answer within 8 s: sbatch --test-only", [WARNING]),
    ],
)
def test_what_sbatch_says(code: int, words: str, found: list[Level]) -> None:
    assert levels(cluster.submission_findings("runtime", Completed(("sbatch",), code, "", words))) == found


def test_a_refusal_shows_the_keys_that_it_may_mean() -> None:
    argv = ("sbatch", "--partition=gpu", "--constraint=a&b", "--mem=1G", "x.py")
    (found,) = cluster.submission_findings("training", Completed(argv, 1, "", "Invalid feature specification"))
    assert "GPU_PARTITION=gpu, CONSTRAINT=a&b or a size" in str(found)


def starting_at(time: str) -> Completed:
    words = f"sbatch: Job 5 to start at {time} using 2 processors on nodes a in partition test"
    return Completed(("sbatch",), 0, "", words)


@pytest.mark.parametrize(
    ("training", "overrides", "level", "said"),
    [
        ("2026-11-25T10:30:00", (), None, ""),
        ("2026-11-25T09:00:00", (), None, ""),
        ("2026-11-25T13:20:00", (), WARNING, "3 h 20 min after the runtime job, which holds 32 CPUs and 64G of memory"),
        ("2026-11-25T17:00:00", (), WARNING, "more than half of its TIME_LIMIT=12:00:00"),
        ("2026-11-25T17:00:00", ("TIME_LIMIT=UNLIMITED",), WARNING, "which holds 32 CPUs and 64G of memory until then"),
        ("2026-11-27T14:00:00", ("RUNTIME_IDLE_LIMIT=60",), ESTIMATE, "2 d 4 h after .* after RUNTIME_IDLE_LIMIT=60 s"),
        ("whenever", (), None, ""),
    ],
)
def test_how_long_the_runtime_job_would_wait(
    tmp_path: Path, training: str, overrides: tuple[str, ...], level: Level | None, said: str
) -> None:
    settings = World(tmp_path).plan("TIME_LIMIT=12:00:00", *overrides).settings
    found = cluster.wait_findings(settings, starting_at("2026-11-25T10:00:00"), starting_at(training))
    assert levels(found) == ([level] if level else [])
    assert all(re.search(said, finding.sentence) for finding in found)
    assert all(("PAIRING=het" in finding.fix) is (level is WARNING) for finding in found)
    assert all(("MIN_RUN_TIME" in finding.fix) is ("half" in finding.sentence) for finding in found)


def test_a_wait_is_not_known_where_slurm_refuses_a_job(tmp_path: Path) -> None:
    settings = World(tmp_path).plan().settings
    refusal = Completed(("sbatch",), 1, "", "allocation failure: Invalid partition name specified")
    assert not cluster.wait_findings(settings, starting_at("2026-11-25T10:00:00"), refusal)


LOST = (
    "{0}: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host\n{0}: error: fetch_config: DNS SRV lookup "
    "failed\n{0}: fatal: Could not establish a configuration source\n"
)


@pytest.mark.parametrize(
    ("sbatch", "sinfo", "said"),
    [
        (LOST.format("sbatch"), LOST.format("sinfo"), "Could not establish a configuration source"),
        (
            "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
            "slurm_load_partitions: Unable to contact slurm controller (connect failure)",
            "Unable to contact slurm controller (connect failure)",
        ),
        ("no answer within 8 s: sbatch --test-only x", "no answer within 8 s: sinfo", "no answer within 8 s"),
    ],
    ids=["no configuration", "no controller", "no answer"],
)
def test_a_silent_slurm_is_said_once(tmp_path: Path, sbatch: str, sinfo: str, said: str) -> None:
    world = World(tmp_path)
    world.slurm.forget()
    world.slurm.answer("sbatch --test-only", *[{"code": 1, "stderr": sbatch}] * 2)
    world.slurm.answer("sinfo", {"code": 1, "stderr": sinfo})
    (found,) = [finding for finding in world.check() if finding.check == "slurm"]
    assert (found.level, found.fix) == (WARNING, "is SLURM_CONF set? does `sinfo` answer?")
    assert found.sentence.endswith(f"compared: {said}")


ASSOCIATIONS = "lab|gpu|normal,long\nother|gpu|short\n"


@pytest.mark.parametrize(
    ("account", "qos", "code", "text", "found"),
    [
        ("lab", "long", 0, ASSOCIATIONS, []),
        ("", "short", 0, ASSOCIATIONS, []),
        ("nobody", "", 0, ASSOCIATIONS, [ERROR]),
        ("lab", "short", 0, ASSOCIATIONS, [ERROR]),
        ("Lab", "LONG", 0, ASSOCIATIONS, []),
        ("lab", "long", 0, "Lab||\n", []),  # no QOS is listed, which says nothing
        ("nobody", "", 1, "", []),  # no accounting here
        ("nobody", "", 0, "", []),  # or it is not told
    ],
)
def test_accounts(account: str, qos: str, code: int, text: str, found: list[Level]) -> None:
    settings = Settings(account=account, qos=qos)
    assert levels(cluster.account_findings(settings, Completed(("sacctmgr",), code, text, ""), "me")) == found


# --- the node's own checks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "visible"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "MIG-aa,MIG-bb"}, 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 0),
        ({"SLURM_GPUS_ON_NODE": "8"}, 8),
        ({}, None),
    ],
)
def test_visible_gpus(environment: dict[str, str], visible: int | None) -> None:
    assert node.visible_gpus(environment) == visible


@pytest.mark.parametrize(("visible", "found"), [(2, []), (1, [ERROR]), (3, [ERROR]), (None, [WARNING])])
def test_gpus_of_a_node(visible: int | None, found: list[Level]) -> None:
    assert levels(node.gpu_findings(Settings(gpus_per_node=2), visible)) == found


@pytest.mark.parametrize(
    ("free", "image", "found"),
    [
        (20 * G, "ghcr.io/a/b", []),
        (5 * G, "ghcr.io/a/b", [WARNING]),
        (5 * G, "localhost/skyrl-busybox:latest", []),
        (100 * 1024**2, "localhost/skyrl-busybox:latest", [ERROR]),
    ],
)
def test_the_disk_of_a_node(free: int, image: str, found: list[Level]) -> None:
    assert levels(node.disk_findings(Path("/scratch"), free, image)) == found


def test_a_range_for_sandboxes_has_a_free_port_or_is_named() -> None:
    ports = range(20_000, 20_003)
    assert node.sandbox_port_findings(ports, lambda port: port == 20_002) == []
    (found,) = node.sandbox_port_findings(ports, lambda _: False)
    assert "no free port in SANDBOX_PORT_RANGE=20000-20002" in found.sentence
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        assert not node.is_free(taken.getsockname()[1])


def test_a_training_node_names_all_that_it_lacks(tmp_path: Path) -> None:
    world = World(tmp_path)
    settings = world.settings(f"CHECKPOINT_DIR={world.uv}/x")
    environment = {**world.environment, "CUDA_VISIBLE_DEVICES": "0,1"}
    node.check_training_node(world.settings(), environment)
    (world.agent / "uv.lock").unlink()
    (world.data / "train.parquet").unlink()
    with pytest.raises(EnvironmentProblem) as problem:
        node.check_training_node(settings, {**environment, "CUDA_VISIBLE_DEVICES": "0", "PATH": "/nowhere"})
    for words in (
        "uv.lock is missing",
        "uv is not a folder",
        "GPUs of this job on this node: 1",
        "TRAIN_DATA=",
        "not on PATH",
    ):
        assert words in str(problem.value)


def test_a_command_of_the_users_needs_no_gpus_and_no_data(tmp_path: Path) -> None:
    settings = World(tmp_path).settings("TRAINING_COMMAND=true", "DATA_DIR=/nowhere")
    node.check_training_node(settings, {"PATH": os.environ["PATH"]})


def test_a_runtime_node_names_all_that_it_lacks(tmp_path: Path) -> None:
    settings = Settings(local_scratch=tmp_path / "nowhere", training_command="true")
    with pytest.raises(EnvironmentProblem, match="not on PATH: podman"):
        node.ready_runtime_node(settings, {"PATH": str(tmp_path)}, "7")
