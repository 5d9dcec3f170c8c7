"""The system calls that Python lacks (``os.setns`` came with 3.12), each with the kernel's own word for an error."""

from __future__ import annotations

import ctypes
import os

CLONE_NEWNS = 0x00020000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_NOATIME, MS_BIND, MS_REC = 32, 1024, 4096, 16384
MS_PRIVATE, MS_RELATIME = 1 << 18, 1 << 21
MNT_DETACH = 2

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NAME, PR_CAPBSET_DROP = 1, 4, 15, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 36, 38, 22
PR_SET_MM, PR_SET_MM_MAP, PR_CAP_AMBIENT = 35, 14, 47
PR_CAP_AMBIENT_RAISE, PR_CAP_AMBIENT_CLEAR_ALL = 2, 4
SECCOMP_MODE_FILTER = 2
MADV_COLLAPSE = 25
CAPABILITY_VERSION_3 = 0x20080522
KEYCTL_JOIN_SESSION_KEYRING = 1
SYS_KEYCTL = {"x86_64": 250, "aarch64": 219}
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
_libc.setns.argtypes = [ctypes.c_int, ctypes.c_int]
_libc.unshare.argtypes = [ctypes.c_int]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, *arguments: int) -> int:
    padded = [*arguments, 0, 0, 0, 0][:4]
    return _checked(_libc.prctl(option, *padded), f"prctl({option})")


def setns(descriptor: int, kind: int = 0) -> None:
    _checked(_libc.setns(descriptor, kind), "setns")


def unshare(flags: int) -> None:
    _checked(_libc.unshare(flags), "unshare")


def madvise(address: int, length: int, advice: int) -> None:
    _checked(_libc.madvise(address, length, advice), "madvise")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    words = (source.encode(), target.encode(), kind.encode() or None)
    _checked(_libc.mount(*words, flags, data.encode() or None), f"mount {target}")


def umount(target: str, flags: int = 0) -> None:
    _checked(_libc.umount2(target.encode(), flags), f"umount {target}")


def pivot_root(new: str, old: str) -> None:
    number = SYS_PIVOT_ROOT[os.uname().machine]
    _checked(_libc.syscall(number, new.encode(), old.encode()), "pivot_root")


def new_session_keyring() -> None:
    """Leave the session keyring that was inherited, with whatever tickets and keys it holds, for an empty one."""
    number = SYS_KEYCTL[os.uname().machine]
    _checked(_libc.syscall(number, KEYCTL_JOIN_SESSION_KEYRING, None), "keyctl")


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Data(ctypes.Structure):
    _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """Set the three sets of this thread, as bit masks."""
    header, data = _Header(CAPABILITY_VERSION_3, 0), (_Data * 2)()
    for index in range(2):
        shift = 32 * index
        data[index] = _Data(*((mask >> shift) & 0xFFFFFFFF for mask in (effective, permitted, inheritable)))
    _checked(_libc.capset(ctypes.byref(header), data), "capset")


class _Instructions(ctypes.Structure):
    _fields_ = [("count", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def install_filter(program: bytes) -> None:
    """Install a seccomp filter: an array of 8-byte BPF instructions."""
    instructions = _Instructions(len(program) // 8, program)
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(instructions))
