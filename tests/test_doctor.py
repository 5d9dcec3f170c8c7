"""The doctor's verdicts from facts: for each probe what makes it well, warn and fail; and its exchange with nodes."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slurm.lib.config import load_config
from slurm.lib.coordination import write_atomically
from slurm.lib.doctor import (
    between,
    examination,
    exchange,
    facts,
    host_verdicts,
    nodes,
    report,
    sections,
    slurm_verdicts,
)
from slurm.lib.doctor.containers import DONE, limit_of, reach
from slurm.lib.doctor.exchange import Echo, Line
from slurm.lib.doctor.facts import Limit, Question, Report, Sandboxes, Seen, Trainer, Trial
from slurm.lib.doctor.node import first_line, share_trial
from slurm.lib.doctor.verdict import Health, Section, Verdict, fail, ok, warn
from slurm.lib.errors import EnvironmentProblem
from slurm.lib.processes import Completed
from slurm.lib.scheduler import JobState, JobStatus
from slurm.lib.settings import Settings
from slurm.lib.signals import SignalNotes
from tests.preflight.world import NOW, ROOT

OK, WARN, FAIL = Health.OK, Health.WARN, Health.FAIL
G = 1024**3
MARK = "python=3.11.2,fastapi=0.115.0"
GOOD_SANDBOXES = Sandboxes(
    user="ada",
    uid=1000,
    scratch="/scratch",
    file_system="ext4",
    free=100 * G,
    version="4.9.4",
    driver="overlay",
    runtime="crun",
    controllers=("memory", "pids"),
    cgroups="v2",
    image=Trial(1.0),
    hello=Trial(0.4),
    limits=(Limit("memory", True), Limit("pids", True)),
    port=31000,
    token="x",
)
GOOD_TRAINER = Trainer(
    uv="uv 0.5.1",
    visible="0",
    visible_number=1,
    cards=("NVIDIA H100, 550.54.15, 81559 MiB, Disabled",),
    libcuda="/usr/lib64",
    python="/usr/bin/python3.12",
    efa=("/opt/amazon/efa/lib",),
    efa_devices=("efa_0",),
)


def settings_of(*words: str, tmp_path: Path = Path("/nonexistent")) -> Settings:
    given = ("SKYRL_JOBS_BASE=/share/jobs", *words)
    return load_config(None, given, {"HOME": "/home/ada"}, ROOT / "slurm" / "config", NOW, ROOT.parent).settings


def told(verdicts: list[Verdict], check: str) -> list[tuple[Health, str]]:
    return [(verdict.health, verdict.sentence) for verdict in verdicts if verdict.check == check]


def every_bad_one_has_a_fix(verdicts: list[Verdict]) -> None:
    for verdict in verdicts:
        assert bool(verdict.fix) == (verdict.health is not OK), verdict


# --- one host ---------------------------------------------------------------------------------------------------------


def test_a_sound_node_is_well_in_all() -> None:
    verdicts = host_verdicts.sandbox_verdicts(GOOD_SANDBOXES, "localhost/x")
    assert {verdict.health for verdict in verdicts} == {OK}
    assert [v.check for v in verdicts] == ["podman", "subuid", "store", "container", "limits", "docker"]
    trainer = host_verdicts.trainer_verdicts(GOOD_TRAINER, settings_of())
    assert {verdict.health for verdict in trainer} == {OK}
    assert [v.check for v in trainer] == ["uv", "gpu", "efa"]


@pytest.mark.parametrize(
    ("changed", "check", "health", "words"),
    [
        ({"absent": ("podman", "newuidmap"), "version": ""}, "podman", FAIL, "not on PATH: podman, newuidmap"),
        ({"version": "3.4.4"}, "podman", FAIL, "Podman 3.4.4 with crun, cgroups v2 is too old"),
        ({"info_problem": "podman info: no tun"}, "podman", FAIL, "podman info: no tun"),
        ({"lacking": ("/etc/subuid",)}, "subuid", FAIL, "no range for ada in /etc/subuid"),
        ({"scratch": "", "scratch_problem": "no folder for it"}, "store", FAIL, "no folder for it"),
        ({"file_system": "nfs4"}, "store", FAIL, "/scratch lies on nfs4"),
        ({"free": 10}, "store", FAIL, "too little"),
        ({"free": 2 * G}, "store", WARN, "few images"),
        ({"driver": "vfs"}, "store", WARN, "the driver vfs"),
        ({"image": Trial(problem="no busybox")}, "image", WARN, "no container was tried: no busybox"),
        ({"hello": Trial(problem="runc: no")}, "container", FAIL, "no container starts: runc: no"),
        ({"hello": Trial(9.0)}, "container", WARN, "a container ran in 9.0 s"),
        ({"limits": (Limit("memory", False), Limit("pids", True))}, "limits", WARN, "limits of memory do not bite"),
        ({"limits": (Limit("memory", None, "timed out"),)}, "limits", WARN, "not found out"),
        ({"port_problem": "no route"}, "port", FAIL, "published port: no route"),
        ({"docker": "podman version 4.9.4"}, "docker", OK, "docker is Podman"),
        ({"docker": "Docker version 28.2.2"}, "docker", WARN, "docker is not Podman"),
    ],
)
def test_what_is_wrong_with_podman(changed: dict[str, Any], check: str, health: Health, words: str) -> None:
    image = "docker.io/some/image"
    verdicts = host_verdicts.sandbox_verdicts(replace(GOOD_SANDBOXES, **changed), image)
    [(found, sentence)] = told(verdicts, check)
    assert (found, words in sentence) == (health, True), sentence
    every_bad_one_has_a_fix(verdicts)
    others = [verdict for verdict in verdicts if verdict.check != check]
    assert {verdict.health for verdict in others} == {OK}


@pytest.mark.parametrize(
    ("changed", "words", "check", "health", "said"),
    [
        ({"uv": ""}, (), "uv", FAIL, "uv, which starts the trainer, is not on PATH"),
        ({"visible_number": 0, "visible": ""}, (), "gpu", FAIL, "sees none"),
        ({"visible_number": None, "visible": None}, (), "gpu", FAIL, "CUDA_VISIBLE_DEVICES=not set"),
        ({"cards": ()}, (), "gpu", FAIL, "there is no nvidia-smi on PATH"),
        ({"cards": (), "smi_problem": "couldn't talk to the driver"}, (), "gpu", FAIL, "nvidia-smi: couldn't talk"),
        ({"libcuda": ""}, (), "trainer", WARN, "no libcuda.so.1"),
        ({"python": ""}, (), "trainer", WARN, "no Python with its headers"),
        ({"efa": ()}, ("SKYRL_LD_LIBRARY_PATH_EXPORT=1",), "trainer", WARN, "no EFA libraries"),
        ({"efa_devices": ()}, ("SKYRL_LD_LIBRARY_PATH_EXPORT=1",), "efa", WARN, "no device"),
        ({}, ("SKYRL_LD_LIBRARY_PATH_EXPORT=0", "GPU_NODES=2"), "efa", WARN, "EFA is there (efa_0) and not used"),
        ({}, ("SKYRL_LD_LIBRARY_PATH_EXPORT=1",), "efa", OK, "EFA: efa_0"),
    ],
)
def test_what_is_wrong_with_a_gpu_node(
    changed: dict[str, Any], words: tuple[str, ...], check: str, health: Health, said: str
) -> None:
    verdicts = host_verdicts.trainer_verdicts(replace(GOOD_TRAINER, **changed), settings_of(*words))
    [(found, sentence)] = told(verdicts, check)
    assert (found, said in sentence) == (health, True), sentence
    every_bad_one_has_a_fix(verdicts)


def test_mig_slices_of_one_card_that_nccl_refuses_fail() -> None:
    found = replace(
        GOOD_TRAINER,
        visible="MIG-a,MIG-b",
        visible_number=2,
        slices={"MIG-a": "GPU-1", "MIG-b": "GPU-1"},
        nccl=(2, 21),
    )
    verdicts = host_verdicts.trainer_verdicts(found, settings_of())
    assert told(verdicts, "mig")[0][0] is FAIL
    assert told(verdicts, "gpu")[0][1].startswith("2 MIG slices: NVIDIA H100, driver 550.54.15, 81559 MiB")
    assert told(host_verdicts.trainer_verdicts(replace(found, nccl=(2, 30)), settings_of()), "mig")[0][0] is WARN


def test_a_trainer_without_gpus_or_verl_needs_neither_uv_nor_a_driver() -> None:
    bare = Trainer()
    verdicts = host_verdicts.trainer_verdicts(bare, settings_of("TRAINING_COMMAND=true", "GPUS_PER_NODE=0"))
    assert [verdict.health for verdict in verdicts] == [OK]


@pytest.mark.parametrize(
    ("changed", "check", "health", "words"),
    [
        ({}, "python", OK, "Python 3.11.2"),
        ({"mark": "python=3.9.1,fastapi=0.115.0"}, "python", WARN, "python 3.11.2 → 3.9.1"),
        ({}, "share", OK, "takes 10 ms"),
        ({"share": Trial(0.5)}, "share", WARN, "takes 500 ms"),
        ({"share": Trial(problem="Read-only file system")}, "share", FAIL, "Read-only"),
        ({"limits": {"open files": 1024, "processes": -1}}, "ulimit", WARN, "open files 1024"),
        ({"limits": {"open files": 65536, "processes": -1}}, "ulimit", OK, "processes unlimited"),
        ({"folders": (Seen("CHECKPOINT_DIR", "/c", "/c", True, True),)}, "folders", OK, "CHECKPOINT_DIR can"),
        ({"folders": (Seen("CHECKPOINT_DIR", "/c/d", "/c", True, False),)}, "folders", FAIL, "cannot be written on n1"),
    ],
)
def test_what_any_host_may_lack(changed: dict[str, Any], check: str, health: Health, words: str) -> None:
    found = replace(Report(host="n1", mark=MARK, share=Trial(0.01), share_file_system="nfs4"), **changed)
    verdicts = list(sections.node_verdicts(found, settings_of(), MARK))
    [(how, sentence)] = told(verdicts, check)
    assert (how, words in sentence) == (health, True), sentence
    every_bad_one_has_a_fix(verdicts)


# --- Slurm ------------------------------------------------------------------------------------------------------------


def said(text: str, code: int = 0) -> Completed:
    return Completed(("x",), code, text if not code else "", "" if not code else text)


CONFIGURED = {"KillWait": "30 sec", "AccountingStorageType": "accounting_storage/slurmdbd"}
GOOD_SLURM = slurm_verdicts.SlurmFacts(
    absent=(),
    version=said("slurm 23.11.4\n"),
    configuration=CONFIGURED,
    partitions=said("test|up|12:00:00|4|(null)\ngpu_test|up|12:00:00|4|gpu:4\n"),
    associations=said("lab||normal\n"),
    limits=said("lab||\n"),
    user="ada",
)


def test_a_sound_slurm_is_well_in_all() -> None:
    verdicts = slurm_verdicts.slurm_verdicts(GOOD_SLURM, settings_of())
    assert {verdict.health for verdict in verdicts} == {OK}
    assert [v.check for v in verdicts] == ["slurm", "killwait", "partition", "partition", "account"]


@pytest.mark.parametrize(
    ("most", "mode", "health", "words", "fix"),
    [
        ("1001", "array", OK, "tasks up to 1000 (MaxArraySize); RUNTIME_NODES needs 7", ""),
        ("8", "array", OK, "tasks up to 7", ""),
        ("7", "array", FAIL, "tasks up to 6 (MaxArraySize=7), and RUNTIME_NODES=8 needs tasks up to 7", "=7 at most"),
        ("0", "array", FAIL, "it takes no job arrays", "set RUNTIME_MODE=allocation"),
        ("", "array", WARN, "does not tell its MaxArraySize", "scontrol show config"),
        ("0", "allocation", None, "", ""),
    ],
)
def test_job_arrays_of_a_runtime_on_several_nodes(
    most: str, mode: str, health: Health | None, words: str, fix: str
) -> None:
    facts = replace(GOOD_SLURM, configuration={**CONFIGURED, "MaxArraySize": most})
    verdicts = slurm_verdicts.slurm_verdicts(facts, settings_of("RUNTIME_NODES=8", f"RUNTIME_MODE={mode}"))
    found = [verdict for verdict in verdicts if verdict.check == "arrays"]
    assert [verdict.health for verdict in found] == [health] * (health is not None)
    assert all(words in verdict.sentence and fix in verdict.fix for verdict in found)


def test_each_worker_counts_as_a_job_of_the_account() -> None:
    """A run with eight nodes is nine jobs at once; in one allocation it is two."""
    facts = replace(GOOD_SLURM, limits=said("lab|8|\n"))
    for mode, fails in (("array", True), ("allocation", False)):
        verdicts = slurm_verdicts.slurm_verdicts(facts, settings_of("RUNTIME_NODES=8", f"RUNTIME_MODE={mode}"))
        few = [verdict.sentence for verdict in verdicts if verdict.health is FAIL and verdict.check == "account"]
        assert ["is 9 jobs at once: MaxJobs=8 in lab" in sentence for sentence in few] == [True] * fails


@pytest.mark.parametrize(
    ("changed", "check", "health", "words"),
    [
        ({"absent": ("sbatch",)}, "slurm", FAIL, "not on PATH: sbatch"),
        ({"configuration": {}}, "slurm", FAIL, "does not answer"),
        ({"version": said("slurm 18.08.1\n")}, "slurm", WARN, "Slurm 18.08.1 is older"),
        ({"version": said("no", 1)}, "slurm", WARN, "version is not known"),
        ({"configuration": {**CONFIGURED, "KillWait": "2 sec"}}, "killwait", WARN, "has 2 s"),
        ({"configuration": {"AccountingStorageType": "x"}}, "killwait", WARN, "does not tell"),
        ({"partitions": said("no", 1)}, "partition", WARN, "names no partition"),
        ({"associations": said("Access denied", 1)}, "account", WARN, "Access denied"),
        ({"associations": said("")}, "account", WARN, "ada has no association"),
        (
            {
                "associations": said(""),
                "configuration": {**CONFIGURED, "AccountingStorageEnforce": "associations,limits"},
            },
            "account",
            FAIL,
            "jobs need one",
        ),
        ({"limits": said("lab|1|\n")}, "account", FAIL, "MaxJobs=1 in lab"),
        ({"limits": said("lab||1\n")}, "account", FAIL, "MaxSubmitJobs=1 in lab"),
        (
            {"configuration": {**CONFIGURED, "AccountingStorageType": "accounting_storage/none"}},
            "account",
            OK,
            "no accounting",
        ),
    ],
)
def test_what_is_wrong_with_slurm(changed: dict[str, Any], check: str, health: Health, words: str) -> None:
    verdicts = slurm_verdicts.slurm_verdicts(replace(GOOD_SLURM, **changed), settings_of())
    assert any(how is health and words in sentence for how, sentence in told(verdicts, check)), verdicts
    every_bad_one_has_a_fix(verdicts)


def test_partitions_that_lack_what_the_jobs_ask_for_fail() -> None:
    verdicts = slurm_verdicts.slurm_verdicts(GOOD_SLURM, settings_of("GPU_PARTITION=gone", "TIME_LIMIT=24:00:00"))
    assert [how for how, _ in told(verdicts, "partition")] == [FAIL, FAIL]
    other = slurm_verdicts.slurm_verdicts(GOOD_SLURM, settings_of("ACCOUNT=theirs"))
    assert (FAIL, "ACCOUNT=theirs: ada has no association with it") in told(other, "account")


# --- between hosts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "health"), [((0.02, 0.04), OK), ((0.02, 9.0), WARN), ((), FAIL)], ids=["soon", "late", "never"]
)
def test_how_soon_a_file_is_seen(seconds: tuple[float, ...], health: Health) -> None:
    verdict = between.visibility_verdict("n1", [Echo(each, 0.0) for each in seconds])
    assert verdict.health is health
    every_bad_one_has_a_fix([verdict])


@pytest.mark.parametrize(
    ("ahead", "seconds", "health"),
    [(0.01, 0.1, OK), (-3.0, 0.1, WARN), (3.0, 0.1, WARN), (3.0, 4.0, OK), (-400.0, 1.0, FAIL)],
)
def test_clocks_count_as_wrong_only_beyond_what_the_exchange_took(ahead: float, seconds: float, health: Health) -> None:
    slow_one = Echo(20.0, 99.0)
    [verdict] = between.clock_verdict("n1", [slow_one, Echo(seconds, ahead)])
    assert verdict.health is health, verdict
    every_bad_one_has_a_fix([verdict])
    assert ("behind" in verdict.sentence) == (ahead < 0 and health is not OK)


@pytest.mark.parametrize(("problem", "health"), [("", OK), ("timed out", FAIL), (None, WARN)])
def test_whether_a_port_is_reached(problem: str | None, health: Health) -> None:
    verdict = between.reach_verdict("n2", "n1", problem)
    assert verdict.health is health
    every_bad_one_has_a_fix([verdict])


def look_of(kind: str, host: str = "", **options: Any) -> examination.Look:
    wanted = nodes.Wanted(f"{kind}-0", kind, "p")
    found = Report(host=host, mark=MARK, sandboxes=GOOD_SANDBOXES if kind == "runtime" else None) if host else None
    return examination.Look(wanted, Line(Path("/nonexistent"), wanted.name), report=found, **options)


def test_a_port_is_reached_for_from_each_training_node_and_from_here() -> None:
    runtime, training = look_of("runtime", "n1"), look_of("training", "n2")
    assert training.untried([runtime, training]) == [runtime]
    assert runtime.untried([runtime, training]) == []
    runtime.reached[examination.HERE] = ""
    training.reached["runtime-0"] = "timed out"
    [section] = sections.between_section([runtime, training])
    assert [how for how, _ in told(list(section.verdicts), "port")] == [FAIL, OK]
    same = look_of("training", "n1")
    assert same.untried([runtime, same]) == [], "one node reaches itself, which says nothing"


@pytest.mark.parametrize(
    ("running", "ended", "words", "said"),
    [
        (None, None, "", ""),
        (None, None, "late", "did not start within 20 s (FAILED) and was taken back"),
        (None, 99.0, "exec: python: not found", "ended without a report (FAILED): exec: python: not found"),
        (None, 99.0, "", ""),
        (None, 60.0, "", "its log is not to be seen here"),
        (95.0, None, "", ""),
        (-50.0, None, "", "has reported nothing"),
    ],
)
def test_why_there_is_no_report(running: float | None, ended: float | None, words: str, said: str) -> None:
    look = look_of("runtime", job_id="7", status=JobStatus(JobState.ENDED_BADLY, "FAILED"))
    look.begun, look.running_since, look.ended_since = 79.0 if words == "late" else 90.0, running, ended
    found = examination.why_none(look, words, 20.0, 100.0)
    assert (said in found) if said else not found, found


def test_a_job_that_waits_too_long_warns_and_one_that_broke_fails() -> None:
    waiting = look_of("runtime", job_id="7", problem="did not start within 5 s", waits=True)
    broken = look_of("runtime", job_id="7", problem="ended without a report")
    healths = [sections.node_section(look, settings_of(), MARK).verdicts[0].health for look in (waiting, broken)]
    assert healths == [WARN, FAIL]


class DyingNode:
    """A job whose node reports and answers three messages, and then nothing; Slurm says so only a while later."""

    def __init__(self, folder: Path, report: Report) -> None:
        self.folder, self.report = folder, report
        self.thread = threading.Thread(target=self.serve)
        self.answered = 0
        self.died = 0.0

    def serve(self) -> None:
        write_atomically(exchange.report_file(self.folder, "runtime-0"), facts.to_text(self.report))
        with contextlib.suppress(InterruptedError):
            exchange.serve(self.folder, "runtime-0", self.answer, self.sleep)
        self.died = time.monotonic()

    def answer(self, message: dict[str, Any]) -> dict[str, object]:
        self.answered += 1
        return {}

    def sleep(self, seconds: float) -> None:
        if self.answered == examination.ECHOES:
            raise InterruptedError
        time.sleep(seconds)

    def start(self, wanted: nodes.Wanted) -> str:
        self.thread.start()
        return "7"

    def statuses(self, job_ids: Sequence[str]) -> dict[str, JobStatus]:
        over = self.died and time.monotonic() - self.died > 1.5
        state = JobStatus(JobState.ENDED_BADLY, "FAILED") if over else JobStatus(JobState.RUNNING, "RUNNING")
        return dict.fromkeys(job_ids, state)

    def cancel(self, job_ids: Sequence[str]) -> str | None:
        raise AssertionError("it has ended")


def test_a_job_that_dies_when_all_but_one_thing_was_tried_is_told(tmp_path: Path) -> None:
    """Its page was not reached, then: that is no port's fault."""
    look = look_of("runtime")
    look.line = Line(tmp_path, "runtime-0")
    node = DyingNode(tmp_path, Report(host="n1", mark=MARK))
    examination.examine(node, [look], tmp_path, 20.0, SignalNotes())
    node.thread.join(10)
    assert look.problem == "job 7 ended while it was needed (FAILED)"
    (verdict,) = [each for each in sections.node_section(look, settings_of(), MARK).verdicts if each.check == "job"]
    assert verdict.health is FAIL and verdict.fix == sections.DIED


def test_a_node_that_falls_silent_is_told_though_it_answered_before() -> None:
    look = look_of("runtime", "n1", is_deaf=True)
    look.line.echoes.append(exchange.Echo(0.1, 0.0))
    [section] = sections.between_section([look])
    assert told(list(section.verdicts), "visibility")[0][0] is FAIL


# --- jobs -------------------------------------------------------------------------------------------------------------


def test_jobs_are_small_bounded_and_of_each_partition() -> None:
    settings = settings_of("CPU_PARTITION=a,b", "GPU_NODES=4", "GPUS_PER_NODE=8", "GPU_TYPE=h100", "ACCOUNT=lab")
    wanted = nodes.wanted_nodes(settings)
    assert [(each.kind, each.partition) for each in wanted] == [
        ("runtime", "a"),
        ("runtime", "b"),
        ("training", "gpu_test"),
    ]
    command = nodes.Command("/py thon", Path("/code"), Path("/share/100%"))
    argv = nodes.job_argv(wanted[2], settings, command, 120)
    last = {word.partition("=")[0]: word.partition("=")[2] for word in argv if word.startswith("--")}
    assert last["--partition"] == "gpu_test" and last["--gres"] == "gpu:h100:1" and last["--nodes"] == "1"
    assert last["--account"] == "lab" and last["--time"] == "5" and last["--deadline"] == "now+480"
    assert last["--output"].startswith("/share/100%%/")
    assert shlex.split(last["--wrap"])[5:8] == ["/py thon", "-m", nodes.MODULE]
    assert nodes.wanted_nodes(settings_of("SKYRL_BACKEND=local"))[0].kind == "local"


def test_a_look_reads_no_code_where_a_person_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout, python = tmp_path / "the checkout", tmp_path / "python"
    checkout.mkdir()
    python.write_text('#!/bin/sh\necho "$PWD $PYTHONPATH"\n')
    python.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    command = nodes.Command(str(python), checkout, tmp_path)
    (wanted,) = nodes.wanted_nodes(settings_of("SKYRL_BACKEND=local"))
    host = nodes.OwnHost(command, os.environ)
    process = host.start(wanted)
    end = time.monotonic() + 20
    while host.statuses([process])[process].state is not JobState.ENDED_WELL:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert exchange.log_file(tmp_path, wanted.name).read_text() == f"{checkout} {checkout}\n"
    argv = nodes.job_argv(wanted, settings_of(), command, 120)
    (line,) = [word.partition("=")[2] for word in argv if word.startswith("--wrap=")]
    said = subprocess.run(["sh", "-c", line], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert said == f"{checkout} {checkout}\n"


# --- facts that travel ------------------------------------------------------------------------------------------------


def test_a_report_comes_as_it_was_sent() -> None:
    sent = Report("n1", MARK, Trial(0.1), sandboxes=GOOD_SANDBOXES, trainer=replace(GOOD_TRAINER, nccl=(2, 21)))
    assert facts.from_text(Report, facts.to_text(sent)) == sent
    question = Question(sandboxes=True, cuda_modules=("cuda",), folders={"A": "/a"})
    assert facts.from_text(Question, facts.to_text(question)) == question


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"host": 7}', '{"newer": 1}', '{"sandboxes": {"limits": [3]}}'])
def test_what_is_no_report_is_an_error_with_a_sentence(text: str) -> None:
    with pytest.raises(EnvironmentProblem, match="not a report of this release"):
        facts.from_text(Report, text)


def test_the_exchange_measures_the_way_and_the_clock(tmp_path: Path) -> None:
    line = Line(tmp_path, "n")

    def act(message: dict[str, Any]) -> dict[str, object]:
        time.sleep(0.2)
        return {"time": time.time() + 100, "heard": message.get("word")}

    ended: list[str] = []
    node = threading.Thread(target=lambda: ended.append(exchange.serve(tmp_path, "n", act, time.sleep)))
    node.start()
    for word in (None, "two"):
        line.send(**({"word": word} if word else {}))
        end = time.monotonic() + 20
        while line.is_busy and time.monotonic() < end:
            line.look()
            time.sleep(0.01)
    line.send(end=True)
    node.join(20)
    assert ended == [exchange.TOLD]
    assert [answer["heard"] for answer in line.answers] == [None, "two"]
    assert len(line.echoes) == 1, "what is asked takes its own time, which says nothing of the share"
    late = exchange.visible_after(line.echoes)
    clock = exchange.clock_ahead(line.echoes)
    assert late is not None and clock is not None
    assert late >= 0.1
    assert abs(clock[0] - 100) <= clock[1] + 0.5


def test_a_node_that_hears_nothing_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "SILENCE_S", 0.1)
    (tmp_path / "n.ping-0.json").write_text("not JSON")
    assert "nothing heard" in exchange.serve(tmp_path, "n", lambda _: {}, time.sleep)


@pytest.mark.parametrize(
    ("answer", "bites"),
    [
        (Completed((), 0, f"{DONE}\n", ""), False),
        (Completed((), 137, "", "Killed"), True),
        (Completed((), 2, "", "sh: can't fork"), True),
        (Completed((), 125, "", "Error: no such image"), None),
        (Completed((), 124, "", "no answer within 45 s"), None),
    ],
)
def test_a_limit_bites_if_not_all_of_it_was_had(answer: Completed, bites: bool | None) -> None:
    assert limit_of("pids", answer, DONE).bites is bites


def test_a_closed_port_is_a_sentence() -> None:
    assert reach("127.0.0.1", 1, "x", 1.0).startswith("http://127.0.0.1:1: ")


def test_another_program_on_the_port_is_not_the_container(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("mine\n")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert reach("127.0.0.1", server.server_port, "mine") == ""
        assert "not as the container: mine" in reach("127.0.0.1", server.server_port, "another")
        server.shutdown()


def test_a_share_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    assert "cannot write" in share_trial(tmp_path / "gone").problem
    assert share_trial(tmp_path).problem == "" and list(tmp_path.iterdir()) == []


def test_a_command_that_is_missing_or_fails_is_told_apart(tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_text("#!/bin/sh\necho broken >&2; exit 3\n")
    bad.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    assert first_line(("nonesuch",), environment) == ("", "")
    assert first_line(("bad",), environment) == ("", "broken")
    assert first_line(("printf", "a\\nb\\n"), environment) == ("a", "")


# --- how it is shown --------------------------------------------------------------------------------------------------

SHOWN = [Section("n1", (ok("podman", "well"), warn("limits", "loose", "ask"), fail("port", "closed", "open it")))]


def test_people_get_a_line_each_with_the_fix_below() -> None:
    lines = report.as_text(SHOWN).splitlines()
    assert lines[0] == "n1"
    assert lines[1].split() == ["ok", "podman", "well"]
    assert lines[3].strip() == "-> ask"
    assert lines[-1] == "1 ok, 1 warn, 1 fail"
    assert "\x1b[" not in report.as_text(SHOWN) and "\x1b[" in report.as_text(SHOWN, 80)


def test_programs_get_all_of_it() -> None:
    told_all = json.loads(report.as_json(SHOWN))
    assert (told_all["schema"], told_all["ok"], told_all["warn"], told_all["fail"]) == (1, 1, 1, 1)
    assert told_all["places"][0]["verdicts"][2] == {
        "check": "port",
        "health": "fail",
        "sentence": "closed",
        "fix": "open it",
    }


# --- the command ------------------------------------------------------------------------------------------------------


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(ROOT / "slurm" / "launch.py"), "doctor", *words]
    return subprocess.run(
        argv, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--wait", "0"), 2, "--wait 0: must be more than 0"),
        (("--wait", "nan"), 2, "--wait nan"),
        (("--wait", "soon"), 2, "--help lists the options"),
        (("--config", "nonesuch"), 2, "nonesuch"),
        (("--set", "GPUS=4"), 2, "GPUS"),
        (("latest",), 2, "unrecognized arguments: latest"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, words: tuple[str, ...], code: int, said: str) -> None:
    done = command(*words, SKYRL_JOBS_BASE=str(tmp_path / "jobs"))
    assert done.returncode == code, done
    assert said in done.stderr and "Traceback" not in done.stderr
    assert not done.stdout and not (tmp_path / "jobs").exists()


def test_where_the_jobs_base_cannot_be_made_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = command(SKYRL_JOBS_BASE=str(tmp_path / "file" / "jobs"), PATH="/nonexistent")
    assert done.returncode == 71 and "Traceback" not in done.stderr
    assert f"SKYRL_JOBS_BASE={tmp_path}/file/jobs: cannot make a folder" in done.stderr


def test_without_slurm_that_is_what_fails(tmp_path: Path) -> None:
    (tmp_path / ".cache" / "doctor" / "old").mkdir(parents=True)
    os.utime(tmp_path / ".cache" / "doctor" / "old", (0, 0))
    done = command(SKYRL_JOBS_BASE=str(tmp_path), PATH="/nonexistent")
    assert done.returncode == 71, done
    assert "fail  slurm       not on PATH: sbatch, scontrol, squeue, scancel" in done.stdout
    assert "ok    share" in done.stdout
    assert list((tmp_path / ".cache").iterdir()) == [], "neither this one's folder nor a killed one's"
