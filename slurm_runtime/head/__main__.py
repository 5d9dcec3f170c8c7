"""The command line and the process of the head.

Exit codes: 0 stopped; 2 the command line is wrong; 70 a fault of the head; 71 the key's file cannot be written; 98 the
port is taken; 128 + N a second signal N forced the end.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from slurm_runtime import __version__
from slurm_runtime.api_server import (
    EXIT_INTERNAL,
    EXIT_OK,
    StopWish,
    api_key,
    http_server,
    listening_socket,
    port_number,
    positive,
    run_process,
)
from slurm_runtime.logs import log

if TYPE_CHECKING:
    import uvicorn

    from slurm_runtime.head.app import Head
    from slurm_runtime.head.config import HeadConfig

COLLECT_AFTER = (50_000, 20, 50)  # instead of 700, 10, 10: allocations, and rounds of the younger objects


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m slurm_runtime.head",
        description="Serve the sandboxes of several nodes under one address: the head of their API servers, which join "
        "it by themselves (slurm_runtime.api_server --head URL).",
        epilog="Exit codes: 0 stopped; 2 wrong command line; 70 a fault of the head; 71 the key's file cannot be "
        "written; 98 the port is taken; 128+N a second signal N forced the end.",
    )
    parser.set_defaults(disable_auth=False)  # whoever reaches the head could join it as a node
    add = parser.add_argument
    add("--version", action="version", version=f"slurm_runtime {__version__}")
    add("--verbose", action="store_true", help="debug lines, and one line for each request")
    add("--host", default="0.0.0.0", help="address to listen on (default: %(default)s)")
    add("--port", type=port_number, default=8000, help="port to listen on, 0 for a free one (default: 8000)")
    add("--fd", type=int, metavar="N", help="serve on this inherited, listening socket instead of --host and --port")
    add(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="file that holds the key of clients and nodes, mode 0600 (default: ALLHANDS_API_KEY, else a new key)",
    )
    add("--public-host", metavar="NAME", help="the name under which clients and nodes reach the head, for its log")
    add(
        "--stop-timeout",
        type=positive,
        default=5.0,
        metavar="S",
        help="seconds for the last answers at the end (default: 5)",
    )
    add(
        "--stop-with-stdin",
        action="store_true",
        help="stop at the end of standard input, and ignore SIGTERM, SIGINT and SIGHUP: for a parent that stops its "
        "children in order, or dies",
    )
    return parser


def collect_seldom() -> None:
    """Look for cycles of objects seldom, and never among what is there already: a look stops all requests.

    Requests make few cycles, and what is looked through grows with the sandboxes: at 200 starts a second the collector
    took a tenth of the CPU time, and one answer in a hundred waited 60 ms for it.
    """
    gc.freeze()
    gc.set_threshold(*COLLECT_AFTER)


async def serve(args: argparse.Namespace, config: HeadConfig, listening: socket.socket) -> int:
    """Serve until told to stop; the exit code."""
    from slurm_runtime.head.app import Head, create_app

    wish = StopWish(asyncio.get_running_loop(), asyncio.Event())
    wish.heed_stdin() if args.stop_with_stdin else wish.heed_signals()
    head = Head.of(config)
    server = http_server(create_app(head, config))
    collect_seldom()
    return await _serve_until(wish.event, server, listening, head, args.stop_timeout)


async def _serve_until(
    stop: asyncio.Event, server: uvicorn.Server, listening: socket.socket, head: Head, stop_timeout_s: float
) -> int:
    """Starts that are under way end with 503, then the server ends; sandboxes and nodes go on."""
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    watching = asyncio.create_task(head.run())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([serving, watching, stopped], return_when=asyncio.FIRST_COMPLETED)
    on_request = stopped.done()
    watching.cancel()
    head.starts.close()
    server.should_exit = True
    await asyncio.wait([serving], timeout=stop_timeout_s)
    server.force_exit = True
    await head.close()
    outcomes = await asyncio.gather(serving, watching, return_exceptions=True)
    stopped.cancel()
    if not on_request:
        log.error("the head ended by itself, a fault of it: %s", [repr(outcome) for outcome in outcomes])
        return EXIT_INTERNAL
    log.info("stopped; the nodes go on by themselves")
    return EXIT_OK


def run(args: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """The head's life; ``StartProblem`` if it cannot begin."""
    from slurm_runtime.head.config import HeadConfig

    with listening_socket(args) as listening:
        host, port = listening.getsockname()[:2]
        with api_key(args, environment, port) as key:
            assert key is not None
            shown = args.public_host or host
            log.info("head on http://%s:%d; nodes join with --head", f"[{shown}]" if ":" in shown else shown, port)
            return asyncio.run(serve(args, HeadConfig(key), listening))


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Parse, serve, exit."""
    run_process(build_parser().parse_args(argv), run)


if __name__ == "__main__":
    main()
