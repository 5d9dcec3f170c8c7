"""The command line of the small RL loop: trains a tiny policy in real sandboxes and says whether it learned.

Exit codes: 0 it learned; 2 usage; 3 it did not learn; 69 no sandboxes; 128+N ended by signal N.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from shell_rl import report
from shell_rl.checkpoint import Checkpoint, Settings, load, save, write_whole
from shell_rl.commands import count
from shell_rl.errors import EXIT_OK, DidNotLearn, ShellRlError, UsageError
from shell_rl.interruption import Interruption, noted_signals
from shell_rl.learner import RunAll, Score, evaluate, score, train_step
from shell_rl.policy import Policy
from shell_rl.pool import SandboxPool
from shell_rl.sandbox import RuntimeApi

log = logging.getLogger("shell_rl")

DEFAULT_IMAGE = "localhost/skyrl-busybox:latest"
LEARNING_RATE = 3.0
EVALUATION_ROLLOUTS = 32  # a task, before training and after
CHECKPOINT_STEPS = 5
LOG_STEPS = 5
LEARNED_REWARD = 0.25  # below this nothing was learned, whatever the ratio: small rewards can be luck


@dataclass(frozen=True)
class Options:
    """What was asked for, by flags and environment. ``resume`` None means: if there is something to resume."""

    url: str
    key: str = field(repr=False)
    image: str
    output: Path
    rollout_dir: Path
    steps: int
    sandboxes: int
    settings: Settings
    resume: bool | None
    min_gain: float

    @property
    def checkpoint(self) -> Path:
        return self.output / "checkpoint.json"

    @property
    def metrics(self) -> Path:
        return self.output / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        return self.rollout_dir / "rollouts.jsonl"

    @property
    def summary(self) -> Path:
        return self.output / "summary.json"

    @property
    def plot(self) -> Path:
        return self.output / "reward.png"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


_positive.__name__ = "positive number"  # argparse says "invalid positive number value"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m shell_rl.train",
        description="Train a tiny policy to solve shell tasks, every reward computed by a command run in a sandbox "
        "of the API server at SANDBOX_REMOTE_RUNTIME_API_URL (key in ALLHANDS_API_KEY). Prints the summary as JSON.",
        epilog="Exit codes: 0 it learned; 2 usage; 3 it did not learn; 69 no sandboxes to be had; "
        "130, 143 ended by SIGINT, SIGTERM. Sandboxes are stopped in every case.",
    )
    add = parser.add_argument
    add("--output", type=Path, help="default: CHECKPOINT_DIR, else $SKYRL_COORD_DIR/shell_rl, else ./shell_rl")
    add("--steps", type=_positive, default=40, help="policy-gradient steps (%(default)s)")
    add("--sandboxes", type=_positive, default=4, help="sandboxes at once (%(default)s)")
    add("--rollouts", type=_positive, default=16, help="commands for each task and step (%(default)s)")
    add("--seed", type=int, default=0, help="of policy and tasks (%(default)s)")
    add("--resume", action=argparse.BooleanOptionalAction, help="default: if an unfinished run is in the output")
    add("--image", help=f"image with busybox; default CONTAINER_IMAGE, else {DEFAULT_IMAGE}")
    add("--min-gain", type=float, default=3.0, help="trained ÷ untrained reward that counts as learned (%(default)s)")
    return parser


def _default_output(environment: Mapping[str, str]) -> Path:
    if environment.get("CHECKPOINT_DIR"):
        return Path(environment["CHECKPOINT_DIR"])
    return Path(environment.get("SKYRL_COORD_DIR") or ".") / "shell_rl"


def read_options(arguments: Sequence[str], environment: Mapping[str, str]) -> Options:
    """Flags and environment as one value.

    :raises UsageError: the address or the key of the API server is missing
    """
    flags = _parser().parse_args(arguments)
    missing = [name for name in ("SANDBOX_REMOTE_RUNTIME_API_URL", "ALLHANDS_API_KEY") if not environment.get(name)]
    if missing:
        raise UsageError(
            f"{' and '.join(missing)} must be set in the environment: the address of a running API server and its key "
            "(a runtime job writes both into its coordination directory; the launcher passes them on)."
        )
    if flags.rollouts < 2:
        raise UsageError("--rollouts must be at least 2: a reward is compared with the others of its group.")
    output = flags.output or _default_output(environment)
    return Options(
        url=environment["SANDBOX_REMOTE_RUNTIME_API_URL"],
        key=environment["ALLHANDS_API_KEY"],
        image=flags.image or environment.get("CONTAINER_IMAGE") or DEFAULT_IMAGE,
        output=output,
        rollout_dir=Path(environment.get("ROLLOUT_DIR") or output),
        steps=flags.steps,
        sandboxes=flags.sandboxes,
        settings=Settings(flags.seed, flags.rollouts, LEARNING_RATE, EVALUATION_ROLLOUTS),
        resume=flags.resume,
        min_gain=flags.min_gain,
    )


def _why_not_resume(options: Options, checkpoint: Checkpoint | None) -> str | None:
    """Why a checkpoint cannot be continued; None if it can."""
    if checkpoint is None:
        return f"there is no checkpoint in {options.output}"
    if checkpoint.settings != options.settings.fingerprint():
        return f"the checkpoint in {options.output} has other settings (seed {checkpoint.seed}, step {checkpoint.step})"
    if checkpoint.step > options.steps:
        return f"the checkpoint in {options.output} is at step {checkpoint.step}, beyond --steps {options.steps}"
    return None


def find_checkpoint(options: Options) -> Checkpoint | None:
    """The checkpoint to go on from, or None to start anew; says which, and why.

    :raises UsageError: ``--resume`` was given and there is nothing to resume
    """
    if options.resume is False:
        return None
    checkpoint = load(options.checkpoint)
    reason = _why_not_resume(options, checkpoint)
    if options.resume is None and reason is None and options.summary.exists():
        reason = f"the run in {options.output} is complete"
    if reason is None:
        return checkpoint
    if options.resume:
        raise UsageError(f"Nothing to resume: {reason}.")
    if checkpoint is not None:
        log.info("Starting anew: %s.", reason)
    return None


def _prepare(options: Options, checkpoint: Checkpoint | None) -> None:
    """Make the directories, and remove what the run will write again."""
    last_step = checkpoint.step if checkpoint else 0
    try:
        for folder in (options.output, options.rollout_dir):
            folder.mkdir(parents=True, exist_ok=True)
        for path in (options.summary, options.plot, *([] if checkpoint else [options.checkpoint])):
            path.unlink(missing_ok=True)
        for path in (options.metrics, options.rollouts):
            report.keep_until(path, last_step)
    except OSError as error:
        raise UsageError(
            f"Cannot use {options.output}: {error.strerror} ({error.filename}); choose another --output."
        ) from error


def _first_checkpoint(options: Options, policy: Policy, run_all: RunAll) -> Checkpoint:
    begin = time.monotonic()
    log.info("Evaluating the untrained policy in the sandboxes.")
    untrained = score(evaluate(policy, run_all, options.settings.seed, options.settings.evaluation))
    log.info("Untrained: mean reward %.3f, %.0f %% solved.", untrained.reward, 100 * untrained.solved)
    seconds = time.monotonic() - begin
    seed = options.settings.seed
    return Checkpoint(options.settings.fingerprint(), seed, 0, untrained.commands, seconds, untrained, policy.logits())


def _step(options: Options, policy: Policy, run_all: RunAll, done: Checkpoint) -> tuple[Checkpoint, Score]:
    """One step with its metrics."""
    begin, step, settings = time.monotonic(), done.step + 1, options.settings
    rollouts = train_step(policy, run_all, settings.seed, step, settings.rollouts, settings.learning_rate)
    now, seconds = score(rollouts), time.monotonic() - begin
    report.append_lines(options.metrics, [report.metrics_line(step, now, seconds)])
    report.append_lines(options.rollouts, report.rollout_lines(step, rollouts))
    commands = done.commands + now.commands
    return replace(done, step=step, commands=commands, seconds=done.seconds + seconds, logits=policy.logits()), now


def _tqdm() -> ModuleType | None:
    """tqdm where there is a terminal to draw on; optional, like matplotlib."""
    try:
        return importlib.import_module("tqdm") if sys.stderr.isatty() else None
    except ImportError:
        return None


@contextmanager
def _progress(options: Options, step: int) -> Iterator[Progress]:
    """A progress bar on a terminal, else a line of log every few steps."""
    module = _tqdm()
    bar = module.tqdm(total=options.steps, initial=step, unit="step", desc="training") if module else None
    try:
        yield Progress(options.steps, bar)
    finally:
        if bar is not None:
            bar.close()


@dataclass(frozen=True)
class Progress:
    """Shows each step."""

    steps: int
    bar: Any  # a tqdm bar, or None

    def show(self, step: int, now: Score) -> None:
        """Show the step just done."""
        if self.bar is not None:
            self.bar.set_postfix(reward=f"{now.reward:.3f}", solved=f"{now.solved:.0%}", refresh=False)
            self.bar.update()
        elif step % LOG_STEPS == 0 or step in (1, self.steps):
            log.info("Step %d/%d: mean reward %.3f, %.0f %% solved.", step, self.steps, now.reward, 100 * now.solved)


def _train(options: Options, policy: Policy, run_all: RunAll, done: Checkpoint) -> Checkpoint:
    """All steps that are left; the last state is saved however they end."""
    saved = done.step
    try:
        with _progress(options, done.step) as progress:
            while done.step < options.steps:
                done, now = _step(options, policy, run_all, done)
                progress.show(done.step, now)
                if done.step % CHECKPOINT_STEPS == 0:
                    save(options.checkpoint, done)
                    saved = done.step
    finally:
        if done.step != saved:
            save(options.checkpoint, done)
    return done


def summarise(options: Options, done: Checkpoint, trained: Score, resumed_from: int | None) -> dict[str, object]:
    """The content of ``summary.json``. ``ratio`` is null where the untrained policy got no reward at all."""
    before, after = done.untrained.reward, trained.reward
    return {
        "learned": has_learned(before, after, options.min_gain),
        "untrained_reward": before,
        "trained_reward": after,
        "ratio": after / before if before > 0 else None,
        "untrained_solved": done.untrained.solved,
        "trained_solved": trained.solved,
        "trained_per_task": trained.per_task,
        "commands_run": done.commands,
        "seconds": round(done.seconds, 1),
        "steps": done.step,
        "seed": options.settings.seed,
        "resumed_from": resumed_from,
    }


def has_learned(untrained: float, trained: float, min_gain: float) -> bool:
    """Whether the reward grew by ``min_gain`` and is more than luck can give."""
    return trained >= LEARNED_REWARD and trained >= min_gain * untrained


def _run(options: Options, checkpoint: Checkpoint | None, interruption: Interruption) -> tuple[Checkpoint, Score]:
    """Train and evaluate in sandboxes; none is left when this ends."""
    policy = Policy(count, checkpoint.logits if checkpoint else None)
    api = RuntimeApi(options.url, options.key, options.image)
    log.info("Starting %d sandboxes of %s at %s.", options.sandboxes, options.image, options.url)
    with SandboxPool(api, options.sandboxes, interruption) as pool:
        done = checkpoint or _first_checkpoint(options, policy, pool.run_all)
        save(options.checkpoint, done)
        done = _train(options, policy, pool.run_all, done)
        begin = time.monotonic()
        trained = score(evaluate(policy, pool.run_all, options.settings.seed, options.settings.evaluation))
    seconds = done.seconds + time.monotonic() - begin
    return replace(done, commands=done.commands + trained.commands, seconds=seconds), trained


def _conclude(options: Options, done: Checkpoint, trained: Score, resumed_from: int | None) -> None:
    """Write, plot and print the outcome.

    :raises DidNotLearn: the rewards do not show learning
    """
    summary = summarise(options, done, trained, resumed_from)
    write_whole(options.summary, json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary), flush=True)
    lines = report.read_lines(options.metrics, done.step)
    log.info("Reward by step: %s", report.sparkline([float(str(line["reward"])) for line in lines]))
    report.plot(options.plot, lines, done.untrained.reward, trained.reward)
    sentence = (
        f"mean reward {done.untrained.reward:.3f} untrained, {trained.reward:.3f} after {done.step} steps "
        f"({done.commands} commands in {done.seconds:.0f} s)"
    )
    if not summary["learned"]:
        raise DidNotLearn(
            f"The policy did not learn: {sentence}; wanted at least {options.min_gain:g} times the untrained reward "
            f"and {LEARNED_REWARD}. Either the sandboxes do not really run what they are sent "
            f"(see {options.rollouts}) or there were too few steps (--steps)."
        )
    log.info("The policy learned: %s. Results are in %s.", sentence, options.output)


def train(options: Options) -> None:
    """The whole run, from checkpoint or from nothing to the outcome.

    :raises ShellRlError: what a person should know
    """
    checkpoint = find_checkpoint(options)
    _prepare(options, checkpoint)
    if checkpoint is not None:
        log.info("Resuming from step %d of %s.", checkpoint.step, options.checkpoint)
    with noted_signals() as interruption:
        done, trained = _run(options, checkpoint, interruption)
    _conclude(options, done, trained, checkpoint.step if checkpoint else None)


def _setup_logging() -> None:
    logging.addLevelName(logging.WARNING, "WARN")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s [%(levelname)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    _setup_logging()
    try:
        train(read_options(sys.argv[1:] if arguments is None else arguments, os.environ))
    except ShellRlError as error:
        log.error("%s", error)
        return error.exit_code
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
