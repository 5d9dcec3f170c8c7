"""What the fault matrix measures: is a run released, how soon, and does everybody read why?

Each case is a row of docs/reliability.md, and what a test marked ``faults`` asserts: its bound, and the
words that stand in both logs and in the completion flag. SKYRL_FAULT_TIMES names a file for the measured times.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests import cluster
from tests.conftest import SCRATCH, NothingLeft, OrdinaryUser
from tests.runs import Run

TIMES = Path(__file__).parent / "fault_times.jsonl"  # those that docs/reliability.md states


@dataclass(frozen=True)
class Case:
    """One fault.

    :param row: its row in the matrix
    :param fault: what happens
    :param outcome: what then holds
    :param bound_s: the seconds within which it does; where time is no matter, infinity
    :param reads: words of the reason as the user reads them, on a node called cpu-a; empty where nothing is to be read
    :param shown: the same for the document, where those words alone do not read well
    :param unit: of the bound and of what is measured, where it is no time
    """

    row: int
    fault: str
    outcome: str
    bound_s: float = math.inf
    reads: str = ""
    shown: str = ""
    unit: str = "s"


ENDS = "the training job ends too"
ENDS_OTHER = "the runtime job ends too"
BOTH_END = "both jobs end"
GONE = "is gone: ended badly (CANCELLED"
SHOWN_GONE = f"{GONE})"
CANCELLED = Case(
    2,
    "`launch.py cancel` of six runs at once: one with its next attempt queued, a heterogeneous one, one whose trainer "
    "ignores SIGTERM, one whose training waits in the queue, one whose job has just started, a local one",
    "all their jobs end, in order",
    15,
    "ended by SIGTERM",
)
CANCELLED_PENDING = Case(
    2,
    "`launch.py cancel` of runs that are pending, as two jobs, as one heterogeneous job, and by a lone `sbatch`",
    "their jobs leave the queue",
    15,
    "cancelled before it began",
)
CANCELLED_HUNG = Case(
    2, "`launch.py cancel` of a run whose job bodies do nothing any more (SIGSTOP)", "its jobs are killed", 15, "killed"
)
CANCELLED_UNHEARD = Case(
    2, "`launch.py cancel` while `slurmctld` does not answer", "it says so, exit code 75", 15, "has not ended"
)
NO_PODMAN = Case(3, "the CPU node has no Podman", ENDS, 10, "cpu-a cannot run this job: not on PATH: podman")
NO_SUBUIDS = Case(3, "`/etc/subuid` of the CPU node is empty", ENDS, 10, "cpu-a cannot run this job: no range for")
FULL_DISK = Case(3, "the CPU node's local disk is full", ENDS, 10, "too little for images and sandboxes")
NO_PORT = Case(3, "all of `RUNTIME_PORT_RANGE` is in use", ENDS, 10, "no free port in RUNTIME_PORT_RANGE on cpu-a")
NO_SANDBOX_PORT = Case(3, "all of `SANDBOX_PORT_RANGE` is in use", ENDS, 10, "no free port in SANDBOX_PORT_RANGE")
DISK_FILLS = Case(
    3, "the CPU node's local disk fills while the image is loaded", ENDS, 10, "no space left on the local disk of cpu-a"
)
NO_IMAGE = Case(3, "the image is nowhere", ENDS, 10, "CONTAINER_IMAGE=localhost/nonesuch is not on cpu-a")
ALL_GOES_ON = "the same address, key and sandboxes answer; the run goes on"
RECOVERED = "the API server and the Podman service answer again, after"
CANCELLED_EARLY = Case(
    2,
    "`scancel` of the training job while the runtime job still loads its image",
    "the runtime job ends too",
    10,
    "before the trainer started",
)
SERVER_KILLED = Case(
    4, "`kill -9` of the API server, with three sandboxes, one of them paused", ALL_GOES_ON, 5, RECOVERED
)
INNER_KILLED = Case(
    5, "`kill -9` of the Podman service, the process that serves, in the middle of a start", ALL_GOES_ON, 5, RECOVERED
)
OUTER_KILLED = Case(
    5,
    "`kill -9` of the Podman service, the process that waits for it, in the middle of a start",
    ALL_GOES_ON,
    5,
    RECOVERED,
)
CUT_START = Case(
    5,
    "`kill -9` of the Podman service once a container that it starts has its first processes",
    "they end too, with their port; monitors, and what runc has noted, are those of living sandboxes alone",
    15,
)
THREE_CRASHES = Case(
    4,
    "the API server or the Podman service is killed for the third time within a minute",
    ENDS,
    10,
    "the API server or the Podman service ended 3 times within 60 s; the last time: the API server on cpu-a ended with",
)
TRAINER_FAILS = Case(1, "the trainer ends with exit code 3", BOTH_END, 10, "the trainer failed with exit code 3")
TRAINER_RAISES = Case(1, "the trainer raises an exception", BOTH_END, 10, "the trainer failed with exit code 1")
TRAINER_KILLED = Case(1, "`kill -9` of the trainer", BOTH_END, 10, "the trainer was ended by SIGKILL")
TRAINER_CRASHES = Case(1, "the trainer dies of a segmentation fault", BOTH_END, 10, "the trainer was ended by SIGSEGV")
CANCEL_TRAINING = Case(2, "`scancel` of a running training job", ENDS_OTHER, 15, "ended by SIGTERM (scancel)")
CANCEL_RUNTIME = Case(2, "`scancel` of a runtime job whose training runs", ENDS, 15, "ended by SIGTERM")
CANCEL_BOTH = Case(2, "`scancel` of both jobs, which run", BOTH_END, 15, "ended by SIGTERM")
CANCEL_STARTING_TRAINING = Case(2, "`scancel` of a training job the moment it starts", ENDS_OTHER, 15)
CANCEL_STARTING_RUNTIME = Case(2, "`scancel` of a runtime job the moment it starts", ENDS, 15)
CANCEL_STARTING_BOTH = Case(2, "`scancel` of both jobs the moment the second starts", BOTH_END, 15)
CANCEL_PENDING_TRAINING = Case(2, "`scancel` of a training job that waits for GPUs", ENDS_OTHER, 15, GONE, SHOWN_GONE)
CANCEL_PENDING_RUNTIME = Case(
    2,
    "`scancel` of a runtime job that waits for its node",
    "the training job ends after its start",
    10,
    GONE,
    SHOWN_GONE,
)
CANCEL_PENDING_BOTH = Case(2, "`scancel` of both jobs, which are pending", BOTH_END, 15)
CANCEL_TRAINING_FIRST = Case(
    2,
    "`scancel` of a training job before its runtime job starts",
    "the runtime job ends after its start",
    10,
    GONE,
    SHOWN_GONE,
)
SHOWN_LOST = "is gone: ended badly (NODE_FAIL …"
RUNTIME_NODE_OFF = Case(7, "the power of the CPU node goes off", ENDS, 20, "on cpu-a)", f"{SHOWN_LOST} on cpu-a)")
TRAINING_NODE_OFF = Case(
    7, "the power of the GPU node goes off", ENDS_OTHER, 20, "on gpu-a)", f"{SHOWN_LOST} on gpu-a)"
)
LINK_CUT = Case(7, "the CPU node's link is cut for 30 s", "the run goes on; its sandboxes answer again", 5)
PARTED = Case(
    7,
    "the two nodes do not reach each other, and Slurm says that both jobs run (`PARTNER_PATIENCE=60`)",
    "both jobs end by themselves",
    75,
    "was not heard of for 60 s; Slurm says RUNNING",
)
CONTROLLER_SILENT = Case(
    8,
    "the controller does not answer for two minutes, is down for two, or slow for two, as above",
    "a run goes on and its sandboxes answer, then and once the controller is back",
)
SIGNAL_IN_SILENCE = Case(
    8,
    "SIGTERM to a training job's body that queues its next attempt while the controller does not answer, or is down",
    "the trainer is stopped, and nothing of the run is left on its nodes; what Slurm may take later stays held",
    15,
)
NEXT_IN_SILENCE = Case(
    8,
    "the controller does not answer, is down or slow when a training job with `RESTARTS=1` queues its next attempt",
    "the trainer starts; the attempt is queued once the controller is back",
    30,
    "the next attempt is not queued yet; the trainer starts meanwhile",
)
CANCELLED_SLOWLY = Case(
    8,
    "`launch.py cancel` while the controller is slow",
    "it has ended the run's jobs, or says that they have not ended, exit code 75; said again, it ends them",
    15,
    "has not ended",
)
RUNTIMES_LIMIT = Case(11, "the runtime job's time limit comes first", ENDS, 15, "ended by SIGTERM")
TRAININGS_LIMIT = Case(11, "the training job's time limit comes first", ENDS_OTHER, 15, "SIGTERM (the time limit)")
BOTH_LIMITS = Case(11, "both jobs reach their time limit", BOTH_END, 15, "ended by SIGTERM")
CHAINED_AT_LIMIT = Case(
    11,
    "both jobs of a run with `RESTARTS=1` reach their time limit, in which the trainer saves",
    "both jobs end within 15 s; the trainer of the next pair goes on",
    30,
    "it goes on in the jobs",
)
CHAINED_BEFORE_LIMIT = Case(
    11,
    "the trainer of a run with `RESTARTS=1` saves when it is told that the time limit comes",
    "both jobs end within 15 s, before the limit; the trainer of the next pair goes on",
    30,
    "it goes on in the jobs",
)
DEAD_JOB = Case(
    19,
    "`kill -9` of a runtime job's body, guardian, API server and Podman service at once; its sandboxes live on",
    "the next job on that node removes them; a living job's sandbox goes on answering",
    20,
    "removing Podman storage that a dead job left",
)
KILLED_AT_A_CALL = Case(
    12,
    "`kill -9` of `launch.py` before and after each call of `sbatch` and `scontrol release`",
    "nothing that can start is left, or the whole run; the next launch removes the rest",
)
KILLED_ANY_TIME = Case(
    12,
    "`kill -9` of `launch.py` at 20 moments, from its first lines to its last",
    "nothing that can start is left, or the whole run; the next launch removes the rest",
)
KILLED_AT_A_CALL_HET = Case(
    12,
    "`kill -9` of `launch.py` before and after each of these calls with `PAIRING=het`, where one is for both parts",
    "nothing that can start is left, or the whole run; the next launch removes the rest",
)
KILLED_ANY_TIME_HET = Case(
    12,
    "`kill -9` of `launch.py` at 20 moments with `PAIRING=het`",
    "nothing that can start is left, or the whole run; the next launch removes the rest",
)
NOT_ITS_OWN = Case(
    12,
    "a launch while another one is between its two `sbatch`, a person holds a run, and one of another host is held",
    "all three stay; of the last one it warns",
)
AWAY = "four launches are at their calls of `sbatch` and `scontrol release`, one begins then"
SILENT_CONTROLLER = Case(
    8,
    f"`slurmctld` does not answer for two minutes (SIGSTOP): {AWAY}",
    "each waits and completes, or says that nothing was queued; never half a pair",
    240,
    "Slurm does not answer; waiting up to",
)
NO_CONTROLLER = Case(
    8,
    f"`slurmctld` is stopped, and started two minutes later: {AWAY}",
    "each waits and completes, or says that nothing was queued; never half a pair",
    240,
    "Slurm does not answer; waiting up to",
)
SLOW_CONTROLLER = Case(
    8,
    f"`slurmctld` is slow for two minutes, works for 1 s and does nothing for 20 s in turns (SIGSTOP, SIGCONT): {AWAY}",
    "each waits and completes, or says that nothing was queued; never half a pair",
    240,
)
HOSTILE_VALUES = Case(
    16,
    "300 variables of a `.conf` with arbitrary text (line ends, quotes, `$( )`, `;`), in a folder named like that",
    "the trainer's environment has each of them exactly",
)
HOSTILE_KEYS = Case(
    16,
    "each key of the suite with values that a shell would run (`$( )`, quotes, line ends, `;`), in a `.conf`, as "
    "`--set`, in the environment; those that carry free text in a run as well",
    "carried exactly, or refused with its name before anything is queued; nothing of it runs",
)
HOSTILE_PATHS = Case(
    16,
    "the jobs base, the checkout, `SKYRL_PROJECT_ROOT` or the `.conf` lies in a folder whose name has line ends, "
    "quotes, `$( )`, backslashes, `%j`, or bytes that are no UTF-8",
    "the run completes, or the launch says which folder cannot be, and queues nothing",
)
MANY_LAUNCHES = Case(13, "20 launches at once by one user", "all 20 runs complete, each with a key of its own", 120)
OTHER_USER = Case(
    13,
    "two users on the same node: each tries the other's key file, run directory, environments of the run's processes, "
    "Podman socket, and API with the key of a run of its own",
    "all refused",
)
SANDBOX_ATTACKS = Case(
    18,
    "a sandbox tries the API without a key and with its own, the node's files, processes, loopback and namespaces, "
    "Podman's socket, munge, the job's environment, mounts, devices and the kernel's settings; of another sandbox the "
    "agent server without its key, files, processes, environment, loopback, sockets and shared memory, and a keyring; "
    "then it kills all that it can reach",
    "all refused; the other one has all it had",
)
HOME_FULL = Case(15, "the home is full", "the run completes; in the home nothing has changed")
HOME_SQUASHED = Case(
    15,
    "root cannot read the home (NFS root squash, imitated by a FUSE file system); checkout, environment and "
    "`SKYRL_JOBS_BASE` are in it, or elsewhere",
    "the runs complete; in the home nothing has changed but `SKYRL_JOBS_BASE`",
)
LAUNCHER_KILLED = Case(21, "`kill -9` of the launcher of a local run", "nothing of the run is left", 10)
LAUNCHER_KILLED_EARLY = Case(
    21, "`kill -9` of the launcher of a local run whose runtime is starting", "nothing of the run is left", 10
)
TERMINAL_CLOSED = Case(21, "the terminal of a local run is closed", "nothing of the run is left", 10)
LATE_FILES = Case(
    9,
    "the run's code, secrets and key are seen on the GPU node 30 s late",
    "the run completes, with its own code, secrets and key",
    150,
)
LATE_READY = Case(9, "the ready flag is seen on the GPU node 30 s late", "the run completes", 120)
LATE_ADDRESS = Case(9, "the API server's address is seen on the GPU node 30 s late", "the run completes", 120)
LATE_SUCCESS = Case(
    9,
    "the completion flag of a training that succeeded is seen on the CPU node 30 s late",
    "the runtime job ends by Slurm's word, as after a success",
    45,
    "its completion flag was not seen here within 10 s",
)
LATE_FAILURE = Case(
    9,
    "the completion flag of a training that failed is seen on the CPU node 30 s late",
    "the runtime job ends by Slurm's word; the flag says what the training wrote",
    45,
    "on gpu-b), without a completion flag",
)
NO_SECRETS = Case(
    9, "the secrets are not seen on the GPU node", "both jobs end", 120, "secrets.json to be seen on gpu-a, in vain"
)
NO_CODE = Case(
    9, "the run's code is not seen on the GPU node", "both jobs end", 120, "/code is not to be seen on gpu-b"
)
NO_FLAG = Case(
    9,
    "the completion flag is not seen on the CPU node",
    "the runtime job ends by Slurm's word, as after a success",
    45,
    "its completion flag was not seen here within 10 s",
)
FULL_SHARE = Case(
    9,
    "the shared directory is full as the trainer ends",
    "both jobs end, the training job with the trainer's exit code",
    45,
)
READ_ONLY = Case(
    9,
    "the shared directory is read-only on both nodes as the trainer ends",
    "both jobs end, with the trainer's exit code",
    45,
    "its completion flag was not seen here within 10 s",
)
NO_DIRECTORY = Case(9, "the run directory is removed during the training", "the trainer goes on; both jobs end", 60)
SLOW_SHARE = Case(
    9,
    "each opening, listing, renaming and sync in the shared directory takes 2 s; `scancel`",
    "both jobs end",
    120,
)
FULL_AT_START = Case(
    9,
    "the shared directory is full when the runtime job starts, or when the training job does",
    "both jobs end; where a log has no room, the job's comment says so (`scontrol show job`)",
    45,
    "its log could not be written: No space left on device",
)
READ_ONLY_RUNTIME = Case(
    9,
    "the run directory is read-only on the CPU node when the runtime job starts, which Slurm then cannot start",
    "the training job ends too",
    45,
    "JobLaunchFailure, on cpu-b); is its run directory there on that node, and writable?",
)
READ_ONLY_TRAINING = Case(
    9,
    "the run directory is read-only on the GPU node when the training job starts, which Slurm then cannot start",
    "the runtime job ends too",
    45,
    "JobLaunchFailure, on gpu-b); is its run directory there on that node, and writable?",
)
LAUNCH_FULL = Case(9, "the shared directory is full at the launch", "an error with its name; nothing is queued", 20)
GONE_BEFORE = Case(
    9,
    "the run directory is removed while the training job waits for the runtime",
    "it ends",
    25,
    "can no longer be read",
)
PLANTED = Case(
    10,
    "half-written, empty, foreign or old flags, addresses, keys and records in the directory of a training job",
    "each is ignored or named; no trainer starts",
    60,
)
PLANTED_RUNTIME = Case(
    10,
    "half-written, empty, foreign or old flags, records and secrets in the directory of a runtime job, before it "
    "begins and while it serves; in the end an empty `training_complete.flag`",
    "each is ignored or named; the last one counts as a person's word",
    90,
    "training_complete.flag was set by hand",
)
PLANTED_RUNS = Case(
    10,
    "half-written, foreign or old records and markers of submissions in the directories of runs; `launch.py`, "
    "`launch.py cancel`",
    "no job of another run, and no other job, is touched; what cannot be used is named",
    reads="left alone",
)
SKEWED = Case(
    14,
    "the clock of the GPU node, or of the CPU node, is 5 minutes ahead or behind",
    "what is said and told of the time limit is right within 5 s; `scancel` counts as `scancel`",
)
REBUILT = Case(
    22,
    "the environment is rebuilt with another version while the training job is queued",
    "the run completes",
    60,
    "was rebuilt since this job was submitted: fastapi",
)
NO_PYTHON = Case(
    22,
    "the environment is removed while the training job is queued",
    "both jobs end",
    30,
    "(SKYRL_PYTHON) is not there",
)
MOVED = Case(
    22, "the checkout is moved while both jobs are queued", "the run completes, from its own copy of the code", 60
)
UPGRADED = Case(
    22,
    "the checkout is upgraded by `git pull` while both jobs are queued",
    "the run completes, with the code of its launch",
    60,
)
BAD_NEIGHBOURS = Case(
    6,
    "in one run one sandbox runs out of memory, another is a fork bomb, another fills the node's disk",
    "each has failed with its reason; a fourth answers, starts processes and writes again; the run completes",
    20,
)
OFFENDERS = "one of a server's sandboxes is killed, runs out of memory, is a fork bomb, or fills its disk"
LIMITS_BITE = Case(
    6,
    f"{OFFENDERS}, where cgroups bound them (Podman as root, CPUs of their own)",
    "it has failed with its reason; while it does harm, again and again for a second, its neighbour's answers, each of "
    "which takes 70 ms of computation, take at most twice as long as before, and as after it, on average",
    2,
    unit="×",
)
WATCHDOG_STOPS = Case(
    6, f"{OFFENDERS}, where no cgroup bounds them (rootless, cgroup v1)", "it has failed with its reason", 2
)
NEIGHBOURS_RECOVER = Case(
    6, "the same, and what its neighbour notices", "its answers take at most twice as long as before again", 5
)
LARGE_BOMB_STOPS = Case(
    6,
    "a fork bomb where no cgroup bounds it and the limit is the usual one, 2,048 processes: all of the node is busy",
    "it has failed with its reason",
    5,
)
DISK_FILLED = Case(
    6,
    "a sandbox without a limit fills the node's disk, and the reserve is reached",
    "it has failed with its reason, and its files are gone; others with some files go on",
    2,
)
ITS_SANDBOXES = (
    "its sandboxes end, their reason has its name; the others' answer; the run goes on; nothing of it is left"
)
WORKER_CANCELLED = Case(23, "`scancel` of a worker of a runtime on several nodes", ITS_SANDBOXES, 15)
WORKER_KILLED = Case(23, "`kill -9` of a worker's body", ITS_SANDBOXES, 30)
HEAD_JOB_KILLED = Case(
    23,
    "`kill -9` of the body of a runtime job that has workers, one of which waits in the queue",
    "both jobs end, and all workers: those that run by themselves, the other is taken out of the queue by the training "
    "job",
    15,
    "is gone: ended badly (FAILED",
)
STEPS_JOB_KILLED = Case(
    23,
    "the same with `RUNTIME_MODE=allocation`",
    "both jobs end, and nothing is left on any node",
    15,
    "is gone: ended badly (FAILED",
)
WORKERS_UNLED = Case(
    23,
    "`slurmctld` does not answer (SIGSTOP), and the training of a runtime on several nodes ends",
    "the runtime job and all workers end by the run's flags; nothing is left on any node",
    30,
)
KILLED_AT_A_CALL_MANY = Case(
    12,
    "`kill -9` of `launch.py` between the calls of a launch with `RUNTIME_NODES=3`, which has two job arrays besides",
    "nothing that can start is left, or the whole run; the next launch removes the rest",
)
WRONG_KEYS = Case(
    17,
    "20,000 requests without a key, with a wrong one or with another run's, on few connections, of a server that logs "
    "each of them",
    "each is answered with 401; no key stands in an answer or in the log, the server's memory grows by less than "
    "5 MiB, and of the answers that a client with the key gets meanwhile 99 % take less than a second",
)
HOSTILE_UPLOADS = Case(
    16,
    "an image's build context has paths and links out of it, devices, pipes, or names that a shell would run",
    "nothing outside of it is changed or read; what leads out of it is refused with its name",
)
HOSTILE_BODIES = Case(
    16,
    "a request's body is nested half a million times, holds numbers beyond all bounds, wrong types or 100 MB",
    "refused with 4xx, in little memory, without a traceback",
)
ENDURANCE = Case(
    20,
    "2,000 sandboxes come and go, 8 at a time; every 4 s one of them is killed, every 35 s the API server or Podman's "
    "service",
    "the others serve; descriptors, memory, slots, ports, containers, monitors and storage of the run are as before",
    600,
)
CASES = (
    KILLED_AT_A_CALL,
    KILLED_ANY_TIME,
    KILLED_AT_A_CALL_HET,
    KILLED_ANY_TIME_HET,
    KILLED_AT_A_CALL_MANY,
    NOT_ITS_OWN,
    SILENT_CONTROLLER,
    NO_CONTROLLER,
    SLOW_CONTROLLER,
    HOSTILE_VALUES,
    HOSTILE_KEYS,
    HOSTILE_PATHS,
    CANCELLED,
    CANCELLED_PENDING,
    CANCELLED_HUNG,
    CANCELLED_UNHEARD,
    NO_PODMAN,
    NO_SUBUIDS,
    FULL_DISK,
    NO_PORT,
    NO_SANDBOX_PORT,
    DISK_FILLS,
    NO_IMAGE,
    CANCELLED_EARLY,
    SERVER_KILLED,
    INNER_KILLED,
    OUTER_KILLED,
    CUT_START,
    THREE_CRASHES,
    TRAINER_FAILS,
    TRAINER_RAISES,
    TRAINER_KILLED,
    TRAINER_CRASHES,
    CANCEL_TRAINING,
    CANCEL_RUNTIME,
    CANCEL_BOTH,
    CANCEL_STARTING_TRAINING,
    CANCEL_STARTING_RUNTIME,
    CANCEL_STARTING_BOTH,
    CANCEL_PENDING_TRAINING,
    CANCEL_PENDING_RUNTIME,
    CANCEL_PENDING_BOTH,
    CANCEL_TRAINING_FIRST,
    RUNTIME_NODE_OFF,
    TRAINING_NODE_OFF,
    LINK_CUT,
    PARTED,
    CONTROLLER_SILENT,
    SIGNAL_IN_SILENCE,
    NEXT_IN_SILENCE,
    CANCELLED_SLOWLY,
    RUNTIMES_LIMIT,
    TRAININGS_LIMIT,
    BOTH_LIMITS,
    CHAINED_AT_LIMIT,
    CHAINED_BEFORE_LIMIT,
    MANY_LAUNCHES,
    OTHER_USER,
    HOME_FULL,
    HOME_SQUASHED,
    SANDBOX_ATTACKS,
    DEAD_JOB,
    ENDURANCE,
    LAUNCHER_KILLED,
    LAUNCHER_KILLED_EARLY,
    TERMINAL_CLOSED,
    LATE_FILES,
    LATE_READY,
    LATE_ADDRESS,
    LATE_SUCCESS,
    LATE_FAILURE,
    NO_SECRETS,
    NO_CODE,
    NO_FLAG,
    FULL_SHARE,
    READ_ONLY,
    NO_DIRECTORY,
    SLOW_SHARE,
    FULL_AT_START,
    READ_ONLY_RUNTIME,
    READ_ONLY_TRAINING,
    LAUNCH_FULL,
    GONE_BEFORE,
    PLANTED,
    PLANTED_RUNTIME,
    PLANTED_RUNS,
    SKEWED,
    REBUILT,
    NO_PYTHON,
    MOVED,
    UPGRADED,
    BAD_NEIGHBOURS,
    LIMITS_BITE,
    WATCHDOG_STOPS,
    NEIGHBOURS_RECOVER,
    LARGE_BOMB_STOPS,
    DISK_FILLED,
    WRONG_KEYS,
    HOSTILE_UPLOADS,
    HOSTILE_BODIES,
    WORKER_CANCELLED,
    WORKER_KILLED,
    HEAD_JOB_KILLED,
    STEPS_JOB_KILLED,
    WORKERS_UNLED,
)


@dataclass(frozen=True)
class NothingLeftOfRun(NothingLeft):
    """A check that one run left nothing, while others of its user go on: what names its jobs, and its port.

    ``disk_in_reach``: its CPU node is on; of one that is off, the next runtime job there removes the storage. ``url``:
    the address of its server, where the next attempt's replaces it.
    """

    run: Run
    disk_in_reach: bool = True
    url: str = ""

    def now(self) -> list[str]:
        """What is left at this moment. Sandboxes are processes of the storage, which ends with the last of them."""
        ids = set(self.run.jobs.values())
        marks = {f"SLURM_JOB_ID={job_id}".encode() for job_id in ids}
        living = self.user.processes().items()
        processes = [f"process {pid}: {words[:100]}" for pid, words in living if marks & _environment(pid)]
        names = [f"skyrl-{self.user.uid}-{job_id}" for job_id in ids]
        storage = [
            f"{name}" for name in names if self.disk_in_reach and any((folder / name).exists() for folder in SCRATCH)
        ]
        named = re.compile(rf"({'|'.join(names)})(?!\d)")  # job 35 is not job 3
        sockets = [line for node in cluster.NODES for line in cluster.sockets(node) if named.search(line)]
        return [*processes, *storage, *sockets, *self._ports()]

    def _ports(self) -> list[str]:
        host, _, port = (self.url or self.run.text("runtime_url.txt")).strip().rpartition("//")[2].rpartition(":")
        taken = bool(host) and host in cluster.NODES and (int(port), self.user.uid) in cluster.listeners(host)
        return [f"port {port} on {host}"] if taken else []


def _environment(pid: int) -> set[bytes]:
    try:
        return set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    except OSError:
        return set()


def released(
    run: Run,
    nothing_left: NothingLeft,
    case: Case,
    reads: str = "",
    since: float | None = None,
    mute: Collection[str] = (),
) -> float:
    """Wait until a run is released and return the seconds that took, which the case bounds.

    Released: both jobs are out of the queue (one that is completing is in it); no process, container, port, socket or
    storage of the user is left on a node that was not there before; and the reason (``reads``, else the case's) stands
    in the logs of both jobs, in the completion flag and in run.json; where the words of it depend on the moment, some
    reason does. A training job that was taken out of the queue before it began has written no log; the runtime job's
    then says so.

    The clock, a monotonic one, starts ``since``, else now. ``mute``: the kinds of jobs that were killed with no chance
    to write a log; if both were, nobody is left to say anything.
    """
    begin = time.monotonic() if since is None else since
    while True:
        seconds = time.monotonic() - begin  # at the beginning of the look, which may take a second itself
        left = _still_there(run, nothing_left)
        if not left:
            break
        assert seconds < case.bound_s, f"{case.fault}: after {case.bound_s:g} s still there: {left}"
        time.sleep(0.2)
    reason = reads or case.reads
    silent = [place for place, text in _places(run, mute) if not text or reason not in text]
    assert not silent, (
        f"{case.fault}: {reason or 'a reason'!r} does not stand in {', '.join(silent)} of {run.directory}"
    )
    return within(case, seconds)


def _still_there(run: Run, nothing_left: NothingLeft) -> list[str]:
    """The jobs; only without them what they leave, as that look is dear, and many of them would be the load."""
    return [f"{kind} job" for kind in run.jobs if not run.is_over(kind)] or nothing_left.now()


def _places(run: Run, mute: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    if len(mute) == 2:
        return
    withdrawn = f"cancelled the pending training job {run.jobs['training']}" in run.log("runtime")
    for kind in {"runtime", "training"} - {*mute, *(("training",) if withdrawn else ())}:
        yield f"the {kind} job's log", run.log(kind) + run.log(kind, "err")
    yield "training_complete.flag", str(run.completion.get("reason", ""))
    for kind in ("runtime", "training"):
        yield f"run.json about the {kind} job", _recorded(run, kind)


def _recorded(run: Run, kind: str) -> str:
    """How a job ended, as run.json says it."""
    record = json.loads(run.text("run.json") or "{}")
    return str(record.get("jobs", {}).get(kind, {}).get("ended", {}).get("reason", ""))


def within(case: Case, seconds: float) -> float:
    """Assert the case's bound, and note what was measured where SKYRL_FAULT_TIMES says so."""
    assert seconds < case.bound_s, f"{case.fault}: {seconds:.1f} {case.unit}, not within {case.bound_s:g} {case.unit}"
    if path := os.environ.get("SKYRL_FAULT_TIMES"):
        entry = {"row": case.row, "case": case.fault, "bound": case.bound_s, "measured": round(seconds, 1)}
        with Path(path).open("a") as file:
            file.write(json.dumps(entry) + "\n")
    return seconds


def measured(case: Case) -> float:
    """The longest time that the kept measurements say of a case."""
    entries = [json.loads(line) for line in TIMES.read_text().splitlines()]
    return max(float(entry["measured"]) for entry in entries if entry["case"] == case.fault)


def runtime_processes(user: OrdinaryUser, run: Run, words: str) -> list[int]:
    """The processes of a run's runtime job whose command line has these words, by the numbers that their node sees."""
    job = f"SLURM_JOB_ID={run.jobs['runtime']}".encode()
    pids = [pid for pid, line in user.processes().items() if words in line]
    found = [pid for pid in pids if job in _environment(pid)]  # Podman forks for a moment under the same name
    assert found, f"no {words} of job {run.jobs['runtime']}"
    return sorted(found)
