"""``python -m slurm_runtime.agent``: make an agent tree, show the ones there are, print the path of the newest.

Exit codes: 0 done; 1 there is none (show, path); 2 the command line is wrong; 71 it cannot be made here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from slurm_runtime.agent.build import DEFAULT_VERSION, BuildProblem, build, say_on_stderr
from slurm_runtime.agent.tree import default_cache, load, newest

EXIT_NONE = 1
EXIT_ENVIRONMENT = 71


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m slurm_runtime.agent",
        description="Make an agent tree, show the newest one, print its path.",
        epilog=__doc__.splitlines()[2],
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="{build,show,path}")
    make = verbs.add_parser("build", help="make the tree of a version, if it is not there")
    make.add_argument("--version", default=DEFAULT_VERSION, help="of openhands-agent-server (default: %(default)s)")
    make.add_argument(
        "--python",
        default="auto",
        metavar="auto|debian|uv|PATH",
        help="where its Python comes from; PATH is a relocatable Python 3.12 or newer (default: auto)",
    )
    show = verbs.add_parser("show", help="what is in the newest tree")
    show.add_argument("--json", action="store_true", help="its manifest as JSON")
    path = verbs.add_parser("path", help="the newest tree's folder, for --agent-dir")
    for verb in (make, show, path):
        verb.add_argument(
            "--cache",
            type=Path,
            default=default_cache(os.environ),
            metavar="DIR",
            help="folder of the trees (default: $SKYRL_AGENT_CACHE, else %(default)s)",
        )
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        if args.verb == "build":
            print(build(args.cache, args.version, args.python, say_on_stderr).root)
            return 0
        tree = newest(args.cache)
    except (BuildProblem, OSError) as problem:
        say_on_stderr(f"the agent tree cannot be made in {args.cache}: {problem}")
        return EXIT_ENVIRONMENT
    if tree is None:
        say_on_stderr(f"there is no agent tree in {args.cache}; make one with 'python -m slurm_runtime.agent build'")
        return EXIT_NONE
    if args.verb == "path":
        print(tree.root)
    elif args.json:
        print(load(tree.root).manifest(), end="")
    else:
        print(json.dumps({"path": str(tree.root), "version": tree.version, "packages": len(tree.packages)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
