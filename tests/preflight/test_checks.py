"""Every check, through the registry that the launcher runs: a world in which it passes, and one thing that breaks it."""

# ruff: noqa: E501  a row of the table is a line
from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from slurm.lib.checkpoints import TRACKER
from slurm.lib.errors import EnvironmentProblem, SuiteError, UsageError
from slurm.lib.plan import Request
from slurm.lib.preflight.asked import Asked
from slurm.lib.preflight.checkpoint import PARTS
from slurm.lib.preflight.checks import CHECKS, Check, Refused, everybody, names, refuse, run_checks, skipped_names
from slurm.lib.preflight.finding import Finding, Level, error, estimate, warning
from slurm.lib.preflight.report import as_json, as_text
from tests.preflight.world import ROOT, World, join, of, worst, write_parquet

ERROR, WARNING, ESTIMATE = Level.ERROR, Level.WARNING, Level.ESTIMATE


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# --- the shipped configurations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["dev", "production"])
def test_as_shipped_they_pass(world: World, config: str) -> None:
    found = world.check("MAX_CKPT_TO_KEEP=1", config=config)
    assert not [finding for finding in found if finding.level is ERROR]
    assert not of(found, "slots", WARNING), "no overcommit"
    assert of(found, "slots", ESTIMATE)


SEED = {
    "dev": ("CPUS_PER_WORKER=8", "MEMORY_PER_WORKER=16G", "MAX_PARALLEL_AGENTS=4"),
    "production": ("CPUS_PER_WORKER=8", "MEMORY_PER_WORKER=16G"),
}


@pytest.mark.parametrize(("config", "wanted"), [("dev", 8), ("production", 512)])
def test_the_seeds_own_numbers_pass_and_the_overcommit_is_named(world: World, config: str, wanted: int) -> None:
    found = world.check(*SEED[config], config=config)
    assert not [finding for finding in found if finding.level is ERROR]
    cpus, memory = of(found, "slots", WARNING)
    assert cpus.sentence.startswith("overcommit: ") and f"= {wanted} sandboxes at once" in cpus.sentence
    assert memory.sentence.startswith(f"overcommit: {wanted} sandboxes may take MEMORY_PER_WORKER=16G each")


def test_the_offered_line_is_the_end_of_the_overcommit(world: World) -> None:
    """The seed's production: what the preflight offers, added, leaves nothing to warn of."""
    found = of(world.check(*SEED["production"], config="production"), "slots", WARNING)
    lines = {re.search("add to the .conf: (RUNTIME_NODES=[0-9]+) ", finding.fix) for finding in found}
    offered = {line[1] for line in lines if line}
    assert offered == {"RUNTIME_NODES=32"}, found
    added = of(world.check(*SEED["production"], *offered, config="production"), "slots")
    assert [finding.level for finding in added] == [ESTIMATE]
    assert "a step opens 512 sandboxes at once, 512 fit on 32 nodes, each with up to 8 CPUs" in added[0].sentence


def test_a_fraction_of_a_cpu_that_is_meant_is_told_what_nodes_would_give(world: World) -> None:
    (found,) = of(world.check(config="production"), "slots")
    assert found.fix == "for a whole CPU each, add to the .conf: CPUS_PER_WORKER=1; RUNTIME_NODES=4"


@pytest.mark.parametrize("words", [["PAIRING=het"], ["SLURM_RUNTIME_DIR=/elsewhere"]])
def test_no_nodes_are_offered_to_a_run_that_can_have_none(world: World, words: list[str]) -> None:
    found = of(world.check("CPUS_PER_WORKER=8", *words), "slots", WARNING)
    assert found and not any("RUNTIME_NODES" in finding.fix for finding in found)


@pytest.mark.parametrize("config", ["check", "local"])
def test_checks_of_verl_do_not_concern_other_trainers(world: World, config: str) -> None:
    (world.agent / "uv.lock").unlink()
    world.environment.pop("WANDB_API_KEY")
    found = world.check(config=config)
    assert not [finding for finding in found if finding.level is not ESTIMATE and finding.check != "parts"]
    assert {finding.check for finding in found} <= {"slurm", "parts"}


def test_a_runtime_alone_has_no_trainer(world: World) -> None:
    found = world.check("MAX_PARALLEL_AGENTS=2", "LOCAL_SCRATCH=/" + "x" * 60, request=Request(training=False))
    assert {finding.check for finding in found} == {"storage"}


# --- what breaks each check -------------------------------------------------------------------------------------------

Break = Callable[[World], object]


def nothing(world: World) -> None:
    """The settings alone break it."""


def remove(name: str) -> Break:
    return lambda world: (world.folder / name).unlink()


def unset(name: str) -> Break:
    return lambda world: world.environment.pop(name)


def data(file: str, rows: int, *columns: str) -> Break:
    return lambda world: write_parquet(world.data / file, rows, columns or ("prompt", "data_source", "instance"))


def text(name: str, content: str) -> Break:
    def write(world: World) -> None:
        path = world.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    return write


def module(code: str) -> Break:
    """What VERL does when it is imported."""
    return lambda world: (world.site_packages / "verl.py").write_text(code)


def model(**config: object) -> Break:
    qwen = {"num_attention_heads": 16, "num_key_value_heads": 8, "hidden_size": 2048, "num_hidden_layers": 28}
    sizes = {"intermediate_size": 6144, "vocab_size": 151936, "max_position_embeddings": 40960, "head_dim": 128}
    return text("model/config.json", json.dumps({**qwen, **sizes, **config}))


def say(name: str, *answers: dict[str, object]) -> Break:
    def answer(world: World) -> None:
        world.slurm.forget()
        world.slurm.answer(name, *answers)

    return answer


def saved(step: int) -> Break:
    """A whole step of a model of 24 layers; the model of 28 layers is at hand too."""

    def write(world: World) -> None:
        model()(world)
        actor = world.checkpoints / f"global_step_{step}" / "actor"
        (actor / "huggingface").mkdir(parents=True)
        (actor / "huggingface" / "config.json").write_text(json.dumps({"hidden_size": 896, "num_hidden_layers": 24}))
        for name in (f"{part}_world_size_2_rank_{rank}.pt" for part in PARTS for rank in range(2)):
            (actor / name).touch()
        (actor.parent / "data.pt").touch()
        (world.checkpoints / TRACKER).write_text(str(step))

    return write


SLICES = "gpu_test|up|infinite|4|gpu:nvidia_a100_3g.20gb:8\ntest|up|infinite|4|(null)\ngpu|up|infinite|4|gpu:a100:8\n"
JOINED = "fake/jobs/20260304_050607_101"
SERVED = json.dumps(
    {"schema": 1, "job_id": "99", "runtime_job_id": "101", "exit_code": 0, "reason": "the trainer ended"}
)


def emptied(world: World) -> None:
    """Another folder in place of the joined one."""
    (world.folder / JOINED).rename(world.folder / "old")
    (world.folder / JOINED).mkdir()


MODEL = "MODEL=@/model"
STOCK = '[[package]]\nname = "verl"\nversion = "0.5.0"\nsource = { registry = "https://an.index/simple" }\n'
EXAMPLE = "project/SkyRL/skyrl-agent/examples/run_verl/verl_oh.yaml"
BROKEN: list[tuple[str, Break, list[str], Level, str]] = [
    ("config", nothing, ["TRAINING_COMPLETE_TIMEOUT=60"], WARNING, "is less than TIME_LIMIT=12:00:00"),
    ("parts", remove("project/SkyRL/skyrl-agent/uv.lock"), [], ERROR, "skyrl-agent/uv.lock is missing; make it: cd "),
    ("parts", remove("fake/bin/scontrol"), ["PATH=@/fake/bin"], ERROR, "not on PATH: scontrol"),
    ("slots", nothing, ["MAX_PARALLEL_AGENTS=6"], ERROR, "4 × 2 = 8 sandboxes before the first one runs, and the runtime has 6"),
    ("slots", nothing, ["CPUS_PER_WORKER=8"], WARNING, "the runtime makes 8 slots that share the CPUs, 4 each"),
    ("slots", nothing, ["MEMORY_PER_WORKER=9G"], WARNING, "72G together, of RUNTIME_MEMORY=64G"),
    ("slots", nothing, ["RUNTIME_MEMORY=100M", "MEMORY_PER_WORKER=100M"], ERROR, "12.5M each"),
    ("slots", nothing, ["CPUS_PER_WORKER=8"], WARNING, "2 nodes would be enough; add to the .conf: RUNTIME_NODES=2 (that"),
    ("slots", nothing, ["MEMORY_PER_WORKER=9G"], WARNING, "; add to the .conf: RUNTIME_NODES=2 (that"),
    ("slots", nothing, ["CPUS_PER_WORKER=16", "RUNTIME_NODES=2"], WARNING, "each node makes 4 slots that share its CPUs, 8 each (asked for: 2 times what there is); 4 nodes would be enough; add to the .conf: RUNTIME_NODES=4 "),
    ("slots", nothing, ["RUNTIME_NODES=2", "CPUS_PER_WORKER=8", "RUNTIME_MIN_SLOTS=4"], ERROR, "RUNTIME_MIN_SLOTS=4 has the training begin when 4 slots are there"),
    ("batch", nothing, ["TRAIN_BATCH_SIZE=3", "ROLLOUT_N=3"], ERROR, "= 9 trajectories cannot be divided"),
    ("batch", nothing, ["ROLLOUT_N=1"], WARNING, "no advantage"),
    ("batch", nothing, ["VERL_OVERRIDES=actor_rollout_ref.actor.ppo_mini_batch_size=5"], ERROR, "is more than TRAIN_BATCH_SIZE=4"),
    ("batch", nothing, ["VERL_OVERRIDES=actor_rollout_ref.actor.ppo_mini_batch_size=1", "GPUS_PER_NODE=8"], ERROR, "leaves nothing for some of the 8 groups"),
    ("parallel", nothing, ["TP_SIZE=4", "GPU_NODES=2"], ERROR, "TP_SIZE=4 must divide GPUS_PER_NODE=2"),
    ("parallel", nothing, ["TRAINING_CPUS=4"], ERROR, "want a CPU each, 5 in all"),
    ("lengths", nothing, ["MAX_MODEL_LEN=4096"], WARNING, "MAX_MODEL_LEN=4096 is less than"),
    ("model", nothing, ["MODEL=@/nowhere"], ERROR, "no config.json in this folder"),
    ("model", text("model/config.json", "{"), [MODEL], WARNING, "cannot read"),
    ("model", lambda world: world.environment.update(HF_HUB_OFFLINE="1"), [], ERROR, "HF_HUB_OFFLINE forbids"),
    ("model", nothing, ["MODEL=https://huggingface.co/Qwen/Qwen3-8B"], ERROR, "write Qwen/Qwen3-8B"),
    ("model", text("project/SkyRL/skyrl-agent/.env", "HF_HUB_OFFLINE=1\n"), [], ERROR, "HF_HUB_OFFLINE forbids"),
    ("model", model(num_attention_heads=9, num_key_value_heads=3), [MODEL, "TP_SIZE=2"], ERROR, "TP_SIZE=2 does not divide"),
    ("model", model(num_key_value_heads=3), [MODEL, "SP_SIZE=2"], ERROR, "SP_SIZE=2 does not divide"),
    ("model", model(max_position_embeddings=8192), [MODEL], ERROR, "was made for 8192"),
    ("verl", text("project/SkyRL/skyrl-agent/uv.lock", ""), [], WARNING, "names exactly one VERL"),
    ("verl", text("project/SkyRL/skyrl-agent/uv.lock", STOCK), [], ERROR, "ADV_ESTIMATOR=loop: this estimator exists only in SkyRL's fork"),
    ("verl", nothing, ["ADV_ESTIMATOR=gprpo"], WARNING, "in SkyRL's fork of VERL 0.5.0 (@/project/SkyRL/skyrl-agent/uv.lock); did you mean grpo?"),
    ("verl", nothing, ["LOGGERS=console,wanbd"], WARNING, "LOGGERS=console,wanbd: the suite knows no logger wanbd in SkyRL's fork"),
    ("verl", nothing, ["VERL_OVERRIDES=algorithm.adv_estimator=gdpo"], WARNING, "it came with VERL 0.7.1; choose one of gae, grpo,"),
    ("verl", text("project/SkyRL/skyrl-agent/uv.lock", STOCK), ["ADV_ESTIMATOR=gprpo"], ERROR, "has no advantage estimator gprpo; did you mean grpo?"),
    ("verl", text("project/SkyRL/skyrl-agent/uv.lock", STOCK), ["ADV_ESTIMATOR=mine"], ERROR, "choose one of gae, grpo"),
    ("verl", text("project/SkyRL/skyrl-agent/uv.lock", STOCK), ["LOGGERS=wanbd", "ADV_ESTIMATOR=rloo"], ERROR, "has no logger wanbd; did you mean wandb?"),
    ("verl", text("project/SkyRL/skyrl-agent/uv.lock", ""), ["ADV_ESTIMATOR=gprpo"], WARNING, "no advantage estimator gprpo in any VERL; did you mean grpo?"),
    ("verl", nothing, ["VERL_OVERRIDES=trainer.use_v1=False"], ERROR, "trainer.use_v1 is not yet a part of"),
    ("verl", nothing, ["VERL_OVERRIDES=data.train_batch_size=16"], WARNING, "set TRAIN_BATCH_SIZE instead: slots, batch and memory are checked"),
    ("task", remove(EXAMPLE), ["TASK_YAML=examples/run_verl/verl_oh.yaml"], ERROR, "cannot read the task file"),
    ("task", nothing, ["TASK_YAML=examples/run_verl/verl_oh.yaml", "ROLLOUT_N=4"], ERROR, "ROLLOUT_N=4 (--set) is not generator.num_trajectories: 2"),
    ("task", nothing, ["TASK_YAML=examples/run_verl/verl_oh.yaml", "MAX_RESPONSE_LENGTH=4096"], WARNING, "padded to the longer one"),
    ("task", text(EXAMPLE, "- a list\n"), ["TASK_YAML=auto"], ERROR, "must hold keys and values"),
    ("task", text(EXAMPLE, "a: [\n"), ["TASK_YAML=auto"], ERROR, "is not valid YAML"),
    ("task", text(EXAMPLE, "generator: 5\n"), ["TASK_YAML=auto"], ERROR, "generator must hold keys and values"),
    ("mig", nothing, ["GPU_TYPE=1g.20gb"], WARNING, "= 2 of them are as many ranks"),
    ("mig", say("sinfo", {"stdout": SLICES}, {"stdout": SLICES}), [], WARNING, "GPU_PARTITION=gpu_test has MIG slices alone (nvidia_a100_3g.20gb), and GPU_NODES × GPUS_PER_NODE = 2 of them"),
    ("memory", nothing, ["MODEL=big/Big-72B", "GPU_TYPE=a100"], ERROR, "an update takes 536G on each GPU"),
    ("memory", nothing, ["MODEL=m/M-7B", "GPU_TYPE=a100"], WARNING, "some GPUs of this type have 40G"),
    ("memory", nothing, ["GPU_TYPE=a100_1g.5gb", "MODEL=m/M-0.5B", "GPU_MEMORY_UTILIZATION=0.1"], ERROR, "weights and one sequence"),
    ("memory", nothing, ["FSDP_OPTIMIZER_OFFLOAD=false", "GPU_MEMORY_UTILIZATION=0.95", "GPU_TYPE=h100"], ERROR, "rest on each GPU"),
    ("memory", nothing, ["GPU_TYPE=a100_1g.10gb", "GPUS_PER_NODE=1"], ERROR, "without activations, GPU_TYPE has 10G; choose a smaller MODEL, such as Qwen/Qwen2.5-Coder-0.5B-Instruct, or larger"),
    ("memory", nothing, ["TRAINING_MEMORY=8G"], ERROR, "what is offloaded takes 19G on each host"),
    ("memory", nothing, ["MODEL=without/number"], ESTIMATE, "is not known here"),
    ("resume", text("ckpts/skyrl-dev/mine/latest_checkpointed_iteration.txt", "7"), [], ERROR, "VERL would start over; remove latest_checkpointed_iteration.txt, or set WANDB_EXPERIMENT"),
    ("resume", saved(25), ["TOTAL_EPOCHS=1"], ERROR, "is at step 25 of at most 25: this training is complete"),
    ("resume", saved(1), [MODEL], ERROR, "was saved from a model of 24 layers with hidden_size 896"),
    ("space", model(num_hidden_layers=28_000), [MODEL], ERROR, "not one fits"),
    ("space", nothing, ["MAX_CKPT_TO_KEEP=1000", "RESTARTS=999"], WARNING, "up to 1000001 of them"),
    ("space", nothing, ["MAX_CKPT_TO_KEEP=1000000"], WARNING, "up to 1000001 of them"),
    ("data", remove("data/r2e-all/train.parquet"), [], ERROR, "train.parquet is not there"),
    ("data", nothing, ["TRAIN_DATA=@/data"], ERROR, "/data is a folder; set DATA_DIR to a data set's folder (`data/swe_data.py --output"),
    ("data", text("data/r2e-all/validation.parquet", "no parquet"), [], ERROR, "cannot be read"),
    ("data", data("train.parquet", 3), [], ERROR, "has 3 rows, fewer than TRAIN_BATCH_SIZE=4"),
    ("data", data("train.parquet", 9, "prompt", "reward_model"), [], ERROR, "lacks the columns data_source, instance (or"),
    ("data", data("validation.parquet", 0), [], ERROR, "has no rows"),
    ("data", data("validation.parquet", 9), ["VAL_BATCH_SIZE=9"], WARNING, "a sandbox for each of 9 rows of VAL_DATA, and the runtime has 8 slots: what gets none (1) counts as unsolved, and while it waits the GPUs may be idle for 105 s; shorten VAL_DATA to 8 rows"),
    ("data", data("validation.parquet", 500), ["VAL_BATCH_SIZE=500"], ERROR, "may be idle for 14 h 21 min, which TIME_LIMIT=12:00:00 ends; shorten"),
    ("data", data("validation.parquet", 500), ["TIME_LIMIT=1-0", "VERL_OVERRIDES=data.val_batch_size=500"], WARNING, "may be idle for 14 h 21 min; shorten"),
    ("folders", text("ckpts", "a file"), [], ERROR, "/ckpts is not a folder"),
    ("dotenv", unset("WANDB_API_KEY"), [], ERROR, "no WANDB_API_KEY, and none for api.wandb.ai in"),
    ("dotenv", text("project/SkyRL/skyrl-agent/.env", "WANDB_API_KEY=\n"), [], ERROR, "no WANDB_API_KEY"),  # it wins
    ("dotenv", text("project/SkyRL/skyrl-agent/.env", "OPENAI_API_KEY=<REPLACE>\n"), [], WARNING, "<REPLACE> for OPENAI_API_KEY"),
    ("environment", remove("fake/bin/uv"), ["PATH=@/fake/bin"], ERROR, "uv, which starts the trainer, is not on PATH"),
    ("environment", lambda world: world.environment.update(UV_PROJECT_ENVIRONMENT="/nowhere/venv"), [], WARNING, "/project/SkyRL/skyrl-agent && uv sync --frozen"),
    ("environment", lambda world: world.venv.rename(world.agent / "moved"), [], WARNING, ".venv is not there"),
    ("environment", remove("project/SkyRL/skyrl-agent/.venv/bin/python"), [], ERROR, "cannot be started"),
    ("environment", lambda world: next(world.venv.rglob("verl-*")).rmdir(), [], WARNING, "lacks verl"),
    ("environment", lambda world: next(world.venv.rglob("verl-*")).rmdir(), ["SNAPSHOT=1"], ERROR, "with SNAPSHOT=1 uv would not install them"),
    ("environment", lambda world: world.venv.rename(world.agent / "moved"), ["SNAPSHOT=1"], ERROR, "with SNAPSHOT=1 uv would not make it"),
    ("snapshot", nothing, ["SNAPSHOT=1"], ERROR, "git tracks nothing in"),
    ("notify", nothing, [f"NOTIFY=http://{'x' * 64}.invalid/x"], WARNING, "x.invalid, which this host does not know"),  # no DNS is asked
    ("import", module("import tensordict_of_the_moon"), [], ERROR, "No module named 'tensordict_of_the_moon'; cd "),
    ("import", module("raise ImportError('libcuda.so.1: cannot open')"), [], WARNING, "ImportError: libcuda.so.1: cannot open; try it"),
    ("import", module("import os; os._exit(9)"), [], WARNING, "exit code 9"),
    ("runtime", text(f"{JOINED}/training_complete.flag", SERVED), [], ERROR, "101 has ended (training_complete.flag: exit code 0, the trainer ended); start another with"),
    ("runtime", text(f"{JOINED}/runtime_failed.flag", SERVED), [], ERROR, "has ended (runtime_failed.flag"),
    ("runtime", remove(f"{JOINED}/runtime_ready.flag"), [], WARNING, "not ready yet: a training job that starts now holds its GPUs until it is, at most RUNTIME_READY_TIMEOUT=600 s"),
    ("runtime", emptied, [], ERROR, "is no run's directory: no run.json"),
    ("runtime", say("squeue", {}), [], ERROR, "the runtime job 101 has ended, by Slurm's word: no longer known"),
    ("runtime", say("squeue", {"code": 1, "stderr": "Unable to contact"}), [], WARNING, "whether the runtime job 101 lives is not known"),
    ("runtime", text(f"{JOINED}/runtime_url.txt", "http://127.0.0.1:1\n"), [], WARNING, "does not answer here (ConnectionRefusedError"),
    ("runtime", nothing, ["RESTARTS=2"], WARNING, "RESTARTS=2 has no effect"),
    ("storage", nothing, ["LOCAL_SCRATCH=/" + "x" * 60], WARNING, "too long a path"),
    ("images", lambda world: shutil.rmtree(world.agent_tree), [], WARNING, "there is no agent server in"),
    ("images", nothing, ["CONTAINER_IMAGE=Upper/Case"], ERROR, "CONTAINER_IMAGE=Upper/Case is not the name"),
    ("images", nothing, ["IMAGE_ARCHIVE=/nowhere.tar"], ERROR, "IMAGE_ARCHIVE=/nowhere.tar is not there"),
    ("images", text("auth.json", "{}"), ["REGISTRY_AUTH_FILE=@/auth.json"], WARNING, "can be read by others"),
    ("slurm", say("sbatch --test-only", {"code": 1, "stderr": "sbatch: error: Batch job submission failed: Invalid qos"}), [], ERROR, "job: sbatch: error: Batch job submission failed: Invalid qos"),
    ("slurm", say("sbatch --test-only", {"code": 1, "stderr": "Unable to contact slurm controller"}), [], WARNING, "Slurm does not answer"),
    ("slurm", say("sinfo", {"code": 1, "stderr": "slurm_load_partitions: Zero Bytes"}), [], WARNING, "partitions are not compared"),
    ("slurm", say("scontrol show config", {"stdout": "MaxArraySize = 3\n"}), ["RUNTIME_NODES=4"], ERROR, "numbers up to 2 (MaxArraySize=3)"),
    ("slurm", nothing, ["GPU_PARTITION=gpux"], ERROR, "GPU_PARTITION=gpux: there is no such partition"),
    ("slurm", nothing, ["GPUS_PER_NODE=16", "TRAIN_BATCH_SIZE=8"], ERROR, "wants 1 node with 16 GPUs each, GPU_PARTITION=gpu_test has 0"),
    ("account", say("sacctmgr", {"stdout": "lab|gpu|normal,long\n"}), ["ACCOUNT=other"], ERROR, "ACCOUNT=other"),
    ("account", say("sacctmgr", {"stdout": "lab|gpu|normal,long\n"}), ["QOS=short"], ERROR, "QOS=short is not among those"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "spoil", "words", "level", "said"), BROKEN, ids=lambda value: str(value)[:40])
def test_what_breaks_it(world: World, check: str, spoil: Break, words: list[str], level: Level, said: str) -> None:
    """Without the one thing the check has nothing worse than an estimate to say."""
    request = join(world) if check == "runtime" else None
    before = of(world.check("MAX_CKPT_TO_KEEP=1", request=request), check)
    assert worst(before) in {None, ESTIMATE}, before
    spoil(world)
    given = [word.replace("@", str(world.folder)) for word in words]
    found = of(world.check("MAX_CKPT_TO_KEEP=1", *given, request=request), check)
    fitting = [finding for finding in found if said.replace("@", str(world.folder)) in str(finding)]
    assert [finding.level for finding in fitting] == [level] * len(fitting) and fitting, found
    assert level is ESTIMATE or all(finding.fix for finding in fitting)


def test_before_a_submission_nothing_is_imported(world: World) -> None:
    (world.site_packages / "verl.py").write_text("raise ImportError")
    assert not of(run_checks(asked(world)), "import")


@pytest.mark.parametrize("word", ["ADV_ESTIMATOR=grpo", "LOGGERS=tensorboard,console", "LOGGERS=tracking"])
def test_values_that_the_release_knows_are_no_finding(world: World, word: str) -> None:
    assert not of(world.check(word), "verl")


@pytest.mark.parametrize(
    "words",
    [["GPUS_PER_NODE=1"], ["GPU_PARTITION=gpu"], ["GPU_PARTITION=gpu,gpu_test"], ["GPU_SBATCH_ARGS=--partition=x"]],
)
def test_slices_that_are_not_several_or_not_sure_are_no_finding(world: World, words: list[str]) -> None:
    say("sinfo", {"stdout": SLICES}, {"stdout": SLICES})(world)
    assert not of(world.check(*words), "mig")


def test_what_slurm_says_about_slices_is_skipped_with_their_check(world: World) -> None:
    say("sinfo", {"stdout": SLICES}, {"stdout": SLICES})(world)
    assert of(run_checks(asked(world)), "mig")
    assert not of(run_checks(asked(world), {"mig"}), "mig")


def test_without_skyrl_agent_nothing_is_said_about_what_is_in_it(world: World) -> None:
    world.agent.rename(world.folder / "elsewhere")
    found = [
        finding for finding in world.check("MAX_CKPT_TO_KEEP=1", "TASK_YAML=mine.yaml") if finding.level is not ESTIMATE
    ]
    assert [(finding.check, finding.fix) for finding in found] == [
        ("parts", "set SKYRL_PROJECT_ROOT to the folder that holds SkyRL/skyrl-agent")
    ]


def test_a_validation_is_cut_into_batches_that_have_sandboxes(world: World) -> None:
    write_parquet(world.data / "validation.parquet", 500)
    found = of(world.check(), "data")
    assert worst(found) is ESTIMATE
    assert "a validation is 500 rows in 63 batches of at most 8, every 20 steps" in [one.sentence for one in found]


def test_of_a_runtime_that_is_joined_the_slots_are_not_known(world: World) -> None:
    write_parquet(world.data / "validation.parquet", 500)
    request = Request(runtime=False, runtime_url="http://127.0.0.1:1")
    assert worst(of(world.check("VAL_BATCH_SIZE=500", request=request), "data")) is WARNING


def test_data_that_overrides_name_are_the_users_affair(world: World) -> None:
    (world.data / "train.parquet").unlink()
    write_parquet(world.data / "validation.parquet", 900)
    found = world.check("VERL_OVERRIDES=data.train_files=[/a,/b] trainer.test_freq=-1")
    assert not of(found, "data"), found


def test_every_check_is_broken_once() -> None:
    assert {check.name for check in CHECKS} == {row[0] for row in BROKEN}


# --- how they are run -------------------------------------------------------------------------------------------------


def asked(world: World) -> Asked:
    return Asked(world.plan(), ROOT)


def of_name(name: str, run: Callable[[Asked], list[Finding]]) -> Check:
    return Check(name, "?", everybody, run)


def test_checks_run_at_the_same_time(world: World) -> None:
    together = threading.Barrier(3, timeout=10)

    def meet(asked: Asked) -> list[Finding]:
        together.wait()
        return []

    assert run_checks(asked(world), checks=[of_name(str(number), meet) for number in range(3)]) == []


def test_a_check_that_hangs_is_a_warning(world: World) -> None:
    release = threading.Event()

    def hang(asked: Asked) -> list[Finding]:
        release.wait(60)
        return []

    checks = [of_name("stuck", hang), of_name("quick", lambda asked: [estimate("quick", "done")])]
    begin = time.monotonic()
    found = run_checks(asked(world), checks=checks, deadline_s=1.0)
    release.set()
    assert time.monotonic() - begin < 5
    assert [(finding.check, finding.level) for finding in found] == [("stuck", WARNING), ("quick", ESTIMATE)]
    assert "not answered within 1 s" in found[0].sentence
    assert "--no-check=stuck" in found[0].fix


@pytest.mark.parametrize("problem", [OSError("stale file handle"), SuiteError("no answer")])
def test_what_cannot_be_answered_is_a_warning(world: World, problem: Exception) -> None:
    def fail(asked: Asked) -> list[Finding]:
        raise problem

    (found,) = run_checks(asked(world), checks=[of_name("odd", fail)])
    assert found.level is WARNING
    assert found.sentence == f"could not be answered: {problem}"


def test_a_fault_of_a_check_is_not_hidden(world: World) -> None:
    def fault(asked: Asked) -> list[Finding]:
        raise KeyError("a fault")

    with pytest.raises(KeyError, match="a fault"):
        run_checks(asked(world), checks=[of_name("odd", fault)])


@pytest.mark.parametrize(
    ("given", "skipped"),
    [
        (None, set()),
        ([None], set(names())),
        (["slots"], {"slots"}),
        (["slots,data", "model"], {"slots", "data", "model"}),
        (["slots", None], set(names())),
        ([",slots, "], {"slots"}),
    ],
)
def test_what_is_left_out(given: list[str | None] | None, skipped: set[str]) -> None:
    assert skipped_names(given) == skipped


def test_an_unknown_name_is_met_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"there is no check nonsense; there are: slots, batch, .*account"):
        skipped_names(["slots,nonsense"])
    for name in ("parts", "config"):
        with pytest.raises(UsageError, match=f"no check {name}"):
            skipped_names([name])


@pytest.mark.parametrize("value", ["", ",", " "])
def test_a_value_without_a_name_leaves_out_nothing(value: str) -> None:
    """As a script's empty variable would bring it: --no-check=$LEFT_OUT."""
    with pytest.raises(
        UsageError, match=rf"--no-check={value} names no check; there are: slots, .*for all: --no-check$"
    ):
        skipped_names(["slots", value])


def test_skipped_checks_ask_nothing(world: World) -> None:
    assert run_checks(asked(world), skipped_names([None])) == []
    assert world.slurm.everything == []


def test_all_errors_are_one_message() -> None:
    found = [error("slots", "too few", "more"), warning("data", "odd", ""), error("batch", "not even", "even")]
    with pytest.raises(Refused, match=r"(?s)2 errors before submission; nothing was queued:\n  slots: too few; more\n"):
        refuse(found)
    with pytest.raises(EnvironmentProblem, match="1 error before"):
        refuse([error("parts", "no uv.lock", "")])
    refuse(found[1:2])


def finding_of_words(number: int) -> Finding:
    return error("slots", " ".join(["word"] * number), "look into " + "/a-long-folder" * 9)


@pytest.mark.parametrize("columns", [100, 60, 20])
def test_a_terminal_gets_lines_of_its_width_and_colour(columns: int) -> None:
    """Words stay whole, a path that is too long for a line too; what is said is the same."""
    lines = as_text([finding_of_words(50), warning("data", "odd", "even")], ["slots"] * 30, columns).splitlines()
    assert lines[0].startswith("\x1b[31merror\x1b[0m    slots        word word")
    assert "\x1b[33mwarning\x1b[0m  data         odd" in lines
    plain = [re.sub(r"\x1b\[\d*m", "", line) for line in lines]
    assert [line for line in plain if len(line) > max(columns, 60)] == [" " * 25 + "/a-long-folder" * 9]
    assert all(line.startswith(" " * 22 + "word ") for line in plain[1:3])
    unbroken = as_text([finding_of_words(50), warning("data", "odd", "even")], ["slots"] * 30)
    assert " ".join(" ".join(plain).split()) == " ".join(unbroken.split())


def test_findings_for_people_and_for_scripts() -> None:
    found = [estimate("data", "10 steps"), error("slots", "too few", "more")]
    assert as_text(found, ["slots", "data"]).splitlines() == [
        "error    slots        too few",
        "                      -> more",
        "estimate data         10 steps",
        "checked  slots, data",
        "1 error, 0 warnings, 1 estimate",
    ]
    assert "\x1b" not in as_text([finding_of_words(300)], []) and as_text([finding_of_words(300)], []).count("\n") == 4
    said = json.loads(as_json(found, ["model"]))
    assert (said["errors"], said["estimates"], said["checked"]) == (1, 1, ["model"])
    assert said["findings"][0] == {"check": "slots", "level": "error", "sentence": "too few", "fix": "more"}
