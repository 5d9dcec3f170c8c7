# What the scripts here share; sourced by them, with CHECKOUT set.
# shellcheck shell=bash disable=SC2034

readonly EXIT_USAGE=2 EXIT_ENVIRONMENT=71 # as in slurm/lib/errors.py
readonly COMMAND="${0##*/}"
VENV="${SKYRL_VENV:-$CHECKOUT/.venv}"

say() { printf '%s: %s\n' "$COMMAND" "$*" >&2; }

# die STATUS MESSAGE
die() {
    say "$2"
    exit "$1"
}

# quietly COMMAND…: run it without a word; if it fails, show all that it printed and return its status.
quietly() {
    local output status=0
    output="$(mktemp)"
    "$@" >"$output" 2>&1 </dev/null || status=$?
    [[ $status == 0 ]] || cat -- "$output" >&2
    rm -f -- "$output"
    return "$status"
}

# there COMMAND…: whether all of them are on PATH.
there() {
    local name
    for name in "$@"; do command -v -- "$name" >/dev/null || return 1; done
}
