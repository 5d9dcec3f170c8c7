"""The overrides against the real thing: VERL's own ``ppo_trainer`` configurations, composed by the real Hydra."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from slurm.lib import verl_versions
from slurm.lib.config import load_config
from slurm.lib.coordination import CoordinationDir
from slurm.lib.hydra_grammar import hydra_value
from slurm.lib.settings import Settings, hydra_overrides
from slurm.lib.trainer import trainer_of
from slurm.lib.verl_command import ROWS, Told, command, row_name
from slurm.lib.verl_versions import ADDED, RENAMED, VerlVersion, known_values
from tests.verl_wheels import ESTIMATORS, TRACKING, VERSIONS, Ppo, ppo

CONFIGS = Path(__file__).resolve().parent.parent / "slurm" / "config"
RUN = CoordinationDir(Path("/jobs/20260304_050607_7"))
LOCK = Path("/project/SkyRL/skyrl-agent/uv.lock")


def settings_of(config: str | None, *overrides: str) -> Settings:
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/home/me"}
    now = datetime(2026, 3, 4, 5, 6, 7)
    return load_config(config, overrides, environment, CONFIGS, now, Path("/project")).settings


@pytest.fixture(scope="module", params=VERSIONS)
def verl(request: pytest.FixtureRequest) -> Iterator[Ppo]:
    with ppo(str(request.param)) as release:
        yield release


def overrides(settings: Settings, version: str | None) -> list[str]:
    """What the trainer's command line says after its module."""
    found = VerlVersion(version, "", LOCK) if version else None
    argv = trainer_of(settings, RUN, found).argv
    return list(argv[argv.index("-m") + 2 :])


def plain(config: DictConfig, name: str) -> object:
    found = OmegaConf.select(config, name)
    return OmegaConf.to_container(found) if OmegaConf.is_config(found) else found


def as_composed(value: object) -> object:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


@pytest.mark.parametrize("adapted", [True, False], ids=["its version known", "not known"])
@pytest.mark.parametrize("name", ["dev", "production"])
def test_the_shipped_configurations_compose(verl: Ppo, name: str, adapted: bool) -> None:
    settings = settings_of(name)
    composed = verl.compose(overrides(settings, verl.version if adapted else None))
    OmegaConf.to_container(composed, resolve=True)  # every reference in it leads somewhere
    assert plain(composed, "actor_rollout_ref.rollout.n") == settings.rollout_n
    assert plain(composed, "skyrl_agent.num_trajectories") == settings.rollout_n
    assert plain(composed, "skyrl_agent.task_yaml") == f"{RUN.path}/task.yaml"


# Values that no release has as a default, so that a row that is not taken shows.
OTHER_VALUES = (
    "MODEL=/models/my model, {new}=1",
    "ADV_ESTIMATOR=rloo",
    "DATA_DIR=/data/it's [here]",
    "TRAIN_BATCH_SIZE=36",
    "MAX_PROMPT_LENGTH=4001",
    "MAX_RESPONSE_LENGTH=8003",
    "MAX_MODEL_LEN=12345",
    "LEARNING_RATE=3e-7",
    "RESTARTS=1",
    "RESTART_LEAD=123",
    "SP_SIZE=6",
    "TP_SIZE=3",
    "GPU_MEMORY_UTILIZATION=0.61",
    "ROLLOUT_N=7",
    "LOGGERS=tensorboard,console",
    "WANDB_PROJECT=${oc.env:HOME} 1, 2",
    "WANDB_EXPERIMENT=123",
    "GPUS_PER_NODE=6",
    "TRAINING_CPUS=17",
    "MAX_CKPT_TO_KEEP=4",
    "SAVE_FREQ=3",
    "TEST_FREQ=9",
    "TOTAL_EPOCHS=2",
    "CHECKPOINT_DIR=/ckpt (1)",
    "ROLLOUT_DIR=/rollouts\\",
    "TASK_YAML=mine, too.yaml",
)


SWITCHES = ("ENFORCE_EAGER", "ENABLE_GRADIENT_CHECKPOINTING", "FSDP_PARAM_OFFLOAD", "FSDP_OPTIMIZER_OFFLOAD")
TURNED = ([f"{key}=true" for key in SWITCHES], [*(f"{key}=false" for key in SWITCHES), "GPU_NODES=3"])


def told(settings: Settings) -> Told:
    assert settings.checkpoint_dir and settings.rollout_dir
    return Told(settings, settings.checkpoint_dir, settings.rollout_dir, LOCK.parent / settings.task_yaml)


def test_no_row_is_ignored(verl: Ppo) -> None:
    """Each alone gives VERL the setting's value, type and all; for a key's row that is not what VERL has by itself."""
    before, release = verl.compose(), VerlVersion(verl.version, "", LOCK).release
    both = [told(settings_of(None, *OTHER_VALUES, *turned)) for turned in TURNED]
    for row in ROWS:
        name = row_name(row, release)
        if name is None:
            continue
        values = list(dict.fromkeys(value for value in map(row.value, both) if value is not None))
        for value in values:
            found = plain(verl.compose([f"{name}={hydra_value(value)}"]), name.lstrip("+"))
            assert (found, type(found)) == (as_composed(value), type(as_composed(value))), name
        assert not row.keys or any(plain(before, name.lstrip("+")) != as_composed(value) for value in values), name


@pytest.mark.parametrize("word", ["trainer.nodes=1", "data.train_batchsize=4", "algorithm.adv_estimator=[a"])
def test_what_is_wrong_does_not_compose(verl: Ppo, word: str) -> None:
    settings = settings_of("dev", f"VERL_OVERRIDES={word}")
    with pytest.raises(HydraException):
        verl.compose(overrides(settings, verl.version))


@pytest.mark.parametrize(
    "value",
    [
        *("1,c.d=2", "1, 2", "a,b", "'a','b'", "[1],[2]", "f(1),g(2)", "'a'b,c", "x:y,z"),
        *("[1,2]", "[[1,2],[3]]", "{a:1,b:2}", "'a,b=1'", '"a,b"', "a\\,b", "'it\\'s, b'", "", "[a,'b,c]']"),
    ],
)
def test_a_comma_that_means_several_runs_is_refused_as_hydra_does(value: str) -> None:
    """By Hydra's own grammar: a sweep ends a run that is one."""
    try:
        is_sweep = OverridesParser.create().parse_override(f"a.b={value}").is_sweep_override()
    except HydraException:
        is_sweep = True  # not even that
    try:
        refused = not hydra_overrides((f"a.b={value}",))
    except ValueError as problem:
        refused = True
        words = "joined by a comma; put a space" if "c.d=" in value else "which Hydra takes for several runs"
        assert words in str(problem)
    assert refused == is_sweep


PIECES = ("a", "-1", ",", "'a,b'", '"it\'s, b"', "[1,[2,3]]", "{a:1,b:2}", "f(1,2)", "${x:1,2}", "\\,", "\\'", ":", " ")


@given(st.lists(st.sampled_from(PIECES), max_size=5).map("".join))
def test_nothing_that_hydra_takes_for_one_run_is_refused(value: str) -> None:
    try:
        is_sweep = OverridesParser.create().parse_override(f"a.b={value}").is_sweep_override()
    except HydraException:  # which says so when the training begins
        is_sweep = True
    if not is_sweep:
        assert hydra_overrides((f"a.b={value}",))


def test_the_table_of_differences_is_true(verl: Ppo) -> None:
    config, release = verl.compose(), VerlVersion(verl.version, "", LOCK).release
    for renamed in RENAMED:
        right, wrong = (renamed.new, renamed.old) if release >= renamed.since else (renamed.old, renamed.new)
        assert OmegaConf.select(config, right.rstrip(".")) is not None, renamed
        assert OmegaConf.select(config, wrong.rstrip(".")) is None, renamed
    for added in ADDED:
        there = OmegaConf.select(config, added.name.rstrip(".")) is not None
        assert there == (release >= added.since), added


def assigned(module: ast.Module, holder: str) -> dict[str, ast.expr]:
    """What is assigned in the body of a class."""
    (found,) = [node for node in ast.walk(module) if isinstance(node, ast.ClassDef) and node.name == holder]
    pairs = [(line.targets[0], line.value) for line in found.body if isinstance(line, ast.Assign)]
    return {target.id: value for target, value in pairs if isinstance(target, ast.Name)}


def test_the_estimators_and_loggers_are_those_of_its_code(verl: Ppo) -> None:
    release = VerlVersion(verl.version, "", LOCK).release
    estimators = map(ast.literal_eval, assigned(verl.code(ESTIMATORS), "AdvantageEstimator").values())
    assert set(known_values(verl_versions.ESTIMATORS, release)) == set(estimators)
    loggers = ast.literal_eval(assigned(verl.code(TRACKING), "Tracking")["supported_backend"])
    assert set(known_values(verl_versions.LOGGERS, release)) == {*loggers, "tracking"}
    words = [node.value for node in ast.walk(verl.code(TRACKING)) if isinstance(node, ast.Constant)]
    assert "tracking" in words, "it has a branch of its own"


def test_the_command_is_what_was_composed() -> None:
    settings = settings_of("dev")
    argv = command(settings, RUN.training_env, Path("/c"), Path("/r"), version=VerlVersion("0.9.1", "", LOCK))
    assert "ray_kwargs.ray_init.num_cpus=16" in argv
    assert "trainer.use_v1=False" in argv
    assert "ray_init.num_cpus=16" in command(
        settings, RUN.training_env, Path("/c"), Path("/r"), version=VerlVersion("0.5.0", "", LOCK)
    )
