"""Which trainer runs, what it is told and what it finds in its environment."""

from __future__ import annotations

import io
from datetime import datetime
from pathlib import Path

import pytest
from dotenv import dotenv_values
from hypothesis import assume, given
from hypothesis import strategies as st

from slurm.lib.config import load_config
from slurm.lib.coordination import CoordinationDir
from slurm.lib.dot_env import read_dot_env
from slurm.lib.hydra_grammar import hydra_value
from slurm.lib.settings import Settings
from slurm.lib.trainer import Trainer, env_file_text, env_file_values, missing_parts, trainer_environment, trainer_of

ROOT = Path(__file__).resolve().parent.parent
NOW = datetime(2026, 3, 4, 5, 6, 7)
RUN = CoordinationDir(Path("/jobs/20260304_050607_7"))
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/home/me"}


def settings_of(*overrides: str, config: str | None = "dev") -> Settings:
    folder = ROOT / "slurm" / "config"
    return load_config(config, overrides, ENVIRONMENT, folder, NOW, Path("/project")).settings


def trainer(*overrides: str, config: str | None = "dev") -> Trainer:
    return trainer_of(settings_of(*overrides, config=config), RUN)


def told(*overrides: str, config: str | None = "dev") -> dict[str, str]:
    """The Hydra overrides, of equal keys the last, as Hydra takes them."""
    words = trainer(*overrides, config=config).argv
    start = words.index("skyrl_agent.integrations.verl.verl_main_ppo") + 1
    return dict(word.partition("=")[::2] for word in words[start:])


# --- which trainer ----------------------------------------------------------------------------------------------------


def test_verl_runs_from_skyrl_agent() -> None:
    found = trainer()
    assert found.cwd == Path("/project/SkyRL/skyrl-agent")
    assert found.argv[:9] == (
        *("uv", "run", "--frozen", "--extra", "verl", "--env-file", f"{RUN.path}/training.env"),
        *("-m", "skyrl_agent.integrations.verl.verl_main_ppo"),
    )


def test_a_command_of_ones_own_replaces_it() -> None:
    found = trainer("TRAINING_COMMAND=echo a  'b c' $X | cat")
    assert found.argv == ("bash", "-c", "echo a  'b c' $X | cat")
    assert found.cwd == RUN.path
    assert missing_parts(settings_of("TRAINING_COMMAND=x", "SKYRL_PROJECT_ROOT=/nowhere")) == []


def test_the_folders_that_must_exist() -> None:
    found = trainer("CHECKPOINT_DIR=/c", "ROLLOUT_DIR=/r")
    assert set(found.folders) == {Path("/c"), Path("/r/train"), Path("/r/val")}
    own = trainer("TRAINING_COMMAND=true", config="local")
    assert set(own.folders) == {RUN.path / "checkpoints", RUN.path / "rollouts/train", RUN.path / "rollouts/val"}


def test_what_is_missing_is_named_one_by_one(tmp_path: Path) -> None:
    settings = settings_of(f"SKYRL_PROJECT_ROOT={tmp_path}", "TASK_YAML=mine.yaml")
    agent = tmp_path / "SkyRL" / "skyrl-agent"
    assert str(missing_parts(settings)[0]).startswith(f"{agent} (skyrl-agent) is missing; set SKYRL_PROJECT_ROOT")
    agent.mkdir(parents=True)
    found = missing_parts(settings)
    assert [part.sentence for part in found] == [f"{agent}/pyproject.toml is missing", f"{agent}/uv.lock is missing"]
    assert found[1].fix == f"make it: cd {agent} && uv lock"
    for name in ("pyproject.toml", "uv.lock"):
        (agent / name).touch()
    assert missing_parts(settings) == []
    automatic = settings_of(f"SKYRL_PROJECT_ROOT={tmp_path}", "TASK_YAML=auto")
    (example,) = missing_parts(automatic)
    assert example.sentence == f"{agent}/examples/run_verl/verl_oh.yaml is missing"


# --- what VERL is told ------------------------------------------------------------------------------------------------

ROLLOUT, ACTOR = "actor_rollout_ref.rollout", "actor_rollout_ref.actor"
VAL = "data.val_batch_size"  # as many as a step starts, unless it is set
DEV = {
    "data.train_batch_size": "4",
    "data.max_prompt_length": "4096",
    "data.max_response_length": "8192",
    "actor_rollout_ref.model.path": "Qwen/Qwen3-1.7B",
    f"{ACTOR}.ulysses_sequence_parallel_size": "1",
    f"{ROLLOUT}.tensor_model_parallel_size": "1",
    f"{ROLLOUT}.gpu_memory_utilization": "0.85",
    f"{ROLLOUT}.max_model_len": "12288",
    f"{ROLLOUT}.n": "2",
    "trainer.n_gpus_per_node": "2",
    "trainer.nnodes": "1",
    "trainer.total_epochs": "1",
    "trainer.project_name": "skyrl-training",
    "trainer.logger": "[console,wandb]",
}
PRODUCTION = {
    "data.train_batch_size": "64",
    "data.max_prompt_length": "8000",
    "data.max_response_length": "32768",
    "actor_rollout_ref.model.path": "Qwen/Qwen3-32B",
    f"{ACTOR}.ulysses_sequence_parallel_size": "4",
    f"{ROLLOUT}.tensor_model_parallel_size": "4",
    f"{ROLLOUT}.gpu_memory_utilization": "0.8",
    f"{ROLLOUT}.max_model_len": "40768",
    f"{ROLLOUT}.n": "8",
    "trainer.n_gpus_per_node": "8",
    "trainer.nnodes": "4",
    "trainer.total_epochs": "15",
}


@pytest.mark.parametrize(("name", "expected"), [("dev", DEV), ("production", PRODUCTION)])
def test_the_shipped_configurations_reach_verl(name: str, expected: dict[str, str]) -> None:
    found = told(config=name)
    assert {key: found.get(key) for key in expected} == expected
    assert found["data.train_files"] == "/home/me/skyrl/data/r2e-all/train.parquet"
    assert found["trainer.default_local_dir"] == f"/home/me/skyrl/ckpts/skyrl-{name}/skyrl-20260304-050607"
    assert found["trainer.rollout_data_dir"] == f"/home/me/skyrl/rollouts/skyrl-{name}/train"


KEYS = [
    ("MODEL", "/models/my model", {"actor_rollout_ref.model.path": "'/models/my model'"}),
    ("TP_SIZE", "2", {f"{ROLLOUT}.tensor_model_parallel_size": "2"}),
    ("SP_SIZE", "2", {f"{ACTOR}.ulysses_sequence_parallel_size": "2"}),
    ("VAL_BATCH_SIZE", "7", {VAL: "7"}),
    ("TRAIN_BATCH_SIZE", "32", {"data.train_batch_size": "32", f"{ACTOR}.ppo_mini_batch_size": "32", VAL: "64"}),
    ("ROLLOUT_N", "5", {f"{ROLLOUT}.n": "5", "+skyrl_agent.num_trajectories": "5", VAL: "20"}),
    ("MAX_PROMPT_LENGTH", "100", {"data.max_prompt_length": "100", f"{ROLLOUT}.max_model_len": "8292"}),
    ("MAX_RESPONSE_LENGTH", "100", {"data.max_response_length": "100", f"{ROLLOUT}.max_model_len": "4196"}),
    ("MAX_MODEL_LEN", "9999", {f"{ROLLOUT}.max_model_len": "9999"}),
    ("TOTAL_EPOCHS", "3", {"trainer.total_epochs": "3"}),
    ("LEARNING_RATE", "2e-5", {f"{ACTOR}.optim.lr": "2e-05"}),
    ("ADV_ESTIMATOR", "grpo", {"algorithm.adv_estimator": "grpo"}),
    ("GPU_MEMORY_UTILIZATION", "0.5", {f"{ROLLOUT}.gpu_memory_utilization": "0.5"}),
    ("ENFORCE_EAGER", "false", {f"{ROLLOUT}.enforce_eager": "False"}),
    ("ENABLE_GRADIENT_CHECKPOINTING", "no", {"actor_rollout_ref.model.enable_gradient_checkpointing": "False"}),
    (
        "FSDP_PARAM_OFFLOAD",
        "0",
        {
            f"{ACTOR}.fsdp_config.param_offload": "False",
            "actor_rollout_ref.ref.fsdp_config.param_offload": "False",
        },
    ),
    ("FSDP_OPTIMIZER_OFFLOAD", "0", {f"{ACTOR}.fsdp_config.optimizer_offload": "False"}),
    ("SAVE_FREQ", "-1", {"trainer.save_freq": "-1"}),
    ("TEST_FREQ", "7", {"trainer.test_freq": "7"}),
    ("MAX_CKPT_TO_KEEP", "3", {"trainer.max_actor_ckpt_to_keep": "3"}),
    ("TASK_YAML", "./a,b.yaml", {"+skyrl_agent.task_yaml": "'/project/SkyRL/skyrl-agent/a,b.yaml'"}),
    ("LOGGERS", "console", {"trainer.logger": "[console]"}),
    ("WANDB_PROJECT", "p", {"trainer.project_name": "p"}),
    ("WANDB_EXPERIMENT", "e", {"trainer.experiment_name": "e"}),
    ("DATA_DIR", "/d", {"data.train_files": "/d/train.parquet", "data.val_files": "/d/validation.parquet"}),
    ("GPU_NODES", "2", {"trainer.nnodes": "2"}),
    ("GPUS_PER_NODE", "6", {"trainer.n_gpus_per_node": "6"}),
    ("VERL_OVERRIDES", "trainer.nnodes=9 '+a.b=[1,2]'", {"trainer.nnodes": "9", "+a.b": "[1,2]"}),
]


@pytest.mark.parametrize(("key", "value", "expected"), KEYS, ids=[key for key, _, _ in KEYS])
def test_each_key_decides_what_it_says(key: str, value: str, expected: dict[str, str]) -> None:
    """Exactly these overrides change; folders named after the experiment aside."""
    before, after = told(), told(f"{key}={value}")
    changed = {name: word for name, word in after.items() if before.get(name) != word}
    assert {name: word for name, word in changed.items() if name != "trainer.default_local_dir"} == expected


def test_the_users_overrides_come_last() -> None:
    assert trainer("VERL_OVERRIDES=trainer.nnodes=9 x=1").argv[-2:] == ("trainer.nnodes=9", "x=1")


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (True, "True"),
        (3, "3"),
        (1e-06, "1e-06"),
        ("plain/path-1.5_x@y", "plain/path-1.5_x@y"),
        (Path("/a b"), "'/a b'"),
        ("", "''"),
        ("it's", "'it\\'s'"),
        ("a=b,c", "'a=b,c'"),
        ("${HOME}", r"'\${HOME}'"),
        ("a\\b", r"'a\b'"),
        ("a\\", "'a\\\\'"),
        ("123", "'123'"),
        ("true", "'true'"),
        ("-1", "'-1'"),
        ("[x]", "'[x]'"),
        (("a", "b c"), "[a,'b c']"),
        ((), "[]"),
    ],
)
def test_values_as_hydra_reads_them(value: object, word: str) -> None:
    assert hydra_value(value) == word


# --- the trainer's environment ----------------------------------------------------------------------------------------

URL, KEY = "SANDBOX_REMOTE_RUNTIME_API_URL", "ALLHANDS_API_KEY"


def test_an_old_env_file_never_beats_the_run() -> None:
    base = {"PATH": "/bin", URL: "of the shell", "WANDB_MODE": "online"}
    dot_env = {URL: "http://old:1", KEY: "old", "WANDB_MODE": "offline", "OTHER": "x"}
    found = trainer_environment(base, dot_env, {URL: "http://new:2", KEY: "new"})
    assert (found[URL], found[KEY]) == ("http://new:2", "new")
    assert found["WANDB_MODE"] == "offline"
    assert found["OTHER"] == "x"
    assert found["PATH"] == "/bin"


def test_the_env_file_says_what_the_trainer_has() -> None:
    """What a step took out stays out, what a step changed is changed, and nothing else of the environment is in it."""
    dot_env = {"FI_PROVIDER": "efa", "HF_HOME": "/old", URL: "http://old:1", "WANDB_MODE": "offline"}
    environment = {"PATH": "/bin", "HF_HOME": "/new", "WANDB_MODE": "offline", URL: "http://new:2"}
    found = env_file_values(environment, dot_env, {URL: "http://new:2", KEY: "new"})
    assert found == {"HF_HOME": "/new", "WANDB_MODE": "offline", URL: "http://new:2", KEY: "new"}


def test_what_still_has_to_be_replaced_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text("A=1\nB=<REPLACE>\nC='key-<REPLACE>'\nexport D=\"x $A\"\nE\n# F=1\nG=\n")
    assert read_dot_env(path) == {"A": "1", "D": "x $A", "G": ""}
    assert read_dot_env(tmp_path / "none") == {}


def read_back(text: str) -> dict[str, str | None]:
    return dict(dotenv_values(stream=io.StringIO(text), interpolate=False))


@given(st.dictionaries(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True), st.text(), max_size=4))
def test_the_env_file_reads_back_unchanged(values: dict[str, str]) -> None:
    """As promised: without carriage returns, and without ``$`` where double quotes are needed."""
    for value in values.values():
        double = "'" in value or "\\\\" in value or value.endswith("\\")
        assume("\r" not in value and not (double and "$" in value))
    assert read_back(env_file_text(values)) == values


# What `uv run --env-file` (0.13) read back exactly, tried by hand; python-dotenv alone cannot show it.
@pytest.mark.parametrize(
    ("value", "line"),
    [
        ('$HOME ${X} `x` "q" #', "V='$HOME ${X} `x` \"q\" #'"),
        ("it's $HOME", 'V="it\'s \\$HOME"'),
        ("ends\\", 'V="ends\\\\"'),
        ("a\\b", "V='a\\b'"),
        ("two\nlines", "V='two\nlines'"),
    ],
)
def test_how_values_are_spelt(value: str, line: str) -> None:
    assert env_file_text({"V": value}) == line + "\n"


def test_one_awkward_value_does_not_hide_the_others() -> None:
    text = env_file_text({"A": "ends in \\", "A B": "x", "B=C": "x", "": "x", "Z": "last"})
    assert read_back(text) == {"A": "ends in \\", "Z": "last"}
