"""Accounting for the test cluster: slurmdbd with a database of its own, both only while a test module asks for them.

It costs seconds, and most tests want none, as some clusters have none. The database listens on a socket alone; all
lies below the cluster's ``HOME`` and goes with it.
Needs the Debian packages slurmdbd and mariadb-server; their services need not run, and are not touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence

from tests.cluster import (
    ACCOUNTING_PID_FILES,
    CONF,
    CONTROLLER_PID,
    HOME,
    LOGIN,
    LOGS,
    ClusterError,
    _alive,
    _await,
    _call,
    _stop,
    _which,
    environment,
    start_controller,
)

PROGRAMS = ("slurmdbd", "sacctmgr", "mariadbd", "mariadb-install-db")
FOLDER = HOME / "db"
SOCKET = FOLDER / "socket"
DBD_CONF = CONF.parent / "slurmdbd.conf"
DBD_PID, DATABASE_PID = ACCOUNTING_PID_FILES
ACCOUNT = "lab"
CLUSTER = "skyrltest"
DBD_PORT = 16819

# A user without an association is refused, as at sites that account.
KEYS = f"""\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={LOGIN}
AccountingStoragePort={DBD_PORT}
AccountingStoragePass={HOME}/munge/socket
AccountingStorageEnforce=associations
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
AccountingStorageTRES=gres/gpu
"""
DBD_CONFIG = """\
DbdHost={host}
DbdAddr={login}
DbdPort={port}
AuthType=auth/munge
AuthInfo=socket={home}/munge/socket
SlurmUser=root
PidFile={pid}
LogFile={logs}/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
"""
# As small as it goes: below /run is memory.
DATABASE_OPTIONS = (
    "--no-defaults",
    f"--datadir={FOLDER}/data",
    "--innodb-log-file-size=4M",
    "--innodb-buffer-pool-size=16M",
    "--innodb-autoextend-increment=4",
    "--innodb-lock-wait-timeout=900",
    "--user=root",
)
IN_THE_BACKGROUND = 'log=$1; shift; exec setsid --fork "$@" </dev/null >>"$log" 2>&1'


def missing() -> list[str]:
    """What this machine lacks for accounting; empty where nothing is."""
    return [name for name in PROGRAMS if not _which(name)]


@contextlib.contextmanager
def accounting(*users: str) -> Iterator[float]:
    """The running cluster with accounting for the length of the block; yields the seconds that its start took.

    ``users`` have an association with the account ``lab``; the jobs of others are refused meanwhile. The controller
    is restarted at both ends, and goes on with the jobs that it knew.
    """
    begin, plain = time.monotonic(), CONF.read_text()
    try:
        _start_database()
        _start_slurmdbd()
        CONF.write_text(_with_accounting(plain))
        _associate(users)
        _restart_controller()
        _await("the controller to be known to slurmdbd", _is_registered, LOGS / "slurmdbd.log")
        yield time.monotonic() - begin
    finally:
        CONF.write_text(plain)
        _restart_controller()
        for path in ACCOUNTING_PID_FILES:
            _stop(path)
        shutil.rmtree(FOLDER, ignore_errors=True)


def _with_accounting(plain: str) -> str:
    """The configuration with accounting's keys in place of those that say that there is none."""
    ours = {line.partition("=")[0] for line in KEYS.splitlines()}
    kept = [line for line in plain.splitlines(keepends=True) if line.partition("=")[0] not in ours]
    return KEYS + "".join(kept)


def _start_database() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    (FOLDER / "tmp").mkdir(parents=True)
    FOLDER.chmod(0o700)
    options = (*DATABASE_OPTIONS, "--skip-test-db", "--auth-root-authentication-method=socket")
    _call(_which("mariadb-install-db") or "mariadb-install-db", *options)
    log = LOGS / "mariadbd.log"
    places = (f"--socket={SOCKET}", f"--pid-file={DATABASE_PID}", f"--tmpdir={FOLDER}/tmp", "--skip-networking")
    server = (_which("mariadbd") or "mariadbd", *DATABASE_OPTIONS, *places)
    _call("sh", "-c", IN_THE_BACKGROUND, "sh", str(log), *server)
    _await("the database", lambda: _alive(DATABASE_PID) is not None and SOCKET.exists(), log)


def _start_slurmdbd() -> None:
    """It takes no path of its configuration, and finds it beside Slurm's; so its own name is what tells it apart."""
    DBD_CONF.touch(0o600)
    places = {"home": HOME, "pid": DBD_PID, "logs": LOGS}
    DBD_CONF.write_text(DBD_CONFIG.format(host=socket.gethostname(), login=LOGIN, port=DBD_PORT, **places))
    log = LOGS / "slurmdbd.log"
    variables = {**os.environ, **environment(), "MYSQL_UNIX_PORT": str(SOCKET)}
    subprocess.run([f"{HOME}/slurmdbd"], executable=_which("slurmdbd"), env=variables, check=True)
    _await("slurmdbd", _listens, log)


def _listens() -> bool:
    with contextlib.suppress(OSError), socket.create_connection((LOGIN, DBD_PORT), timeout=1):
        return True
    return False


def _associate(users: Sequence[str]) -> None:
    """The cluster, the account and its users, by one sacctmgr: each takes a third of a second to begin."""
    commands = [f"add cluster {CLUSTER}", f"add account {ACCOUNT} cluster={CLUSTER} description=lab organization=lab"]
    commands += [f"add user {name} account={ACCOUNT} cluster={CLUSTER}" for name in users]
    told = subprocess.run(
        [_which("sacctmgr") or "sacctmgr", "--immediate"],
        input="".join(f"{command}\n" for command in [*commands, "quit"]),
        env={**os.environ, **environment()},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if told.returncode or "error" in told.stderr.lower():
        raise ClusterError(f"sacctmgr: {told.stderr.strip() or told.stdout.strip()}")


def _is_registered() -> bool:
    """Of jobs that start before, the accounts would lack half."""
    shown = _call("sacctmgr", "-n", "-P", "show", "cluster", CLUSTER, "format=ControlHost,ControlPort")
    return shown.strip() == f"{LOGIN}|16817"


def _restart_controller() -> None:
    """Where its accounts are kept, it reads only as it starts."""
    _stop(CONTROLLER_PID)
    start_controller()
