"""What can be configured: every key with its type, default, unit and meaning, declared once.

``KEYS`` is generated from the dataclass, and a configuration reference can be too. Parsers are pure: they take what a
``.conf`` or the environment says and return a value, or raise ``ValueError`` with the sentence that completes
"KEY=VALUE: …".
"""

# ruff: noqa: RUF009  `setting` is dataclasses.field with our metadata, and parsers are values
from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from slurm.lib.hydra_grammar import Override, read_override
from slurm.lib.ray_ports import BLOCK_SIZE

T = TypeVar("T")
Raw = str | tuple[str, ...]  # a bash array is a tuple

# --- parsers ---------------------------------------------------------------------------------------------------------


def text(raw: str) -> str:
    """Any text."""
    return raw


def word(raw: str) -> str:
    """Text without spaces, as names, partitions and lists of nodes are."""
    if re.search(r"\s", raw.strip()):
        raise ValueError("must not contain spaces (a list is separated by commas)")
    return raw.strip()


def secret(raw: str) -> str:
    """A key as it travels in an HTTP header."""
    if not re.fullmatch(r"[!-~]+", raw):
        raise ValueError("must be printable ASCII without spaces, since it travels in an HTTP header")
    return raw


def integer(raw: str) -> int:
    """A whole number."""
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", raw.strip()):
        raise ValueError("must be a whole number")
    return int(raw)


def positive_int(raw: str) -> int:
    """A whole number, at least 1."""
    number = integer(raw)
    if number < 1:
        raise ValueError("must be at least 1")
    return number


def non_negative_int(raw: str) -> int:
    """A whole number, at least 0."""
    number = integer(raw)
    if number < 0:
        raise ValueError("must be at least 0")
    return number


def lead_seconds(raw: str) -> int:
    """Seconds before a time limit, as many as sbatch's ``--signal`` takes."""
    number = integer(raw)
    if not 1 <= number <= 65535:
        raise ValueError("must be 1 to 65535, as sbatch's --signal takes it")
    return number


def patience_seconds(raw: str) -> int:
    """Seconds of silence, more than a slow file system or a busy node explains."""
    number = integer(raw)
    if number < 60:
        raise ValueError("must be at least 60")
    return number


def frequency(raw: str) -> int:
    """Every so many steps; -1 is never."""
    number = integer(raw)
    if number != -1 and number < 1:
        raise ValueError("must be at least 1 (every so many steps), or -1 (never)")
    return number


def positive_number(raw: str) -> float:
    """A number above 0, perhaps a fraction."""
    if not re.fullmatch(r"\+?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", raw.strip()):
        raise ValueError("must be a number")
    number = float(raw)
    if not 0 < number < math.inf:
        raise ValueError("must be above 0")
    return number


def fraction(raw: str) -> float:
    """A number between 0 and 1, both excluded."""
    number = positive_number(raw)
    if number >= 1:
        raise ValueError("must be below 1")
    return number


def boolean(raw: str) -> bool:
    """true or false; yes/no, on/off and 1/0 are understood too."""
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if raw.strip().lower() not in words:
        raise ValueError("must be true or false (1 and 0, yes and no, on and off do as well)")
    return words[raw.strip().lower()]


def switch(raw: str) -> bool:
    """The same, for keys that programs read as 1 and 0."""
    return boolean(raw)


def slurm_time(raw: str) -> str:
    """One of Slurm's six time formats, or UNLIMITED."""
    slurm_seconds(raw)
    return raw.strip()


_TIME = re.compile(
    r"(?P<minutes>\d+)(:(?P<seconds>\d+))?"
    r"|(?P<h>\d+):(?P<m>\d+):(?P<s>\d+)"
    r"|(?P<days>\d+)-(?P<dh>\d+)(:(?P<dm>\d+)(:(?P<ds>\d+))?)?",
    re.ASCII,
)


def slurm_seconds(raw: str) -> float:
    """A Slurm time limit in seconds; infinity for UNLIMITED and INFINITE, and for 0, which asks for no limit."""
    if raw.strip().upper() in {"UNLIMITED", "INFINITE"}:
        return math.inf
    match = _TIME.fullmatch(raw.strip())
    if not match:
        raise ValueError(
            "must be a Slurm time: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or "
            "days-hours:minutes:seconds, like 12:00:00"
        )
    part = {name: int(digits) for name, digits in match.groupdict("0").items()}
    minutes = part["days"] * 1440 + (part["h"] + part["dh"]) * 60 + part["m"] + part["dm"] + part["minutes"]
    return minutes * 60 + part["seconds"] + part["s"] + part["ds"] or math.inf


_MEMORY = re.compile(r"(?P<number>[0-9]{1,15})(?P<unit>[KMGTP]?)B?", re.I)


def memory(raw: str) -> str:
    """An amount of memory: a whole number with K, M, G, T or P; without a unit it is megabytes, as for Slurm."""
    match = _MEMORY.fullmatch(raw.strip())
    if not match:
        raise ValueError("must be an amount of memory: a whole number with K, M, G or T, like 64G")
    if not int(match["number"]):
        raise ValueError("must be above 0")
    return match["number"] + (match["unit"].upper() or "M")


def optional_memory(raw: str) -> str:
    """An amount of memory, or empty for no limit."""
    return memory(raw) if raw.strip() else ""


def node_memory(raw: str) -> str:
    """The same, and 0 for all memory of the node."""
    return "0" if re.fullmatch(r"0+[KMGTP]?B?", raw.strip(), re.I) else memory(raw)


def memory_bytes(amount: str) -> int:
    """Bytes of an amount as ``memory`` returns it, with K = 1024, as Slurm and Podman count."""
    match = _MEMORY.fullmatch(amount)
    if not match:
        raise ValueError(f"{amount} is not an amount of memory")
    powers = {"K": 1, "M": 2, "": 2, "G": 3, "T": 4, "P": 5}
    factor: int = 1024 ** powers[match["unit"].upper()]
    return int(match["number"]) * factor


def port(raw: str) -> int:
    """A TCP port."""
    number = integer(raw)
    if not 1 <= number <= 65535:
        raise ValueError("must be a port, 1 to 65535")
    return number


def port_range(raw: str) -> range:
    """A-B, both ends included."""
    first, dash, last = raw.partition("-")
    if not dash:
        raise ValueError("must be two ports with a dash between, like 20000-20999")
    ports = range(port(first), port(last) + 1)
    if not ports:
        raise ValueError("must begin with the lower port")
    return ports


def path(raw: str) -> Path:
    """A path; ``~`` and relative ones are made absolute later, when home and current folder are known."""
    if "\n" in raw:
        raise ValueError("must be one path, not several lines")
    return Path(raw)


def url(raw: str) -> str:
    """An http or https address, without a slash at its end."""
    if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", raw.strip()) or not _names_a_server(raw.strip()):
        raise ValueError("must be an address like http://host:8000")
    return raw.strip().rstrip("/")


def _names_a_server(address: str) -> bool:
    from urllib.parse import urlsplit  # 5 ms, spent only where there is an address

    try:
        parts = urlsplit(address)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not match, a port above 65535
        return False


# Fewer characters than mail allows: one that begins with - or |, or holds a /, is no address to mail programs.
_MAIL = re.compile(r"\w[\w.+%=-]*@[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?", re.ASCII)


def recipients(raw: Raw) -> tuple[str, ...]:
    """A bash array, or mail addresses and webhooks (http or https) separated by spaces or commas.

    A complaint counts the entries and does not repeat them: a webhook's address is a secret.
    """
    found = tuple(filter(None, re.split(r"[\s,]+", raw.strip()))) if isinstance(raw, str) else raw
    bad = [str(number) for number, entry in enumerate(found, 1) if not (_MAIL.fullmatch(entry) or _is_webhook(entry))]
    if bad:
        which = f"entry {bad[0]} is" if len(bad) == 1 else f"entries {', '.join(bad)} are"
        raise ValueError(
            f"{which} neither a mail address nor a webhook, like me@lab.example or https://HOST/PATH (a comma within "
            "one is %2C)"
        )
    return tuple(dict.fromkeys(found))


def _is_webhook(entry: str) -> bool:
    return re.fullmatch(r"https?://[!-+\--~]+", entry) is not None and _names_a_server(entry)


def gres_type(raw: str) -> str:
    """The type of a Slurm GRES, as in gpu:TYPE:2."""
    if not re.fullmatch(r"[\w.-]+", raw.strip(), re.ASCII):
        raise ValueError("must be one GPU type as `sinfo -o %G` shows it between the colons, like a100")
    return raw.strip()


def experiment(raw: str) -> str:
    """A name that can be a folder's."""
    if "/" in raw or raw in {".", ".."} or not raw.isprintable():
        raise ValueError("must be usable as a folder's name: printable, and without a slash")
    return raw


def backend(raw: str) -> str:
    """slurm or local."""
    return _one_of(raw, "slurm", "local")


def start_word(raw: str) -> str:
    """fork or exec."""
    return _one_of(raw, "fork", "exec")


def network_word(raw: str) -> str:
    """private or deny."""
    return _one_of(raw, "private", "deny")


def pinning_word(raw: str) -> str:
    """docker_cpuset, taskset or none."""
    return _one_of(raw, "docker_cpuset", "taskset", "none")


_MIRROR = re.compile(r"[\w.-]+(:\d{1,5})?(/[\w./-]+)?=(https?://)?[\w.-]+(:\d{1,5})?(/[\w./-]+)?", re.ASCII)


def mirrors(raw: Raw) -> tuple[str, ...]:
    """A bash array, or entries separated by commas or spaces: REGISTRY=MIRROR, http:// before one without TLS."""
    result = tuple(filter(None, re.split(r"[\s,]+", raw.strip()))) if isinstance(raw, str) else raw
    if not all(_MIRROR.fullmatch(entry) for entry in result):
        raise ValueError("must be REGISTRY=MIRROR, like docker.io=mirror.example:5000/cache, separated by commas")
    return result


def ray_word(raw: str) -> str:
    """auto, on or off."""
    return _one_of(raw, "auto", "on", "off")


def runtime_mode_word(raw: str) -> str:
    """How Slurm hands out the runtime's nodes."""
    if raw.strip() not in {"array", "allocation"}:
        raise ValueError("must be array or allocation")
    return raw.strip()


def pairing_word(raw: str) -> str:
    """jobs or het."""
    return _one_of(raw, "jobs", "het")


def ray_ports(raw: str) -> range:
    """A-B, both ends included, with room for one block of ports."""
    ports = port_range(raw)
    if len(ports) < BLOCK_SIZE:
        raise ValueError(f"must hold at least {BLOCK_SIZE} ports, which is what one run takes on a node")
    return ports


def _one_of(raw: str, *allowed: str) -> str:
    if raw not in allowed:
        raise ValueError(f"must be {', '.join(allowed[:-1])} or {allowed[-1]}")
    return raw


def words(raw: Raw) -> tuple[str, ...]:
    """A bash array as it is, or a string split as a shell splits it."""
    if not isinstance(raw, str):
        return raw
    try:
        return tuple(shlex.split(raw))
    except ValueError as problem:
        raise ValueError(f"cannot be split like a command line: {str(problem).lower()}") from None


def sbatch_words(raw: Raw) -> tuple[str, ...]:
    """Options of sbatch; without one that holds the job, as the launcher does until it releases it."""
    found = words(raw)
    held = next((word for word in found if word in {"-H", "--ho", "--hol", "--hold"}), None)
    if held:
        raise ValueError(f"cannot have {held}: the launcher releases its jobs; use --begin=…, or scontrol hold later")
    return found


_OVERRIDE = re.compile(r"(\+{0,2}[^\s=+~'\"][^\s=]*=.*)|(~[^\s=]+(=.*)?)", re.S)
_QUOTED = re.compile(r"'(\\.|[^'\\])*'|\"(\\.|[^\"\\])*\"")


def hydra_overrides(raw: Raw) -> tuple[str, ...]:
    """A bash array as it is; several lines, one override in each; or one line, split as a shell splits it.

    In several lines Hydra's own quotes stay, a line that itself begins with a quote is read as a shell reads it, and
    empty lines and those that begin with # are left out.
    """
    found = raw if not isinstance(raw, str) else _override_lines(raw) if "\n" in raw.strip() else words(raw)
    for override in found:
        if "\n" in override:
            raise ValueError("an override must be one line")
        if not _OVERRIDE.fullmatch(override):
            raise ValueError(f"{override} is no override, NAME=VALUE, +NAME=VALUE or ~NAME; quote values with spaces")
    for override in found:
        _refuse_sweep(override)
    return found


_BRACKETS = re.compile(r"\[[^][(){}]*\]|\([^][(){}]*\)|\{[^][(){}]*\}")


def _refuse_sweep(override: str) -> None:
    """A comma outside of quotes and brackets means several runs to Hydra, which ends the one that is wanted."""
    bare = re.sub(r"\\.", "", _QUOTED.sub("", override.partition("=")[2]))
    while (outside := _BRACKETS.sub("", bare)) != bare:
        bare = outside
    if re.search(r",\s*[+~]*[A-Za-z_][\w./@-]*=", bare):
        raise ValueError(f"{override} holds several overrides joined by a comma; put a space between them instead")
    if "," in bare:
        what = "has a comma outside of quotes and brackets, which Hydra takes for several runs"
        raise ValueError(f"{override} {what}; write [1,2] for a list, and quotes within the value around text")


def _override_lines(raw: str) -> tuple[str, ...]:
    lines = [line for line in map(str.strip, raw.split("\n")) if line and not line.startswith("#")]
    found = [word for line in lines for word in (words(line) if line[0] in "'\"" else (line,))]
    for line in found:
        if re.search(r"\s[+~]*[A-Za-z_][\w./@-]*=", _QUOTED.sub("", line)):
            raise ValueError(f"{line} holds several overrides; write one in each line")
    return tuple(found)


def names(raw: Raw) -> tuple[str, ...]:
    """A bash array, or names separated by commas or spaces, with or without Hydra's brackets and quotes."""
    given = re.split(r"[\s,]+", raw.strip().strip("[]")) if isinstance(raw, str) else raw
    result = tuple(name.strip("\"'") for name in given)
    if not result or not all(re.fullmatch(r"[\w.-]+", name, re.ASCII) for name in result):
        raise ValueError("must be names separated by commas, like console,wandb")
    return result


# --- the declaration of a key ----------------------------------------------------------------------------------------

_ARRAYS: tuple[Callable[[Any], object], ...] = (words, sbatch_words, hydra_overrides, names, mirrors, recipients)
_INFO = "key"


@dataclass(frozen=True)
class Key:
    """One key of the configuration.

    ``attribute`` is its name in ``Settings``; ``default_text`` says what the default is where it depends on something.
    """

    name: str
    attribute: str
    parse: Callable[[Any], object]
    default: object
    doc: str
    unit: str
    default_text: str

    @property
    def is_array(self) -> bool:
        """Whether a bash array is allowed."""
        return self.parse in _ARRAYS


def setting(
    name: str,
    parse: Callable[[Any], T],
    default: T,
    doc: str,
    *,
    unit: str = "",
    default_text: str = "",
    show: bool = True,
) -> T:
    """Declare a field of ``Settings``; ``show=False`` keeps it out of ``repr``."""
    metadata = {_INFO: (name, parse, doc, unit, default_text)}
    return field(default=default, repr=show, metadata=metadata)


def optional(parse: Callable[[Any], T]) -> Callable[[Any], T | None]:
    """The same parser, for a field that is None where the key is unset."""
    return parse


@dataclass(frozen=True)
class Settings:
    """Everything a run can be told, checked and typed. Unset text is empty, other unset values are None.

    An empty value (``KEY=""``) means the default, as bash's ``${KEY:-default}`` does, for every key; an empty array
    is no element.
    """

    # Where the jobs run
    skyrl_backend: str = setting(
        "SKYRL_BACKEND", backend, "slurm", "Where the jobs run: slurm, or local for processes of this machine."
    )
    gpu_partition: str = setting("GPU_PARTITION", word, "gpu_test", "Slurm partition of the training job.")
    cpu_partition: str = setting("CPU_PARTITION", word, "test", "Slurm partition of the runtime job.")
    account: str = setting("ACCOUNT", word, "", "Slurm account that is charged.", default_text="the site's")
    qos: str = setting("QOS", word, "", "Slurm quality of service.", default_text="the site's")
    constraint: str = setting("CONSTRAINT", word, "", "Features that the nodes of both jobs must have.")
    reservation: str = setting("RESERVATION", word, "", "Slurm reservation that both jobs run in.")
    exclude_nodes: str = setting("EXCLUDE_NODES", word, "", "Nodes that neither job may use, as a Slurm host list.")
    cpu_sbatch_args: tuple[str, ...] = setting(
        "CPU_SBATCH_ARGS", sbatch_words, (), "Further sbatch options of the runtime job: a bash array, or one string."
    )
    gpu_sbatch_args: tuple[str, ...] = setting(
        "GPU_SBATCH_ARGS", sbatch_words, (), "Further sbatch options of the training job: a bash array, or one string."
    )
    time_limit: str = setting(
        "TIME_LIMIT", slurm_time, "12:00:00", "Time limit of both jobs, in one of Slurm's formats.", unit="Slurm time"
    )
    pairing: str = setting(
        "PAIRING",
        pairing_word,
        "jobs",
        "How both jobs are queued: jobs (the training after the runtime's start), or het, one heterogeneous job whose "
        "parts start together; see [pairing.md](pairing.md).",
    )
    restarts: int = setting(
        "RESTARTS",
        non_negative_int,
        0,
        "How often a training that is interrupted (time limit, preemption, node failure) goes on in new jobs; see "
        "[restarts.md](restarts.md).",
    )
    restart_lead: int = setting(
        "RESTART_LEAD",
        lead_seconds,
        900,
        "With RESTARTS: how long before the time limit the training is to save. Slurm may say so a minute early.",
        unit="s",
    )
    min_run_time: int = setting(
        "MIN_RUN_TIME",
        non_negative_int,
        0,
        "Time that either job must have left for a training to begin; 0 is no such condition.",
        unit="s",
    )
    runtime_idle_limit: int = setting(
        "RUNTIME_IDLE_LIMIT",
        non_negative_int,
        0,
        "How long the runtime job keeps its node while the training job waits for GPUs; then both are queued again, "
        "see [restarts.md](restarts.md#waiting-for-gpus). 0 is until the time limit.",
        unit="s",
    )

    # The training job
    gpu_nodes: int = setting("GPU_NODES", positive_int, 1, "Nodes of the training job.")
    gpus_per_node: int = setting(
        "GPUS_PER_NODE", non_negative_int, 4, "GPUs on each node; 0 only with a TRAINING_COMMAND that needs none."
    )
    gpu_type: str = setting("GPU_TYPE", gres_type, "", "GPU type to ask for, as in --gres=gpu:TYPE:N.")
    training_cpus: int = setting("TRAINING_CPUS", positive_int, 48, "CPUs of the training job on each node.")
    training_memory: str = setting(
        "TRAINING_MEMORY",
        node_memory,
        "500G",
        "Memory of the training job on each node; 0 is all of it.",
        unit="K, M, G, T",
    )
    training_command: str = setting(
        "TRAINING_COMMAND", text, "", "Run by `bash -c` in the training job in place of VERL.", default_text="VERL"
    )
    training_command_is_verl: bool = setting(
        "TRAINING_COMMAND_IS_VERL",
        boolean,
        False,
        "Whether that command runs VERL: how VERL saves is known, see [restarts.md](restarts.md).",
    )

    # Ray on the nodes of the training job
    ray_cluster: str = setting(
        "RAY_CLUSTER",
        ray_word,
        "auto",
        "Whether Ray is started on all nodes of the training job before the trainer; auto: for VERL on several nodes.",
    )
    ray_python: tuple[str, ...] = setting(
        "RAY_PYTHON",
        words,
        (),
        "Command that starts the Python which has Ray, on every node in the trainer's folder.",
        default_text="VERL: `uv run --frozen --extra verl python`; TRAINING_COMMAND: `python3`",
    )
    ray_port_range: range | None = setting(
        "RAY_PORT_RANGE",
        optional(ray_ports),
        None,
        "Ports that Ray may use on each node: A-B; one run takes 500 of them.",
        default_text="20000-32499",
    )
    ray_ready_timeout: int = setting(
        "RAY_READY_TIMEOUT", positive_int, 300, "How long the training job waits for Ray on all of its nodes.", unit="s"
    )

    # The runtime job and its sandboxes
    cpus_for_runtime: int = setting("CPUS_FOR_RUNTIME", positive_int, 64, "CPUs of the runtime job.")
    runtime_memory: str = setting(
        "RUNTIME_MEMORY", node_memory, "256G", "Memory of the runtime job; 0 is all of the node's.", unit="K, M, G, T"
    )
    cpus_per_worker: float = setting(
        "CPUS_PER_WORKER",
        positive_number,
        8.0,
        "CPUs of one sandbox; may be a fraction. Where a step of VERL starts more than fit, they share the CPUs.",
    )
    memory_per_worker: str = setting("MEMORY_PER_WORKER", memory, "16G", "Memory of one sandbox.", unit="K, M, G, T")
    runtime_nodes: int = setting(
        "RUNTIME_NODES",
        positive_int,
        1,
        "Nodes that sandboxes run on; with more than one see [many-nodes.md](many-nodes.md).",
    )
    runtime_mode: str = setting(
        "RUNTIME_MODE",
        runtime_mode_word,
        "array",
        "With RUNTIME_NODES: array, each further node a job of its own that joins when Slurm starts it; or allocation, "
        "one job of all nodes.",
    )
    runtime_min_slots: int | None = setting(
        "RUNTIME_MIN_SLOTS",
        optional(positive_int),
        None,
        "With RUNTIME_NODES: sandboxes that the nodes which have joined must have room for before the training begins.",
        default_text="as many as a step of VERL starts",
    )
    runtime_drain_lead: int = setting(
        "RUNTIME_DRAIN_LEAD",
        non_negative_int,
        1800,
        "With RUNTIME_NODES: how long before its own time limit a node takes no new sandboxes: longer than a "
        "trajectory takes.",
        unit="s",
    )
    max_parallel_agents: int | None = setting(
        "MAX_PARALLEL_AGENTS",
        optional(positive_int),
        None,
        "Sandboxes that may exist at once. A number that only says over again what the CPUs allow, as 4 beside 32 CPUs "
        "with 8 for each, bounds nothing.",
        default_text="as many as the CPUs allow, and as a step of VERL starts",
    )
    warm_sandboxes: int = setting(
        "WARM_SANDBOXES",
        non_negative_int,
        0,
        "Containers that wait, initialised, for sandboxes like the last ones, no more than idle slots: such a sandbox "
        "starts in a third of the time ([more](api-server.md#warm-containers)).",
    )
    container_image: str = setting(
        "CONTAINER_IMAGE", word, "ghcr.io/openhands/agent-server", "Image of a sandbox whose request names none."
    )
    image_archive: Path | None = setting(
        "IMAGE_ARCHIVE", optional(path), None, "Archive of that image on shared storage, loaded in place of a pull."
    )
    image_archives: Path | None = setting(
        "IMAGE_ARCHIVES",
        optional(path),
        None,
        "Folder of image archives, as the prebuild job writes them, looked into before a registry is asked.",
        default_text="`SKYRL_JOBS_BASE/.cache/images`, where that exists",
    )
    registry_auth_file: Path | None = setting(
        "REGISTRY_AUTH_FILE",
        optional(path),
        None,
        "Logins for registries, on shared storage and readable by you alone: `podman login --authfile FILE REGISTRY`.",
        default_text="those that Podman finds by itself",
    )
    registry_mirrors: tuple[str, ...] = setting(
        "REGISTRY_MIRRORS",
        mirrors,
        (),
        "Where images come from in place of their registry: `docker.io=mirror.example:5000/cache`, with `http://` "
        "before a mirror without TLS. `REGISTRY=http://REGISTRY` allows plain HTTP to a registry itself.",
    )
    local_scratch: Path | None = setting(
        "LOCAL_SCRATCH",
        optional(path),
        None,
        "Folder on the node's own disk for Podman's storage and for Ray.",
        default_text="SLURM_TMPDIR, TMPDIR or /tmp of the node",
    )
    agent_start: str = setting(
        "AGENT_START",
        start_word,
        "fork",
        "How an agent server starts in a sandbox: forked from one that is imported already, or as a plain program.",
    )
    agent_dir: Path | None = setting(
        "AGENT_DIR",
        optional(path),
        None,
        "Agent tree that is mounted into sandboxes whose image has no agent server.",
        default_text="the newest that `python -m slurm_runtime.agent build` made",
    )
    agent_image: str = setting(
        "AGENT_IMAGE", text, "", "Image to take that agent tree out of, once on each node.", default_text="none"
    )
    network: str = setting(
        "NETWORK",
        network_word,
        "private",
        "Network of a sandbox: its own with a way out, or without one (its published port still answers).",
    )
    disk_per_worker: str = setting(
        "DISK_PER_WORKER",
        optional_memory,
        "",
        "Disk that one sandbox may fill.",
        unit="K, M, G, T",
        default_text="no limit",
    )
    cpu_pinning_method: str = setting(
        "CPU_PINNING_METHOD",
        pinning_word,
        "docker_cpuset",
        "How a sandbox is kept on CPUs of its own; where Podman has no cpusets, docker_cpuset does what taskset does.",
    )
    runtime_port: int | None = setting(
        "RUNTIME_PORT", optional(port), None, "Preferred port of the API server.", default_text="any free port"
    )
    runtime_port_range: range | None = setting(
        "RUNTIME_PORT_RANGE", optional(port_range), None, "Ports the API server may use: A-B.", default_text="any"
    )
    sandbox_port_range: range | None = setting(
        "SANDBOX_PORT_RANGE", optional(port_range), None, "Ports the sandboxes may use: A-B.", default_text="any"
    )
    allhands_api_key: str = setting(
        "ALLHANDS_API_KEY", secret, "", "Key of the API server.", default_text="made anew for each run", show=False
    )
    sandbox_remote_runtime_api_url: str = setting(
        "SANDBOX_REMOTE_RUNTIME_API_URL", url, "", "Address of a runtime that runs already, for --skip-runtime."
    )

    # The prebuild job
    dataset_path: Path | None = setting(
        "DATASET_PATH", optional(path), None, "Data set (parquet) whose images the prebuild job fetches."
    )
    image_prefix: str = setting(
        "IMAGE_PREFIX",
        word,
        "",
        "Registry and folder of the data set's sweb.eval images.",
        default_text="`docker.io/xingyaoww/`",
    )
    max_workers: int | None = setting(
        "MAX_WORKERS", optional(positive_int), None, "Images that it fetches at the same time.", default_text="`2`"
    )
    force_rebuild: bool | None = setting(
        "FORCE_REBUILD",
        optional(boolean),
        None,
        "Whether it fetches images anew that are archived already.",
        default_text="`false`",
    )

    # Waiting
    runtime_ready_timeout: int = setting(
        "RUNTIME_READY_TIMEOUT", positive_int, 600, "How long the training job waits for the API server.", unit="s"
    )
    training_complete_timeout: int = setting(
        "TRAINING_COMPLETE_TIMEOUT",
        positive_int,
        43200,
        "How long the runtime job waits for the training, from its own readiness on.",
        unit="s",
        default_text="TIME_LIMIT in seconds, at least 43200; 366 days for UNLIMITED",
    )

    partner_patience: int = setting(
        "PARTNER_PATIENCE",
        patience_seconds,
        600,
        "How long one job of a run waits for a sign of life of the other, whatever Slurm says of it.",
        unit="s",
    )

    notify: tuple[str, ...] = setting(
        "NOTIFY",
        recipients,
        (),
        "Who is told when a run ends or needs you: mail addresses and webhooks (`https://…`), with spaces or commas "
        "between; see [notify.md](notify.md).",
        default_text="nobody",
        show=False,
    )

    usage_samples: bool = setting(
        "USAGE_SAMPLES",
        switch,
        True,
        "Whether both jobs note every half minute what they use of CPUs, memory and GPUs (nvidia-smi).",
    )

    # Data and results
    data_dir: Path | None = setting("DATA_DIR", optional(path), None, "Folder of the data set.")
    train_data: Path | None = setting(
        "TRAIN_DATA", optional(path), None, "Training rows.", default_text="${DATA_DIR}/train.parquet"
    )
    val_data: Path | None = setting(
        "VAL_DATA", optional(path), None, "Validation rows.", default_text="${DATA_DIR}/validation.parquet"
    )
    checkpoint_dir: Path | None = setting(
        "CHECKPOINT_DIR",
        optional(path),
        None,
        "Folder of checkpoints, on shared storage.",
        default_text="below the run's",
    )
    rollout_dir: Path | None = setting(
        "ROLLOUT_DIR", optional(path), None, "Folder of recorded rollouts.", default_text="below the run's"
    )
    wandb_project: str = setting("WANDB_PROJECT", text, "skyrl-training", "Project that metrics are logged to.")
    wandb_experiment: str = setting(
        "WANDB_EXPERIMENT",
        experiment,
        "skyrl",
        "Name of the run there, and of its checkpoint folder; set it to resume on another day.",
        default_text="skyrl-YYYYMMDD-HHMMSS; with RESTARTS it is skyrl",
    )

    # What VERL trains
    model: str = setting(
        "MODEL",
        text,
        "Qwen/Qwen3-8B",
        "Hugging Face id of the model, or its folder: a path that begins with `/`, `./`, `../` or `~`.",
    )
    tp_size: int = setting("TP_SIZE", positive_int, 2, "GPUs that one copy of the model is spread over for rollouts.")
    sp_size: int = setting("SP_SIZE", positive_int, 2, "GPUs that one sequence is spread over in updates.")
    train_batch_size: int = setting("TRAIN_BATCH_SIZE", positive_int, 64, "Prompts in one step.")
    rollout_n: int = setting("ROLLOUT_N", positive_int, 8, "Rollouts of each prompt.")
    max_prompt_length: int = setting("MAX_PROMPT_LENGTH", positive_int, 8000, "Longest prompt.", unit="tokens")
    max_response_length: int = setting(
        "MAX_RESPONSE_LENGTH", positive_int, 32768, "Longest response, all turns together.", unit="tokens"
    )
    max_model_len: int = setting(
        "MAX_MODEL_LEN",
        positive_int,
        40768,
        "Longest sequence the inference engine accepts; the bash suite's 32768 cut prompts and responses of its own "
        "default lengths, so that the default is their sum.",
        unit="tokens",
        default_text="MAX_PROMPT_LENGTH + MAX_RESPONSE_LENGTH",
    )
    total_epochs: int = setting("TOTAL_EPOCHS", positive_int, 15, "Passes over the training rows.")
    learning_rate: float = setting("LEARNING_RATE", positive_number, 1e-6, "Learning rate of the policy.")
    adv_estimator: str = setting("ADV_ESTIMATOR", word, "loop", "Advantage estimator of VERL.")
    gpu_memory_utilization: float = setting(
        "GPU_MEMORY_UTILIZATION", fraction, 0.8, "Share of each GPU's memory that the inference engine takes."
    )
    enforce_eager: bool = setting(
        "ENFORCE_EAGER", boolean, True, "Whether the inference engine does without CUDA graphs."
    )
    enable_gradient_checkpointing: bool = setting(
        "ENABLE_GRADIENT_CHECKPOINTING", boolean, True, "Whether activations are recomputed to save GPU memory."
    )
    fsdp_param_offload: bool = setting(
        "FSDP_PARAM_OFFLOAD", boolean, True, "Whether parameters rest in host memory between uses."
    )
    fsdp_optimizer_offload: bool = setting(
        "FSDP_OPTIMIZER_OFFLOAD", boolean, True, "Whether the optimizer's state rests in host memory between uses."
    )
    save_freq: int = setting("SAVE_FREQ", frequency, 1, "A checkpoint every so many steps; -1 is never.", unit="steps")
    test_freq: int = setting("TEST_FREQ", frequency, 20, "A validation every so many steps; -1 is never.", unit="steps")
    val_batch_size: int | None = setting(
        "VAL_BATCH_SIZE",
        optional(positive_int),
        None,
        "Rows of VAL_DATA that are validated at once; each has a sandbox from the beginning to the end.",
        default_text="the runtime's slots",
    )
    max_ckpt_to_keep: int = setting("MAX_CKPT_TO_KEEP", positive_int, 10, "Checkpoints that are kept.")
    task_yaml: str = setting(
        "TASK_YAML",
        text,
        "./examples/run_verl/verl_oh.yaml",
        "SkyRL-agent's task file, relative to skyrl-agent; `auto` makes one from the default that fits the other keys, "
        "in the run directory.",
    )
    loggers: tuple[str, ...] = setting(
        "LOGGERS", names, ("console", "wandb"), "Where metrics go: a bash array, or names with commas between."
    )
    verl_overrides: tuple[str, ...] = setting(
        "VERL_OVERRIDES",
        hydra_overrides,
        (),
        "Further Hydra overrides, which win: a bash array, lines with one override each, or one line that is split as "
        "a shell splits it.",
    )
    vllm_use_v1: bool = setting("VLLM_USE_V1", switch, True, "Whether vLLM uses its V1 engine.")

    # Network
    fi_provider: str = setting(
        "FI_PROVIDER",
        word,
        "efa",
        "Provider of libfabric; tcp where there is no EFA. efa counts only with SKYRL_LD_LIBRARY_PATH_EXPORT=1.",
    )
    skyrl_ld_library_path_export: bool = setting(
        "SKYRL_LD_LIBRARY_PATH_EXPORT", switch, False, "Whether the training job sets up EFA and its libraries."
    )
    network_interface: str = setting(
        "NETWORK_INTERFACE",
        word,
        "",
        "Network interface between GPU nodes, such as `ib0`, for NCCL, gloo and Ray.",
        default_text="each one's own choice",
    )

    # The GPU node
    cuda_modules: tuple[str, ...] = setting(
        "CUDA_MODULES",
        words,
        (),
        "Environment modules that the training job loads: a bash array, or names with spaces between.",
        default_text="`cuda`, only where no libcuda is found",
    )
    cache_dir: Path | None = setting(
        "CACHE_DIR",
        optional(path),
        None,
        "Folder on shared storage for the caches of Hugging Face and uv.",
        default_text="`SKYRL_JOBS_BASE/.cache`, unless that is in your home",
    )

    # The suite itself
    skyrl_jobs_base: Path = setting(
        "SKYRL_JOBS_BASE", path, Path("~/.skyrl_jobs"), "Where the runs' directories are made, on shared storage."
    )
    skyrl_project_root: Path = setting(
        "SKYRL_PROJECT_ROOT", path, Path(".."), "Folder that holds SkyRL.", default_text="the parent of the checkout"
    )
    snapshot: bool = setting(
        "SNAPSHOT",
        switch,
        False,
        "Whether the training uses a copy of the files of skyrl-agent that git tracks, as they are at the launch; "
        "see [reproducibility.md](reproducibility.md#snapshot1).",
    )
    skyrl_coord_dir: Path | None = setting(
        "SKYRL_COORD_DIR", optional(path), None, "Coordination directory of a run to join."
    )
    slurm_runtime_dir: Path | None = setting(
        "SLURM_RUNTIME_DIR", optional(path), None, "A slurm-remote-runtime of your own with .venv.", default_text="ours"
    )
    skyrl_debug: bool = setting("SKYRL_DEBUG", switch, False, "Whether debug lines are logged.")

    @property
    def webhooks(self) -> tuple[str, ...]:
        """The addresses in NOTIFY that a message is posted to."""
        return tuple(entry for entry in self.notify if "://" in entry)

    @property
    def mail_addresses(self) -> tuple[str, ...]:
        """The addresses in NOTIFY that get a mail."""
        return tuple(entry for entry in self.notify if "://" not in entry)

    @property
    def saves_like_verl(self) -> bool:
        """Whether the trainer saves as VERL does: by its environment and not by a signal, with a tracker file."""
        return not self.training_command or self.training_command_is_verl

    def as_environment(self) -> dict[str, str]:
        """Key → value as a ``.conf`` or a shell would say it, without unset ones; secrets included.

        Loading it again gives equal settings.
        """
        shown = {name: said(key, getattr(self, key.attribute)) for name, key in KEYS.items()}
        return {name: value for name, value in shown.items() if value}


def _key(declared: Field[Any]) -> Key:
    name, parse, doc, unit, default_text = declared.metadata[_INFO]
    return Key(name, declared.name, parse, declared.default, doc, unit, default_text)


KEYS: Mapping[str, Key] = MappingProxyType({key.name: key for key in map(_key, fields(Settings))})


def said(key: Key, value: object) -> str:
    """A value as text that the key's parser reads back; empty for an unset one."""
    if value is None:
        return ""
    if isinstance(value, bool):
        on, off = ("1", "0") if key.parse is switch else ("true", "false")
        return on if value else off
    if isinstance(value, float):
        return repr(int(value) if value.is_integer() else value)
    if isinstance(value, range):
        return f"{value.start}-{value.stop - 1}"
    if isinstance(value, tuple):
        return "\n".join(value) if key.parse in {names, recipients} else shlex.join(value)
    return str(value)


# --- defaults that depend, and checks across keys --------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where and when a configuration is read: what ``~``, relative paths and dated defaults mean."""

    now: datetime
    home: Path
    cwd: Path
    project_root: Path


def complete(settings: Settings, given: Iterable[str], place: Place) -> Settings:
    """Fill in the defaults that depend on other keys, for keys that are not ``given``, and make paths absolute."""
    dependent: dict[str, object] = {
        "MAX_MODEL_LEN": settings.max_prompt_length + settings.max_response_length,
        "WANDB_EXPERIMENT": "skyrl" if settings.restarts else f"skyrl-{place.now:%Y%m%d-%H%M%S}",
        "SKYRL_PROJECT_ROOT": place.project_root,
        "TRAINING_COMPLETE_TIMEOUT": max(43200, time_limit_s(settings)),
    }
    if not (base := absolute(settings.skyrl_jobs_base, place)).is_relative_to(place.home):
        dependent["CACHE_DIR"] = base / ".cache"
    if settings.data_dir:
        dependent["TRAIN_DATA"] = settings.data_dir / "train.parquet"
        dependent["VAL_DATA"] = settings.data_dir / "validation.parquet"
    known = set(given)
    changes = {KEYS[name].attribute: value for name, value in dependent.items() if name not in known}
    return _with_absolute_paths(replace(settings, **changes), place)  # type: ignore[arg-type]  # values typed by key


LONGEST_S = 366 * 86400  # stands for no limit, where a number of seconds is needed


def time_limit_s(settings: Settings) -> int:
    """TIME_LIMIT in whole seconds, at most 366 days."""
    return int(min(slurm_seconds(settings.time_limit), LONGEST_S))


def gpu_gres(settings: Settings) -> str:
    """What each node of the training job has of Slurm's generic resources, such as ``gpu:a100:8``; empty for none."""
    kind = f"gpu:{settings.gpu_type}" if settings.gpu_type else "gpu"
    return f"{kind}:{settings.gpus_per_node}" if settings.gpus_per_node else ""


def doubts(settings: Settings) -> list[tuple[tuple[str, ...], str, str]]:
    """What holds together and is hardly meant: the keys involved, the one to change first; a sentence; what to do."""
    local = settings.skyrl_backend == "local"
    return [*(_without_effect(settings) if local else _queued_doubts(settings)), *_sandbox_doubts(settings)]


def _sandbox_doubts(settings: Settings) -> Iterator[tuple[tuple[str, ...], str, str]]:
    if settings.warm_sandboxes and settings.agent_start == "exec":
        sentence = (
            f"WARM_SANDBOXES={settings.warm_sandboxes} saves little with AGENT_START=exec: each agent server still "
            "imports for seconds once its container runs"
        )
        yield ("WARM_SANDBOXES", "AGENT_START"), sentence, "leave AGENT_START unset"


SHORT_WAIT_S = 300  # GPUs that come free now and then do so within minutes


def _queued_doubts(settings: Settings) -> Iterator[tuple[tuple[str, ...], str, str]]:
    waits, limit = settings.training_complete_timeout, time_limit_s(settings)
    if waits < limit:
        sentence = (
            f"TRAINING_COMPLETE_TIMEOUT={waits} is less than TIME_LIMIT={settings.time_limit} ({limit} s): a training "
            "that takes longer loses its runtime"
        )
        yield ("TRAINING_COMPLETE_TIMEOUT",), sentence, "leave it unset for the whole time limit"
    if settings.pairing == "het" and settings.runtime_idle_limit:
        sentence = (
            f"RUNTIME_IDLE_LIMIT={settings.runtime_idle_limit} has no effect: with PAIRING=het no part waits for the "
            "other"
        )
        yield ("RUNTIME_IDLE_LIMIT", "PAIRING"), sentence, "leave it unset"
    elif 0 < settings.runtime_idle_limit < SHORT_WAIT_S:
        sentence = (
            f"RUNTIME_IDLE_LIMIT={settings.runtime_idle_limit}: each time that both jobs are queued again the training "
            "loses its age in the queue"
        )
        yield ("RUNTIME_IDLE_LIMIT",), sentence, f"give it {SHORT_WAIT_S} s or more, or set PAIRING=het"
    if settings.runtime_min_slots and settings.runtime_nodes == 1:
        sentence = f"RUNTIME_MIN_SLOTS={settings.runtime_min_slots} has no effect: the runtime has one node"
        yield ("RUNTIME_MIN_SLOTS", "RUNTIME_NODES"), sentence, "set RUNTIME_NODES, or leave it unset"
    if settings.training_command_is_verl and not settings.training_command:
        sentence = "TRAINING_COMMAND_IS_VERL has no effect: there is no TRAINING_COMMAND"
        yield ("TRAINING_COMMAND_IS_VERL",), sentence, "leave it unset"


def _without_effect(settings: Settings) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """What a local run does not do."""
    if settings.restarts:
        sentence = f"RESTARTS={settings.restarts} has no effect: a local run has no time limit"
        yield ("RESTARTS",), sentence, "leave it unset"
    if settings.runtime_idle_limit:
        sentence = f"RUNTIME_IDLE_LIMIT={settings.runtime_idle_limit} has no effect: a local run waits in no queue"
        yield ("RUNTIME_IDLE_LIMIT",), sentence, "leave it unset"
    if settings.pairing == "het":
        yield ("PAIRING",), "PAIRING=het has no effect: a local run queues nothing", "leave it unset"


def _with_absolute_paths(settings: Settings, place: Place) -> Settings:
    found = {key.attribute: getattr(settings, key.attribute) for key in KEYS.values()}
    paths: dict[str, object] = {n: absolute(value, place) for n, value in found.items() if isinstance(value, Path)}
    if re.match(r"/|\.\.?(/|$)|~", settings.model):
        paths["model"] = str(absolute(Path(settings.model), place))
    if settings.task_yaml.startswith("~"):  # another relative one is relative to skyrl-agent
        paths["task_yaml"] = str(absolute(Path(settings.task_yaml), place))
    return replace(settings, **paths)  # type: ignore[arg-type]  # only fields that are paths


def absolute(value: Path, place: Place) -> Path:
    """``~`` by HOME, ``~user`` by the user database, the rest relative to the caller's folder; links stay."""
    if value.parts[:1] == ("~",):
        value = place.home.joinpath(*value.parts[1:])
    elif str(value).startswith("~"):
        value = Path(os.path.expanduser(value))  # noqa: PTH111  Path.expanduser raises for an unknown user
    return Path(os.path.normpath(place.cwd / value))


def contradictions(settings: Settings) -> list[tuple[tuple[str, ...], str]]:
    """What cannot hold together: the keys involved, the one to change first, and a sentence."""
    return [
        *_gpu_contradictions(settings),
        *_runtime_contradictions(settings),
        *_nodes_contradictions(settings),
        *_time_contradictions(settings),
        *_restart_contradictions(settings),
    ]


def _time_contradictions(settings: Settings) -> Iterator[tuple[tuple[str, ...], str]]:
    limit = slurm_seconds(settings.time_limit)
    shown = f"TIME_LIMIT={settings.time_limit}"
    restarts = settings.restarts if settings.skyrl_backend == "slurm" else 0  # a local run has neither
    if restarts and settings.restart_lead >= limit:
        sentence = (
            f"RESTARTS={restarts}: the training saves RESTART_LEAD={settings.restart_lead} s before {shown} "
            f"({limit:g} s), which must be longer; raise TIME_LIMIT, or lower RESTART_LEAD"
        )
        yield ("RESTART_LEAD", "TIME_LIMIT", "RESTARTS"), sentence
    if settings.min_run_time >= limit:
        sentence = f"MIN_RUN_TIME={settings.min_run_time} must be less than {shown} ({limit:g} s): nothing would begin"
        yield ("MIN_RUN_TIME", "TIME_LIMIT"), sentence


# With one of these a new attempt would not find what the last one saved.
HIDING = ("trainer.resume_mode", "trainer.default_local_dir")
SAID_ANYWAY = Override("trainer.resume_mode", "auto")


def _restart_contradictions(settings: Settings) -> Iterator[tuple[tuple[str, ...], str]]:
    """Of VERL alone: how another TRAINING_COMMAND saves is its own affair."""
    if not settings.restarts or not settings.saves_like_verl or settings.skyrl_backend == "local":
        return
    if settings.save_freq == -1:
        sentence = f"RESTARTS={settings.restarts} with SAVE_FREQ=-1: without checkpoints there is nothing to go on from"
        yield ("SAVE_FREQ", "RESTARTS"), sentence
    for override in settings.verl_overrides:
        said = read_override(override)
        if said.name in HIDING and said != SAID_ANYWAY:
            sentence = f"VERL_OVERRIDES: {override}, but with RESTARTS the suite decides {said.name}"
            yield ("VERL_OVERRIDES", "RESTARTS"), f"{sentence}; use CHECKPOINT_DIR and WANDB_EXPERIMENT"


def _gpu_contradictions(settings: Settings) -> list[tuple[tuple[str, ...], str]]:
    if settings.ray_cluster == "on" and settings.skyrl_backend == "local":
        return [(("RAY_CLUSTER",), "RAY_CLUSTER=on: Ray is started by Slurm's job steps, which a local run has not")]
    if settings.training_command:
        return []  # VERL does not run, so nothing is spread over GPUs
    if settings.gpus_per_node == 0:
        return [(("GPUS_PER_NODE",), "GPUS_PER_NODE=0: VERL needs at least 1 (0 is for a TRAINING_COMMAND)")]
    gpus = settings.gpu_nodes * settings.gpus_per_node
    product = f"GPU_NODES × GPUS_PER_NODE = {settings.gpu_nodes} × {settings.gpus_per_node} = {gpus}"
    return [
        ((name, "GPU_NODES", "GPUS_PER_NODE"), f"{name}={size} must divide the number of GPUs, {product}")
        for name, size in (("TP_SIZE", settings.tp_size), ("SP_SIZE", settings.sp_size))
        if gpus % size
    ]


def _nodes_contradictions(settings: Settings) -> Iterator[tuple[tuple[str, ...], str]]:
    """Of a runtime on several nodes."""
    if settings.runtime_nodes == 1:
        return
    nodes = f"RUNTIME_NODES={settings.runtime_nodes}"
    if settings.skyrl_backend == "local":
        yield ("RUNTIME_NODES", "SKYRL_BACKEND"), f"{nodes}: a local run has one machine; leave it unset"
        return
    if settings.pairing == "het":
        sentence = f"{nodes} with PAIRING=het: a heterogeneous job has one node for the runtime"
        yield ("PAIRING", "RUNTIME_NODES"), f"{sentence}; leave PAIRING unset"
    if settings.slurm_runtime_dir is not None:
        sentence = f"{nodes} with SLURM_RUNTIME_DIR: another's server joins no head"
        yield ("SLURM_RUNTIME_DIR", "RUNTIME_NODES"), f"{sentence}; leave SLURM_RUNTIME_DIR unset"
    limit, lead = slurm_seconds(settings.time_limit), settings.runtime_drain_lead
    if lead >= limit:
        sentence = f"RUNTIME_DRAIN_LEAD={lead} must be less than TIME_LIMIT={settings.time_limit} ({limit:g} s)"
        yield ("RUNTIME_DRAIN_LEAD", "TIME_LIMIT"), f"{sentence}: no node would ever take a sandbox"
    ports = settings.runtime_port_range
    if ports and len(ports) == 1:
        sentence = f"RUNTIME_PORT_RANGE={ports.start}-{ports.start}: the head and its node's server take a port each"
        yield ("RUNTIME_PORT_RANGE", "RUNTIME_NODES"), sentence
    yield from _slots_contradictions(settings)


def _slots_contradictions(settings: Settings) -> Iterator[tuple[tuple[str, ...], str]]:
    from slurm.lib.sandbox_room import sandbox_room  # which reads settings

    slots = sandbox_room(settings).all_slots
    if settings.runtime_min_slots and settings.runtime_min_slots > slots:
        sentence = f"RUNTIME_MIN_SLOTS={settings.runtime_min_slots} is more than all nodes have, {slots} slots"
        yield ("RUNTIME_MIN_SLOTS", "RUNTIME_NODES"), f"{sentence}: the training would never begin"


def _runtime_contradictions(settings: Settings) -> Sequence[tuple[tuple[str, ...], str]]:
    found: list[tuple[tuple[str, ...], str]] = []
    if settings.cpus_per_worker > settings.cpus_for_runtime:
        sentence = (
            f"CPUS_PER_WORKER={settings.cpus_per_worker:g} is more than CPUS_FOR_RUNTIME={settings.cpus_for_runtime}"
        )
        found.append((("CPUS_PER_WORKER", "CPUS_FOR_RUNTIME"), sentence + ": not one sandbox would fit"))
    node, worker = settings.runtime_memory, settings.memory_per_worker
    if node != "0" and memory_bytes(worker) > memory_bytes(node):
        sentence = f"MEMORY_PER_WORKER={worker} is more than RUNTIME_MEMORY={node}: not one sandbox would fit"
        found.append((("MEMORY_PER_WORKER", "RUNTIME_MEMORY"), sentence))
    ports = settings.runtime_port_range
    if settings.runtime_port and ports and settings.runtime_port not in ports:
        sentence = f"RUNTIME_PORT={settings.runtime_port} is outside of RUNTIME_PORT_RANGE={ports.start}-{ports[-1]}"
        found.append((("RUNTIME_PORT", "RUNTIME_PORT_RANGE"), sentence))
    return found
