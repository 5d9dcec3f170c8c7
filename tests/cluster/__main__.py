"""python -m tests.cluster up|down|status|logs"""

from __future__ import annotations

import subprocess
import sys

from tests import cluster


def main(argv: list[str]) -> int:
    if argv == ["up"]:
        lacks = cluster.missing()
        if lacks:
            print(f"missing: {', '.join(lacks)} ({cluster.MISSING_HINT})", file=sys.stderr)
            return 71
        with cluster.exclusive(deadline_s=0):
            print(f"up after {cluster.up():.1f} s; export SLURM_CONF={cluster.CONF}")
    elif argv == ["down"]:
        with cluster.exclusive(deadline_s=0):
            cluster.down()
    elif argv == ["status"]:
        return subprocess.run(["env", f"SLURM_CONF={cluster.CONF}", "sinfo"], check=False).returncode
    elif argv == ["logs"]:
        print(cluster.LOGS)
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except cluster.ClusterError as problem:
        sys.exit(f"cluster: {problem}")
