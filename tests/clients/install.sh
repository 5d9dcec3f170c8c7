#!/usr/bin/env bash
# Installs the real clients into a Debian tree with Python 3.13: install.sh ROOT. Root, about five minutes, once for a
# machine; run again it does only what is missing. They need Python 3.12 or newer, which Debian 12 does not have.
set -euo pipefail
ROOT="$1"
readonly SDK=1.9.0 NEWEST=1.57.0 LEGACY=0.62.0

mirror() {
    cat /etc/apt/sources.list.d/debian.sources 2>/dev/null | awk '/^URIs:/ { print $2; exit }'
}

make_tree() {
    [[ ! -e $ROOT/.tree-is-whole ]] || return 0
    rm -rf --one-file-system -- "$ROOT"
    mkdir -p -- "$ROOT"
    debootstrap --variant=minbase \
        --include=python3,python3-venv,python3-dev,ca-certificates,git,curl,tmux,procps trixie "$ROOT" "$(mirror)" >&2
    touch "$ROOT/.tree-is-whole"
}

in_tree() {
    chroot "$ROOT" env -i HOME=/root PATH=/usr/sbin:/usr/bin LC_ALL=C.UTF-8 PIP_NO_INPUT=1 \
        PIP_CERT=/etc/ssl/certs/ca-certificates.crt PIP_DEFAULT_TIMEOUT=180 PIP_DISABLE_PIP_VERSION_CHECK=1 \
        ${PIP_INDEX_URL:+PIP_INDEX_URL="$PIP_INDEX_URL"} bash -c "$1" >&2
}

# install NAME PACKAGES…: an environment of its own, named when it is whole.
install() {
    local folder="/opt/$1"
    shift
    [[ ! -e $ROOT$folder/.whole ]] || return 0
    in_tree "rm -rf $folder && python3 -m venv $folder && $folder/bin/pip install -q $* && touch $folder/.whole"
}

openhands() { printf 'openhands-%s ' "sdk==$1" "tools==$1" "workspace==$1" "agent-server==$1"; }

# Mounts are seen by nobody else and go with this process.
[[ ${SKYRL_PRIVATE_MOUNTS:-} ]] || SKYRL_PRIVATE_MOUNTS=1 exec unshare --mount --propagation private "$0" "$@"
mkdir -p -- "$(dirname -- "$ROOT")"
exec 9>"$ROOT.lock"
flock 9
make_tree
cp /etc/resolv.conf "$ROOT/etc/resolv.conf"
cp /etc/ssl/certs/ca-certificates.crt "$ROOT/etc/ssl/certs/ca-certificates.crt"
mount -t proc proc "$ROOT/proc"
mount --bind /dev "$ROOT/dev"
install "oh-$SDK" "$(openhands "$SDK") fastapi==0.128.0" # a newer one refuses this release
install "oh-$NEWEST" "$(openhands "$NEWEST")"
install "ohai-$LEGACY" "openhands-ai==$LEGACY"
