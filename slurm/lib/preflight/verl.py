"""Can the VERL that skyrl-agent would start do what it is told? Known from its version, before it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from slurm.lib import verl_versions
from slurm.lib.hydra_grammar import Override, read_override
from slurm.lib.preflight.asked import override
from slurm.lib.preflight.finding import Finding, Level, warning
from slurm.lib.preflight.shape import ESTIMATOR, MINI_BATCH, VAL_BATCH
from slurm.lib.preflight.words import nearest_word
from slurm.lib.settings import Settings
from slurm.lib.verl_command import ROWS, row_name
from slurm.lib.verl_versions import KNOWN, LIKE_LOOP, LOOP, Origin, VerlVersion

CHECK = "verl"
READ = frozenset({ESTIMATOR, MINI_BATCH, VAL_BATCH})  # what checks take from VERL_OVERRIDES before they look at the key


def verl_findings(settings: Settings, version: VerlVersion | None) -> list[Finding]:
    """What is wrong with this VERL for these settings; pure. Nothing where a TRAINING_COMMAND runs in its place."""
    if settings.training_command:
        return []
    if version is None:
        sentence = "neither uv.lock nor the environment of skyrl-agent names exactly one VERL, so it was not checked"
        unknown = warning(CHECK, sentence, f"{_known()}; run `uv lock` in skyrl-agent")
        return [unknown, *_unknown_values(settings, None), *_said_twice(settings, None)]
    of_version = (_release(version), _origin(version), _estimator(settings, version), _overrides(settings, version))
    return [
        *chain.from_iterable(of_version),
        *_unknown_values(settings, version),
        *_said_twice(settings, version),
    ]


def _known() -> str:
    return f"the suite knows VERL {', '.join(KNOWN)} and SkyRL's fork of 0.5.0"


def _release(version: VerlVersion) -> Iterator[Finding]:
    if not version.known:
        sentence = f"{version} is a release that the suite does not know: overrides may not exist in it"
        yield Finding(CHECK, Level.WARNING, sentence, f"{_known()}; what differs can be said by VERL_OVERRIDES")


def _origin(version: VerlVersion) -> Iterator[Finding]:
    """SkyRL-agent's entry point imports `config_dir` from verl.trainer.main_ppo, which no stock release has."""
    if version.origin is Origin.STOCK:
        sentence = f"{version}: SkyRL-agent as published needs SkyRL's fork, and fails with another VERL on import"
        fix = "pin verl to the git repository NovaSky-AI/verl-fork in skyrl-agent, unless yours was changed for it"
        yield Finding(CHECK, Level.WARNING, sentence, fix)


def _estimator(settings: Settings, version: VerlVersion) -> Iterator[Finding]:
    """Stock VERL ends with a NotImplementedError without any text, after it has read the data."""
    said = override(settings, ESTIMATOR)
    if (said or settings.adv_estimator) != LOOP or version.origin is Origin.SKYRL:
        return
    key = f"VERL_OVERRIDES: {ESTIMATOR}={LOOP}" if said else f"ADV_ESTIMATOR={LOOP}"
    fix = f"set ADV_ESTIMATOR={LIKE_LOOP}, which is nearest" if not said else f"say {ESTIMATOR}={LIKE_LOOP}"
    sure = version.origin is Origin.STOCK
    where = f"which {version} is not" if sure else f"and {version} may lack it"
    level = Level.ERROR if sure else Level.WARNING
    yield Finding(CHECK, level, f"{key}: this estimator exists only in SkyRL's fork of VERL, {where}", fix)


def _unknown_values(settings: Settings, version: VerlVersion | None) -> Iterator[Finding]:
    """Estimators and loggers that this VERL's release does not have; a fork, or code that registers one, may."""
    stock = version if version and version.known and version.origin is Origin.STOCK else None
    said = override(settings, ESTIMATOR)
    estimator = Value("advantage estimator", said or settings.adv_estimator, verl_versions.ESTIMATORS)
    shown = f"VERL_OVERRIDES: {ESTIMATOR}={said}" if said else f"ADV_ESTIMATOR={settings.adv_estimator}"
    fixed = stock is not None and stock.release < verl_versions.FIRST_REGISTRY
    if estimator.value != LOOP:  # of which another finding speaks
        yield from estimator.findings(shown, version, fixed)
    for name in settings.loggers:
        logger = Value("logger", name, verl_versions.LOGGERS)
        yield from logger.findings(f"LOGGERS={','.join(settings.loggers)}", version, stock is not None)


@dataclass(frozen=True)
class Value:
    """A value that VERL must know: what it is, and ``since``, in which release each known one came."""

    what: str
    value: str
    since: Mapping[str, verl_versions.Release]

    def findings(self, shown: str, version: VerlVersion | None, sure: bool) -> Iterator[Finding]:
        """Where ``version`` does not have it; ``sure`` that nothing but its own code can bring it."""
        known = verl_versions.known_values(self.since, version.release if version and version.known else None)
        if self.value in known:
            return
        sentence = f"{shown}: {version} has no {self.what} {self.value}"
        if not sure:
            sentence = f"{shown}: the suite knows no {self.what} {self.value} in {version or 'any VERL'}"
        yield Finding(CHECK, Level.ERROR if sure else Level.WARNING, sentence, self._fix(known, sure))

    def _fix(self, known: Sequence[str], sure: bool) -> str:
        if self.value in self.since:
            return f"it came with VERL {'.'.join(map(str, self.since[self.value]))}; choose one of {', '.join(known)}"
        nearest = nearest_word(self.value, known)
        if nearest:
            return f"did you mean {nearest}?"
        return f"{'choose' if sure else 'see whether yours has it, or choose'} one of {', '.join(known)}"


def _overrides(settings: Settings, version: VerlVersion) -> Iterator[Finding]:
    """What the user adds and this release does not have under that name, or does not take. Unknown releases pass."""
    if not version.known:
        return
    for said in map(read_override, settings.verl_overrides):
        yield from _misnamed(said.name, version)
        for row in verl_versions.REFUSED:
            if said == Override(row.name, row.value) and version.release >= row.since:
                sentence = f"VERL_OVERRIDES: {row.name}={row.value} does not run in {version}"
                yield Finding(CHECK, Level.ERROR, sentence, f"use {row.name}={row.instead}")


def _misnamed(name: str, version: VerlVersion) -> Iterator[Finding]:
    right = verl_versions.name_in(version.release, name)
    if right != name:
        yield Finding(CHECK, Level.ERROR, f"VERL_OVERRIDES: {name} is no part of {version}", f"there it is {right}")
    elif not verl_versions.exists_in(version.release, name):
        yield Finding(CHECK, Level.ERROR, f"VERL_OVERRIDES: {name} is not yet a part of {version}", "leave it out")


def _said_twice(settings: Settings, version: VerlVersion | None) -> Iterator[Finding]:
    """Overrides of what a key says: they win in VERL, and no other check knows of them."""
    release = version.release if version and version.known else None
    keys = {(row_name(row, release) or row.name).lstrip("+"): row.keys for row in ROWS if row.keys}
    last = {read_override(text).name: text for text in settings.verl_overrides}
    for name, text in last.items():
        if name in keys and name not in READ:
            sentence = f"VERL_OVERRIDES: {text} wins over {' and '.join(keys[name])}"
            fix = f"set {' or '.join(keys[name])} instead: slots, batch and memory are checked against the key"
            yield warning(CHECK, sentence, fix)
