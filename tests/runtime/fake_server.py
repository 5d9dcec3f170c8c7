"""The API server as a program, on the Podman in memory: for many requests in a short time."""

from __future__ import annotations

from pathlib import Path

import slurm_runtime.podman
from slurm_runtime.api_server import main
from tests.runtime.fake_podman import FakePodman


def fake(_socket: Path, _logins: Path | None) -> FakePodman:
    return FakePodman(delay_s=0.002)


if __name__ == "__main__":
    slurm_runtime.podman.Podman = fake  # type: ignore[misc,assignment]
    main()
