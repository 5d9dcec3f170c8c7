"""The head of a runtime on several nodes, as the runtime job's child; its address is the one that clients use.

It has what the API server has (``api_server_child``): a listening socket that it inherits, so that one that was killed
comes back at the same address, and a stdin by which it is stopped.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from slurm.lib.api_server_child import ApiServer, listening_socket, public_host
from slurm.lib.coordination import write_atomically
from slurm.lib.job_context import JobContext
from slurm.lib.processes import ChildSpec
from slurm.lib.serving import Ground


def head_spec(job: JobContext, descriptor: int, key_file: Path, stop_s: float) -> ChildSpec:
    """The process of the head, which listens on the socket ``descriptor``."""
    flags = ("--fd", str(descriptor), "--api-key-file", str(key_file), "--public-host", public_host(job.is_local))
    ends = ("--stop-with-stdin", "--stop-timeout", f"{0.8 * stop_s:g}")
    switches = ("--verbose",) if job.settings.skyrl_debug else ()
    return ChildSpec(
        (sys.executable, "-m", "slurm_runtime.head", *flags, *ends, *switches),
        {**job.open_environment, "PYTHONPATH": str(job.code)},
        "the head",
        cwd=job.code,  # Python looks there first
        stdin_pipe=True,
        stderr=subprocess.PIPE,
        pass_fds=(descriptor,),
        ignores_stops=True,
    )


@contextlib.contextmanager
def head_of(job: JobContext, ground: Ground, key: str) -> Iterator[ApiServer]:
    """The head, started (not yet answering), on RUNTIME_PORT or in RUNTIME_PORT_RANGE; stopped at the block's end."""
    key_file = ground.storage.root / "head_api_key"
    write_atomically(key_file, key + "\n", 0o600)
    settings, stop_s = job.settings, ground.budget.service_s
    with listening_socket("0.0.0.0", settings.runtime_port, settings.runtime_port_range) as listener:
        spec = head_spec(job, listener.fileno(), key_file, stop_s)
        where = (public_host(job.is_local), listener.getsockname()[1])
        own = ground.guardian.own_session
        with ApiServer(spec, key, *where, is_ours=True, stop_s=stop_s, own_session=own, again=()) as head:
            yield head
