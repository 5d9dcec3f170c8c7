"""SkyRL-agent's task file: what is read from it, what is said about it, and the one that is made to fit."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from slurm.lib.config import load_config
from slurm.lib.coordination import CoordinationDir
from slurm.lib.errors import EnvironmentProblem
from slurm.lib.job_environment import without_slurm
from slurm.lib.plan import Request, make_plan
from slurm.lib.preflight.finding import Finding, Level
from slurm.lib.preflight.task import task_file_findings, task_findings
from slurm.lib.run_record import ensure_task_yaml, furnish
from slurm.lib.settings import Settings
from slurm.lib.task_yaml import EXAMPLE, TaskYaml, matching, read_task_yaml, write_matching
from slurm.lib.trainer import task_example, task_file

ROOT = Path(__file__).resolve().parent.parent
PLACE = Path("/agent/task.yaml")
RUN = CoordinationDir(Path("/jobs/20260304_050607_7"))
SETTINGS = Settings(rollout_n=8, train_batch_size=64, max_response_length=32768)
FITS = TaskYaml(PLACE, 8, 32768, 4096, 50, 512, 1)
SOURCES = {"ROLLOUT_N": "/c/x.conf:7", "MAX_RESPONSE_LENGTH": "--set", "MAX_PARALLEL_AGENTS": "environment"}

# A file of SkyRL-agent's kind, with its own order, other values than ours, and what OmegaConf would resolve.
EXAMPLE_TEXT = """
# a comment
agent_cls: "some.module.Agent"
task: ${oc.env:TASK,"swe"}
tools: {browser: false, editor: true}
generator:
  infer_backend: verl
  num_trajectories: 2
  max_prompt_length: 31232
  max_iterations: 50
  sampling_params: {temperature: 1.0, max_tokens: 31232}
  val_config: {num_trajectories: 1}
dispatcher: {type: pipeline, max_parallel_agents: 96}
data: {instance_key: instance, name: "ä: 'ö'"}
"""


def written(folder: Path, text: str | bytes = EXAMPLE_TEXT) -> Path:
    path = folder / "task.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# --- reading ----------------------------------------------------------------------------------------------------------


def test_what_is_read(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert read_task_yaml(path) == TaskYaml(path, 2, 31232, 31232, 50, 96, 1)


@pytest.mark.parametrize("text", ["a: 1", "generator:", "generator: {sampling_params: }\ndispatcher: {}"])
def test_what_a_file_does_not_say(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    assert read_task_yaml(path) == TaskYaml(path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [1", "is not valid YAML: .*line 1"),
        ("a: 2026-13-45", "is not valid YAML"),
        ("a: !!python/object:os.system x", "is not valid YAML"),
        ("&a [*a", "is not valid YAML"),
        (b"\xff\xfe\xfa", "is not text in UTF-8"),
        ("a: \x01", "is not valid YAML"),
        ("", "must hold keys and values"),
        ("- a\n- b", "must hold keys and values"),
        ("generator: 3", "generator must hold keys and values, not 3"),
        ("generator: {sampling_params: [1]}", r"generator.sampling_params must hold keys and values, not \[1\]"),
        (
            "generator: {num_trajectories: '2'}",
            "generator.num_trajectories must be a whole number, at least 1, not '2'",
        ),
        ("generator: {num_trajectories: true}", "not True"),
        ("generator: {num_trajectories: 0}", "not 0"),
        ("dispatcher: {max_parallel_agents: 1.5}", "dispatcher.max_parallel_agents must be .* not 1.5"),
    ],
)
def test_a_file_that_is_wrong_is_a_sentence(tmp_path: Path, text: str | bytes, sentence: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(EnvironmentProblem, match=sentence) as caught:
        read_task_yaml(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    (finding,) = task_file_findings(SETTINGS, path, {"TASK_YAML": "--set"})
    assert (finding.check, finding.level, finding.sentence) == ("task", Level.ERROR, str(caught.value))
    assert "(TASK_YAML, --set)" in finding.fix and "TASK_YAML=auto" in finding.fix


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(EnvironmentProblem, match=r"cannot read the task file .*(No such file|directory)"):
        read_task_yaml(tmp_path / name)


# --- comparing --------------------------------------------------------------------------------------------------------


def levels(findings: list[Finding]) -> list[Level]:
    return [finding.level for finding in findings]


def test_a_file_that_fits() -> None:
    assert task_findings(SETTINGS, FITS, SOURCES) == []
    assert task_findings(SETTINGS, TaskYaml(PLACE), SOURCES) == []


def test_rollouts_that_differ_are_an_error_with_both_places() -> None:
    (error,) = task_findings(SETTINGS, replace(FITS, num_trajectories=2), SOURCES)
    assert error.level is Level.ERROR
    assert "ROLLOUT_N=8 (/c/x.conf:7)" in error.sentence
    assert f"generator.num_trajectories: 2 ({PLACE})" in error.sentence


@pytest.mark.parametrize(("budget", "words"), [(40000, "may not fit"), (16000, "no response is longer than 16000")])
def test_a_budget_that_differs(budget: int, words: str) -> None:
    (warning,) = task_findings(SETTINGS, replace(FITS, max_prompt_length=budget), SOURCES)
    assert warning.level is Level.WARNING
    assert "MAX_RESPONSE_LENGTH=32768 (--set)" in warning.sentence and words in warning.sentence
    assert f"generator.max_prompt_length: {budget} ({PLACE})" in warning.sentence


def test_a_turn_that_may_ask_for_more_than_the_budget() -> None:
    (warning,) = task_findings(SETTINGS, replace(FITS, max_tokens=32769), SOURCES)
    assert (warning.level, "max_tokens: 32769" in warning.sentence) == (Level.WARNING, True)


def test_agents_that_run_in_turns_are_told() -> None:
    (estimate,) = task_findings(SETTINGS, replace(FITS, max_parallel_agents=96), {})
    assert estimate.level is Level.ESTIMATE
    assert "512 rollouts, TRAIN_BATCH_SIZE=64 (default) × ROLLOUT_N=8 (default)" in estimate.sentence


@pytest.mark.parametrize(("slots", "wanted"), [(16, 512), (95, 512), (96, None), (None, None)])
def test_more_agents_than_sandboxes(slots: int | None, wanted: int | None) -> None:
    settings = replace(SETTINGS, max_parallel_agents=slots)
    found = task_findings(settings, replace(FITS, max_parallel_agents=96), SOURCES)
    warnings = [finding for finding in found if finding.level is Level.WARNING]
    assert bool(warnings) == (wanted is not None)
    for warning in warnings:
        assert f"MAX_PARALLEL_AGENTS={slots} (environment)" in warning.sentence
        assert f"dispatcher.max_parallel_agents: 96 ({PLACE})" in warning.sentence
        assert f"raise MAX_PARALLEL_AGENTS to {wanted}" in warning.fix


def test_fewer_rollouts_than_agents_need_no_more_sandboxes() -> None:
    settings = replace(SETTINGS, train_batch_size=2, max_parallel_agents=16)
    assert task_findings(settings, FITS, SOURCES) == []


# --- TASK_YAML=auto ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dev", "production"])
def test_the_file_of_auto_fits_the_shipped_configurations(tmp_path: Path, name: str) -> None:
    settings = loaded(name)
    write_matching(written(tmp_path), tmp_path / "made.yaml", settings)
    compared = replace(settings, max_parallel_agents=None, task_yaml="made.yaml")
    assert task_file_findings(compared, tmp_path / "made.yaml", {}) == []
    assert task_file_findings(compared, tmp_path / "task.yaml", {}) != []
    assert task_file_findings(settings, tmp_path / "task.yaml", {}) == []


def test_an_example_that_cannot_be_read_is_an_error_too(tmp_path: Path) -> None:
    (finding,) = task_file_findings(loaded("dev"), tmp_path / "absent.yaml", {"TASK_YAML": "/c/dev.conf:9"})
    assert finding.level is Level.ERROR
    assert finding.fix == "correct it or name another one (TASK_YAML, /c/dev.conf:9)"


def test_all_else_of_the_example_stays(tmp_path: Path) -> None:
    write_matching(written(tmp_path), tmp_path / "made.yaml", SETTINGS)
    text = (tmp_path / "made.yaml").read_text(encoding="utf-8")
    made, example = yaml.safe_load(text), yaml.safe_load(EXAMPLE_TEXT)
    expected: dict[str, Any] = example
    expected["generator"] |= {"num_trajectories": 8, "max_prompt_length": 32768}
    expected["dispatcher"] |= {"max_parallel_agents": 512}
    assert made == expected
    assert list(made) == list(example)
    assert text.startswith(f"# Made from {tmp_path}/task.yaml, with the numbers of this run's settings")


def test_a_turn_takes_no_more_than_the_budget() -> None:
    example = {"generator": {"sampling_params": {"max_tokens": 31232}}}
    made = matching(example, replace(SETTINGS, max_response_length=8192), PLACE)
    assert made["generator"]["sampling_params"]["max_tokens"] == 8192
    assert example == {"generator": {"sampling_params": {"max_tokens": 31232}}}


def test_sections_that_an_example_lacks_are_made() -> None:
    assert matching({"generator": None}, SETTINGS, PLACE) == {
        "generator": {
            "num_trajectories": 8,
            "max_prompt_length": 32768,
            "sampling_params": {"max_tokens": 32768},
        },
        "dispatcher": {"max_parallel_agents": 512},
    }


def loaded(config: str, *words: str) -> Settings:
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/home/me"}
    folder = ROOT / "slurm" / "config"
    return load_config(config, words, environment, folder, datetime(2026, 3, 4), Path("/project")).settings


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("auto", f"{RUN.path}/task.yaml"),
        ("./examples/run_verl/verl_oh.yaml", "/project/SkyRL/skyrl-agent/examples/run_verl/verl_oh.yaml"),
        ("../x.yaml", "/project/SkyRL/x.yaml"),
        ("/t/x.yaml", "/t/x.yaml"),
        ("~/x.yaml", "/home/me/x.yaml"),
    ],
)
def test_the_path_that_verl_gets_is_absolute(value: str, expected: str) -> None:
    assert task_file(loaded("dev", f"TASK_YAML={value}"), RUN) == Path(expected)


def test_when_a_file_is_made() -> None:
    assert task_example(loaded("dev", "TASK_YAML=auto")) == Path("/project/SkyRL/skyrl-agent") / EXAMPLE
    assert task_example(loaded("dev", "TASK_YAML=mine.yaml")) is None
    assert task_example(loaded("dev", "TASK_YAML=auto", "TRAINING_COMMAND=true")) is None


@pytest.mark.parametrize("training", [True, False])
def test_it_is_there_at_launch(tmp_path: Path, training: bool) -> None:
    """And only where a training is launched that will read it."""
    agent = tmp_path / "SkyRL" / "skyrl-agent"
    (agent / EXAMPLE).parent.mkdir(parents=True)
    (agent / EXAMPLE).write_text(EXAMPLE_TEXT)
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    words = [f"SKYRL_PROJECT_ROOT={tmp_path}"]
    now, folder = datetime(2026, 3, 4), ROOT / "slurm" / "config"
    config = load_config("dev", words, without_slurm(environment), folder, now, tmp_path)
    plan = make_plan(config, Request(training=training), environment, ROOT, "/python", now)
    directory = CoordinationDir(tmp_path / "run")
    directory.path.mkdir()
    added: list[Path] = []
    furnish(directory, plan, {"runtime": "1", "training": "2"}, ROOT, added)
    assert directory.task_yaml.exists() == training == (directory.task_yaml in added)
    if training:
        assert read_task_yaml(directory.task_yaml).num_trajectories == config.settings.rollout_n


def test_a_job_without_a_launch_makes_it_and_leaves_an_edited_one(tmp_path: Path) -> None:
    agent, directory = tmp_path / "SkyRL" / "skyrl-agent", CoordinationDir(tmp_path / "run")
    for path in ((agent / EXAMPLE).parent, directory.path):
        path.mkdir(parents=True)
    (agent / EXAMPLE).write_text(EXAMPLE_TEXT)
    settings = loaded("dev", f"SKYRL_PROJECT_ROOT={tmp_path}")
    ensure_task_yaml(loaded("dev", "TASK_YAML=mine.yaml"), directory)
    assert not directory.task_yaml.exists()
    ensure_task_yaml(settings, directory)
    assert read_task_yaml(directory.task_yaml).num_trajectories == settings.rollout_n
    directory.task_yaml.write_text("generator: {num_trajectories: 5}")
    ensure_task_yaml(settings, directory)
    assert read_task_yaml(directory.task_yaml).num_trajectories == 5
