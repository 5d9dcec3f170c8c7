"""What VERL is told: settings → the arguments of its PPO entry point; pure.

One row of ``OVERRIDES`` for each thing that a key of the configuration decides, and ``FIXED`` for what the suite
always says. The user's VERL_OVERRIDES come last and win, as Hydra takes the last of equal keys.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from slurm.lib.settings import Settings

MODULE = "skyrl_agent.integrations.verl.verl_main_ppo"

FIXED = (
    "data.dataloader_num_workers=0",
    "data.filter_overlong_prompts=True",
    "data.truncation=error",
    "data.return_raw_chat=true",
    "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum",
    "actor_rollout_ref.model.use_remove_padding=True",
    "actor_rollout_ref.actor.use_dynamic_bsz=False",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
    "actor_rollout_ref.actor.use_kl_loss=False",
    "actor_rollout_ref.actor.kl_loss_coef=0.001",
    "actor_rollout_ref.actor.kl_loss_type=low_var_kl",
    "actor_rollout_ref.actor.entropy_coeff=0",
    "actor_rollout_ref.actor.clip_ratio_high=0.28",
    "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=False",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
    "actor_rollout_ref.rollout.free_cache_engine=True",
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.rollout.mode=async",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=1",
    "actor_rollout_ref.ref.fsdp_config.param_offload=True",
    "algorithm.use_kl_in_reward=False",
    "algorithm.norm_adv_by_std_in_grpo=False",
    "trainer.val_before_train=False",
    "trainer.critic_warmup=0",
)

Value = Callable[[Settings], object]

OVERRIDES: tuple[tuple[str, Value], ...] = (
    ("algorithm.adv_estimator", lambda s: s.adv_estimator),
    ("data.train_files", lambda s: s.train_data),
    ("data.val_files", lambda s: s.val_data),
    ("data.train_batch_size", lambda s: s.train_batch_size),
    ("data.max_prompt_length", lambda s: s.max_prompt_length),
    ("data.max_response_length", lambda s: s.max_response_length),
    ("actor_rollout_ref.model.path", lambda s: s.model),
    ("actor_rollout_ref.model.enable_gradient_checkpointing", lambda s: s.enable_gradient_checkpointing),
    ("actor_rollout_ref.actor.optim.lr", lambda s: s.learning_rate),
    ("actor_rollout_ref.actor.ppo_mini_batch_size", lambda s: s.train_batch_size),
    ("actor_rollout_ref.actor.fsdp_config.param_offload", lambda s: s.fsdp_param_offload),
    ("actor_rollout_ref.actor.fsdp_config.optimizer_offload", lambda s: s.fsdp_optimizer_offload),
    ("actor_rollout_ref.actor.ulysses_sequence_parallel_size", lambda s: s.sp_size),
    ("actor_rollout_ref.rollout.tensor_model_parallel_size", lambda s: s.tp_size),
    ("actor_rollout_ref.rollout.enforce_eager", lambda s: s.enforce_eager),
    ("actor_rollout_ref.rollout.gpu_memory_utilization", lambda s: s.gpu_memory_utilization),
    ("actor_rollout_ref.rollout.max_model_len", lambda s: s.max_model_len),
    ("actor_rollout_ref.rollout.n", lambda s: s.rollout_n),
    ("trainer.logger", lambda s: s.loggers),
    ("trainer.project_name", lambda s: s.wandb_project),
    ("trainer.experiment_name", lambda s: s.wandb_experiment),
    ("trainer.n_gpus_per_node", lambda s: s.gpus_per_node),
    ("trainer.nnodes", lambda s: s.gpu_nodes),
    ("trainer.max_actor_ckpt_to_keep", lambda s: s.max_ckpt_to_keep),
    ("trainer.save_freq", lambda s: s.save_freq),
    ("trainer.test_freq", lambda s: s.test_freq),
    ("trainer.total_epochs", lambda s: s.total_epochs),
    ("+skyrl_agent.task_yaml", lambda s: s.task_yaml),
    ("+skyrl_agent.num_trajectories", lambda s: s.rollout_n),
)


def hydra_value(value: object) -> str:
    """A value as Hydra's override grammar reads it back: text with special characters is quoted."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(hydra_value(item) for item in value) + "]"
    text = str(value)
    plain = bool(text) and not any(character in "\\,=[]{}()'\"\t\n :%#&$" for character in text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return text if plain else f"'{escaped}'"


def overrides(settings: Settings, checkpoint_dir: Path, rollout_dir: Path) -> tuple[str, ...]:
    """The Hydra overrides for these settings; rows whose setting is unset are left to VERL's default."""
    decided = [f"{name}={hydra_value(v)}" for name, value in OVERRIDES if (v := value(settings)) is not None]
    folders = [
        f"trainer.default_local_dir={hydra_value(checkpoint_dir / settings.wandb_experiment)}",
        f"trainer.rollout_data_dir={hydra_value(rollout_dir / 'train')}",
        f"trainer.validation_data_dir={hydra_value(rollout_dir / 'val')}",
    ]
    return (*decided, *FIXED, *folders, *settings.verl_overrides)


def command(settings: Settings, env_file: Path, checkpoint_dir: Path, rollout_dir: Path) -> tuple[str, ...]:
    """The trainer's command line, to be run in the ``skyrl-agent`` folder."""
    uv = ("uv", "run", "--frozen", "--extra", "verl", "--env-file", str(env_file), "-m", MODULE)
    return (*uv, *overrides(settings, checkpoint_dir, rollout_dir))
