"""A container's seccomp profile as the BPF program that its runtime installs; compiled by libseccomp.

The profile is ``linux.seccomp`` of the OCI runtime specification. Like runc, system calls that are newer than all the
profile knows are answered with ENOSYS: a C library then falls back, where EPERM would break it.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import os
import struct
from collections.abc import Mapping
from typing import Any

ACTIONS = {
    "SCMP_ACT_KILL": 0x00000000,
    "SCMP_ACT_KILL_THREAD": 0x00000000,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_TRAP": 0x00030000,
    "SCMP_ACT_ERRNO": 0x00050000,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_ALLOW": 0x7FFF0000,
}
COMPARISONS = {
    "SCMP_CMP_NE": 1,
    "SCMP_CMP_LT": 2,
    "SCMP_CMP_LE": 3,
    "SCMP_CMP_EQ": 4,
    "SCMP_CMP_GE": 5,
    "SCMP_CMP_GT": 6,
    "SCMP_CMP_MASKED_EQ": 7,
}
NATIVE = {"x86_64": ("SCMP_ARCH_X86_64", 0xC000003E), "aarch64": ("SCMP_ARCH_AARCH64", 0xC00000B7)}
X32_BIT = 0x40000000
# Of BPF: load a word of seccomp_data, jump if equal / greater, return.
LOAD, JUMP_EQUAL, JUMP_GREATER, RETURN = 0x20, 0x15, 0x25, 0x06
NUMBER_AT, ARCHITECTURE_AT = 0, 4


KEY_CALLS = ("add_key", "keyctl", "request_key")


class Unsupported(Exception):
    """The profile cannot be reproduced here; ``str()`` says why."""


class _Comparison(ctypes.Structure):
    _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]


def library() -> ctypes.CDLL:
    """libseccomp: the one of the tree, found through its loader's library path."""
    try:
        found = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    except OSError as problem:
        raise Unsupported(f"libseccomp is missing ({problem})") from None
    found.seccomp_init.restype = ctypes.c_void_p
    found.seccomp_init.argtypes = [ctypes.c_uint32]
    found.seccomp_release.argtypes = [ctypes.c_void_p]
    found.seccomp_arch_add.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
    found.seccomp_arch_resolve_name.argtypes = [ctypes.c_char_p]
    found.seccomp_arch_resolve_name.restype = ctypes.c_uint32
    found.seccomp_attr_set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32]
    found.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.POINTER(_Comparison),
    ]
    found.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
    return found


def action(name: str, error: int | None) -> int:
    """The kernel's number for an action."""
    if name not in ACTIONS:
        raise Unsupported(f"its seccomp profile uses {name}")
    code = ACTIONS[name]
    return code | ((errno.EPERM if error is None else error) & 0xFFFF) if name == "SCMP_ACT_ERRNO" else code


def compile_profile(profile: Mapping[str, Any]) -> bytes:
    """The program for this machine's architecture, as an array of 8-byte instructions."""
    if profile.get("listenerPath") or os.uname().machine not in NATIVE:
        raise Unsupported("its seccomp profile has a listener, or this architecture is not known")
    lib = library()
    default = action(profile["defaultAction"], profile.get("defaultErrnoRet"))
    context = lib.seccomp_init(default)
    if not context:
        raise Unsupported("libseccomp refuses its seccomp profile")
    try:
        for name in profile.get("architectures") or ():
            lib.seccomp_arch_add(context, lib.seccomp_arch_resolve_name(_architecture(name)))
        lib.seccomp_attr_set(context, 3, 0)  # no_new_privs is set by us, in its place
        newest = _add_rules(lib, context, profile, default)
        program = _exported(lib, context)
    finally:
        lib.seccomp_release(context)
    wants_stub = profile["defaultAction"] == "SCMP_ACT_ERRNO" and default & 0xFFFF != errno.ENOSYS
    return (newer_is_unknown(newest) if wants_stub else b"") + program


def _architecture(name: str) -> bytes:
    return name.removeprefix("SCMP_ARCH_").lower().encode()


def _add_rules(lib: ctypes.CDLL, context: int, profile: Mapping[str, Any], default: int) -> int:
    """All rules; the highest number of a system call that the profile names."""
    newest = 0
    for rule in profile.get("syscalls") or ():
        does = action(rule["action"], rule.get("errnoRet"))
        for name in rule["names"]:
            number = lib.seccomp_syscall_resolve_name(name.encode())
            newest = max(newest, number)
            if number != -1 and does != default and name not in KEY_CALLS:
                _add_rule(lib, context, does, number, rule.get("args") or ())
    _refuse_keys(lib, context, default)
    return newest


def _refuse_keys(lib: ctypes.CDLL, context: int, default: int) -> None:
    """Forked servers share a session keyring; a container of its own keyring would be one key of a user's 200."""
    refusal = action("SCMP_ACT_ERRNO", errno.ENOSYS)
    for name in KEY_CALLS if refusal != default else ():
        _add_rule(lib, context, refusal, lib.seccomp_syscall_resolve_name(name.encode()), ())


def _add_rule(lib: ctypes.CDLL, context: int, does: int, number: int, arguments: Any) -> None:
    """Conditions on different arguments must all hold; several on one argument mean any of them, as in runc."""
    comparisons = [
        _Comparison(entry["index"], COMPARISONS[entry["op"]], entry["value"], entry.get("valueTwo") or 0)
        for entry in arguments
    ]
    indexes = [comparison.arg for comparison in comparisons]
    groups = [comparisons] if len(set(indexes)) == len(indexes) else [[one] for one in comparisons]
    for group in groups or [[]]:
        array = (_Comparison * max(1, len(group)))(*group)
        result = lib.seccomp_rule_add_array(context, does, number, len(group), array)
        # A call that this architecture lacks, or a rule that is there already.
        if result < 0 and -result not in {errno.EEXIST, errno.EDOM, errno.EINVAL}:
            raise Unsupported(f"libseccomp refuses a rule of its seccomp profile: {os.strerror(-result)}")


def _exported(lib: ctypes.CDLL, context: int) -> bytes:
    descriptor = os.memfd_create("seccomp")
    try:
        if lib.seccomp_export_bpf(context, descriptor):
            raise Unsupported("libseccomp cannot export its seccomp profile")
        size = os.lseek(descriptor, 0, os.SEEK_CUR)
        return os.pread(descriptor, size, 0)
    finally:
        os.close(descriptor)


def newer_is_unknown(newest: int) -> bytes:
    """The prelude: on the native architecture a number above ``newest`` is answered with ENOSYS."""
    _, native = NATIVE[os.uname().machine]
    steps = [
        (LOAD, 0, 0, ARCHITECTURE_AT),
        (JUMP_EQUAL, 0, 4, native),
        (LOAD, 0, 0, NUMBER_AT),
        (JUMP_GREATER, 2, 0, X32_BIT - 1),
        (JUMP_GREATER, 0, 1, newest),
        (RETURN, 0, 0, ACTIONS["SCMP_ACT_ERRNO"] | errno.ENOSYS),
    ]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
