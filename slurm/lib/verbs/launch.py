"""A launch: reads settings, makes the plan, shows or carries it out, says where to look."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from slurm.lib import leftovers, local, submission
from slurm.lib.command_line import say
from slurm.lib.config import LoadedConfig, load_config
from slurm.lib.coordination import CoordinationDir
from slurm.lib.errors import EXIT_ENVIRONMENT, EXIT_OK, EXIT_USAGE, ConfigError, SuiteError, UsageError
from slurm.lib.interpreter import mark
from slurm.lib.job_environment import without_slurm
from slurm.lib.logs import debug_wanted, log, setup_command_logging, wants_colour
from slurm.lib.lookout import inquiry
from slurm.lib.plan import LaunchPlan, Request, make_plan, shown
from slurm.lib.preflight.asked import Asked
from slurm.lib.preflight.checks import CONFIGURATION, concerning, of_failure, refuse, run_checks, skipped_names
from slurm.lib.preflight.finding import Finding, Level
from slurm.lib.preflight.joined import ended
from slurm.lib.preflight.report import as_json as report_json
from slurm.lib.preflight.report import as_text as report_text
from slurm.lib.run_record import WORKER_KINDS, provenance, read_jobs
from slurm.lib.scheduler import Slurm
from slurm.lib.secrets import mask_values
from slurm.lib.settings import secret
from slurm.lib.signals import SignalNotes
from slurm.lib.trainer import KEY_NAME, URL_NAME, missing_parts, verl_of
from slurm.lib.unheard import PATIENCE_S

CHECKOUT = Path(__file__).resolve().parent.parent.parent.parent


def main(argv: Sequence[str], notes: SignalNotes, parser: argparse.ArgumentParser) -> int:
    """What the command line asks for; a mistake in it is a finding where findings are asked for."""
    try:
        return launch(parser.parse_args(argv), os.environ, notes)
    except SuiteError as problem:
        check = "--check" in argv
        return show_failure(problem, check, as_json=check and "--json" in argv)


def launch(arguments: argparse.Namespace, environment: Mapping[str, str], notes: SignalNotes) -> int:
    """Plan, then show, submit or run."""
    if arguments.config is None:
        raise UsageError("--config NAME|PATH is required; see --help")
    skipped = skipped_names(arguments.no_check)
    refuse_options(arguments)
    now = datetime.now()
    config, seen = read_settings(arguments, environment, now)
    if config.settings.skyrl_debug:
        setup_command_logging(debug=True)
    verl = verl_of(config.settings, {**seen, **config.exported})
    plan = make_plan(config, request_of(arguments, config), seen, CHECKOUT, interpreter(), now, verl, mark())
    if config.settings.pairing == "het" and len(plan.jobs) == 1:
        log.info("PAIRING=het has no effect here: one job is submitted alone")
    if arguments.dry_run:
        for warning in config.warnings:
            log.warning("%s", warning)
        return show(plan)
    asked = Asked(plan, CHECKOUT, at_leisure=arguments.check)
    on_slurm = config.settings.skyrl_backend == "slurm"
    cleared = inquiry(lambda: clear_leftovers(plan), notes) if on_slurm and not arguments.check else None
    found = run_checks(asked, skipped)
    if arguments.check:
        return show_findings(found, dict.fromkeys(check.name for check in concerning(asked, skipped)), arguments.json)
    if cleared:
        cleared()
    before_submission(found)
    return submit(plan, notes) if on_slurm else local.run(plan, notes, CHECKOUT)


def clear_leftovers(plan: LaunchPlan) -> None:
    """Remove what killed launches left in the queue and in the jobs base."""
    leftovers.clear(Slurm({**plan.inherited, **plan.environment}), plan.settings.skyrl_jobs_base)


def interpreter() -> str:
    """This interpreter, by a path that stays when the checkout is moved: links to the environment are resolved.

    The last link is not: it is what makes the environment's Python one with the environment's packages.
    """
    path = Path(sys.executable)
    return str(path.parent.resolve() / path.name)


def read_settings(
    arguments: argparse.Namespace, environment: Mapping[str, str], now: datetime
) -> tuple[LoadedConfig, dict[str, str]]:
    """The settings, and the environment that they were read in (with what the command line says about keys)."""
    seen = dict(environment)
    key = given_key(arguments)
    if key is not None:
        seen[KEY_NAME] = key
    if arguments.debug or debug_wanted(environment):
        seen["SKYRL_DEBUG"] = "1"
    overrides = list(arguments.set)
    if arguments.runtime_url is not None:
        overrides.append(f"{URL_NAME}={arguments.runtime_url}")
    config = load_config(
        arguments.config, overrides, without_slurm(seen), CHECKOUT / "slurm" / "config", now, CHECKOUT.parent
    )
    return (config if key is None else with_key(config, key)), seen


def with_key(config: LoadedConfig, key: str) -> LoadedConfig:
    """The configuration with the key that the command line gave, which wins over the file's."""
    settings = replace(config.settings, allhands_api_key=key)
    exported = {**config.exported, KEY_NAME: key}
    return replace(config, settings=settings, exported=exported, sources={**config.sources, KEY_NAME: "--api-key"})


def given_key(arguments: argparse.Namespace) -> str | None:
    """The key from --api-key-file or --api-key."""
    if arguments.api_key is not None:
        log.warning("--api-key: everyone on this host can read it in the process list; prefer --api-key-file")
        return checked_key(arguments.api_key, "--api-key")
    if arguments.api_key_file is None:
        return None
    path = Path(os.path.expanduser(arguments.api_key_file))  # noqa: PTH111  Path's raises for an unknown user
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"--api-key-file {path}: {getattr(problem, 'strerror', problem)}") from None
    return checked_key(key, f"--api-key-file {path}")


def checked_key(key: str, where: str) -> str:
    """The key, if it can travel in an HTTP header."""
    if not key:
        raise UsageError(f"{where}: the key is empty")
    try:
        return secret(key)
    except ValueError as problem:
        raise UsageError(f"{where}: the key {problem}") from None


def request_of(arguments: argparse.Namespace, config: LoadedConfig) -> Request:
    """What to submit; ``UsageError`` for what cannot go together."""
    settings = config.settings
    skip = arguments.skip_runtime or arguments.runtime_url is not None
    if "%j" in str(settings.skyrl_jobs_base):
        raise UsageError(f"SKYRL_JOBS_BASE={settings.skyrl_jobs_base}: %j would stand for a job's id; choose another")
    if "\\" in str(settings.skyrl_jobs_base) and settings.skyrl_backend == "slurm":
        sentence = "after a backslash Slurm fills in no job id in the name of a log"
        raise UsageError(f"SKYRL_JOBS_BASE={settings.skyrl_jobs_base}: {sentence}; choose a folder without one")
    if skip and arguments.runtime_only:
        raise UsageError("--runtime-only and --skip-runtime exclude each other")
    if skip and settings.skyrl_backend == "local":
        raise UsageError("--skip-runtime and --runtime-url need Slurm; a local run brings its own runtime")
    if arguments.runtime_only:
        words = [word for setting in arguments.set for word in ("--set", setting)]
        return Request(training=False, settings_words=("--config", arguments.config, *words))
    if not skip:
        return Request()
    url = settings.sandbox_remote_runtime_api_url
    if url and not url.startswith(("http://", "https://")):
        raise UsageError(f"the runtime's address must be http://HOST:PORT, not {url}")
    attach = settings.skyrl_coord_dir
    if attach is None and not url:
        raise UsageError(
            f"--skip-runtime needs a runtime: set SKYRL_COORD_DIR to its coordination directory, or {URL_NAME} "
            "(or --runtime-url URL) to its address"
        )
    if attach is not None and not url and not attach.is_dir():
        raise UsageError(f"SKYRL_COORD_DIR={attach} is not a folder")
    if url or attach is None:
        return Request(runtime=False, runtime_url=url)
    return Request(runtime=False, attach_dir=attach, attach_id=_runtime_id(attach))


def _runtime_id(attach: Path) -> str:
    """The runtime job of the run in a folder; ``UsageError`` for another user's."""
    try:
        return read_jobs(CoordinationDir(attach)).get("runtime", "")
    except OSError as problem:
        sentence = f"SKYRL_COORD_DIR={attach} cannot be read: {problem.strerror}"
        raise UsageError(f"{sentence}; name the directory of a run of your own") from None


def show(plan: LaunchPlan) -> int:
    """Print the plan on stdout."""
    for part in missing_parts(plan.settings) if plan.training else []:
        log.warning("%s", part)
    if gone := ended(plan):
        log.warning("%s", gone)
    return EXIT_OK if say(shown(plan)) else EXIT_ENVIRONMENT


def refuse_options(arguments: argparse.Namespace) -> None:
    """``UsageError`` for options of the checks that cannot go together."""
    if arguments.check and arguments.dry_run:
        raise UsageError("--check and --dry-run exclude each other")
    if arguments.json and not arguments.check:
        raise UsageError("--json goes with --check")


def show_failure(problem: SuiteError, check: bool, as_json: bool) -> int:
    """Say what ended the launch; a check's reader gets it on stdout, and one of JSON gets JSON whatever it is.

    Returns the exit code.
    """
    is_report = as_json or (check and isinstance(problem, ConfigError))
    if is_report:
        show_findings(of_failure(problem), [CONFIGURATION], as_json)
    if not (is_report and isinstance(problem, ConfigError)):
        log.error("%s", problem)
    return problem.exit_code


def show_findings(found: Sequence[Finding], checked: Collection[str], as_json: bool) -> int:
    """Print what the checks found on stdout; returns 2 if there are errors."""
    columns = shutil.get_terminal_size().columns if wants_colour(sys.stdout) else None
    text = report_json(found, checked) if as_json else report_text(found, checked, columns)
    has_errors = any(finding.level is Level.ERROR for finding in found)
    return (EXIT_USAGE if has_errors else EXIT_OK) if say(text) else EXIT_ENVIRONMENT


def before_submission(found: Sequence[Finding]) -> None:
    """Log warnings and estimates, then raise the one error that names all errors."""
    for finding in found:
        if finding.level is not Level.ERROR:
            (log.warning if finding.level is Level.WARNING else log.info)("%s", finding)
    refuse(found)


def submit(plan: LaunchPlan, notes: SignalNotes) -> int:
    """Submit and say where to look."""
    # Within some 10 s a tree, and asked for after a commit too.
    git = inquiry(lambda: provenance(CHECKOUT, plan.settings), SignalNotes())
    done = submission.submit(plan, notes, git, CHECKOUT, patience_s=PATIENCE_S)
    more = joining(done, plan) if plan.training is None else stopping(done) if plan.combined else ""
    say(report(done) + more)
    return EXIT_OK


def report(done: submission.Submitted) -> str:
    """Ids, directory and the commands to watch them."""
    lines = [f"{_named(kind)}: {job_id}" for kind, job_id in done.jobs.items()]
    lines += [f"coordination directory: {done.directory.path}", f"watch: squeue -j {','.join(done.jobs.values())}"]
    pair = {kind: job_id for kind, job_id in done.jobs.items() if kind not in WORKER_KINDS}
    lines += [f"follow: tail -F '{done.directory.log(kind, job_id, 'out')}'" for kind, job_id in pair.items()]
    return "\n".join(lines) + "\n"


def _named(kind: str) -> str:
    return f"{kind} (job array)" if kind in WORKER_KINDS else f"{kind} job"


def stopping(done: submission.Submitted) -> str:
    """How to stop a heterogeneous job: of one that is queued, Slurm cancels no component by itself."""
    runtime, training = done.jobs["runtime"], done.jobs["training"]
    return f"stop: scancel {training}   (one heterogeneous job: {runtime} is its second component)\n"


def joining(done: submission.Submitted, plan: LaunchPlan) -> str:
    """How to join a runtime that was launched alone, and how to stop it."""
    directory = shlex.quote(str(done.directory.path))
    again = [str(CHECKOUT / "slurm" / "launch.py"), *plan.request.settings_words, "--skip-runtime"]
    words = mask_values(shlex.join(again), plan.secret_values)
    stop = shlex.quote(str(done.directory.training_complete))
    lines = [
        f"join:  SKYRL_COORD_DIR={directory} {words}",
        f"stop:  touch {stop}   (or: scancel {done.jobs['runtime']})",
    ]
    return "\n".join(lines) + "\n"
