# What of the system the sandboxes and the tests need: who may install it installs it, everyone else is told all that
# is missing at once. Sourced by scripts/setup.
# shellcheck shell=bash

# catatonit is the init process of sandboxes; netavark stands for the network stack that Podman's package asks for.
DEBIAN_RUN=(podman runc uidmap slirp4netns catatonit netavark busybox-static)
DEBIAN_TEST=(slurm-wlm munge iproute2 procps git debootstrap docker-registry chromium musl-tools gcc python3-fusepy libfuse2
    slurmdbd mariadb-server openssh-server zsh fish)
readonly TUN=/dev/net/tun SUBORDINATE_IDS=65536

may_install() { [[ $EUID == 0 ]] && there apt-get dpkg-query; }

# Prints those of the Debian packages that are not installed.
not_installed() {
    local installed name
    installed=" $(dpkg-query --show --showformat '${Package}=${db:Status-Status} ' "$@" 2>/dev/null || true)"
    for name in "$@"; do
        [[ $installed == *" $name=installed "* ]] || printf '%s\n' "$name"
    done
}

apt_install() {
    DEBIAN_FRONTEND=noninteractive apt-get --yes --quiet --no-install-recommends -o DPkg::Lock::Timeout=300 \
        install "$@"
}

# Refreshes the package lists only where they prove to be missing or old.
install_debian() {
    local missing
    mapfile -t missing < <(not_installed "$@")
    ((${#missing[@]})) || return 0
    say "installing Debian's ${missing[*]}"
    apt_install "${missing[@]}" >/dev/null 2>&1 </dev/null && return 0
    quietly apt-get --quiet -o DPkg::Lock::Timeout=300 update ||
        die "$EXIT_ENVIRONMENT" "could not refresh Debian's package lists (apt-get update); see above"
    quietly apt_install "${missing[@]}" ||
        die "$EXIT_ENVIRONMENT" "could not install ${missing[*]} (apt-get install); see above"
}

# Even --version makes Podman's runtime folders where none are named; so they are made here, and go.
podman_version() {
    local folder code=0
    folder="$(mktemp -d)"
    XDG_RUNTIME_DIR="$folder" podman --version || code=$?
    rm -rf "$folder"
    return "$code"
}

# Podman 5 connects rootless containers by pasta, earlier ones by slirp4netns.
podman_major() {
    local version
    version="$(podman_version 2>/dev/null)" || return 0
    version="${version##* }"
    printf '%s' "${version%%.*}"
}

ensure_packages() {
    local wanted=("${DEBIAN_RUN[@]}")
    # Debian keeps daemons in folders that an ordinary user's PATH lacks.
    PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
    [[ $1 == run ]] || wanted+=("${DEBIAN_TEST[@]}")
    if may_install; then
        install_debian "${wanted[@]}"
        [[ $(podman_major) -lt 5 ]] || install_debian passt
    fi
    report_missing "$1"
}

# --- What is missing, and what to do about it ------------------------------------------------------------------------

lacks() {
    MISSING+=("$1")
    REMEDIES+=("$2")
}

lacks_program() {
    MISSING+=("$1")
    TO_INSTALL+=("$2")
}

report_missing() {
    MISSING=() REMEDIES=() TO_INSTALL=()
    check_programs
    check_tun
    [[ $EUID == 0 ]] || check_user_namespaces
    [[ $1 == run ]] || check_test_programs
    ((${#MISSING[@]})) || return 0
    describe_missing
    exit "$EXIT_ENVIRONMENT"
}

check_programs() {
    local major
    major="$(podman_major)"
    if [[ -z $major ]]; then
        lacks_program "podman: starts the sandboxes" podman
    elif ((major < 4)); then
        lacks_program "podman 4.0 or newer: here is only $(podman_version)" podman
    fi
    there runc || there crun || lacks_program "runc or crun: runs a sandbox for Podman" runc
    if ((${major:-4} >= 5)); then
        there pasta || lacks_program "pasta: connects a sandbox to the network" passt
    else
        there slirp4netns || lacks_program "slirp4netns: connects a sandbox to the network" slirp4netns
    fi
    has_busybox || lacks_program "busybox: the sandbox image is made from a static one" busybox-static
}

# The image needs a static busybox, which an ordinary user of Debian can fetch without installing it.
has_busybox() {
    there busybox || there busybox-static || there apt-get dpkg-deb
}

check_tun() {
    # Opening the device makes no interface; nothing else tells whether this machine lets us.
    (exec 3<>"$TUN") 2>/dev/null && return 0
    if [[ -e $TUN ]]; then
        lacks "$TUN that ${USER_NAME} can read and write: sandboxes reach the network through it" "chmod 0666 $TUN"
    else
        lacks "$TUN: sandboxes reach the network through it" \
            "modprobe tun || { mkdir -p ${TUN%/*} && mknod -m 0666 $TUN c 10 200; }"
    fi
}

check_user_namespaces() {
    there newuidmap newgidmap ||
        lacks_program "newuidmap and newgidmap: give a sandbox its own user ids" uidmap
    check_subordinate_ids
    unshare --user -- "$BASH" -c : 2>/dev/null || lacks "user namespaces: this kernel refuses them to ordinary users" \
        "sysctl -w user.max_user_namespaces=65536$(debian_switch)"
}

# Debian's kernels have a switch of their own.
debian_switch() {
    [[ ! -e /proc/sys/kernel/unprivileged_userns_clone ]] || printf ' kernel.unprivileged_userns_clone=1'
}

check_subordinate_ids() {
    local lacking=() options="" first
    has_range /etc/subuid || lacking+=(/etc/subuid) options+="--add-subuids RANGE "
    has_range /etc/subgid -g || lacking+=(/etc/subgid) options+="--add-subgids RANGE "
    ((${#lacking[@]})) || return 0
    first="$(first_free_id)"
    lacks "a range of subordinate ids for $USER_NAME in $(join " and " "${lacking[@]}"): a sandbox's own user ids" \
        "usermod ${options//RANGE/$first-$((first + SUBORDINATE_IDS - 1))}$USER_NAME"
}

# has_range FILE [OPTION OF getsubids]: getsubids knows directories other than the files, where it exists.
has_range() {
    local file="$1"
    shift
    ! there getsubids || [[ -z $(getsubids "$@" "$USER_NAME" 2>/dev/null) ]] || return 0
    grep -q -E "^($USER_NAME|$EUID):[0-9]+:[1-9]" -- "$file" 2>/dev/null
}

first_free_id() {
    cat /etc/subuid /etc/subgid 2>/dev/null | awk -F: -v free=100000 \
        '$2 + $3 > free { free = $2 + $3 } END { printf "%d", free }'
}

check_test_programs() {
    local program
    [[ $EUID == 0 ]] || lacks "root: the tests start a Slurm of several nodes" "run it as root, on a machine for tests"
    for program in slurmctld:slurm-wlm slurmd:slurm-wlm munged:munge ip:iproute2 ps:procps git:git; do
        there "${program%%:*}" || lacks_program "${program%%:*}: the tests' Slurm cluster needs it" "${program##*:}"
    done
}

join() {
    local between="$1" text="$2" word
    for word in "${@:3}"; do text+="$between$word"; done
    printf '%s' "$text"
}

describe_missing() {
    local line
    {
        printf '%s: this machine lacks what %s needs for sandboxes:\n' "$COMMAND" "$USER_NAME"
        printf '  - %s\n' "${MISSING[@]}"
        printf 'An administrator can put it there, as root:\n'
        ((${#TO_INSTALL[@]} == 0)) || printf '  %s\n' "$(install_line)"
        for line in "${REMEDIES[@]}"; do printf '  %s\n' "$line"; done
        printf 'Then run %s again.\n' "$0"
    } >&2
}

install_line() {
    local names
    names="$(printf '%s\n' "${TO_INSTALL[@]}" | sort -u | tr '\n' ' ')"
    names="${names% }"
    if there apt-get; then
        printf 'apt-get install %s' "$names"
    elif there dnf; then
        names="${names/busybox-static/busybox}"
        printf 'dnf install %s' "${names/uidmap/shadow-utils}"
    else
        printf "install, by the names that Debian gives them: %s" "$names"
    fi
}

USER_NAME="$(id -un 2>/dev/null || id -u)"
