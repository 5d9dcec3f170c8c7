"""Which VERL skyrl-agent has, and what is found to be wrong with it before anything is queued."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from slurm.lib.preflight.finding import Finding, Level
from slurm.lib.preflight.verl import verl_findings
from slurm.lib.settings import Settings
from slurm.lib.verl_versions import KNOWN, Origin, VerlVersion, exists_in, find_verl, name_in, parse_lock

PLACE = Path("/agent/uv.lock")
FORK = "https://github.com/NovaSky-AI/verl-fork?rev=fc628e73#fc628e7300000000000000000000000000000000"
HEAD = 'version = 1\nrequires-python = "==3.12.*"\n\n[[package]]\nname = "vllm"\nversion = "0.8.5"\n'


def entry(version: str | None, source: str) -> str:
    said = f'version = "{version}"\n' if version else ""
    return f'{HEAD}\n[[package]]\nname = "verl"\n{said}source = {{ {source} }}\n'


def verl(version: str, source: str = "") -> VerlVersion:
    return VerlVersion(version, source, PLACE)


SKYRL = verl("0.5.0", FORK)


# --- what the lock file says ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (entry("0.9.1", 'registry = "https://index.example/simple"'), ("0.9.1", Origin.STOCK)),
        (entry("0.5.0", f'git = "{FORK}"'), ("0.5.0", Origin.SKYRL)),
        (entry("0.7.1", 'git = "https://github.com/volcengine/verl.git?tag=v0.7.1#abc"'), ("0.7.1", Origin.STOCK)),
        (entry("0.7.1", 'git = "https://github.com/verl-project/verl#abc"'), ("0.7.1", Origin.STOCK)),
        (entry("0.5.0", 'git = "https://github.com/someone/verl#abc"'), ("0.5.0", Origin.OTHER)),
        (entry("0.5.0", 'editable = "../verl"'), ("0.5.0", Origin.OTHER)),
        (entry(None, 'directory = "../verl"'), ("of no stated version", Origin.OTHER)),
    ],
)
def test_the_verl_of_a_lock(text: str, expected: tuple[str, Origin]) -> None:
    found = parse_lock(text, PLACE)
    assert found is not None
    assert (found.text, found.origin) == expected


@pytest.mark.parametrize("text", [HEAD, "", "not [ toml", "package = 3", "package = [1]", entry("1", "") * 2])
def test_a_lock_that_names_no_verl(text: str) -> None:
    assert parse_lock(text, PLACE) is None


def installed(folder: Path, version: str, address: str = "") -> None:
    info = folder / "lib" / "python3.12" / "site-packages" / f"verl-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: verl\nVersion: {version}\n\nVersion: 9 it is not\n")
    if address:
        (info / "direct_url.json").write_text(f'{{"url": "{address}", "vcs_info": {{"vcs": "git"}}}}')


def test_the_lock_decides_unless_uv_leaves_the_environment_alone(tmp_path: Path) -> None:
    assert find_verl(tmp_path, {}) is None
    installed(tmp_path / ".venv", "0.5.0", "https://github.com/NovaSky-AI/verl-fork")
    alone = find_verl(tmp_path, {})
    assert alone and (alone.text, alone.origin) == ("0.5.0", Origin.SKYRL)
    (tmp_path / "uv.lock").write_text(entry("0.9.1", 'registry = "x"'))
    locked = find_verl(tmp_path, {})
    assert locked and (locked.text, locked.origin, locked.place) == ("0.9.1", Origin.STOCK, tmp_path / "uv.lock")
    assert find_verl(tmp_path, {"UV_NO_SYNC": "1"}) == alone


def test_the_environment_may_lie_elsewhere(tmp_path: Path) -> None:
    installed(tmp_path / "venv", "0.6.1")
    assert find_verl(tmp_path, {}) is None
    for place in ("venv", str(tmp_path / "venv")):
        found = find_verl(tmp_path, {"UV_PROJECT_ENVIRONMENT": place})
        assert found and (found.text, found.origin) == ("0.6.1", Origin.STOCK)


@pytest.mark.parametrize(
    ("text", "release", "known"),
    [
        ("0.6.1", (0, 6, 1), True),
        ("0.6.1.post2", (0, 6, 1), True),
        ("0.5.0+cu124", (0, 5, 0), True),
        ("0.9.2", (0, 9, 2), False),
        ("0.4.1", (0, 4, 1), False),
        ("of no stated version", (), False),
    ],
)
def test_releases(text: str, release: tuple[int, ...], known: bool) -> None:
    assert (verl(text).release, verl(text).known) == (release, known)


def test_names_by_release() -> None:
    old, new = "ray_init.num_cpus", "ray_kwargs.ray_init.num_cpus"
    assert [name_in((0, 5, 0), name) for name in (old, new)] == [old, old]
    assert [name_in((0, 6, 0), name) for name in (old, new)] == [new, new]
    assert name_in((0, 9, 1), "trainer.nnodes") == "trainer.nnodes"
    assert [exists_in(release, "trainer.use_v1") for release in ((0, 8, 0), (0, 9, 0))] == [False, True]


# --- what is found ----------------------------------------------------------------------------------------------------


def found(version: VerlVersion | None, *overrides: str, estimator: str = "rloo") -> list[Finding]:
    return verl_findings(Settings(adv_estimator=estimator, verl_overrides=overrides), version)


def errors(version: VerlVersion | None, *overrides: str, estimator: str = "rloo") -> list[Finding]:
    return [one for one in found(version, *overrides, estimator=estimator) if one.level is Level.ERROR]


def test_the_fork_that_skyrl_agent_pins_is_well() -> None:
    assert found(SKYRL, estimator="loop") == []
    assert all(one.check == "verl" and one.fix for one in found(verl("9.9"), "ray_init.num_cpus=1", estimator="loop"))


@pytest.mark.parametrize("version", KNOWN)
def test_loop_with_a_stock_verl_is_an_error_that_names_rloo(version: str) -> None:
    (error,) = errors(verl(version), estimator="loop")
    assert "ADV_ESTIMATOR=loop" in error.sentence and f"stock VERL {version} ({PLACE})" in error.sentence
    assert "ADV_ESTIMATOR=rloo" in error.fix
    assert errors(verl(version)) == []


def test_the_estimator_of_an_override_counts() -> None:
    assert errors(verl("0.9.1"), "algorithm.adv_estimator=grpo", estimator="loop") == []
    (error,) = errors(verl("0.9.1"), "algorithm.adv_estimator='loop'", estimator="grpo")
    assert error.sentence.startswith("VERL_OVERRIDES: algorithm.adv_estimator=loop")


def test_another_fork_may_have_loop() -> None:
    (warning,) = found(verl("0.5.0", "https://github.com/someone/verl"), estimator="loop")
    assert (warning.level, "may lack it" in warning.sentence) == (Level.WARNING, True)


def test_a_stock_verl_is_said_to_need_an_adapted_skyrl_agent() -> None:
    (warning,) = found(verl("0.6.1"))
    assert (warning.level, "verl-fork" in warning.fix) == (Level.WARNING, True)


@pytest.mark.parametrize("version", [None, verl("0.9.2", FORK), verl("1.0", FORK), verl("x", FORK)])
def test_what_is_not_known_is_said_with_what_is(version: VerlVersion | None) -> None:
    (warning,) = found(version)
    assert warning.level is Level.WARNING
    assert all(release in warning.fix for release in KNOWN)


@pytest.mark.parametrize(
    ("version", "override", "fix"),
    [
        ("0.6.0", "ray_init.num_cpus=8", "there it is ray_kwargs.ray_init.num_cpus"),
        ("0.9.1", "+ray_init.num_cpus=8", "there it is ray_kwargs.ray_init.num_cpus"),
        ("0.5.0", "ray_kwargs.ray_init.num_cpus=8", "there it is ray_init.num_cpus"),
        ("0.8.0", "trainer.use_v1=False", "leave it out"),
        ("0.5.0", "actor_rollout_ref.nccl_timeout=9", "leave it out"),
        ("0.7.0", "actor_rollout_ref.rollout.mode=sync", "use actor_rollout_ref.rollout.mode=async"),
        ("0.6.1", "actor_rollout_ref.rollout.name='hf'", "use actor_rollout_ref.rollout.name=vllm"),
    ],
)
def test_overrides_that_a_release_lacks(version: str, override: str, fix: str) -> None:
    (error,) = errors(verl(version), override)
    assert error.fix == fix
    assert f"stock VERL {version}" in error.sentence


@pytest.mark.parametrize(
    ("version", "override"),
    [
        ("0.5.0", "ray_init.num_cpus=8"),
        ("0.6.0", "ray_kwargs.ray_init.num_cpus=8"),
        ("0.9.0", "trainer.use_v1=False"),
        ("0.6.1", "actor_rollout_ref.rollout.mode=sync"),
        ("0.5.0", "actor_rollout_ref.rollout.name=hf"),
        ("0.9.1", "trainer.nnodes=2"),
        ("0.9.1", "~data.train_files"),
        ("0.9.9", "ray_init.num_cpus=8"),
    ],
)
def test_overrides_that_a_release_has(version: str, override: str) -> None:
    assert errors(verl(version), override) == []


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (("data.train_batch_size=16", "actor_rollout_ref.rollout.n=4"), ["TRAIN_BATCH_SIZE", "ROLLOUT_N"]),
        (("trainer.n_gpus_per_node=1", "trainer.nnodes=2"), ["GPUS_PER_NODE", "GPU_NODES"]),
        (("trainer.logger=[console]", "~data.train_files"), ["LOGGERS", "TRAIN_DATA or DATA_DIR"]),
        (
            ("+skyrl_agent.num_trajectories=2", "ray_init.num_cpus=8"),
            ["ROLLOUT_N", "TRAINING_CPUS or GPU_NODES or RAY_CLUSTER"],
        ),
        (("trainer.nnodes=2", "trainer.nnodes=3"), ["GPU_NODES"]),
        (("actor_rollout_ref.actor.ppo_mini_batch_size=2", "algorithm.adv_estimator=grpo"), []),
        (("trainer.total_training_steps=9", "data.truncation=left", "trainer.use_v1=False"), []),
    ],
)
def test_overrides_of_what_a_key_says(overrides: tuple[str, ...], keys: list[str]) -> None:
    said = [one.fix for one in found(SKYRL, *overrides) if one.level is Level.WARNING]
    assert said == [f"set {key} instead: slots, batch and memory are checked against the key" for key in keys]
    assert len(found(None, *overrides)) == 1 + len(keys) - ("ray_init.num_cpus=8" in overrides)


def test_another_trainer_needs_no_verl() -> None:
    assert verl_findings(replace(Settings(), training_command="true"), None) == []
