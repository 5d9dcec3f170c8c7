"""``launch.py open``: how to look at a run's sandbox page, from here and from a laptop that reaches only this host.

Where the node does not answer from here, but ``ssh`` to it does, the way is a tunnel that this command holds open.
"""

from __future__ import annotations

import getpass
import json
import shlex
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from slurm.lib.command_line import Parser, say
from slurm.lib.coordination import CoordinationDir, host_name
from slurm.lib.errors import EXIT_ENVIRONMENT, EXIT_OK, NotRunning
from slurm.lib.logs import log
from slurm.lib.observe import nodes
from slurm.lib.observe.run_files import key_of, read_small
from slurm.lib.observe.run_view import RunView, is_ready
from slurm.lib.observe.survey import Survey
from slurm.lib.observe.unknown import Unknown
from slurm.lib.reports.run_words import SCHEMA, job_words
from slurm.lib.runs import FoundRun
from slurm.lib.runtime_client import RuntimeClient, address_of, is_host
from slurm.lib.scheduler import Slurm
from slurm.lib.settings import port
from slurm.lib.signals import SignalNotes
from slurm.lib.tunnel import LOOPBACK, free_port, tunnel
from slurm.lib.verbs.named import HELP, is_worker, named, worker_name

ANSWER_S = 3.0
LOOK_EVERY_S = 10.0  # whether the run still serves, while a tunnel is open: its files; Slurm each time costs one squeue
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
EPILOG = """\
The page asks for a user name, any, and a password: the run's key, which stands in the file that is named.

exit codes: 0 shown, or the run ended while a tunnel was open; 2 there is no such run, or the command line is wrong; 69
the run has no API server now; 71 neither this host nor ssh from it reaches the server, or the port is taken; 128+N
stopped by signal N (130: Ctrl-C).
"""


def build_parser() -> Parser:
    parser = Parser(prog="launch.py open", description="Tell how to look at a run's sandbox page.", epilog=EPILOG)
    parser.add_argument("run", metavar="RUN", help=HELP)
    parser.add_argument("--port", metavar="N", type=port, help="the port on your laptop, and of a tunnel from here")
    own = "that of worker N's own server; the page of the run shows all nodes"
    parser.add_argument("--worker", metavar="N", type=worker_name, help=own)
    parser.add_argument("--print", action="store_true", dest="only_print", help="only tell; never open a tunnel")
    parser.add_argument("--json", action="store_true", help="as one JSON object; implies --print")
    return parser


@dataclass(frozen=True)
class Page:
    """Where a run's API server is.

    ``host`` is its node, ``target`` (HOST:PORT) its address as seen from there; ``reachable`` whether it answers here.
    ``key_file`` holds the password.
    """

    run: str
    host: str
    target: str
    reachable: bool
    key_file: Path

    @property
    def server_port(self) -> int:
        return int(self.target.rpartition(":")[2])


def main(argv: Sequence[str], notes: SignalNotes) -> int:
    """The verb; returns its exit code."""
    arguments = build_parser().parse_args(argv)
    survey = Survey(Slurm(), notes)
    (run,) = named([arguments.run], survey.slurm)
    (view,) = survey.look([run], servers=False)
    page = page_of(view, arguments.worker or "")
    if arguments.json:
        return EXIT_OK if say(as_json(page, arguments.port)) else EXIT_ENVIRONMENT
    if page.reachable and not has_page(f"http://{page.target}", key_of(CoordinationDir(page.key_file.parent))):
        log.warning("its server has no page: it is another than ours (SLURM_RUNTIME_DIR), or refuses the key")
    if page.reachable or arguments.only_print:
        return EXIT_OK if say(as_text(page, arguments.port)) else EXIT_ENVIRONMENT
    return hold_open(page, arguments.port, Serving(survey, run), notes)


def page_of(view: RunView, worker: str = "") -> Page:
    """Where the server is that serves now, or that of a worker; ``NotRunning`` with how the run is, where none does."""
    runtime = view.pair.job("runtime") if view.pair else None
    directory, name = view.record.directory, view.record.name
    if runtime is None or directory is None:
        raise NotRunning(f"{name} has no runtime job; the page is that of the runtime which it joined")
    if not runtime.may_run:
        words = job_words(runtime, time.time())
        raise NotRunning(f"{name} ({view.state.value}) has no page: runtime job {runtime.job_id}: {words}")
    url = read_small(directory.runtime_url)
    if isinstance(url, Unknown) or view.pair is None or not is_ready(view.pair, view.record):
        raise NotRunning(f"the API server of {name} is not ready: launch.py status {name} tells how far it is")
    address = own_address(view, worker, url.strip(), directory) if worker else url.strip()
    return located(name, address, view.record.host, directory)


def own_address(view: RunView, worker: str, url: str, directory: CoordinationDir) -> str:
    """The address of a worker's own server, as the head at ``url`` knows it."""
    known = [one.job_id for one in (view.pair.workers if view.pair else ()) if is_worker(one.job_id, worker)]
    if not known:
        raise NotRunning(f"{view.record.name} has no worker {worker}")
    found = nodes.ask(url, key_of(directory), ANSWER_S)
    if isinstance(found, Unknown):
        raise NotRunning(f"{found.why}, so where the worker {known[0]} is is not known")
    node = nodes.of_worker(found, known[0])
    if node is None or node.state in {"lost", "left"}:
        raise NotRunning(
            f"the worker {known[0]} " + (f"has {node.state}: {node.reason}" if node else "has not joined yet")
        )
    return node.url


def located(run: str, url: str, launched_from: str, directory: CoordinationDir) -> Page:
    """The page at an address; one of a loopback address is on the host that the run was launched from."""
    address = address_of(url)
    if address is None:
        raise NotRunning(f"{directory.runtime_url} holds no address: {url[:100]!r}")
    host, number = address
    is_elsewhere = host in LOCAL_NAMES and launched_from not in {"", host_name()}
    if is_elsewhere and not is_host(launched_from):
        raise NotRunning(f"{directory.run_record} names no host that {run} was launched from: {launched_from[:100]!r}")
    node = launched_from if is_elsewhere else host
    reachable = not is_elsewhere and answers(url)
    target = f"[{host}]:{number}" if ":" in host else f"{host}:{number}"
    return Page(run, node, target, reachable, directory.runtime_api_key)


def answers(url: str) -> bool:
    """Whether the server answers from here; it is asked without the key."""
    return RuntimeClient(url, None).ask("GET", "/health", ANSWER_S).status == 200


def has_page(url: str, key: str | None) -> bool:
    """Whether the server has the page, as ours has."""
    return RuntimeClient(url, key).page("/", ANSWER_S).ok


# --- what is told -----------------------------------------------------------------------------------------------------


def own_name() -> str:
    """This host's name for others: the full one, where there is one."""
    full = socket.getfqdn()
    return host_name() if full.startswith("localhost") else full


def laptop_argv(page: Page, wanted: int | None, tunnel_port: int | None = None) -> list[str]:
    """The command to run on a laptop, for a browser there; through a tunnel that is open here, if one is."""
    own, here = wanted or tunnel_port or page.server_port, f"{getpass.getuser()}@{own_name()}"
    if tunnel_port:
        return ["ssh", "-N", "-L", f"{own}:{LOOPBACK}:{tunnel_port}", here]
    if page.reachable or page.host in LOCAL_NAMES:
        return ["ssh", "-N", "-L", f"{own}:{page.target}", here]
    return ["ssh", "-N", "-L", f"{own}:{page.target}", "-J", here, f"{getpass.getuser()}@{page.host}"]


def as_text(page: Page, wanted: int | None, tunnel_port: int | None = None) -> str:
    """What a person is told: the address here, the command for a laptop and the address there, where the key is."""
    local = wanted or tunnel_port or page.server_port
    here = f"http://{page.target}/" if page.reachable else "does not answer: the node is not reachable directly"
    here = f"http://{LOOPBACK}:{tunnel_port}/" if tunnel_port else here
    lines = [
        ("from this host", here),
        ("on your laptop", shlex.join(laptop_argv(page, wanted, tunnel_port))),
        ("and there", f"http://localhost:{local}/"),
        ("user name", "any"),
        ("password", f"the key in {page.key_file}"),
    ]
    return f"sandbox page of {page.run}\n" + "".join(f"  {label:<14}  {words}\n" for label, words in lines)


def as_json(page: Page, wanted: int | None) -> str:
    """The same for scripts; without the key."""
    told = {
        "schema": SCHEMA,
        **{name: str(value) if isinstance(value, Path) else value for name, value in asdict(page).items()},
        "url": f"http://{page.target}/" if page.reachable else None,
        "laptop_command": laptop_argv(page, wanted),
        "laptop_url": f"http://localhost:{wanted or page.server_port}/",
    }
    return json.dumps(told, indent=2) + "\n"


# --- a tunnel ---------------------------------------------------------------------------------------------------------


@dataclass
class Serving:
    """Whether a run's server still serves."""

    survey: Survey
    run: FoundRun

    def end(self) -> str:
        """Why it does not; empty while it does, or that is not known."""
        (view,) = self.survey.look([self.run], servers=False)
        runtime = view.pair.job("runtime") if view.pair else None
        over = view.state.is_over or (runtime is not None and not runtime.may_run)
        return f"{view.record.name} is {view.state.value}" if over else ""


def hold_open(page: Page, wanted: int | None, serving: Serving, notes: SignalNotes) -> int:
    """Hold a tunnel open until the run's server ends, or a signal comes."""
    number = free_port(wanted)
    log.info("%s does not answer from this host; going through ssh", page.target)
    with tunnel(number, page.target, page.host, notes.check) as way:
        if not say(as_text(page, wanted, number)):
            return EXIT_ENVIRONMENT
        log.info("this tunnel ends with Ctrl-C, or with the run; Ctrl-C does not end the run")
        end = watch(way.check, serving, notes)
    log.info("%s; the tunnel is closed", end)
    return EXIT_OK


def watch(check: Callable[[], None], serving: Serving, notes: SignalNotes) -> str:
    """Wait for the end of the server, and return why; raises what ``check`` raises."""
    while True:
        later = time.monotonic() + LOOK_EVERY_S
        while time.monotonic() < later:
            notes.sleep(0.2)
            notes.check()
            check()
        if end := serving.end():
            return end
