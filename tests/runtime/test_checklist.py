"""Does every statement of the conformance checklist have a test on real Podman?

The checklist is what clients of the remote runtime API rely on, in short in ``CHECKLIST``; what each statement means
exactly is in its tests. A test counts for the numbers that its name begins with: ``test_08_09_…``. That none was
skipped is seen to by ``tests/no_skips.py``: in CI a skipped test has failed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CHECKLIST = {
    1: "every endpoint but /health asks for the key in X-API-Key, and answers 401 without it",
    2: "errors are JSON with a text in detail",
    3: "sixteen starts in parallel, while /health answers",
    4: "an idle connection stays usable",
    5: "a command as a string and as a list starts the same process",
    6: "every field that any client sends is accepted",
    7: "an entry point of the image that equals the command's program is not run twice",
    8: "/start answers with every field that clients read",
    9: "among them a URL without a path, and the sandbox's own key",
    10: "a sandbox is known by its names before /start has answered",
    11: "a start that waits for its image is answered in time, as pending",
    12: "a living session is found again, also if asked for twice at once; a stopped one is started anew",
    13: "a slot that becomes free in time is taken; else 503 with slots used and in all, and nothing is left",
    14: "a client that hangs up during /start leaves nothing, unless another waits for the session",
    15: "a command that exits, a program or an image that is not there: failed or refused, with the last lines",
    16: "the working directory is made, and /workspace can be written",
    17: "keys are enforced; each sandbox has its own, and the client's variables",
    18: "88888888 becomes the port, and running the word for ready",
    19: "resource_factor multiplies the share and takes slots",
    20: "ready means that the server has answered at its URL",
    21: "polls after ready go on saying ready",
    22: "fields of a sandbox have the types that clients read",
    23: "unknown sessions and sandboxes are 404",
    24: "a sandbox that dies, or takes more than it may, is failed with its reason, and frees its slot",
    25: "status is a word that clients know, and no field is null",
    26: "/sessions/batch is a list of those that are known",
    27: "/list has only the living",
    28: "/stop removes a sandbox, and may be repeated",
    29: "/pause and /resume keep files, memory, URL and key",
    30: "/resume of a running one is fine, and of nothing; of an unknown one it is 404",
    31: "sixteen stops at once",
    32: "SIGTERM removes every container, also in the midst of starts; what a killed server left, the next removes",
    33: "an idle sandbox is stopped, a working one is not",
    34: "/registry_prefix, and /image_exists with time and size, which also fetches",
    35: "/build builds an image under all its names, or says why not; 501 where it is off",
    36: "the real OpenHands SDK works",
    37: "the real legacy client works",
    38: "many workspaces of the real SDK in parallel, twice, leave nothing",
}
NAME = re.compile(r"::test_((?:\d\d_)+)")


def numbers_of(node_ids: list[str]) -> set[int]:
    """The numbers in the names of tests."""
    found = (NAME.search(node_id) for node_id in node_ids)
    return {int(number) for match in found if match for number in match[1].rstrip("_").split("_")}


def test_numbers_are_read_from_names() -> None:
    assert numbers_of(["a.py::test_08_09_x[fork]", "a.py::test_3_things", "a.py::test_10_y", "a.py::test_z"]) == {
        8,
        9,
        10,
    }


def test_every_statement_has_a_test_on_real_podman() -> None:
    folder = Path(__file__).parent
    argv = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-m",
        "podman",
        "-p",
        "no:cacheprovider",
        str(folder),
    ]
    done = subprocess.run(argv, cwd=folder.parents[1], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    assert set(CHECKLIST) - numbers_of(done.stdout.splitlines()) == set()
