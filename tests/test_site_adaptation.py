"""Does ``docs/site-adaptation.md`` lead to a site that works? Its commands and its site's file, as they stand there."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path

import pytest

from slurm.lib.config import LoadedConfig, load_config
from slurm.lib.errors import ConfigError
from tests.cluster.accounting import accounting, missing
from tests.conftest import NothingLeft, OrdinaryUser
from tests.page_rows import ROOT
from tests.runs import STARTS_SANDBOXES, parse_report

PAGE = (ROOT / "docs" / "site-adaptation.md").read_text(encoding="utf-8")
# A command, and what it prints below it.
EXAMPLES = dict(re.findall(r"^```bash\n([^`]*?)\n```\n```\n(.*?)\n```$", PAGE, re.MULTILINE | re.DOTALL))
(SITE,) = re.findall(r"^```bash\n(# What is this cluster's.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SINFO, SACCTMGR, SCONTROL, DF, CURL = EXAMPLES


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip("\n").splitlines()]


# --- the site's file -------------------------------------------------------------------------------------------------


def loaded(tmp_path: Path, config: str, site: str, *said: str) -> LoadedConfig:
    file = tmp_path / "site.conf"
    file.write_text(site)
    environment = {"HOME": str(tmp_path), "SKYRL_SITE": str(file)}
    return load_config(config, said, environment, ROOT / "slurm" / "config", datetime(2026, 3, 4), tmp_path)


@pytest.mark.parametrize("config", ["dev", "production", "check"])
def test_the_sites_file_has_the_last_word_on_what_is_the_sites(tmp_path: Path, config: str) -> None:
    site = SITE.replace('"test"', '"cpus"').replace('"gpu_test"', '"cards"').replace("#ACCOUNT", "ACCOUNT")
    site = site.replace('"$HOME/skyrl"', '"/scratch/me"').replace('"tcp"', '"verbs"')
    found = loaded(tmp_path, config, site)
    taken = found.settings.as_environment()
    names = ("CPU_PARTITION", "GPU_PARTITION", "ACCOUNT", "FI_PROVIDER", "SKYRL_LD_LIBRARY_PATH_EXPORT", "CACHE_DIR")
    assert [taken[name] for name in names] == ["cpus", "cards", "my_lab", "verbs", "0", "/scratch/me/cache"]
    assert found.warnings == ()
    assert "site.conf" in {file.name for file in found.files}, "it is copied into the run directory, too"
    said = loaded(tmp_path, config, site, "GPU_PARTITION=now").settings
    assert said.gpu_partition == "now"


def test_a_file_of_ones_own_reads_the_sites_with_a_shipped_one(tmp_path: Path) -> None:
    (own,) = re.findall(r"^```bash\n(# ~/skyrl/large\.conf.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "large.conf").write_text(own)
    found = loaded(tmp_path, str(tmp_path / "large.conf"), SITE.replace('"gpu_test"', '"cards"')).settings
    assert (found.gpu_partition, found.gpus_per_node) == ("cards", 8)


def test_other_partitions_for_production(tmp_path: Path) -> None:
    (line,) = re.findall(r"`(case .* esac)`", PAGE)
    site = f"{SITE}{line}\n"
    assert loaded(tmp_path, "production", site).settings.gpu_partition == "gpu"
    assert loaded(tmp_path, "dev", site).settings.gpu_partition == "gpu_test"


def test_a_sites_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "SKYRL_SITE": "/nowhere/site.conf"}
    with pytest.raises(ConfigError, match=r"/nowhere/site\.conf"):
        load_config("dev", [], environment, ROOT / "slurm" / "config", datetime(2026, 3, 4), tmp_path)


# --- on the cluster --------------------------------------------------------------------------------------------------


@pytest.mark.slurm
def test_the_commands_print_what_the_page_shows(user: OrdinaryUser, nothing_left: NothingLeft) -> None:
    def printed(command: str) -> list[str]:
        return lines(user.run(["bash", "-c", command]).stdout)

    for command in (SINFO, SCONTROL):
        assert printed(command) == lines(EXAMPLES[command])
    assert printed(DF)[0].split() == lines(EXAMPLES[DF])[0].split()
    assert printed(CURL) in (["000"], ["401"])
    assert "You are not running a supported accounting_storage plugin" in user.run(["bash", "-c", SACCTMGR]).stderr
    if lacks := missing():
        pytest.skip(f"accounting needs {', '.join(lacks)}")
    with accounting(user.name):
        assert printed(SACCTMGR) == lines(EXAMPLES[SACCTMGR])


@pytest.mark.slurm
@pytest.mark.podman
def test_a_site_from_nothing(user: OrdinaryUser, checkout: Path, nothing_left: NothingLeft) -> None:
    """By the page alone, up to a run; on a partition that no shipped file names, so that the site's file is needed."""
    folder = user.home / "skyrl"
    user.run(["bash", "-c", "rm -rf ~/.skyrl_jobs ~/skyrl && mkdir ~/skyrl"])
    (folder / "site.conf").write_text(SITE.replace('"gpu_test"', '"urgent"'))

    def does(line: str, code: int = 0, *words: str) -> str:
        argv = [*line.split(), *words]
        done = user.run(argv, {"SKYRL_SITE": f"{folder}/site.conf"}, checkout, timeout=180)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    planned = does("./slurm/launch.py --config check --dry-run")
    assert "--partition=urgent" in planned
    does("./slurm/launch.py --config check --check")
    looked = does("./slurm/launch.py doctor --config check", 71)
    assert re.findall(r"^  fail  (\w+)", looked, re.MULTILINE) == ["gpu"], looked  # the nodes have no driver
    # In place of the RL loop, which test_slurm_runs.py runs, a trainer of a moment.
    run = parse_report(user, does("./slurm/launch.py --config check", 0, "--set", STARTS_SANDBOXES))
    does("./slurm/launch.py wait latest")
    assert run.shown("training", "%P") == "urgent"
    assert len(json.loads(run.text("sandboxes.json"))) == 2
