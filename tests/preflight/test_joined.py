"""The check of a runtime that is joined: its folder, its job, its server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from slurm.lib.coordination import CoordinationDir, Flag
from slurm.lib.plan import Request
from slurm.lib.preflight.finding import Finding, Level
from slurm.lib.preflight.joined import JoinedServer, ask_server, look_at_folder, server_findings
from slurm.lib.runtime_client import Answer
from tests.preflight.world import World, join, of

ERROR, WARNING, ESTIMATE = Level.ERROR, Level.WARNING, Level.ESTIMATE
KEY = "sk-of-the-server"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@contextmanager
def server(codes: dict[str, int]) -> Iterator[str]:
    """A server that answers ``/list`` only to its key; ``codes`` are its answers otherwise. Yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fits = self.path == "/health" or self.headers.get("X-API-Key") == KEY
            self.send_response(codes.get(self.path, 200) if fits else 401)
            self.end_headers()
            self.wfile.write(json.dumps({"detail": "its words"}).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("codes", "key", "level", "said"),
    [
        ({}, KEY, ESTIMATE, "answers and takes the key"),
        ({}, "sk-another", ERROR, "refused the key (HTTP 401: its words)"),
        ({}, None, ERROR, "refused the key"),
        ({"/list": 404}, KEY, ESTIMATE, "answers"),  # a server of another kind
        ({"/health": 503}, KEY, WARNING, "does not answer here (HTTP 503: its words)"),
    ],
)
def test_a_server(codes: dict[str, int], key: str | None, level: Level, said: str) -> None:
    with server(codes) as url:
        (found,) = server_findings(ask_server(url, key))
    assert (found.level, said in found.sentence) == (level, True), found
    assert KEY not in str(found)


def test_a_server_out_of_reach_is_a_warning(closed_port: int) -> None:
    (found,) = server_findings(ask_server(f"http://127.0.0.1:{closed_port}", KEY))
    assert (found.level, "does not answer here (ConnectionRefusedError" in found.sentence) == (WARNING, True)


@pytest.fixture
def closed_port() -> int:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as http:
        return http.server_port


def only(found: list[Finding]) -> list[tuple[Level, str]]:
    return [(finding.level, finding.sentence) for finding in of(found, "runtime")]


def test_one_that_runs_and_answers(world: World) -> None:
    with server({}) as url:
        directory = join(world, url=url, key=KEY)
        assert only(world.check(request=directory)) == [(ESTIMATE, f"the runtime at {url} answers and takes the key")]
    assert [call.argv[5] for call in world.slurm.of("squeue")] == ["101"], "Slurm is asked about its job"


def test_one_by_address_alone(world: World) -> None:
    with server({}) as url:
        request = Request(runtime=False, runtime_url=url)
        assert only(world.check(f"ALLHANDS_API_KEY={KEY}", request=request))[0][0] is ESTIMATE
        assert only(world.check("ALLHANDS_API_KEY=sk-another", request=request))[0][0] is ERROR
        assert only(world.check("RESTARTS=2", f"ALLHANDS_API_KEY={KEY}", request=request)) == [
            (WARNING, "RESTARTS=2 has no effect: this job is not one of a pair that is launched together"),
            (ESTIMATE, f"the runtime at {url} answers and takes the key"),
        ]
    assert not world.slurm.of("squeue")


def test_nothing_is_asked_of_one_that_has_ended(world: World) -> None:
    request = join(world, url="http://127.0.0.1:1", key=KEY)
    assert request.attach_dir
    run = CoordinationDir(request.attach_dir)
    run.publish(run.runtime_failed, Flag.of_this_host("101", "101", 71, "no Podman"))
    ((level, sentence),) = only(world.check(request=request))
    assert (level, sentence.partition(" has ended ")[2]) == (ERROR, "(runtime_failed.flag: exit code 71, no Podman)")
    assert not world.slurm.of("squeue")


@pytest.mark.parametrize("flag", ["", "another"])
def test_a_flag_that_is_not_this_attempts_says_nothing(world: World, flag: str) -> None:
    """An empty one may be left from before, and another attempt's is."""
    request = join(world)
    assert request.attach_dir
    run = CoordinationDir(request.attach_dir)
    run.training_complete.touch()
    if flag:
        run.publish(run.training_complete, Flag.of_this_host("99", "98", 0, "the trainer ended"))
    assert look_at_folder(run.path, "101").ended is None
    assert only(world.check(request=request)) == []


def test_a_local_run_is_looked_up_here(world: World) -> None:
    request = join(world, job_id="local77.0")
    (world.slurm.jobs / "20260304_050607_local77.0" / "local_jobs.txt").write_text("local77.0 1 1\n")
    ((level, sentence),) = only(world.check(request=request))
    assert (level, "its process 1 is gone" in sentence) == (ERROR, True)
    assert not world.slurm.of("squeue")


@pytest.mark.parametrize(
    "url", ["http://[fe80", "http://$(touch x):1", "http://-x:1", "http://h:1/\x1b[2J", "nonsense"]
)
def test_what_is_no_address_is_an_error_and_no_word_of_a_command(url: str) -> None:
    (found,) = server_findings(ask_server(url, KEY))
    assert found.level is Level.ERROR
    assert found.sentence == f"the runtime's address is none: {url!r}"


def test_the_command_that_is_advised_is_quoted() -> None:
    (found,) = server_findings(JoinedServer("http://cpu-a:1/$(reboot)", Answer(0, "none")))
    assert "try `curl 'http://cpu-a:1/$(reboot)/health'` on one" in str(found.fix)
