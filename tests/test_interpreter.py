"""Which interpreter a job was submitted with, told so that a job can see whether it is another one now."""

from __future__ import annotations

from importlib import metadata

from slurm.lib.bootstrap import PACKAGES
from slurm.lib.interpreter import ABSENT, changes, mark


def test_the_mark_tells_every_package() -> None:
    told = dict(part.split("=") for part in mark().split(","))
    assert set(told) == {"python", *PACKAGES}
    assert told["yaml"] == metadata.version("PyYAML")
    assert ABSENT not in told.values()


def test_what_has_changed() -> None:
    assert changes(mark(), mark()) == []
    then, now = "python=3.11.2,fastapi=0.115.0,sh=2.1", "python=3.11.2,fastapi=0.116.0,sh=absent,new=1"
    assert changes(then, now) == ["fastapi 0.115.0 → 0.116.0", "sh 2.1 → absent"]
    assert changes("", now) == [], "submitted directly"
