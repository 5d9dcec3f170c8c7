"""What a job notes of its own use: from cgroups, from processes, from nvidia-smi; and that nobody waits for it."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slurm.lib.coordination import CoordinationDir
from slurm.lib.job_context import JobContext
from slurm.lib.observe.usage import efficiency, read_usage
from slurm.lib.scheduler import Slurm
from slurm.lib.settings import Settings
from slurm.lib.signals import SignalNotes
from slurm.lib.usage_cgroup import JobCgroup, cpu_s, job_cgroup, memory_bytes, memory_limit_bytes
from slurm.lib.usage_gpus import COMMAND, Gpus, parse
from slurm.lib.usage_processes import Ledger, Process, all_processes, below, of_job, parse_stat
from slurm.lib.usage_sampler import ROOM, SAMPLE_S, STEP, Background, SampleFile, Sampler, sampled

ROOT = Path(__file__).resolve().parent.parent
BURN = "import sys, time\nwhile time.process_time() < float(sys.argv[1]): pass"


@pytest.fixture
def job(tmp_path: Path) -> JobContext:
    environment = {"SLURM_CPUS_ON_NODE": "6", "SLURM_CPUS_PER_TASK": "4", "SLURM_MEM_PER_CPU": "1024"}
    directory = CoordinationDir(tmp_path)
    return JobContext("7", directory, Settings(), environment, Slurm({}), tmp_path, own_dir=True)


def until(reached: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.01)


# --- cgroups ----------------------------------------------------------------------------------------------------------

MOUNTS = """\
31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
"""


@pytest.mark.parametrize(
    ("cgroup", "mounts", "found"),
    [
        (
            "4:memory:/slurm/uid_9/job_12/step_batch/task_0\n2:cpu,cpuacct:/slurm/uid_9/job_12/step_batch\n0::/init\n",
            MOUNTS,
            JobCgroup(
                Path("/sys/fs/cgroup/cpu,cpuacct/slurm/uid_9/job_12"), Path("/sys/fs/cgroup/memory/slurm/uid_9/job_12")
            ),
        ),
        (
            "0::/system.slice/slurmstepd.scope/job_12/step_0/user/task_0\n",
            "41 31 0:38 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
            JobCgroup(v2=Path("/sys/fs/cgroup/system.slice/slurmstepd.scope/job_12")),
        ),
        (  # a mount that shows a part of the tree
            "0::/slurm/job_3/step_0\n",
            "41 31 0:38 /slurm /cg rw - cgroup2 cgroup2 rw\n",
            JobCgroup(v2=Path("/cg/job_3")),
        ),
        ("2:cpuacct:/\n0::/user.slice\n", MOUNTS, JobCgroup()),  # Slurm made none
        ("2:cpuacct:/jobs/myjob_3\n", MOUNTS, JobCgroup()),
        ("0::/job_3/step_0\n", "", JobCgroup()),
        ("nonsense\n", "nonsense\n", JobCgroup()),
    ],
)
def test_the_jobs_cgroup(cgroup: str, mounts: str, found: JobCgroup) -> None:
    assert job_cgroup(cgroup, mounts) == found


def test_figures_of_both_versions(tmp_path: Path) -> None:
    files = {
        "cpuacct.usage": "2500000000\n",
        "cpu.stat": "usage_usec 1500000\nuser_usec 1\n",
        "memory.usage_in_bytes": "5000\n",
        "memory.current": "4000\n",
        "memory.stat": "inactive_file 1000\ntotal_inactive_file 2000\n",
        "memory.limit_in_bytes": "9223372036854771712\n",
        "memory.max": "8192\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    v1, v2 = JobCgroup(tmp_path, tmp_path), JobCgroup(v2=tmp_path)
    assert (cpu_s(v1), memory_bytes(v1), memory_limit_bytes(v1)) == (2.5, 3000, None)
    assert (cpu_s(v2), memory_bytes(v2), memory_limit_bytes(v2)) == (1.5, 3000, 8192)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_limit_bytes(v2) is None
    gone = JobCgroup(tmp_path / "gone", tmp_path / "gone", tmp_path / "gone")
    for nothing in (JobCgroup(), gone):
        assert (cpu_s(nothing), memory_bytes(nothing), memory_limit_bytes(nothing)) == (None, None, None)


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup such as Slurm makes, of the version that this kernel has."""
    parents = [Path("/sys/fs/cgroup/cpuacct"), Path("/sys/fs/cgroup/cpu,cpuacct"), Path("/sys/fs/cgroup")]
    made = next((parent for parent in parents if (parent / "cgroup.procs").exists()), None)
    folder = (made or Path("/nonexistent")) / f"skyrl_test_{os.getpid()}" / "job_7" / "step_batch"
    try:
        folder.mkdir(parents=True)
    except OSError as problem:
        pytest.skip(f"needs to make a cgroup: {problem}")
    try:
        yield folder
    finally:
        for path in (folder, folder.parent, folder.parent.parent):
            until(lambda path=path: _removed(path))  # type: ignore[misc]


def _removed(path: Path) -> bool:
    try:
        path.rmdir()
    except OSError:
        return False
    return True


def test_a_real_cgroup_counts_ended_processes_too(cgroup: Path) -> None:
    """As the kernel counts it, compared with what it says of the process itself."""
    into = f"import os\nopen({str(cgroup / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        f"{into}"
        "from slurm.lib.usage_cgroup import own_cgroup, cpu_s\n"
        "import time\n"
        "begun = time.process_time()\n"
        "while time.process_time() < begun + float(sys.argv[1]): pass\n"
        "print(cpu_s(own_cgroup()), begun)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "0.5", str(Path(__file__).parents[1])], capture_output=True, text=True, check=True
    )
    counted, before = map(float, done.stdout.split())
    assert 0.5 <= counted <= 0.5 + before + 0.5
    of_the_job = (
        JobCgroup(cpuacct=cgroup.parent) if (cgroup / "cpuacct.usage").exists() else JobCgroup(v2=cgroup.parent)
    )
    assert (cpu_s(of_the_job) or 0) >= counted  # it has ended


# --- processes --------------------------------------------------------------------------------------------------------


def process(pid: int, parent: int, cpu: float, started: int = 1) -> Process:
    return Process(pid, started, parent, cpu, 0)


def test_what_a_parent_keeps_is_not_counted_twice() -> None:
    ledger = Ledger().after([process(1, 0, 1.0), process(2, 1, 5.0)])
    assert ledger.total_s == 6.0
    assert ledger.after([process(1, 0, 6.5)]).total_s == 6.5  # 2 has ended with 5.5, and 1 reaped it


def test_what_no_parent_keeps_is_added_as_seen_last() -> None:
    """A container: its monitor's parent is none of the job's."""
    ledger = Ledger().after([process(1, 0, 1.0), process(7, 99, 0.5), process(8, 7, 4.0), process(9, 8, 2.0)])
    later = ledger.after([process(1, 0, 1.5)])
    assert (later.ended_s, later.total_s) == (6.5, 8.0)
    assert later.after([process(1, 0, 2.0)]).total_s == 8.5  # once


def test_a_pid_that_is_used_again_is_another_process() -> None:
    ledger = Ledger().after([process(7, 99, 4.0, started=1)])
    assert ledger.after([process(7, 99, 1.0, started=2)]).total_s == 5.0


LOOKS = st.lists(
    st.lists(
        st.builds(process, st.integers(1, 6), st.integers(0, 6), st.floats(0, 100), st.integers(1, 3)),
        max_size=6,
        unique_by=lambda one: one.pid,
    ),
    max_size=6,
)


@given(LOOKS)
@settings(deadline=None)
def test_the_total_never_shrinks_and_is_no_less_than_what_lives(looks: list[list[Process]]) -> None:
    ledger = Ledger()
    for living in looks:
        before, ledger = ledger.total_s, ledger.after(living)
        assert ledger.total_s >= before
        assert ledger.total_s >= sum(one.cpu_s for one in living)


@given(st.text())
@settings(deadline=None)
def test_a_stat_that_is_none(text: str) -> None:
    assert parse_stat(1, text) is None or ")" in text


def test_a_name_with_blanks_and_brackets() -> None:
    fields = ["S", "3", *["0"] * 9, "100", "50", "25", "25", *["0"] * 4, "777", "0", "4"]
    assert parse_stat(9, f"9 (a) b ( c) {' '.join(fields)} 1 2") == Process(9, 777, 3, 2.0, 4 * 4096)


def test_a_child_that_has_ended_counts_as_the_kernel_says() -> None:
    before = Ledger().after(of_job("none", tuple)).total_s
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", BURN, "0.5"], check=True)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = now.ru_utime + now.ru_stime - spent.ru_utime - spent.ru_stime
    after = Ledger().after(of_job("none", tuple)).total_s
    assert used >= 0.45
    assert after - before >= used - 0.05


def test_processes_that_slurm_started_for_the_job_are_its_own() -> None:
    """As Ray's, which are steps and do not descend from the body."""
    held = subprocess.Popen(
        ["sh", "-c", "sleep 60 & echo; wait"],
        env={"PATH": os.defpath, "SLURM_JOB_ID": "987654"},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert held.stdout
        held.stdout.readline()
        own = below({os.getpid()}, all_processes())
        assert held.pid in own
        code = "import sys; sys.path.insert(0, sys.argv[1])\nfrom slurm.lib.usage_processes import of_job\n"
        code += "print(*sorted(one.pid for one in of_job(sys.argv[2], tuple)))"
        ask = [sys.executable, "-c", code, str(Path(__file__).parents[1])]
        for job_id, count in (("987654", 2), ("987655", 0)):
            done = subprocess.run([*ask, job_id], capture_output=True, text=True, check=True)
            found = {int(pid) for pid in done.stdout.split()}
            assert len(found) - 1 == count and (held.pid in found) == bool(count)
    finally:
        os.killpg(held.pid, 9)
        held.communicate()


# --- GPUs -------------------------------------------------------------------------------------------------------------

SMI = """\
0, GPU-aaaa-1, 97, 60000, 81559, NVIDIA H100 80GB HBM3
1, GPU-bbbb-2, [N/A], 12, 81559, NVIDIA H100, with a comma
2, GPU-cccc-3, 0, [N/A], [N/A], NVIDIA H100 80GB HBM3
Unable to determine the device handle for GPU 0000:41:00.0: Unknown Error
"""


@pytest.mark.parametrize(
    ("visible", "found"),
    [(None, [0, 1, 2]), ("0,2", [0, 2]), ("GPU-bbbb", [1]), ("", []), ("MIG-aaaa", []), ("GPU-", []), ("1, 7", [1])],
)
def test_the_cards_of_the_job_alone(visible: str | None, found: list[int]) -> None:
    assert [card["index"] for card in parse(SMI, visible)] == found


def test_what_nvidia_smi_does_not_say_is_none() -> None:
    cards = parse(SMI, None)
    assert cards[0] == {
        "index": 0,
        "name": "NVIDIA H100 80GB HBM3",
        "busy_percent": 97,
        "used_mib": 60000,
        "total_mib": 81559,
    }
    assert (cards[1]["name"], cards[1]["busy_percent"]) == ("NVIDIA H100, with a comma", None)
    assert (cards[2]["used_mib"], cards[2]["total_mib"]) == (None, None)


def smi(folder: Path, script: str) -> dict[str, str]:
    """An environment in which nvidia-smi is this script."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho asked >> {folder}/asked\n{script}\n")
    program.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "1"}


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """How long nvidia-smi may take: on a busy machine the start of a shell takes seconds."""

    def set_to(seconds: float) -> None:
        monkeypatch.setattr("slurm.lib.usage_gpus.COMMAND", (*COMMAND[:2], f"{seconds:g}", *COMMAND[3:]))
        monkeypatch.setattr("slurm.lib.usage_gpus.PATIENCE_S", seconds + 20.0)

    return set_to


def asked(folder: Path) -> int:
    path = folder / "asked"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_nvidia_smi_is_asked_with_the_jobs_environment(tmp_path: Path, patience: Callable[[float], None]) -> None:
    patience(60.0)
    gpus = Gpus(smi(tmp_path, f"cat <<'END'\n{SMI}END"), wanted=True)
    assert [card["index"] for card in gpus.look()] == [1]
    assert Gpus(gpus.environment, wanted=False).look() == []
    assert asked(tmp_path) == 1


@pytest.mark.parametrize("script", ["exit 9", "exec sleep 1000"])
def test_one_that_fails_or_hangs_is_left_alone(tmp_path: Path, script: str, patience: Callable[[float], None]) -> None:
    patience(4.0)
    gpus = Gpus(smi(tmp_path, script), wanted=True)
    assert gpus.look() == [] == gpus.look()
    assert asked(tmp_path) == 1
    gpus.quiet_until = 0.0
    gpus.look()
    assert asked(tmp_path) == 2


def test_no_nvidia_smi() -> None:
    assert Gpus({"PATH": "/nonexistent"}, wanted=True).look() == []


# --- samples ----------------------------------------------------------------------------------------------------------


def test_a_sample_is_what_the_reader_reads(job: JobContext, tmp_path: Path, patience: Callable[[float], None]) -> None:
    patience(60.0)
    environment = {**job.environment, **smi(tmp_path, f"cat <<'END'\n{SMI}END")}
    sampler = Sampler(replace(job, environment=environment), Gpus(environment, wanted=True))
    subprocess.run([sys.executable, "-c", BURN, "0.2"], check=True)
    (sample,) = read_usage(json.dumps(sampler.look(is_last=False)))
    assert (sample.cpus, sample.memory_limit_bytes) == (6, 6 * 2**30)
    assert sample.cpu_s and sample.cpu_s >= 0.2
    assert sample.memory_bytes and sample.memory_bytes > 2**22
    assert abs(sample.at - time.time()) < 60
    assert [(card.index, card.used_mib) for card in sample.gpus] == [(1, 12)]
    assert sampler.look(is_last=True)["gpus"] == []


def test_the_file_stays_small_however_long_a_job_runs(tmp_path: Path) -> None:
    file, line, hours = SampleFile(tmp_path / "usage"), "x" * 1100, 0.0  # as with eight cards
    distances = []
    while file.size + len(line) < ROOM and hours < 24 * 365:
        file.append(line)
        distances.append(file.distance_s)
        hours += file.distance_s / 3600
    assert hours > 24 * 9
    for _ in range(5):
        file.append(line)
    assert ROOM - STEP < file.path.stat().st_size <= ROOM
    assert distances == sorted(distances)
    assert (distances[0], distances[-1]) == (SAMPLE_S, SAMPLE_S * 128)
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    again = SampleFile(file.path)  # the job was requeued
    again.append(line)
    assert again.path.stat().st_size <= ROOM


def test_a_line_that_was_torn_spoils_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, write = SampleFile(tmp_path / "usage"), os.write
    file.append("one")
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:1]))
    file.append("two")
    monkeypatch.setattr(os, "write", write)
    file.append("three")
    assert file.path.read_text() == "one\nt\nthree\n"


def test_short_jobs_have_a_first_and_a_last_sample(job: JobContext) -> None:
    path = job.directory.usage("training", "7")
    with sampled(job, "training", SignalNotes()) as usage:
        until(lambda: path.exists() and path.read_text().endswith("\n"))
        subprocess.run([sys.executable, "-c", BURN, "0.3"], check=True)
        usage.close()
        until(lambda: len(path.read_text().splitlines()) == 2)
    found = efficiency(read_usage(path.read_text()))
    assert found.span_s and found.cpu_share
    assert found.cpu_share * 6 * found.span_s >= 0.25


def samplers() -> set[threading.Thread]:
    """The threads that note what a job uses."""
    return {thread for thread in threading.enumerate() if thread.name == "what this job uses is not noted"}


def test_a_job_that_a_signal_ends_has_no_last_sample(job: JobContext) -> None:
    path, notes = job.directory.usage("training", "7"), SignalNotes()
    before = samplers()
    with sampled(job, "training", notes):
        until(lambda: path.exists() and path.read_text().endswith("\n"))
        assert samplers() - before
        notes.stop_signal = signal.SIGTERM
    until(lambda: not samplers() - before)
    assert len(path.read_text().splitlines()) == 1


def test_no_samples_where_none_are_wanted(job: JobContext) -> None:
    before = samplers()
    with sampled(replace(job, settings=Settings(usage_samples=False)), "training", SignalNotes()) as usage:
        assert not samplers() - before
        usage.close()
    assert not job.directory.usage("training", "7").exists()


def test_a_run_directory_that_cannot_be_written_is_said_once(
    job: JobContext, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slurm.lib.usage_sampler.SAMPLE_S", 0.01)
    caplog.set_level("INFO")
    gone = replace(job, directory=CoordinationDir(job.directory.path / "gone"))
    with sampled(gone, "training", SignalNotes()):
        until(lambda: "not noted" in caplog.text)
        time.sleep(0.2)
    assert caplog.text.count("not noted") == 1


def test_nobody_waits_for_a_share_that_hangs() -> None:
    began, goes_on = threading.Event(), threading.Event()
    works: list[bool] = []

    def work(is_last: bool) -> None:
        works.append(is_last)
        began.set()
        goes_on.wait(60)

    with Background("a test", work, lambda: 0.01):
        assert began.wait(20)
        begin = time.monotonic()
    assert time.monotonic() - begin < 10
    goes_on.set()
    until(lambda: works[-1])
    assert works[-1] and works.count(True) == 1


def test_what_it_raises_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    works: list[Any] = []

    def work(is_last: bool) -> None:
        works.append(is_last)
        raise RuntimeError("disk full")

    with Background("a test", work, lambda: 0.01):
        until(lambda: len(works) > 3)
    until(lambda: works[-1])
    assert caplog.text.count("disk full") == 1


def test_where_no_thread_can_be_had_the_job_goes_on(
    job: JobContext, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_thread(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    with sampled(job, "training", SignalNotes()):
        pass
    assert "what this job uses is not noted: can't start new thread" in caplog.text


LOOKING = """
import os, subprocess, sys
from slurm.lib.usage_processes import Ledger, of_job

def look(ledger):
    children = [subprocess.Popen(["sleep", "600"]) for _ in range(20)]
    ledger = ledger.after(of_job("999999999", tuple))
    for child in children:
        child.kill()
        child.wait()
    return ledger

def resident_kib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024

ledger = Ledger()
for number in range(100):
    ledger = look(ledger)
    if number == 30:
        before = resident_kib()
print(resident_kib() - before)
"""


def test_looks_at_processes_that_come_and_go_do_not_add_up() -> None:
    done = subprocess.run([sys.executable, "-c", LOOKING], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2048  # KiB, in 70 looks
