"""Configuration: parsers, precedence, all problems together, the shipped files."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm.lib import settings as parsers
from slurm.lib.config import LoadedConfig, load_config
from slurm.lib.errors import EXIT_USAGE, ConfigError, EnvironmentProblem
from slurm.lib.settings import KEYS, Settings

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "slurm" / "config"
NOW = datetime(2026, 3, 4, 5, 6, 7)
ENVIRONMENT = {"PATH": os.environ["PATH"], "HOME": "/home/me"}


class Loader:
    """Writes a ``.conf`` and loads it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "x.conf"

    def __call__(self, text: str | None, *overrides: str, **environment: str) -> LoadedConfig:
        if text is not None:
            self.path.write_text(text)
        config = None if text is None else str(self.path)
        return self.named(config, *overrides, **environment)

    def named(self, config: str | None, *overrides: str, **environment: str) -> LoadedConfig:
        seen = {**ENVIRONMENT, **environment}
        return load_config(config, overrides, seen, SHIPPED, NOW, Path("/project"), cwd=self.folder)

    def problems(self, text: str | None, *overrides: str, **environment: str) -> list[str]:
        """The problems with the file's folder cut off."""
        with pytest.raises(ConfigError) as caught:
            self(text, *overrides, **environment)
        assert caught.value.exit_code == EXIT_USAGE
        return [str(problem).replace(f"{self.folder}/", "") for problem in caught.value.problems]


@pytest.fixture
def load(tmp_path: Path) -> Loader:
    return Loader(tmp_path)


# --- parsers ---------------------------------------------------------------------------------------------------------

GOOD: list[tuple[Callable[[str], object], str, object]] = [
    (parsers.positive_int, "1", 1),
    (parsers.positive_int, " 08 ", 8),
    (parsers.non_negative_int, "0", 0),
    (parsers.frequency, "-1", -1),
    (parsers.positive_number, "0.25", 0.25),
    (parsers.positive_number, "8", 8.0),
    (parsers.positive_number, "1e-6", 1e-6),
    (parsers.fraction, ".8", 0.8),
    (parsers.boolean, "True", True),
    (parsers.boolean, "off", False),
    (parsers.switch, "1", True),
    (parsers.slurm_time, "12:00:00", "12:00:00"),
    (parsers.memory, "64g", "64G"),
    (parsers.memory, "64GB", "64G"),
    (parsers.memory, "500", "500M"),
    (parsers.node_memory, "0", "0"),
    (parsers.node_memory, "1T", "1T"),
    (parsers.port, "8000", 8000),
    (parsers.port_range, "8000-8002", range(8000, 8003)),
    (parsers.port_range, "8000-8000", range(8000, 8001)),
    (parsers.word, "cpu[1-2],gpu1", "cpu[1-2],gpu1"),
    (parsers.url, "http://host:8000/", "http://host:8000"),
    (parsers.gres_type, "a100_1g.5gb", "a100_1g.5gb"),
    (parsers.experiment, "my run 1", "my run 1"),
    (parsers.backend, "local", "local"),
    (parsers.words, "--a=b '--c=d e'", ("--a=b", "--c=d e")),
    (parsers.words, "", ()),
    (parsers.names, "console,wandb", ("console", "wandb")),
    (parsers.names, '["console", "wandb"]', ("console", "wandb")),
    (parsers.path, "a b/c", Path("a b/c")),
]


@pytest.mark.parametrize(("parse", "raw", "value"), GOOD)
def test_good_values(parse: Callable[[str], object], raw: str, value: object) -> None:
    assert parse(raw) == value


BAD: list[tuple[Callable[[str], object], str]] = [
    *[(parsers.positive_int, raw) for raw in ("0", "-1", "1.5", "one", "", "1_000", "٣", "9" * 30)],
    (parsers.non_negative_int, "-1"),
    (parsers.frequency, "0"),
    *[(parsers.positive_number, raw) for raw in ("0", "-1", "nan", "inf", "1e999", "1e-999", "x", "")],
    *[(parsers.fraction, raw) for raw in ("1", "1.5", "0")],
    *[(parsers.boolean, raw) for raw in ("maybe", "2", "")],
    *[(parsers.slurm_time, raw) for raw in ("soon", "1:2:3:4", "1-", "-1", "1d", "12h", "", "1-2:3:4:5", "1.5")],
    *[(parsers.memory, raw) for raw in ("lots", "0", "0G", "1.5G", "-1G", "G", "64 G", "64X", "")],
    *[(parsers.port, raw) for raw in ("0", "65536", "http")],
    *[(parsers.port_range, raw) for raw in ("8000", "9000-8000", "0-10", "a-b", "1-70000")],
    (parsers.word, "a b"),
    (parsers.secret, "with space"),
    (parsers.secret, "two\nlines"),
    *[(parsers.url, raw) for raw in ("host:8000", "ftp://host", "http://", "http://a b")],
    (parsers.gres_type, "gpu:a100:2"),
    *[(parsers.experiment, raw) for raw in ("a/b", "..", "a\nb")],
    (parsers.backend, "cloud"),
    (parsers.words, "'never closed"),
    *[(parsers.sbatch_words, raw) for raw in ("--nice --hold", "-H", "--hol", "'never closed")],
    (parsers.names, "a;b"),
    (parsers.path, "/a\n/b"),
]


def test_a_hold_that_the_launcher_would_release_is_refused() -> None:
    assert parsers.sbatch_words("--nice --comment='--hold it'") == ("--nice", "--comment=--hold it")
    with pytest.raises(ValueError, match="scontrol hold later"):
        parsers.sbatch_words(("--nice", "--hold"))


@pytest.mark.parametrize(("parse", "raw"), BAD)
def test_bad_values_say_what_would_be_right(parse: Callable[[str], object], raw: str) -> None:
    with pytest.raises(ValueError, match=r"must|cannot"):
        parse(raw)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90 * 60),
        ("90:30", 90 * 60 + 30),
        ("1:02:03", 3723),
        ("2-3", 2 * 86400 + 3 * 3600),
        ("2-3:04", 2 * 86400 + 3 * 3600 + 240),
        ("2-03:04:05", 2 * 86400 + 3 * 3600 + 245),
        ("UNLIMITED", math.inf),
        ("0", math.inf),
    ],
)
def test_the_time_formats_of_slurm(text: str, seconds: float) -> None:
    assert parsers.slurm_seconds(text) == seconds


def test_memory_in_bytes() -> None:
    assert [parsers.memory_bytes(text) for text in ("1K", "1M", "2G", "1T")] == [1024, 1024**2, 2 * 1024**3, 1024**4]


@given(st.text(max_size=20))
def test_parsers_raise_nothing_but_value_errors(raw: str) -> None:
    for key in KEYS.values():
        try:
            key.parse(raw)
        except ValueError as problem:
            assert str(problem)


# --- the declaration -------------------------------------------------------------------------------------------------

BASH_SUITE = {
    "GPU_PARTITION": "gpu_test", "CPU_PARTITION": "test", "GPU_NODES": 1, "GPUS_PER_NODE": 4, "TRAINING_CPUS": 48,
    "TRAINING_MEMORY": "500G", "CPUS_FOR_RUNTIME": 64, "RUNTIME_MEMORY": "256G", "CPUS_PER_WORKER": 8,
    "MEMORY_PER_WORKER": "16G", "MAX_PARALLEL_AGENTS": None, "EXCLUDE_NODES": "", "MODEL": "Qwen/Qwen3-8B",
    "TP_SIZE": 2, "SP_SIZE": 2, "TRAIN_BATCH_SIZE": 64, "ROLLOUT_N": 8, "MAX_PROMPT_LENGTH": 8000,
    "MAX_RESPONSE_LENGTH": 32768, "TOTAL_EPOCHS": 15, "TIME_LIMIT": "12:00:00", "RUNTIME_READY_TIMEOUT": 600,
    "NOTIFY": (), "SNAPSHOT": False,
    "PARTNER_PATIENCE": 600, "TRAINING_COMPLETE_TIMEOUT": 43200, "USAGE_SAMPLES": True, "DATA_DIR": None,
    "TRAIN_DATA": None, "VAL_DATA": None,
    "CHECKPOINT_DIR": None, "ROLLOUT_DIR": None, "WANDB_PROJECT": "skyrl-training",
    "CONTAINER_IMAGE": "ghcr.io/openhands/agent-server", "ALLHANDS_API_KEY": "", "GPU_MEMORY_UTILIZATION": 0.8,
    "VLLM_USE_V1": True, "FI_PROVIDER": "efa", "SKYRL_LD_LIBRARY_PATH_EXPORT": False,
    "ENABLE_GRADIENT_CHECKPOINTING": True, "FSDP_PARAM_OFFLOAD": True, "FSDP_OPTIMIZER_OFFLOAD": True,
    # and where the bash suite's default was a fault, ours
    "MAX_MODEL_LEN": 40768, "RUNTIME_PORT": None, "WANDB_EXPERIMENT": "skyrl-20260304-050607",
    # fixed words of its trainer command
    "ENFORCE_EAGER": True, "SAVE_FREQ": 1, "TEST_FREQ": 20, "MAX_CKPT_TO_KEEP": 10, "LEARNING_RATE": 1e-6,
    "ADV_ESTIMATOR": "loop", "TASK_YAML": "./examples/run_verl/verl_oh.yaml", "LOGGERS": ("console", "wandb"),
    # new ones
    "ACCOUNT": "", "QOS": "", "CONSTRAINT": "", "RESERVATION": "", "GPU_TYPE": "", "CPU_SBATCH_ARGS": (),
    "GPU_SBATCH_ARGS": (), "LOCAL_SCRATCH": None, "RUNTIME_PORT_RANGE": None, "SANDBOX_PORT_RANGE": None,
    "AGENT_START": "fork", "AGENT_DIR": None, "AGENT_IMAGE": "", "NETWORK": "private", "DISK_PER_WORKER": "",
    "CPU_PINNING_METHOD": "docker_cpuset", "IMAGE_ARCHIVES": None, "REGISTRY_AUTH_FILE": None, "REGISTRY_MIRRORS": (),
    "DATASET_PATH": None, "IMAGE_PREFIX": "", "MAX_WORKERS": None, "FORCE_REBUILD": None,
    "IMAGE_ARCHIVE": None, "TRAINING_COMMAND": "", "VERL_OVERRIDES": (), "SKYRL_COORD_DIR": None,
    "SKYRL_JOBS_BASE": Path("/home/me/.skyrl_jobs"), "SKYRL_PROJECT_ROOT": Path("/project"), "SKYRL_DEBUG": False,
    "SLURM_RUNTIME_DIR": None, "SANDBOX_REMOTE_RUNTIME_API_URL": "", "SKYRL_BACKEND": "slurm",
    "VAL_BATCH_SIZE": None, "RAY_CLUSTER": "auto", "RAY_PYTHON": (), "RAY_PORT_RANGE": None, "RAY_READY_TIMEOUT": 300,
    "NETWORK_INTERFACE": "", "CUDA_MODULES": (), "CACHE_DIR": None,
    "PAIRING": "jobs", "RESTARTS": 0, "RESTART_LEAD": 900, "MIN_RUN_TIME": 0, "RUNTIME_IDLE_LIMIT": 0,
    "TRAINING_COMMAND_IS_VERL": False,
    "RUNTIME_NODES": 1, "RUNTIME_MODE": "array", "RUNTIME_MIN_SLOTS": None, "RUNTIME_DRAIN_LEAD": 1800,
    "WARM_SANDBOXES": 0,
}  # fmt: skip


def test_every_key_and_its_default(load: Loader) -> None:
    settings = load(None).settings
    assert {name: getattr(settings, key.attribute) for name, key in KEYS.items()} == BASH_SUITE


def test_every_key_is_documented_and_named_after_its_field() -> None:
    for name, key in KEYS.items():
        assert name == key.attribute.upper()
        assert key.doc.endswith(".") and key.doc[0].isupper()


def test_settings_are_frozen_and_hide_the_key() -> None:
    settings = Settings(allhands_api_key="sk-hidden")
    assert "sk-hidden" not in repr(settings)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.gpu_nodes = 2  # type: ignore[misc]


EVERYTHING = """
VERL_OVERRIDES=("a=['x', 'y']" '+b=c d')
GPU_SBATCH_ARGS="--mail-type=END '--comment=two words'"
LOGGERS=(console tensorboard)
CPUS_PER_WORKER=0.5 LEARNING_RATE=3e-7
RUNTIME_PORT=20001 RUNTIME_PORT_RANGE=20000-20010
DATA_DIR=data ALLHANDS_API_KEY=sk-12345 SKYRL_DEBUG=1 ENFORCE_EAGER=no
LOCAL_SCRATCH='/scratch/a b' TRAINING_COMMAND=$'two\\nlines'
"""


def test_what_a_job_reads_back_is_what_was_launched(load: Loader) -> None:
    launched = load(EVERYTHING)
    assert load(None, **launched.settings.as_environment()).settings == launched.settings
    assert load(None, **launched.exported).settings == launched.settings


# --- precedence ------------------------------------------------------------------------------------------------------


def test_precedence_and_sources(load: Loader, tmp_path: Path) -> None:
    loaded = load(
        "A=1\nGPU_NODES=2\nROLLOUT_N=3\n", "GPU_NODES=4", GPU_NODES="8", ROLLOUT_N="9", MODEL="m", TIME_LIMIT=""
    )
    settings = loaded.settings
    assert (settings.gpu_nodes, settings.rollout_n, settings.model, settings.time_limit) == (4, 3, "m", "12:00:00")
    picked = {name: loaded.sources[name] for name in ("GPU_NODES", "ROLLOUT_N", "MODEL", "TIME_LIMIT")}
    x_conf = f"{tmp_path / 'x.conf'}:3"
    assert picked == {"GPU_NODES": "--set", "ROLLOUT_N": x_conf, "MODEL": "environment", "TIME_LIMIT": "default"}
    assert set(loaded.sources) == set(KEYS)


def test_values_of_set_reach_defaults_in_the_file(load: Loader) -> None:
    loaded = load('BASE="${BASE:-/here}"\nDATA_DIR="$BASE/data"\n', "BASE=/there")
    assert loaded.settings.train_data == Path("/there/data/train.parquet")
    assert loaded.warnings == ()


def test_an_empty_value_in_the_file_is_the_default_and_beats_the_environment(load: Loader) -> None:
    loaded = load("GPU_NODES=''\n", GPU_NODES="3")
    assert (loaded.settings.gpu_nodes, loaded.sources["GPU_NODES"]) == (1, "default")


def test_unset_in_the_file_hides_the_environment(load: Loader) -> None:
    loaded = load("unset GPU_NODES NCCL_DEBUG\n", GPU_NODES="3", NCCL_DEBUG="INFO")
    assert loaded.settings.gpu_nodes == 1
    assert loaded.unset == {"GPU_NODES", "NCCL_DEBUG"}


def test_exported_is_what_file_and_set_assigned(load: Loader) -> None:
    loaded = load("X='a b'\nLIST=(a 'b c')\nCPU_SBATCH_ARGS=(--x '--y=1 2')\n", "HF_Z=1", OTHER="o", MODEL="m")
    assert loaded.exported == {"X": "a b", "LIST": "a\nb c", "CPU_SBATCH_ARGS": "--x '--y=1 2'", "HF_Z": "1"}
    assert loaded.settings.cpu_sbatch_args == ("--x", "--y=1 2")


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))))
def test_arrays_reach_the_job_exactly(elements: list[str]) -> None:
    assert parsers.words(shlex.join(elements)) == tuple(elements)


# --- derived defaults and paths --------------------------------------------------------------------------------------


def test_paths_are_absolute(load: Loader, tmp_path: Path) -> None:
    settings = load("DATA_DIR='~/d'\nCHECKPOINT_DIR=../c/./d\nTRAIN_DATA=/t.parquet\n").settings
    assert settings.data_dir == Path("/home/me/d")
    assert settings.checkpoint_dir == tmp_path.parent / "c" / "d"
    assert (settings.train_data, settings.val_data) == (Path("/t.parquet"), Path("/home/me/d/validation.parquet"))


def test_the_model_length_covers_prompt_and_response(load: Loader) -> None:
    assert load("MAX_PROMPT_LENGTH=100\nMAX_RESPONSE_LENGTH=200\n").settings.max_model_len == 300
    assert load("MAX_PROMPT_LENGTH=100\nMAX_RESPONSE_LENGTH=200\nMAX_MODEL_LEN=250\n").settings.max_model_len == 250


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("2-00:00:00", 172800), ("30", 43200), ("12:00:01", 43201), ("UNLIMITED", 366 * 86400), ("0", 366 * 86400)],
)
def test_the_runtime_waits_as_long_as_the_training_may_take(load: Loader, limit: str, seconds: int) -> None:
    loaded = load(f"TIME_LIMIT={limit}\n")
    assert (loaded.settings.training_complete_timeout, loaded.warnings) == (seconds, ())
    again = load(None, **loaded.settings.as_environment())
    assert (again.settings, again.warnings) == (loaded.settings, ()), "a job reads back what was launched"


def test_a_runtime_that_gives_up_before_the_training_is_warned_of(load: Loader) -> None:
    lower = "TIME_LIMIT=2-0\nTRAINING_COMPLETE_TIMEOUT=43200\n"
    (warning,) = load(lower).warnings
    assert str(warning).endswith(
        "x.conf:2: TRAINING_COMPLETE_TIMEOUT=43200 is less than TIME_LIMIT=2-0 (172800 s): a training that takes "
        "longer loses its runtime; leave it unset for the whole time limit"
    )
    assert load(lower, "TRAINING_COMPLETE_TIMEOUT=172800").warnings == ()
    assert load(lower, "SKYRL_BACKEND=local").warnings == (), "no time limit ends a local run"
    told = load("", "SKYRL_BACKEND=local", "RESTARTS=2", "RUNTIME_IDLE_LIMIT=60", "PAIRING=het").warnings
    assert ["has no effect" in str(warning) for warning in told] == [True, True, True]
    (warning,) = load("", "RUNTIME_IDLE_LIMIT=60").warnings
    assert "loses its age in the queue; give it 300 s or more, or set PAIRING=het" in str(warning)
    (warning,) = load("", "TRAINING_COMMAND_IS_VERL=true").warnings
    assert "TRAINING_COMMAND_IS_VERL has no effect" in str(warning)
    (warning,) = load("", "WARM_SANDBOXES=8", "AGENT_START=exec").warnings
    assert "WARM_SANDBOXES=8 saves little with AGENT_START=exec" in str(warning)
    assert load("", "WARM_SANDBOXES=8").warnings == ()
    assert load("", "SKYRL_BACKEND=local", "RESTARTS=1", "SAVE_FREQ=-1").warnings
    (warning,) = load("", "RUNTIME_IDLE_LIMIT=60", "PAIRING=het").warnings
    assert str(warning).startswith("--set RUNTIME_IDLE_LIMIT: RUNTIME_IDLE_LIMIT=60 has no effect: with PAIRING=het")
    (warning,) = load("TIME_LIMIT=UNLIMITED\n", "TRAINING_COMPLETE_TIMEOUT=43200").warnings
    assert warning.where == "--set TRAINING_COMPLETE_TIMEOUT"


# --- problems --------------------------------------------------------------------------------------------------------


def test_a_second_word_without_quotes_is_a_problem_whatever_it_is(load: Loader) -> None:
    """Bash takes what stands before it for the environment of a command, and forgets it."""
    text = "WANDB_PROJECT=my true\nGPU_SBATCH_ARGS=--exclusive --nice\nMODEL=my model/x\nLOGGERS=a b # two\n"
    missing, no_file = "command not found", "No such file or directory"
    assert [problem.partition(": ")[2] for problem in load.problems(text)] == [
        "WANDB_PROJECT is set for the command behind its value alone, which bash has run, and then forgotten; quote a "
        'value with a space: WANDB_PROJECT="…"; or, if the command was meant: env WANDB_PROJECT=… COMMAND',
        f'bash says: --nice: {missing}; if the value has a space, quote it: GPU_SBATCH_ARGS="…"',
        f'bash says: model/x: {no_file}; if the value has a space, quote it: MODEL="…"',
        f'bash says: b: {missing}; if the value has a space, quote it: LOGGERS="…"',
    ]


@pytest.mark.parametrize(
    "text",
    [
        "TRAINING_COMMAND='\nWANDB_PROJECT=x true\n'\n",
        "OTHER=x true\n",
        "WANDB_PROJECT=x true\nWANDB_PROJECT=y\n",
        "WANDB_PROJECT=x # a comment\n",
        "WANDB_PROJECT=x; true\n",
        "WANDB_PROJECT='a b' && true\n",
        "( WANDB_PROJECT=x true )\n",
        "env WANDB_PROJECT=x true\n",
    ],
)
def test_what_is_meant_for_a_command_or_is_one_word_is_none(load: Loader, text: str) -> None:
    load(text)


def test_all_problems_together_each_with_its_place(load: Loader) -> None:
    text = "GPU_NODES=0\nTIME_LIMIT=soon\nRUNTIME_MEMORY=lots\nTIME_LIMIT =5\nTP_SIZE=(1 2)\nif then\n"
    found = load.problems(text, "GPU_NODES", "PORT=1", "RUNTIME_PORT=0", MAX_PARALLEL_AGENTS="many")
    starts = [
        "--set GPU_NODES: must be KEY=VALUE",
        "--set PORT: not a key of this suite: PORT",
        "environment: MAX_PARALLEL_AGENTS=many: must be a whole number",
        "--set RUNTIME_PORT: RUNTIME_PORT=0: must be a port",
        "x.conf:1: GPU_NODES=0: must be at least 1",
        "x.conf:2: TIME_LIMIT=soon: must be a Slurm time",
        "x.conf:3: RUNTIME_MEMORY=lots: must be an amount of memory",
        "x.conf:4: bash says: TIME_LIMIT: command not found",
        "x.conf:5: TP_SIZE=(1 2): must be one value",
        "x.conf:6: bash says: syntax error",
    ]
    assert len(found) == len(starts)
    assert all(any(problem.startswith(start) for problem in found) for start in starts)
    assert found[-6:] == sorted(found[-6:])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("GPUS_PER_NODE=4\nTP_SIZE=3\n", "x.conf:2: TP_SIZE=3 must divide the number of GPUs, GPU_NODES"),
        ("GPU_NODES=3\nSP_SIZE=8\nGPUS_PER_NODE=4\n", "x.conf:2: SP_SIZE=8 must divide"),
        ("GPUS_PER_NODE=1\nSP_SIZE=1\n", "x.conf:1: TP_SIZE=2 must divide"),
        ("\nGPUS_PER_NODE=0\n", "x.conf:2: GPUS_PER_NODE=0: VERL needs at least 1"),
        ("CPUS_FOR_RUNTIME=4\n", "x.conf:1: CPUS_PER_WORKER=8 is more than CPUS_FOR_RUNTIME=4"),
        ("MEMORY_PER_WORKER=1T\n", "x.conf:1: MEMORY_PER_WORKER=1T is more than RUNTIME_MEMORY=256G"),
        ("RUNTIME_PORT=80\nRUNTIME_PORT_RANGE=90-99\n", "x.conf:1: RUNTIME_PORT=80 is outside of RUNTIME_PORT_RANGE"),
        ("RUNTIME_NODES=2\nPAIRING=het\n", "x.conf:2: RUNTIME_NODES=2 with PAIRING=het"),
        ("RUNTIME_NODES=2\nSKYRL_BACKEND=local\n", "x.conf:1: RUNTIME_NODES=2: a local run has one machine"),
        ("RUNTIME_NODES=2\nSLURM_RUNTIME_DIR=/x\n", "x.conf:2: RUNTIME_NODES=2 with SLURM_RUNTIME_DIR"),
        ("RUNTIME_NODES=2\nTIME_LIMIT=30\n", "x.conf:2: RUNTIME_DRAIN_LEAD=1800 must be less than TIME_LIMIT=30 (18"),
        ("RUNTIME_NODES=2\nRUNTIME_PORT_RANGE=90-90\n", "x.conf:2: RUNTIME_PORT_RANGE=90-90: the head and its node"),
        ("RUNTIME_NODES=2\nRUNTIME_MIN_SLOTS=9999\n", "x.conf:2: RUNTIME_MIN_SLOTS=9999 is more than all nodes have"),
        ("declare -A MODEL=([a]=b)\n", "x.conf:1: MODEL is an associative array"),
    ],
)  # fmt: skip
def test_what_cannot_hold_together(load: Loader, text: str, problem: str) -> None:
    (found,) = load.problems(text)
    assert found.startswith(problem)


def test_a_contradiction_with_a_bad_value_is_not_guessed_at(load: Loader) -> None:
    assert len(load.problems("GPUS_PER_NODE=none\nTP_SIZE=3\n")) == 1


def test_a_training_command_needs_no_gpus(load: Loader) -> None:
    assert load("TRAINING_COMMAND=true\nGPUS_PER_NODE=0\nTP_SIZE=3\n").settings.gpus_per_node == 0


def test_a_whole_node_of_memory_holds_any_worker(load: Loader) -> None:
    assert load("RUNTIME_MEMORY=0\nMEMORY_PER_WORKER=1T\n").settings.runtime_memory == "0"


def test_secrets_are_not_shown(load: Loader) -> None:
    found = load.problems("ALLHANDS_API_KEY='sk hidden'\n", "MY_TOKEN sk-hidden=", "HF_TOKEN:hidden")
    assert "hidden" not in "".join(found)
    (found_set,) = load.problems("", "ALLHANDS_API_KEY=sk hidden")
    assert found_set.startswith("--set ALLHANDS_API_KEY: ALLHANDS_API_KEY=***: must be printable")


def test_the_process_list_warning(load: Loader) -> None:
    (warning,) = load("", "ALLHANDS_API_KEY=sk-hidden").warnings
    assert "process list" in str(warning) and "sk-hidden" not in str(warning)


# --- unknown keys ----------------------------------------------------------------------------------------------------


def test_unknown_keys_are_warned_of_and_exported(load: Loader, tmp_path: Path) -> None:
    loaded = load('GPU_NODE=2\nSITE=/s\nDATA_DIR="$SITE/d"\nTRAIN_BATCHSIZE=3; X="$TRAIN_BATCHSIZE"\nFOO=1 BAR=2\n')
    told = [str(warning).replace(f"{tmp_path}/", "") for warning in loaded.warnings]
    given = "(given to the jobs all the same)"
    assert told == [
        f"x.conf:1: not a key of this suite: GPU_NODE {given}; did you mean GPU_NODES?",
        f"x.conf:4: not a key of this suite: TRAIN_BATCHSIZE {given}; did you mean TRAIN_BATCH_SIZE?",
        f"x.conf:4: not a key of this suite: X {given}; remove it if nothing reads it",
        f"x.conf:5: not a key of this suite: BAR, FOO {given}; remove it if nothing reads it",
    ]
    assert loaded.exported["GPU_NODE"] == "2"
    assert loaded.settings.gpu_nodes == 1


def test_unknown_keys_of_set_are_mistakes(load: Loader) -> None:
    """All of them together with the rest, each with the key that is meant."""
    found = load.problems("", "RESTART=3", "WANDB_PROJEKT=x", "VALUE=1", "GPU_NODES=0")
    assert found == [
        "--set GPU_NODES: GPU_NODES=0: must be at least 1",
        "--set RESTART: not a key of this suite: RESTART; did you mean RESTARTS?",
        "--set WANDB_PROJEKT: not a key of this suite: WANDB_PROJEKT; did you mean WANDB_PROJECT?",
        "--set VALUE: not a key of this suite: VALUE; export VALUE before the launch if the jobs read it",
    ]
    with pytest.raises(ConfigError) as caught:
        load.named("nonesuch", "VALUE=1")
    assert len(caught.value.problems) == 1, "the file that there is not may have read it"


@pytest.mark.parametrize(
    ("text", "override", "environment"),
    [
        ('DATA_DIR="${SITE:-/here}/data"', "SITE=/s", {}),
        ("TRAINING_COMMAND='run --lr \"$RATE\"'", "RATE=1", {}),
        ("", "WANDB_MODE=offline", {}),
        ("", "SKYRL_VERL_CACHE=/c", {}),
        ("", "HTTPS_PROXY=http://proxy", {"HTTPS_PROXY": "http://other"}),
    ],
)
def test_names_that_somebody_reads_are_no_mistakes(
    load: Loader, text: str, override: str, environment: dict[str, str]
) -> None:
    loaded = load(text, override, **environment)
    name, _, value = override.partition("=")
    assert (loaded.exported[name], loaded.warnings) == (value, ())


def test_a_file_elsewhere_finds_the_shipped_ones(load: Loader) -> None:
    loaded = load('source "$SKYRL_CONFIG_DIR/dev.conf"\nGPUS_PER_NODE=1\n', SKYRL_CONFIG_DIR="/another/checkout")
    assert (loaded.settings.gpus_per_node, loaded.settings.train_batch_size) == (1, 4)
    assert loaded.files == (load.path, SHIPPED / "dev.conf")
    assert "SKYRL_CONFIG_DIR" not in loaded.exported
    assert loaded.warnings == ()


def test_the_environment_brings_no_unknown_keys(load: Loader) -> None:
    loaded = load("PATH=$PATH:/more\n", GPU_NODE="2")
    assert loaded.warnings == ()
    assert set(loaded.exported) == {"PATH"}


def test_without_a_home_or_a_folder_it_says_so(load: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user whom the user database lacks
    with pytest.raises(EnvironmentProblem, match="HOME is not set"):
        load(None, HOME="")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(EnvironmentProblem, match="the current folder cannot be used: No such file or directory"):
        load_config("dev", [], ENVIRONMENT, SHIPPED, NOW, Path("/project"))


# --- which file ------------------------------------------------------------------------------------------------------


def test_an_unknown_name_lists_the_names(load: Loader) -> None:
    with pytest.raises(ConfigError, match="there are: check, dev, local, local-verl, production"):
        load.named("prod")


@pytest.mark.parametrize("config", ["x.conf", "./x.conf", "../{}/x.conf"])
def test_paths_are_relative_to_the_callers_folder(load: Loader, tmp_path: Path, config: str) -> None:
    (tmp_path / "x.conf").write_text("GPU_NODES=2\n")
    loaded = load.named(config.format(tmp_path.name))
    assert (loaded.settings.gpu_nodes, loaded.files) == (2, (tmp_path / "x.conf",))


def test_a_missing_file_is_named(load: Loader, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.conf: cannot read this configuration file: No such file"):
        load.named("absent.conf")


# --- the shipped files -----------------------------------------------------------------------------------------------


def _picked(settings: Settings, *names: str) -> list[object]:
    return [getattr(settings, KEYS[name].attribute) for name in names]


@pytest.mark.parametrize("name", ["dev", "production", "local", "local-verl"])
@pytest.mark.parametrize("environment", [{}, {"SCRATCH": "/scratch"}])
def test_shipped_files_load_without_a_word(load: Loader, name: str, environment: dict[str, str]) -> None:
    loaded = load.named(name, **environment)
    assert loaded.warnings == ()
    assert loaded.files == (SHIPPED / f"{name}.conf",)


@pytest.mark.parametrize("name", ["dev", "production", "local", "local-verl"])
def test_the_comments_count_sandboxes_right(load: Loader, name: str) -> None:
    (claim,) = re.findall(r"CPUS_PER_WORKER=.*: (\d+) at once", (SHIPPED / f"{name}.conf").read_text())
    settings = load.named(name, CPUS_FOR_RUNTIME="2").settings
    assert settings.cpus_for_runtime / settings.cpus_per_worker == int(claim)
    assert settings.max_parallel_agents in (None, int(claim))


def test_dev(load: Loader) -> None:
    settings = load.named("dev", SCRATCH="/scratch").settings
    sizes = ("GPU_NODES", "GPUS_PER_NODE", "TRAINING_CPUS", "TRAINING_MEMORY", "CPUS_FOR_RUNTIME", "RUNTIME_MEMORY")
    assert _picked(settings, *sizes) == [1, 2, 16, "64G", 32, "64G"]
    assert _picked(settings, "GPU_PARTITION", "CPU_PARTITION", "MODEL") == ["gpu_test", "test", "Qwen/Qwen3-1.7B"]
    assert _picked(settings, "TP_SIZE", "SP_SIZE", "TRAIN_BATCH_SIZE", "ROLLOUT_N", "TOTAL_EPOCHS") == [1, 1, 4, 2, 1]
    assert _picked(settings, "FI_PROVIDER", "SKYRL_LD_LIBRARY_PATH_EXPORT") == ["tcp", False]
    assert settings.train_data == Path("/scratch/skyrl/data/r2e-all/train.parquet")
    assert settings.checkpoint_dir == Path("/scratch/skyrl/ckpts/skyrl-dev")
    assert settings.max_model_len == 4096 + 8192


def test_production(load: Loader) -> None:
    settings = load.named("production").settings
    sizes = ("GPU_NODES", "GPUS_PER_NODE", "TRAINING_CPUS", "TRAINING_MEMORY", "CPUS_FOR_RUNTIME", "RUNTIME_MEMORY")
    assert _picked(settings, *sizes) == [4, 8, 96, "1000G", 128, "512G"]
    assert _picked(settings, "MODEL", "TP_SIZE", "SP_SIZE", "TRAIN_BATCH_SIZE", "ROLLOUT_N") == [
        "Qwen/Qwen3-32B",
        4,
        4,
        64,
        8,
    ]
    assert _picked(settings, "RUNTIME_READY_TIMEOUT", "FI_PROVIDER", "SKYRL_LD_LIBRARY_PATH_EXPORT") == [
        900,
        "efa",
        True,
    ]


def test_local_fits_a_small_machine(load: Loader) -> None:
    settings = load.named("local", CPUS_FOR_RUNTIME="2").settings
    assert settings.skyrl_backend == "local"
    assert settings.container_image == "localhost/skyrl-busybox:latest"
    assert 2 / settings.cpus_per_worker >= 4
    assert settings.training_command == '"$SKYRL_PYTHON" -m shell_rl.train'
    assert (settings.checkpoint_dir, settings.rollout_dir) == (None, None)
    assert load.named("local").settings.cpus_for_runtime == len(os.sched_getaffinity(0))


def test_reading_a_configuration_imports_nothing_of_others() -> None:
    code = "import slurm.lib.config, sys; print(*sys.modules)"
    argv = [sys.executable, "-S", "-c", code]  # -S: no site-packages at all
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"tempfile", "difflib", "tenacity", "sh", "yaml", "dotenv"} & set(done.stdout.split())
