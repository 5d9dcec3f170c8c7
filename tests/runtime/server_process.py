"""An API server as a process of its own, for the length of a block."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.runtime import local_registry
from tests.runtime.test_contract import eventually
from tests.runtime.test_server_process import CHECKOUT, DEADLINE_S, KEY, Server, environment_for


@contextlib.contextmanager
def server_process(
    folder: Path,
    podman: Path,
    *flags: str,
    module: str = "slurm_runtime.api_server",
    ends_with: int = 0,
    **variables: str,
) -> Iterator[Server]:
    """The server with its log in ``folder``; it must end in order, or as its test has it end."""
    log = folder / "server.log"
    environment = {**environment_for(podman, KEY), **variables}
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(local_registry.held_port())
        argv = [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", str(port), *flags]
        with log.open("w") as output:
            process = subprocess.Popen(argv, cwd=CHECKOUT, env=environment, stderr=output, stdout=output, text=True)
        stack.enter_context(process)
        stack.callback(process.kill)
        made = Server(process, port, log, KEY)
        eventually(lambda: made.answers() or process.poll() is not None, DEADLINE_S)
        yield made
        process.terminate()
        assert process.wait(DEADLINE_S) == ends_with
