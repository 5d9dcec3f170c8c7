"""What runs inside a sandbox, and how its answers are read: busybox httpd with one program that runs shell text.

Needs an image with busybox and nothing else. ``POST /cgi-bin/run`` takes shell text and, with the sandbox's own
key in ``X-Session-API-Key``, runs it in a fresh directory that is removed afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

PORT = 60000
RUN_PATH = "/cgi-bin/run"
COMMAND_SECONDS = 10  # a script that runs longer is killed, with everything it started
OUTPUT_BYTES = 65536  # of stdout and of stderr; the rest is cut off

# Busybox's own sh answers `command -v busybox` with the bare word, so its path is looked for in the start script.
# `timeout` kills one process, so the script gets a session of its own whose group is killed at the end.
_RUN_PROGRAM = f"""
if [ -z "$SESSION_API_KEY" ] || [ "$HTTP_X_SESSION_API_KEY" != "$SESSION_API_KEY" ]; then
  printf 'Status: 403 Forbidden\\r\\nContent-Type: text/plain\\r\\n\\r\\nwrong X-Session-API-Key\\n'; exit 0
fi
fail() {{ printf 'Status: 500 Internal Server Error\\r\\nContent-Type: text/plain\\r\\n\\r\\n%s\\n' "$1"; exit 0; }}
d=$(mktemp -d "$SHELL_RL_ROOT/run.XXXXXX") || fail 'no temporary directory'
trap 'cd /; rm -rf "$d"' EXIT
mkdir "$d/work" && head -c "${{CONTENT_LENGTH:-0}}" >"$d/script" && cd "$d/work" || fail 'no room for the script'
ulimit -f 4096
setsid env -i PATH="$PATH" HOME="$d/work" TMPDIR="$d/work" LC_ALL=C \\
  timeout -s KILL {COMMAND_SECONDS} sh "$d/script" >"$d/out" 2>"$d/err" </dev/null &
p=$!
wait "$p"
code=$?
kill -KILL "-$p" 2>/dev/null
for f in out err; do
  n=$(wc -c <"$d/$f")
  [ "$n" -le {OUTPUT_BYTES} ] || {{ head -c {OUTPUT_BYTES} "$d/$f" >"$d/cut"; mv "$d/cut" "$d/$f"; n={OUTPUT_BYTES}; }}
  eval "$f=$n"
done
printf 'Content-Type: application/octet-stream\\r\\n\\r\\n%s %s %s\\n' "$code" "$out" "$err"
cat "$d/out" "$d/err"
"""


def start_script(port: int = PORT, address: str = "") -> str:
    """Shell text that makes the web root and becomes the HTTP server.

    :param port: where the server listens inside the sandbox
    :param address: the address to listen on; empty for all
    """
    listen = f"{address}:{port}" if address else str(port)
    return f"""\
die() {{ echo "shell_rl: $1" >&2; exit 127; }}
B=
for b in /bin/busybox /usr/bin/busybox /usr/local/bin/busybox /sbin/busybox; do [ -x "$b" ] && B=$b && break; done
[ "$B" ] || die 'this image has no busybox; choose one that has (CONTAINER_IMAGE or --image)'
T=${{TMPDIR:-/tmp}}
"$B" mkdir -p "$T" && R=$("$B" mktemp -d "$T/shell-rl.XXXXXX") || die "cannot write in $T"
"$B" mkdir -p "$R/bin" "$R/www/cgi-bin" || die "cannot write in $R"
"$B" --install -s "$R/bin"
echo OK >"$R/www/health"; echo '{{"status":"ok"}}' >"$R/www/alive"; echo '{{"status":"ready"}}' >"$R/www/ready"
{{ echo "#!$B sh"; "$B" cat <<'END_OF_PROGRAM'
{_RUN_PROGRAM.strip()}
END_OF_PROGRAM
}} >"$R/www{RUN_PATH}" && "$B" chmod 755 "$R/www{RUN_PATH}" || die "cannot write in $R"
export SHELL_RL_ROOT="$R" PATH="$R/bin:$PATH"
exec "$B" httpd -f -p {listen} -h "$R/www"
"""


def start_command() -> list[str]:
    """The command of ``/start``."""
    return ["/bin/sh", "-c", start_script()]


@dataclass(frozen=True)
class Execution:
    """What a script did: exit code (137 when its time was over), stdout and stderr, each at most ``OUTPUT_BYTES``."""

    exit_code: int
    stdout: str
    stderr: str


def parse_reply(body: bytes) -> Execution:
    """Read the answer of ``/cgi-bin/run``.

    :raises ValueError: the answer is not one of this program, or was cut off
    """
    head, _, rest = body.partition(b"\n")
    try:
        code, out, err = map(int, head.split())
    except ValueError:
        raise ValueError(f"not an answer of {RUN_PATH}: {body[:80]!r}") from None
    if len(rest) != out + err:
        raise ValueError(f"cut off: {len(rest)} bytes of {out + err}")
    return Execution(code, rest[:out].decode(errors="replace"), rest[out:].decode(errors="replace"))
