"""VERL's own entry point on a Ray of its own: one machine, no dashboard, a GPU that is only said to be there.

Runs under the Python of VERL's environment: ``python -m local_verl.driver OVERRIDE…``, with RAY_TMPDIR set.
"""

from __future__ import annotations

from typing import Any

CPUS = 4  # as Ray counts: one for the task runner, one for the worker, and room; it binds nobody to them
GPUS = 1  # VERL asks Ray for it; nothing uses it
OBJECT_STORE_BYTES = 200 << 20  # of shared memory; Ray's least is 75 MiB


def start_ray() -> None:
    """Start a Ray that ends with this process and is nobody else's, whatever RAY_ADDRESS says."""
    import ray
    from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

    ray.init(
        address="local",
        num_cpus=CPUS,
        num_gpus=GPUS,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,  # takes longer to start than all else
        runtime_env=get_ppo_ray_runtime_env(),
    )


def main() -> None:
    """Train. VERL starts no Ray where there is one already, so ours is started in between, with its configuration
    read and found good."""
    from verl.trainer import main_ppo

    entry: Any = main_ppo
    train = entry.run_ppo

    def run_ppo(config: Any) -> None:
        start_ray()
        train(config)

    entry.run_ppo = run_ppo
    entry.main()


if __name__ == "__main__":
    main()
