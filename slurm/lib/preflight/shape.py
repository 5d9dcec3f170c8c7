"""Do the numbers of the settings fit each other: sandboxes and slots, batches and GPUs, lengths? Pure."""

from __future__ import annotations

from dataclasses import replace

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
    """Sandboxes that a step opens at once against the runtime's slots, CPUs and memory on all of its nodes."""
    room = sandbox_room(settings)
    opened = f"TRAIN_BATCH_SIZE × ROLLOUT_N = {settings.train_batch_size} × {settings.rollout_n} = {room.wanted}"
    if room.all_slots < room.wanted:
        return [_too_few(settings, room, opened)]
    return [
        *_begun_early(settings, room, opened),
        *_cpu_findings(settings, room, opened),
        *_memory_findings(settings, room),
        _opened(settings, room),
    ]


def _too_few(settings: Settings, room: SandboxRoom, opened: str) -> Finding:
    sentence = (
        f"a step starts {opened} sandboxes before the first one runs, and the runtime has "
        f"{number_of(room.all_slots, 'slot')} (MAX_PARALLEL_AGENTS={settings.max_parallel_agents}): the rest would "
        "wait for one until they are given up"
    )
    fix = f"set MAX_PARALLEL_AGENTS={room.wanted} or leave it unset, or make the batch smaller"
    return error("slots", sentence, fix)


def _begun_early(settings: Settings, room: SandboxRoom, opened: str) -> list[Finding]:
    """A training that does not wait for the nodes which its first step needs."""
    if room.nodes == 1 or room.first_slots >= room.wanted:
        return []
    sentence = (
        f"a step starts {opened} sandboxes before the first one runs, and RUNTIME_MIN_SLOTS="
        f"{settings.runtime_min_slots} has the training begin when {number_of(room.first_slots, 'slot')} are there: "
        "the rest would wait for one until they are given up"
    )
    return [error("slots", sentence, f"leave RUNTIME_MIN_SLOTS unset ({room.wanted} then), or make the batch smaller")]


def _opened(settings: Settings, room: SandboxRoom) -> Finding:
    sentence = (
        f"a step opens {room.wanted} sandboxes at once, {room.all_slots} fit{_on(room.nodes)}, each with up to "
        f"{room.cpus_each:.3g} CPUs and {settings.memory_per_worker} of memory; "
    )
    if room.all_slots >= 2 * room.wanted:
        sentence += "a second one each for an evaluation fits too"
    else:
        second = "each trajectory's evaluation may need a second sandbox; "
        sentence += second + f"only {room.all_slots} can exist at once"
    if room.nodes > 1:
        sentence += f"; with all of that for each, {number_of(room.nodes_in_full, 'node')} would do"
    return estimate("slots", sentence, _whole_cpus(settings, room))


def _on(nodes: int) -> str:
    return f" on {nodes} nodes" if nodes > 1 else ""


def _whole_cpus(settings: Settings, room: SandboxRoom) -> str:
    """What a fraction of a CPU for each, where it is meant, could be exchanged for; empty for whole ones."""
    if settings.cpus_per_worker >= 1 or room.is_overcommitted or not can_have_nodes(settings):
        return ""
    nodes = sandbox_room(replace(settings, cpus_per_worker=1.0)).nodes_in_full
    return f"for a whole CPU each, {add_line('CPUS_PER_WORKER=1', f'RUNTIME_NODES={nodes}')}" if nodes > 1 else ""


def can_have_nodes(settings: Settings) -> bool:
    """Whether this run can have its sandboxes on several nodes."""
    return settings.skyrl_backend == "slurm" and settings.pairing == "jobs" and settings.slurm_runtime_dir is None


def add_line(*assignments: str) -> str:
    """An offer of lines for the configuration."""
    return f"add to the .conf: {'; '.join(assignments)}"


def _nodes_offered(settings: Settings, room: SandboxRoom) -> str:
    """The line with which each sandbox has its CPUs and memory for itself, as the first words of a fix."""
    if room.nodes_in_full <= room.nodes or not can_have_nodes(settings):
        return ""
    return f"{add_line(f'RUNTIME_NODES={room.nodes_in_full}')} (that many have them all in full); or "


def _cpu_findings(settings: Settings, room: SandboxRoom, opened: str) -> list[Finding]:
    if not room.is_overcommitted:
        return []
    times = room.slots * settings.cpus_per_worker / room.cpus
    cpus = f"CPUS_FOR_RUNTIME={room.cpus} with CPUS_PER_WORKER={settings.cpus_per_worker:g}"
    if room.nodes == 1:
        there = f"{cpus} is enough for {room.fitting}; the runtime makes {room.slots} slots that share the CPUs"
    else:
        there = (
            f"RUNTIME_NODES={room.nodes} with {cpus} are enough for {room.nodes * room.fitting}; each node makes "
            f"{room.slots} slots that share its CPUs"
        )
    sentence = (
        f"overcommit: a step opens {opened} sandboxes at once, {there}, {room.cpus_each:.3g} each (asked for: "
        f"{times:.3g} times what there is); {number_of(room.nodes_in_full, 'node')} would be enough"
    )
    fix = (
        f"expect commands to be slower; say CPUS_PER_WORKER={room.cpus / room.slots:.3g} to mean it, raise "
        "CPUS_FOR_RUNTIME, or make the batch smaller"
    )
    return [warning("slots", sentence, _nodes_offered(settings, room) + fix)]


def _memory_findings(settings: Settings, room: SandboxRoom) -> list[Finding]:
    if settings.runtime_memory == "0":
        return []
    crowd = min(room.wanted, room.slots)  # on one node
    there, promised = memory_bytes(settings.runtime_memory), memory_promised(settings, crowd)
    of_a_node = "" if room.nodes == 1 else " of a node"
    if there < crowd * SMALLEST_SANDBOX:
        sentence = (
            f"{crowd} sandboxes at once share RUNTIME_MEMORY={settings.runtime_memory}{of_a_node}, "
            f"{size(there / crowd)} each; an idle one takes {size(SMALLEST_SANDBOX)}"
        )
        return [error("slots", sentence, "raise RUNTIME_MEMORY, or make the batch smaller")]
    if there >= promised:
        return []
    sentence = (
        f"overcommit: {crowd} sandboxes may take MEMORY_PER_WORKER={settings.memory_per_worker} each, "
        f"{size(promised)} together, of RUNTIME_MEMORY={settings.runtime_memory}{of_a_node}: if many do, the job is "
        "killed"
    )
    fix = f"raise RUNTIME_MEMORY, or lower MEMORY_PER_WORKER (to {size(there / crowd)} for no overcommit)"
    return [warning("slots", sentence, _nodes_offered(settings, room) + fix)]


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
