"""Commands of sandboxes in tests; the fake Podman knows what they do, a real one runs them in busybox."""

from __future__ import annotations

IMAGE = "localhost/bb:latest"
IMAGE_WITH_ENTRYPOINT = "localhost/bb-entrypoint:latest"  # its entry point is /bin/sh

# Answers /health and /ready, and shows what it sees of itself as further pages.
SERVE_SCRIPT = """
mkdir -p /www; cd /www
echo '"OK"' > health; cp health ready
env > env; id -u > uid; cat /proc/self/status > status; cat /proc/self/uid_map > uid_map
echo "$OLDPWD" > cwd; touch /workspace/file && echo yes > workspace
exec httpd -f -p ${1:-60000} -h /www
"""
SERVE = ["/bin/sh", "-c", SERVE_SCRIPT, "server", "60000"]
SERVE_ON_PLACEHOLDER = [*SERVE[:-1], "88888888"]
EXIT = ["/bin/sh", "-c", "echo last words; exit 3"]
CHATTY = ["/bin/sh", "-c", "yes 0123456789 | head -c 3000000; printf 'in '; printf 'pieces'; exit 4"]
SILENT = ["/bin/sleep", "1000"]
NOT_THERE = ["/bin/nonesuch"]
