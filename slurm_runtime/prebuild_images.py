"""Fetch every image that a dataset names, before training: into Podman's store, and as archives for other nodes.

Exit codes: 0 every image is there; 2 the command line or the dataset is wrong; 69 some images could not be had, and the
output says why; 70 a fault of this program; 71 this machine lacks something (Podman's socket, pyarrow, a folder);
128 + N ended by signal N, to be gone on with by the same command.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from slurm_runtime import registry_login
from slurm_runtime.archive_folder import ArchiveFolder
from slurm_runtime.dataset_images import PREFIX, NoImages, images_of
from slurm_runtime.dataset_rows import NoPyarrow, rows
from slurm_runtime.logs import log, setup
from slurm_runtime.podman import EngineError, Podman, socket_path
from slurm_runtime.prebuild import PATIENCE_S, Build, CannotWrite, Prebuild
from slurm_runtime.prebuild_report import FAILED, FETCHED, HERE, Outcome, Report
from slurm_runtime.references import full_name
from slurm_runtime.refusals import Patience

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_INCOMPLETE = 69  # EX_UNAVAILABLE
EXIT_INTERNAL = 70  # EX_SOFTWARE
EXIT_ENVIRONMENT = 71  # EX_OSERR
EXIT_SIGNAL_BASE = 128

STOPPING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Problem(Exception):
    """The work cannot begin, or not go on; ``str()`` says why and what to do."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m slurm_runtime.prebuild_images",
        description="Fetch every image that a dataset names. The same command again goes on where it was interrupted.",
        epilog=(
            "Podman's service is found by DOCKER_HOST=unix:///path, else at $XDG_RUNTIME_DIR/podman/podman.sock. "
            "Exit codes: 0 every image is there; 2 wrong command line or dataset; 69 some images could not be had; "
            "70 a fault of this program; 71 something is missing on this machine; 128+N ended by signal N."
        ),
    )
    _add_dataset(parser.add_argument_group("which images"))
    _add_fetching(parser.add_argument_group("how they are fetched"))
    _add_results(parser.add_argument_group("where they go"))
    parser.add_argument("--verbose", action="store_true", help="debug lines")
    return parser


def _add_dataset(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--dataset", type=Path, required=True, metavar="FILE", help="parquet file whose rows name images")
    add(
        "--image-prefix",
        default=PREFIX,
        metavar="P",
        help="registry and folder of sweb.eval images (default: %(default)s); r2e-gym and swe-smith have their own",
    )
    add("--list", action="store_true", help="print the names of the images and do nothing else")


def _add_fetching(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--max-workers", type=_count, default=2, metavar="N", help="images at the same time (default: %(default)s)")
    add("--force-rebuild", action="store_true", help="fetch images anew that are here already")
    add(
        "--registry-auth-file",
        type=Path,
        metavar="FILE",
        help="logins for registries (default: REGISTRY_AUTH_FILE, else those that Podman finds by itself)",
    )
    add(
        "--patience",
        type=_count,
        default=PATIENCE_S,
        metavar="S",
        help="seconds for which a registry that limits us is asked again for an image (default: %(default)s)",
    )
    add(
        "--build-with",
        type=Path,
        metavar="FILE",
        help="a Dockerfile that begins with 'ARG BASE_IMAGE' and 'FROM ${BASE_IMAGE}': build it on each image",
    )


def _add_results(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--output-json", type=Path, metavar="F", help="what became of each image; written anew after every image")
    add(
        "--archives",
        type=Path,
        metavar="DIR",
        help="also write each image into a file of this folder, for --image-archives of API servers",
    )
    add("--archive-only", action="store_true", help="with --archives: remove images from Podman's store once archived")
    add(
        "--registry-prefix",
        default="localhost/skyrl",
        metavar="NAME",
        help="what the names of built images begin with (default: %(default)s)",
    )


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def wanted_images(args: argparse.Namespace) -> list[str]:
    """The images that the dataset names; ``Problem`` where there are none."""
    try:
        found = images_of(rows(args.dataset), args.image_prefix)
    except NoPyarrow as problem:
        raise Problem(str(problem), EXIT_ENVIRONMENT) from None
    except NoImages as problem:
        raise Problem(f"--dataset {args.dataset}: {problem}", EXIT_USAGE) from None
    if not found:
        raise Problem(f"--dataset {args.dataset} has no rows", EXIT_USAGE)
    return found


def auth_file(args: argparse.Namespace, environment: Mapping[str, str]) -> Path | None:
    """The logins to use, looked at beforehand: a bad file would fail every single image."""
    path = registry_login.auth_file(args.registry_auth_file, environment)
    try:
        for doubt in registry_login.doubts(path) if path else ():
            log.warning("%s", doubt)
    except (OSError, ValueError) as problem:
        raise Problem(f"--registry-auth-file: {problem}", EXIT_USAGE) from None
    return path


@contextlib.contextmanager
def build_on(args: argparse.Namespace) -> Iterator[Build | None]:
    """The context of --build-with, for the length of the block: its Dockerfile alone."""
    if args.build_with is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="skyrl-prebuild-") as folder:
        context = Path(folder) / "context.tar.gz"
        try:
            prefix = full_name(f"{args.registry_prefix}/name").removesuffix("/name:latest")
            with tarfile.open(context, "w:gz") as tar:
                tar.add(args.build_with.resolve(), "Dockerfile")
        except (OSError, ValueError) as problem:
            raise Problem(f"--build-with {args.build_with}: {problem}", EXIT_USAGE) from None
        yield Build(context, prefix)


def archive_folder(args: argparse.Namespace) -> ArchiveFolder | None:
    if args.archives is None:
        return None
    folder = ArchiveFolder(args.archives)
    try:
        folder.prepare()
    except OSError as problem:
        raise Problem(f"--archives {args.archives}: {problem.strerror or problem}", EXIT_ENVIRONMENT) from None
    return folder


def report_for(args: argparse.Namespace, images: Sequence[str]) -> Report:
    try:
        return Report.begun(str(args.dataset), images, args.output_json)
    except OSError as problem:
        raise Problem(f"--output-json {args.output_json}: {problem.strerror or problem}", EXIT_ENVIRONMENT) from None


def line_for(number: int, total: int, image: str, outcome: Outcome) -> str:
    """What is said of an image that is done with."""
    words = {
        FETCHED: f"fetched, {outcome.size_bytes / 1e6:.0f} MB in {outcome.seconds:.1f} s",
        HERE: "here already",
        FAILED: outcome.error,
    }
    return f"[{number}/{total}] {image}: {words[outcome.status]}"


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str, Outcome], None]]:
    """A line for each image that is done with; on a terminal a bar below them too."""
    done = 0
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(_bar(total)) if sys.stderr.isatty() else None

        def tell(image: str, outcome: Outcome) -> None:
            nonlocal done
            done += 1
            level = log.error if outcome.status == FAILED else log.info
            level("%s", line_for(done, total, image, outcome))
            if bar is not None:
                bar()

        yield tell


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[], object]]:
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]  # it brings no types
        from tqdm.contrib.logging import logging_redirect_tqdm  # type: ignore[import-untyped]
    except ImportError:
        yield lambda: None
        return
    with tqdm(total=total, unit="image") as bar, logging_redirect_tqdm([log]):
        yield lambda: bar.update()


async def work(prebuild: Prebuild, podman: Podman) -> int:
    """Do it until it is done or a signal comes; the exit code."""
    signals: list[int] = []
    task = asyncio.current_task()
    assert task

    def on_signal(number: int) -> None:
        signals.append(number)
        task.cancel()

    for number in STOPPING_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    total = len(prebuild.report.outcomes)
    try:
        facts = await podman.facts()
        log.info("%d images; Podman %s at %s", total, facts.version, podman.path)
        with progress(total) as tell:
            await prebuild.run(tell)
    except asyncio.CancelledError:
        log.error("ended by %s; the same command goes on from here", signal.Signals(signals[0]).name)
    finally:
        await podman.close()
    counts = prebuild.report.counts()
    log.info("%s", ", ".join(f"{number} {status}" for status, number in counts.items()))
    if signals:
        return EXIT_SIGNAL_BASE + signals[0]
    return EXIT_OK if counts[FETCHED] + counts[HERE] == total else EXIT_INCOMPLETE


def run(args: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """The whole command; ``Problem`` if it cannot begin or go on."""
    images = wanted_images(args)
    if args.list:
        print("\n".join(images))
        return EXIT_OK
    if args.archive_only and args.archives is None:
        raise Problem("--archive-only needs --archives DIR", EXIT_USAGE)
    try:
        podman = Podman(socket_path(environment, os.getuid()), auth_file(args, environment))
    except ValueError as problem:
        raise Problem(str(problem), EXIT_USAGE) from None
    archives, report = archive_folder(args), report_for(args, images)
    with build_on(args) as build:
        prebuild = Prebuild(
            podman,
            report,
            archives,
            build,
            force=args.force_rebuild,
            archive_only=args.archive_only,
            workers=args.max_workers,
            patience=Patience(limited_s=args.patience),
        )
        try:
            return asyncio.run(work(prebuild, podman))
        except (EngineError, CannotWrite) as problem:
            raise Problem(f"{problem}; the same command goes on from here", EXIT_ENVIRONMENT) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, work, say how it ended."""
    args = build_parser().parse_args(argv)
    setup(args.verbose)
    try:
        return run(args, os.environ)
    except Problem as problem:
        log.error("%s", problem)
        return problem.exit_code
    except KeyboardInterrupt:  # before the event loop heeds signals
        return EXIT_SIGNAL_BASE + signal.SIGINT
    except Exception:  # the edge of the process: what no code of ours expected ends here, with its traceback
        log.exception("an internal error")
        return EXIT_INTERNAL


if __name__ == "__main__":
    sys.exit(main())
