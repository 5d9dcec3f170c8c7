"""prebuild_images: names by dataset, the report, archives, and the command with a real registry and Podman."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]  # it brings no types
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest

from slurm_runtime import archive_folder
from slurm_runtime.archive_folder import ArchiveFolder, is_abandoned
from slurm_runtime.dataset_images import PREFIX, NoImages, images_of
from slurm_runtime.prebuild import CannotWrite, Prebuild
from slurm_runtime.prebuild_images import build_parser, line_for, main
from slurm_runtime.prebuild_report import FAILED, FETCHED, HERE, MISSING, Outcome, Report, read
from slurm_runtime.references import archive_name
from tests.runtime import local_registry, podman_service
from tests.runtime.fake_podman import FakePodman
from tests.runtime.local_registry import Refuser, Registry, push_new, refuser_before, registries_conf, registry
from tests.runtime.server_process import server_process
from tests.runtime.test_server_process import environment_for
from tests.users import ordinary_user, subordinate_uids

CHECKOUT = Path(__file__).resolve().parents[2]
GYM = "docker.io/xingyaoww/sweb.eval.x86_64.django_s_django-11099:latest"
R2E = "docker.io/namanjain12/orange3_final:2d9617bd0cb1f0ba61771258410ab8fae8e7e24d"
SMITH = "docker.io/jyangballin/swesmith.x86_64.oauthlib_1776_oauthlib.1fd52536:latest"


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "image"),
    [
        ({"instance_id": "Django__django-11099"}, GYM),
        ({"data_source": "swe-gym", "instance": {"instance_id": "django__django-11099"}}, GYM),
        (
            {"data_source": "SWE-bench_Verified", "extra_info": {"instance": {"instance_id": "django__django-11099"}}},
            GYM,
        ),
        ({"extra_info": {"instance_id": "django__django-11099", "index": 1}}, GYM),
        ({"instance": json.dumps({"instance_id": "django__django-11099"})}, GYM),
        ({"instance": None, "extra_info": None, "instance_id": "django__django-11099"}, GYM),
        ({"data_source": "r2e-gym", "instance": {"instance_id": R2E.removeprefix("docker.io/")}}, R2E),
        ({"data_source": "r2e-gym", "instance": {"instance_id": R2E}}, R2E),
        ({"instance": {"instance_id": R2E.removeprefix("docker.io/")}}, R2E),
        ({"data_source": "R2E", "instance": {"instance_id": "orange3-1", "docker_image": R2E}}, R2E),
        (
            {"data_source": "swe-smith", "instance": {"instance_id": "oauthlib__oauthlib.1fd52536.combine_file__0f"}},
            SMITH,
        ),
        (
            {
                "instance": {
                    "instance_id": "oauthlib__oauthlib.1fd52536.combine_file__0f",
                    "image_name": "jyangballin/swesmith.x86_64.oauthlib__oauthlib.1fd52536",
                }
            },
            SMITH,
        ),
        ({"data_source": "swesmith", "image_name": "swesmith.x86_64.oauthlib_1776_oauthlib.1fd52536"}, SMITH),
    ],
)
def test_the_image_of_a_row(row: Mapping[str, Any], image: str) -> None:
    assert images_of([row], PREFIX) == [image]


@pytest.mark.parametrize(
    ("prefix", "begins"),
    [
        ("docker.io/xingyaoww/", "docker.io/xingyaoww/sweb"),
        ("xingyaoww", "docker.io/xingyaoww/sweb"),
        ("mirror.example:5000/cache/xingyaoww/", "mirror.example:5000/cache/xingyaoww/sweb"),
    ],
)
def test_the_prefix(prefix: str, begins: str) -> None:
    assert images_of([{"instance_id": "a__b-1"}], prefix) == [f"{begins}.eval.x86_64.a_s_b-1:latest"]


def test_each_image_once_in_order() -> None:
    rows = [{"instance_id": name} for name in ("b__b-2", "a__a-1", "b__b-2")]
    assert [image.rpartition("64.")[2] for image in images_of(rows, PREFIX)] == ["b_s_b-2:latest", "a_s_a-1:latest"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "names no instance_id"),
        ({"instance_id": ""}, "names no instance_id"),
        ({"instance_id": 7}, "names no instance_id"),
        ({"instance": "{", "extra_info": "[]"}, "names no instance_id"),
        ({"data_source": "r2e", "instance_id": "orange3-1"}, "names no instance_id or docker_image"),
        ({"instance_id": "a b"}, "names no image"),
    ],
)
def test_a_row_that_names_none(row: Mapping[str, Any], said: str) -> None:
    with pytest.raises(NoImages, match=f"row 2: .*{said}"):
        images_of([{"instance_id": "a__a-1"}, row], PREFIX)


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report_goes_on_from_an_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    first = Report.begun("set", ["a", "b", "c"], path)
    first.note("a", Outcome(FETCHED, "a", "id", "sha256:1", 5, 1.5))
    first.note("b", Outcome(FAILED, error="no"))
    assert json.loads(path.read_text())["counts"] == {"fetched": 1, "here": 0, "failed": 1, "missing": 1}
    again = Report.begun("set", ["b", "a"], path)
    assert again.outcomes["a"] == Outcome(MISSING, "a", "id", "sha256:1", 5, 1.5)
    assert again.outcomes["b"].error == ""
    assert set(read(path)) == {"a", "b"}
    assert [name.name for name in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"images": 7}', '{"images": {"a": 7}}', '{"images": {"a": {"x": 1}}}']
)
def test_what_is_no_report_is_begun_anew(tmp_path: Path, text: str) -> None:
    path = tmp_path / "out.json"
    path.write_text(text)
    assert Report.begun("set", ["a"], path).outcomes == {"a": Outcome()}
    assert json.loads(path.read_text())["complete"] is False


def test_the_line_of_an_image() -> None:
    assert (
        line_for(1, 3, "a", Outcome(FETCHED, size_bytes=12_345_678, seconds=1.5)) == "[1/3] a: fetched, 12 MB in 1.5 s"
    )
    assert line_for(2, 3, "a", Outcome(HERE)) == "[2/3] a: here already"
    assert line_for(3, 3, "a", Outcome(FAILED, error="why")) == "[3/3] a: why"


# --- archives --------------------------------------------------------------------------------------------------------


def test_only_unfinished_files_of_the_dead_are_abandoned() -> None:
    host, pid = "node-1.example", os.getpid()
    assert not is_abandoned(f".part-{host}-{pid}-3", host, 1e9)
    assert is_abandoned(f".part-{host}-99999999-3", host, 0)
    assert not is_abandoned(f".part-other-{pid}-3", host, 100)
    assert is_abandoned(f".part-other-{pid}-3", host, 100_000)
    assert not is_abandoned(archive_name(GYM), host, 1e9)


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / f".part-{socket.gethostname()}-99999999-1"
    left.touch()
    kept = tmp_path / archive_name(GYM)
    kept.touch()
    ArchiveFolder(tmp_path).prepare()
    assert list(tmp_path.iterdir()) == [kept]


def full(_path: Path) -> Path:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("what", ["archive", "report"])
def test_a_full_disk_ends_the_work_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    images = [f"docker.io/x/y:{number}" for number in range(5)]
    engine = FakePodman(registry={*images})
    report = Report.begun("set", images, tmp_path / "out.json")
    folder = ArchiveFolder(tmp_path / "archives")
    folder.prepare()
    monkeypatch.setattr(*((archive_folder, "_sync", full) if what == "archive" else (Report, "write", full)))
    with pytest.raises(CannotWrite, match=f"{'archive' if what == 'archive' else 'out.json'} .*No space left"):
        asyncio.run(Prebuild(engine, report, folder, workers=1).run(lambda _image, _outcome: None))
    assert len(engine.pulls) <= 2
    assert not list(folder.folder.glob(".part-*"))


def test_images_leave_the_store_once_archived_where_that_is_asked(tmp_path: Path) -> None:
    images = [f"docker.io/x/y:{number}" for number in range(3)]
    engine = FakePodman(registry={*images})
    folder = ArchiveFolder(tmp_path)
    asyncio.run(
        Prebuild(engine, Report("set", None, {image: Outcome() for image in images}), folder, archive_only=True).run(
            lambda _image, _outcome: None
        )
    )
    assert not engine.images & {*images}
    assert {path.name for path in tmp_path.iterdir()} == {*map(archive_name, images)}


# --- the command line ------------------------------------------------------------------------------------------------


def dataset(path: Path, *rows: Mapping[str, Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)
    path.chmod(0o644)
    return path


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max-workers", "0"], "above 0"),
        (["--dataset", "{none}"], "No such file"),
        (["--dataset", "{junk}"], "is no parquet file"),
        (["--dataset", "{columns}"], "its columns are prompt, reward"),
        (["--dataset", "{empty}"], "has no rows"),
        (["--archive-only"], "needs --archives"),
        (["--build-with", "{none}"], "No such file"),
        (["--registry-auth-file", "{none}"], "podman login --authfile"),
    ],
)
def test_a_wrong_command_line_is_2_with_a_sentence(tmp_path: Path, flags: list[str], said: str) -> None:
    (tmp_path / "junk").write_text("junk")
    places = {
        "none": tmp_path / "none",
        "junk": tmp_path / "junk",
        "columns": dataset(tmp_path / "columns", {"prompt": "x", "reward": 1.0}),
        "empty": tmp_path / "empty",
    }
    schema = pyarrow.schema([("instance_id", pyarrow.string())])
    pyarrow.parquet.write_table(schema.empty_table(), places["empty"])
    good = dataset(tmp_path / "good", {"instance_id": "a__b-1"})
    done = run("--dataset", str(good), *(flag.format(**places) for flag in flags), podman=tmp_path / "none.sock")
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_without_podman_it_is_71_with_how_to_start_one(tmp_path: Path) -> None:
    good = dataset(tmp_path / "good", {"instance_id": "a__b-1"})
    done = run("--dataset", str(good), podman=tmp_path / "none.sock")
    assert done.returncode == 71
    assert "podman system service --time=0" in done.stderr


def test_without_pyarrow_it_is_71_with_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["--dataset", str(tmp_path)]) == 71


def test_the_names_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = dataset(tmp_path / "set", {"instance_id": "a__b-1"}, {"instance_id": "c__d-2"})
    assert main(["--dataset", str(path), "--list", "--image-prefix", "quay.io/x"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "quay.io/x/sweb.eval.x86_64.a_s_b-1:latest",
        "quay.io/x/sweb.eval.x86_64.c_s_d-2:latest",
    ]


def test_the_flags_of_the_bash_suite_are_there() -> None:
    flags = ["--dataset", "d", "--image-prefix", "p", "--max-workers", "2", "--force-rebuild", "--output-json", "o"]
    assert build_parser().parse_args(flags).force_rebuild


# --- with a real registry and Podman ---------------------------------------------------------------------------------


def run(*flags: str, podman: Path) -> subprocess.CompletedProcess[str]:
    with start(*flags, podman=podman) as process:
        out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(flags, process.returncode, out, err)


def start(*flags: str, podman: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "slurm_runtime.prebuild_images", *flags],
        cwd=CHECKOUT,
        env=environment_for(podman, None),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


NAMES = tuple(f"owner__repo-{number}" for number in range(4))


class Place:
    """A registry with four images of a dataset, something that delays in front of it, and a Podman."""

    def __init__(self, home: Path, registry: Registry, refuser: Refuser, podman: podman_service.Service) -> None:
        self.registry, self.refuser, self.podman = registry, refuser, podman
        self.dataset = dataset(home / "set.parquet", *({"instance_id": name} for name in (*NAMES, NAMES[0])))
        self.images = [self.image(name) for name in NAMES]
        for name in NAMES:
            push_new(podman, f"{registry.name}/x/{self.short(name)}:latest")

    def short(self, name: str) -> str:
        return f"sweb.eval.x86_64.{name.replace('__', '_s_')}"

    def image(self, name: str) -> str:
        return f"{self.refuser.name}/x/{self.short(name)}:latest"

    def flags(self, *more: object) -> list[str]:
        return ["--dataset", str(self.dataset), "--image-prefix", f"{self.refuser.name}/x/", *map(str, more)]

    def pulls(self) -> int:
        return sum(self.registry.requests("manifests", f"x/{self.short(name)}") for name in NAMES)

    def remove_all(self) -> None:
        self.podman.podman("rmi", "--force", "--ignore", *self.images)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    owner = ordinary_user()
    lacks = local_registry.missing() or podman_service.missing()
    if lacks or not subordinate_uids(owner.pw_name):
        pytest.skip(f"this machine lacks {lacks or 'subordinate ids of ' + owner.pw_name}")
    with contextlib.ExitStack() as stack:
        behind = stack.enter_context(registry(tmp_path / "registry"))
        refuser = stack.enter_context(refuser_before(behind))
        conf = registries_conf(behind.name, refuser.name)
        yield Place(tmp_path, behind, refuser, stack.enter_context(podman_service.running(owner, conf)))


def outcomes(path: Path) -> dict[str, dict[str, Any]]:
    return dict(json.loads(path.read_text())["images"])


@pytest.mark.podman
def test_all_images_once_and_again_nothing(place: Place, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    done = run(*place.flags("--output-json", output, "--max-workers", 3), podman=place.podman.socket)
    assert done.returncode == 0, done.stderr
    assert place.pulls() == 4
    found = outcomes(output)
    assert list(found) == place.images
    for outcome in found.values():
        assert outcome["status"] == "fetched"
        assert outcome["digest"].startswith("sha256:")
        assert outcome["size_bytes"] > 100_000
        assert outcome["seconds"] > 0
    assert "[4/4]" in done.stderr
    again = run(*place.flags("--output-json", output), podman=place.podman.socket)
    assert (again.returncode, place.pulls()) == (0, 4)
    assert "4 here" in again.stderr
    forced = run(*place.flags("--output-json", output, "--force-rebuild"), podman=place.podman.socket)
    assert (forced.returncode, place.pulls()) == (0, 8)


@pytest.mark.podman
def test_what_cannot_be_had_is_69_and_the_rest_is_there(place: Place, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    dataset(place.dataset, *({"instance_id": name} for name in (NAMES[0], "owner__none-1")))
    done = run(*place.flags("--output-json", output), podman=place.podman.socket)
    assert done.returncode == 69
    found = outcomes(output)
    assert [outcome["status"] for outcome in found.values()] == ["fetched", "failed"]
    assert "check the image's name and tag" in found[place.image("owner__none-1")]["error"]
    assert "1 fetched, 0 here, 1 failed, 0 missing" in done.stderr


@pytest.mark.podman
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_one_is_gone_on_with(place: Place, tmp_path: Path, number: int) -> None:
    output, archives = tmp_path / "out.json", tmp_path / "archives"
    flags = place.flags("--output-json", output, "--archives", archives, "--max-workers", 1)
    place.refuser.delay_s = 0.4
    with start(*flags, podman=place.podman.socket) as process:
        try:
            deadline = time.monotonic() + 60
            while not output.exists() or json.loads(output.read_text())["counts"]["fetched"] < 2:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(number)
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number), err
    counts = json.loads(output.read_text())["counts"]
    assert 2 <= counts["fetched"] < 4
    assert counts["missing"] == 4 - counts["fetched"]
    place.refuser.delay_s = 0.0
    done = run(*flags, podman=place.podman.socket)
    assert done.returncode == 0, done.stderr
    assert json.loads(output.read_text())["counts"] == {
        "fetched": 4 - counts["fetched"],
        "here": counts["fetched"],
        "failed": 0,
        "missing": 0,
    }
    assert sorted(path.name for path in archives.iterdir()) == sorted(map(archive_name, place.images))


@pytest.mark.podman
def test_a_server_starts_sandboxes_from_the_archives_without_the_registry(place: Place, tmp_path: Path) -> None:
    archives, output = tmp_path / "archives", tmp_path / "out.json"
    flags = place.flags("--archives", archives, "--archive-only", "--output-json", output)
    assert run(*flags, podman=place.podman.socket).returncode == 0
    assert not set(place.images) & set(place.podman.podman("images", "--format", "{{.Repository}}:{{.Tag}}").split())
    pulls = place.pulls()
    broken = archives / archive_name(place.images[1])
    broken.write_bytes(broken.read_bytes()[:5000])
    with server_process(tmp_path, place.podman.socket, "--image-archives", str(archives)) as api:
        answer = api.start(image=place.images[0])
        assert answer.status_code == 201, answer.text
        assert place.pulls() == pulls
        answer = api.start(image=place.images[1])
        assert answer.status_code == 201, answer.text
        assert place.pulls() == pulls + 1
        assert f"the registry is asked for {place.images[1]}, because {broken} holds no image" in api.log()
    assert all(outcome["archive"].startswith(str(archives)) for outcome in outcomes(output).values())


@pytest.mark.podman
def test_images_are_built_on_those_of_the_dataset(place: Place, tmp_path: Path) -> None:
    dockerfile, output = tmp_path / "Dockerfile.tools", tmp_path / "out.json"
    dockerfile.write_text("ARG BASE_IMAGE\nFROM ${BASE_IMAGE}\nRUN echo built > /built\n")
    flags = place.flags("--build-with", dockerfile, "--registry-prefix", "localhost/tests", "--output-json", output)
    done = run(*flags, podman=place.podman.socket)
    assert done.returncode == 0, done.stderr + output.read_text()
    built = [outcome["name"] for outcome in outcomes(output).values()]
    assert built == [f"localhost/tests/x/{place.short(name)}:latest" for name in NAMES]
    for name, base in zip(built, NAMES, strict=True):
        said = place.podman.podman("run", "--rm", "--network=none", name, "/bin/cat", "/built", "/layer")
        assert said == f"built\n{place.registry.name}/x/{place.short(base)}:latest\n"
