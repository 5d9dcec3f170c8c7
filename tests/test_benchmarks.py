"""What the benchmarks decide without measuring: bounds and exit codes, what drivers said, how results are shown."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from benchmarks import bash_suite, measure, plots
from benchmarks import peers_side_by_side as side
from benchmarks.peers.install import parsed
from benchmarks.sandbox_crowd import Result, Weight
from benchmarks.sandbox_crowd import aims as crowd_aims

SCRIPTS = [
    path.stem for path in sorted(Path(measure.__file__).parent.glob("*.py")) if path.read_text().startswith("#!")
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_says_what_it_measures(
    script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [script, "--help"])
    main = importlib.import_module(f"benchmarks.{script}").main
    with pytest.raises(SystemExit) as end:
        main(["--help"]) if main.__code__.co_argcount else main()
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "usage:" in said
    assert script == "plots" or "--json" in said


def test_a_missed_bound_is_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert measure.verdict([measure.Aim("ratio", 1.5, 1.5), measure.Aim("rate", 1.0, 1.0, at_least=True)]) == 0
    assert measure.verdict([measure.Aim("ratio", 1.51, 1.5)]) == 1
    assert measure.verdict([measure.Aim("rate", 0.99, 1.0, at_least=True)]) == 1
    assert capsys.readouterr().err == "missed: ratio: 1.51, aimed at ≤ 1.5\nmissed: rate: 0.99, aimed at ≥ 1\n"


def test_a_drivers_lines_are_found_among_others() -> None:
    text = "START 1.5\n[DOCKER] noise\nCOMMAND 0.1\nSTARTED 3\nSTART 2.5\n"
    assert parsed(text) == {"START": [1.5, 2.5], "COMMAND": [0.1]}


def crowd(returned: tuple[int, int]) -> Result:
    return Result(512, 5.0, 9000, 2.0, 10.0, 80.0, returned, 60.1, Weight(60.0, 10_000.0, 3600))


def test_one_token_that_is_not_returned_is_a_miss() -> None:
    assert all(aim.kept for aim in crowd_aims(crowd((512, 512))))
    assert [aim.what for aim in crowd_aims(crowd((512, 511))) if not aim.kept] == ["tokens returned, look 2"]


def figures(start_s: float, up: int) -> side.Figures:
    return side.Figures([start_s], {"OpenHands' SDK": [0.01]}, [side.Capacity(4, up, 2.0)])


def test_the_bounds_beside_peers() -> None:
    found = {side.OURS: figures(0.1, 4), side.PODMAN: figures(0.1, 4), side.SWE: figures(1.0, 1)}
    assert all(aim.kept for aim in side.aims(found))
    found[side.OURS] = figures(0.31, 3)
    missed = [aim.what for aim in side.aims(found) if not aim.kept]
    assert missed == ["start / podman run -d", "start / SWE-ReX", "up of 4"]


def test_a_system_that_does_not_run_is_in_the_table_with_its_reason() -> None:
    found = {side.OURS: figures(0.1, 4), side.PODMAN: figures(0.1, 4), side.CRUN: side.Figures(refused="no crun")}
    text = side.report(found, {"cpus": "2"})
    assert "| crun | no crun |" in text and "4 of 4, 2.0 s" in text


def test_what_does_not_fit_into_memory_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "available_mb", lambda: 3000.0)
    system = side.Peer(lambda *_: pytest.fail("it was run"), {}, each_mb=330.0)
    assert "not run" in str(side.capacity(system, 64))


def test_a_job_that_stays_misses_the_bound() -> None:
    stays = bash_suite.Ending("fails", 1.0, None, ("runtime",))
    goes = bash_suite.Ending("clean", 1.0, 0.6)
    assert all(aim.kept for aim in bash_suite.aims([goes], bash_suite.RECORDED))
    assert [aim.what for aim in bash_suite.aims([goes, stays], bash_suite.RECORDED) if not aim.kept] == ["fails, s"]
    assert [one.what for one in bash_suite.RECORDED] == list(bash_suite.ENDINGS)


def test_recorded_figures_are_said_to_be_recorded() -> None:
    text = bash_suite.report(bash_suite.RECORDED, bash_suite.RECORDED, bash_suite.RECORDED_HEAD)
    assert "recorded earlier, not run here" in text and "the runtime job stays" in text


def test_the_plots_are_drawn_from_the_results_in_the_tree(tmp_path: Path) -> None:
    assert plots.main(["--out", str(tmp_path)]) == 0
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == ["benchmarks-endings.svg", "benchmarks-peers.svg"]
    results = json.loads((Path(plots.CHECKOUT) / "benchmarks/results/peers_side_by_side.json").read_text())
    for name, found in results["systems"].items():
        assert found["refused"] or name in (tmp_path / "benchmarks-peers.svg").read_text()
