"""What VERL is told: settings → the arguments of its PPO entry point; pure.

``ROWS`` is the one table: each row an override, the keys of the configuration that decide it (none where the suite
always says the same), and where the fact comes from. Types and valid ranges are those of the keys, in
``settings.KEYS``. The user's VERL_OVERRIDES come last and win, as Hydra takes the last
of equal names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from slurm.lib.hydra_grammar import hydra_value
from slurm.lib.sandbox_room import sandbox_room
from slurm.lib.settings import Settings
from slurm.lib.verl_versions import Release, VerlVersion, exists_in, name_in

MODULE = "skyrl_agent.integrations.verl.verl_main_ppo"


@dataclass(frozen=True)
class Told:
    """What the overrides are made of. ``task_yaml`` is SkyRL-agent's task file."""

    settings: Settings
    checkpoint_dir: Path
    rollout_dir: Path
    task_yaml: str | Path


@dataclass(frozen=True)
class Row:
    """One override: ``name`` as the newest release that the suite knows calls it.

    ``value`` None leaves it to VERL. ``source`` is where the fact comes from; most are the bash suite's command line.
    A row with ``known_only`` is told only to a VERL whose version is known: its name differs between releases.
    """

    keys: tuple[str, ...]
    name: str
    value: Callable[[Told], object]
    source: str = "bash suite"
    known_only: bool = False


def _always(name: str, value: object) -> Row:
    return Row((), name, lambda _: value)


_ROLLOUT, _ACTOR, _REF = "actor_rollout_ref.rollout", "actor_rollout_ref.actor", "actor_rollout_ref.ref"

ROWS: tuple[Row, ...] = (
    Row(("ADV_ESTIMATOR",), "algorithm.adv_estimator", lambda t: t.settings.adv_estimator),
    Row(("TRAIN_DATA", "DATA_DIR"), "data.train_files", lambda t: t.settings.train_data),
    Row(("VAL_DATA", "DATA_DIR"), "data.val_files", lambda t: t.settings.val_data),
    Row(("TRAIN_BATCH_SIZE",), "data.train_batch_size", lambda t: t.settings.train_batch_size),
    Row(
        ("VAL_BATCH_SIZE",),
        "data.val_batch_size",
        lambda t: t.settings.val_batch_size or sandbox_room(t.settings).first_slots,
        "read in VERL 0.5.0 to 0.9.1: all rows at once without it",
    ),
    Row(("MAX_PROMPT_LENGTH",), "data.max_prompt_length", lambda t: t.settings.max_prompt_length),
    Row(("MAX_RESPONSE_LENGTH",), "data.max_response_length", lambda t: t.settings.max_response_length),
    Row(("MODEL",), "actor_rollout_ref.model.path", lambda t: t.settings.model),
    Row(
        ("ENABLE_GRADIENT_CHECKPOINTING",),
        "actor_rollout_ref.model.enable_gradient_checkpointing",
        lambda t: t.settings.enable_gradient_checkpointing,
        "VERL; True whatever was set in the bash suite",
    ),
    Row(("LEARNING_RATE",), f"{_ACTOR}.optim.lr", lambda t: t.settings.learning_rate),
    Row(("TRAIN_BATCH_SIZE",), f"{_ACTOR}.ppo_mini_batch_size", lambda t: t.settings.train_batch_size),
    Row(
        ("FSDP_PARAM_OFFLOAD",),
        f"{_ACTOR}.fsdp_config.param_offload",
        lambda t: t.settings.fsdp_param_offload,
        "VERL; True whatever was set in the bash suite",
    ),
    Row(
        ("FSDP_OPTIMIZER_OFFLOAD",),
        f"{_ACTOR}.fsdp_config.optimizer_offload",
        lambda t: t.settings.fsdp_optimizer_offload,
        "VERL; True whatever was set in the bash suite",
    ),
    Row(
        ("FSDP_PARAM_OFFLOAD",),
        f"{_REF}.fsdp_config.param_offload",
        lambda t: t.settings.fsdp_param_offload,
        "VERL; True whatever was set in the bash suite",
    ),
    Row(("SP_SIZE",), f"{_ACTOR}.ulysses_sequence_parallel_size", lambda t: t.settings.sp_size),
    Row(("TP_SIZE",), f"{_ROLLOUT}.tensor_model_parallel_size", lambda t: t.settings.tp_size),
    Row(("ENFORCE_EAGER",), f"{_ROLLOUT}.enforce_eager", lambda t: t.settings.enforce_eager),
    Row(("GPU_MEMORY_UTILIZATION",), f"{_ROLLOUT}.gpu_memory_utilization", lambda t: t.settings.gpu_memory_utilization),
    Row(("MAX_MODEL_LEN",), f"{_ROLLOUT}.max_model_len", lambda t: t.settings.max_model_len),
    Row(("ROLLOUT_N",), f"{_ROLLOUT}.n", lambda t: t.settings.rollout_n),
    Row(("LOGGERS",), "trainer.logger", lambda t: t.settings.loggers),
    Row(("WANDB_PROJECT",), "trainer.project_name", lambda t: t.settings.wandb_project),
    Row(("WANDB_EXPERIMENT",), "trainer.experiment_name", lambda t: t.settings.wandb_experiment),
    Row(("GPUS_PER_NODE",), "trainer.n_gpus_per_node", lambda t: t.settings.gpus_per_node),
    Row(("GPU_NODES",), "trainer.nnodes", lambda t: t.settings.gpu_nodes),
    Row(("MAX_CKPT_TO_KEEP",), "trainer.max_actor_ckpt_to_keep", lambda t: t.settings.max_ckpt_to_keep),
    Row(("SAVE_FREQ",), "trainer.save_freq", lambda t: t.settings.save_freq),
    Row(("TEST_FREQ",), "trainer.test_freq", lambda t: t.settings.test_freq),
    Row(("TOTAL_EPOCHS",), "trainer.total_epochs", lambda t: t.settings.total_epochs),
    # With RESTARTS: save after every step of the last minutes, and go on from what was saved last.
    Row(
        ("RESTART_LEAD", "RESTARTS"),
        "trainer.esi_redundant_time",
        lambda t: t.settings.restart_lead if t.settings.restarts else None,
        "read in VERL 0.5.0 to 0.9.1, run in 0.5.0",
    ),
    Row((), "trainer.resume_mode", lambda t: "auto" if t.settings.restarts else None),
    Row(
        ("CHECKPOINT_DIR", "WANDB_EXPERIMENT"),
        "trainer.default_local_dir",
        lambda t: t.checkpoint_dir / t.settings.wandb_experiment,
    ),
    Row(("ROLLOUT_DIR",), "trainer.rollout_data_dir", lambda t: t.rollout_dir / "train"),
    Row(("ROLLOUT_DIR",), "trainer.validation_data_dir", lambda t: t.rollout_dir / "val"),
    Row(("TASK_YAML",), "+skyrl_agent.task_yaml", lambda t: t.task_yaml),
    Row(("ROLLOUT_N",), "+skyrl_agent.num_trajectories", lambda t: t.settings.rollout_n),
    # Ray counts the machine's CPUs, not the job's. Where our own `ray start` says how many VERL, which joins, must not.
    Row(
        ("TRAINING_CPUS", "GPU_NODES", "RAY_CLUSTER"),
        "ray_kwargs.ray_init.num_cpus",
        lambda t: t.settings.training_cpus if t.settings.gpu_nodes == 1 and t.settings.ray_cluster != "on" else None,
        "read in SkyRL-agent's entry point; VERL issue 523",
        known_only=True,
    ),
    # SkyRL-agent's trainer extends the older one. The newer one does not save by the time that is left, and waits for
    # ever where Ray has fewer CPUs than it wants.
    Row((), "trainer.use_v1", lambda _: False, "read and run, VERL 0.9.1", known_only=True),
    _always("data.dataloader_num_workers", 0),
    _always("data.filter_overlong_prompts", True),
    _always("data.truncation", "error"),
    _always("data.return_raw_chat", True),
    _always(f"{_ACTOR}.loss_agg_mode", "seq-mean-token-sum"),
    _always("actor_rollout_ref.model.use_remove_padding", True),
    _always(f"{_ACTOR}.use_dynamic_bsz", False),
    _always(f"{_ACTOR}.ppo_micro_batch_size_per_gpu", 1),
    _always(f"{_ACTOR}.use_kl_loss", False),
    _always(f"{_ACTOR}.kl_loss_coef", 0.001),
    _always(f"{_ACTOR}.kl_loss_type", "low_var_kl"),
    _always(f"{_ACTOR}.entropy_coeff", 0),
    _always(f"{_ACTOR}.clip_ratio_high", 0.28),
    _always(f"{_ROLLOUT}.log_prob_use_dynamic_bsz", False),
    _always(f"{_ROLLOUT}.log_prob_micro_batch_size_per_gpu", 1),
    _always(f"{_ROLLOUT}.free_cache_engine", True),
    _always(f"{_ROLLOUT}.name", "vllm"),
    _always(f"{_ROLLOUT}.mode", "async"),
    _always(f"{_REF}.log_prob_micro_batch_size_per_gpu", 1),
    _always("algorithm.use_kl_in_reward", False),
    _always("algorithm.norm_adv_by_std_in_grpo", False),
    _always("trainer.val_before_train", False),
    _always("trainer.critic_warmup", 0),
)

# Keys of "Data and results" and "What VERL trains" that are no override of their own, and where they go instead.
ELSEWHERE = {
    "VERL_OVERRIDES": "appended as they are",
    "VLLM_USE_V1": "a variable of the environment, which vLLM reads itself",
}


def overrides(
    settings: Settings,
    checkpoint_dir: Path,
    rollout_dir: Path,
    *,
    task_yaml: Path | None = None,
    version: VerlVersion | None = None,
) -> tuple[str, ...]:
    """The Hydra overrides for these settings, in the names of the given VERL; without one, in those of all releases.

    Rows whose value is None are left to VERL's default. ``task_yaml`` is TASK_YAML made absolute.
    """
    told = Told(settings, checkpoint_dir, rollout_dir, task_yaml or settings.task_yaml)
    release = version.release if version and version.known else None
    rows = [(name, row.value(told)) for row in ROWS if (name := row_name(row, release))]
    ours = [f"{name}={hydra_value(value)}" for name, value in rows if value is not None]
    return (*ours, *settings.verl_overrides)


def row_name(row: Row, release: Release | None) -> str | None:
    """What a row's override is called in a release (None: one that is not known), or None where it has none."""
    if release is None:
        return None if row.known_only else row.name
    return name_in(release, row.name) if exists_in(release, row.name) else None


def command(
    settings: Settings,
    env_file: Path,
    checkpoint_dir: Path,
    rollout_dir: Path,
    *,
    task_yaml: Path | None = None,
    version: VerlVersion | None = None,
) -> tuple[str, ...]:
    """The trainer's command line, to be run in the ``skyrl-agent`` folder."""
    uv = ("uv", "run", "--frozen", "--extra", "verl", "--env-file", _one_of_uvs_files(env_file), "-m", MODULE)
    return (*uv, *overrides(settings, checkpoint_dir, rollout_dir, task_yaml=task_yaml, version=version))


def _one_of_uvs_files(path: Path) -> str:
    """uv takes a space within ``--env-file`` for the end of one file's name, unless a backslash stands before it."""
    return re.sub(r"([ \\])", r"\\\1", str(path))
