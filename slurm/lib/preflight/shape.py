"""Do the numbers of the settings fit each other: sandboxes and slots, batches and GPUs, lengths? Pure."""

from __future__ import annotations

from slurm.lib.preflight.asked import override
from slurm.lib.preflight.finding import Finding, error, estimate, warning
from slurm.lib.preflight.words import number_of, size
from slurm.lib.sandbox_room import SandboxRoom, memory_promised, sandbox_room
from slurm.lib.settings import Settings, memory_bytes

# An idle sandbox with a forked agent server and all that belongs to it, 9.9 GB for 512 (docs/benchmarks.md).
SMALLEST_SANDBOX = 20 * 1024**2
COMPARING = frozenset({"loop", "rloo", "grpo", "grpo_passk", "opo"})  # advantages relative to a prompt's other rollouts
ESTIMATOR = "algorithm.adv_estimator"
MINI_BATCH = "actor_rollout_ref.actor.ppo_mini_batch_size"
VAL_BATCH = "data.val_batch_size"


def world_size(settings: Settings) -> int:
    """All GPUs of the training job."""
    return settings.gpu_nodes * settings.gpus_per_node


def slot_findings(settings: Settings) -> list[Finding]:
    """Sandboxes that a step opens at once against the runtime's slots, CPUs and memory."""
    room = sandbox_room(settings)
    opened = f"TRAIN_BATCH_SIZE × ROLLOUT_N = {settings.train_batch_size} × {settings.rollout_n} = {room.wanted}"
    if room.slots < room.wanted:
        slots = number_of(room.slots, "slot")
        sentence = (
            f"a step starts {opened} sandboxes before the first one runs, and the runtime has {slots} "
            f"(MAX_PARALLEL_AGENTS={settings.max_parallel_agents}): the rest would wait for one until they are given up"
        )
        fix = f"set MAX_PARALLEL_AGENTS={room.wanted} or leave it unset, or make the batch smaller"
        return [error("slots", sentence, fix)]
    return [*_cpu_findings(settings, room, opened), *_memory_findings(settings, room), _opened(settings, room)]


def _opened(settings: Settings, room: SandboxRoom) -> Finding:
    sentence = (
        f"a step opens {room.wanted} sandboxes at once, {room.slots} fit, each with up to {room.cpus_each:.3g} CPUs "
        f"and {settings.memory_per_worker} of memory; "
    )
    if room.slots >= 2 * room.wanted:
        return estimate("slots", sentence + "a second one each for an evaluation fits too")
    second = "each trajectory's evaluation may need a second sandbox; "
    return estimate("slots", sentence + second + f"only {room.slots} can exist at once")


def _cpu_findings(settings: Settings, room: SandboxRoom, opened: str) -> list[Finding]:
    if not room.is_overcommitted:
        return []
    times = room.slots * settings.cpus_per_worker / room.cpus
    sentence = (
        f"overcommit: a step opens {opened} sandboxes at once, CPUS_FOR_RUNTIME={room.cpus} with "
        f"CPUS_PER_WORKER={settings.cpus_per_worker:g} is enough for {room.fitting}; the runtime makes {room.slots} "
        f"slots that share the CPUs, {room.cpus_each:.3g} each (asked for: {times:.3g} times what there is)"
    )
    fix = (
        f"expect commands to be slower; say CPUS_PER_WORKER={room.cpus / room.slots:.3g} to mean it, raise "
        "CPUS_FOR_RUNTIME, or make the batch smaller"
    )
    return [warning("slots", sentence, fix)]


def _memory_findings(settings: Settings, room: SandboxRoom) -> list[Finding]:
    if settings.runtime_memory == "0":
        return []
    there, promised = memory_bytes(settings.runtime_memory), memory_promised(settings, room.wanted)
    if there < room.wanted * SMALLEST_SANDBOX:
        sentence = (
            f"{room.wanted} sandboxes at once share RUNTIME_MEMORY={settings.runtime_memory}, "
            f"{size(there / room.wanted)} each; an idle one takes {size(SMALLEST_SANDBOX)}"
        )
        return [error("slots", sentence, "raise RUNTIME_MEMORY, or make the batch smaller")]
    if there >= promised:
        return []
    sentence = (
        f"overcommit: {room.wanted} sandboxes may take MEMORY_PER_WORKER={settings.memory_per_worker} each, "
        f"{size(promised)} together, of RUNTIME_MEMORY={settings.runtime_memory}: if many do, the job is killed"
    )
    fix = f"raise RUNTIME_MEMORY, or lower MEMORY_PER_WORKER (to {size(there / room.wanted)} for no overcommit)"
    return [warning("slots", sentence, fix)]


def batch_findings(settings: Settings) -> list[Finding]:
    """What VERL divides a step's trajectories by: GPUs, sequence groups, mini-batches."""
    gpus, rollouts = world_size(settings), settings.train_batch_size * settings.rollout_n
    found = []
    if rollouts % gpus:
        sentence = (
            f"TRAIN_BATCH_SIZE × ROLLOUT_N = {rollouts} trajectories cannot be divided among "
            f"GPU_NODES × GPUS_PER_NODE = {gpus} GPUs"
        )
        found.append(error("batch", sentence, f"make the product a multiple of {gpus}"))
    found += _mini_batch_findings(settings, gpus)
    estimator = override(settings, ESTIMATOR) or settings.adv_estimator
    if settings.rollout_n == 1 and estimator in COMPARING:
        sentence = f"ROLLOUT_N=1: {estimator} compares a prompt's rollouts, and there is one: no advantage"
        found.append(warning("batch", sentence, "set ROLLOUT_N to 2 or more, or another ADV_ESTIMATOR"))
    return found


def _mini_batch_findings(settings: Settings, gpus: int) -> list[Finding]:
    given = override(settings, MINI_BATCH)
    mini = int(given) if given is not None and given.isdigit() else settings.train_batch_size
    groups = max(1, gpus // settings.sp_size)
    if mini > settings.train_batch_size:
        sentence = f"{MINI_BATCH}={mini} in VERL_OVERRIDES is more than TRAIN_BATCH_SIZE={settings.train_batch_size}"
        return [error("batch", sentence, "make it at most the batch")]
    if mini * settings.rollout_n < groups:
        sentence = (
            f"a mini-batch of {mini} prompts × ROLLOUT_N={settings.rollout_n} leaves nothing for some of the "
            f"{groups} groups of SP_SIZE={settings.sp_size} GPUs"
        )
        return [error("batch", sentence, f"make the product at least {groups}")]
    return []


def parallel_findings(settings: Settings) -> list[Finding]:
    """TP_SIZE against the GPUs of one node, and the CPUs that Ray's actors need; else VERL fails or hangs late."""
    per_node, tp = settings.gpus_per_node, settings.tp_size
    found = []
    if per_node % tp:
        sentence = (
            f"TP_SIZE={tp} must divide GPUS_PER_NODE={per_node}: a copy of the model is spread over one node's GPUs"
        )
        found.append(error("parallel", sentence, "choose a TP_SIZE that divides GPUS_PER_NODE"))
    # One CPU for each GPU's worker, the task runner, and each inference server (Ray's actors, seen to hang without).
    needed = per_node + 1 + max(1, per_node // tp)
    if settings.training_cpus < needed:
        sentence = (
            f"TRAINING_CPUS={settings.training_cpus}: {per_node} GPU workers, the task runner and inference servers "
            f"want a CPU each, {needed} in all; Ray waits for them without a word"
        )
        found.append(error("parallel", sentence, f"set TRAINING_CPUS to {needed} or more"))
    return found


def length_findings(settings: Settings) -> list[Finding]:
    """MAX_MODEL_LEN against prompt and response, which nothing in VERL compares."""
    longest = settings.max_prompt_length + settings.max_response_length
    if settings.max_model_len >= longest:
        return []
    sentence = (
        f"MAX_MODEL_LEN={settings.max_model_len} is less than MAX_PROMPT_LENGTH + MAX_RESPONSE_LENGTH = {longest}: "
        "long trajectories are cut without a word"
    )
    return [warning("lengths", sentence, "leave MAX_MODEL_LEN unset (it is their sum then), or lower the two")]
