"""What Linux has to confine a process and Python has no names for: mounts, capabilities, call filters, Landlock.

Standard library only, by ctypes. Numbers are the kernel's: asm/unistd.h, linux/mount.h, prctl.h, filter.h, landlock.h.
Everything raises OSError with the name of the call that failed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

MS_RDONLY, MS_NOSUID, MS_NODEV = 1, 2, 4
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
_MNT_DETACH = 2

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x4000000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWCGROUP, CLONE_NEWTIME = 0x20000000, 0x40000000, 0x2000000, 0x80

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER = 1, 4, 24, 36
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, _PR_SET_NO_NEW_PRIVS = 22, 2, 38
_CAPABILITY_VERSION_3 = 0x20080522

_OCTAL = re.compile(rb"\\([0-7]{3})")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# name: (x86_64, aarch64). Ways to other processes, to the network, to memory that no limit counts, and to the parts of
# the kernel where its holes are found. clone3 hides its flags from a filter, so it is to be taken for absent.
_DENIED: Mapping[str, tuple[int, int]] = {
    "socket": (41, 198),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "process_madvise": (440, 440),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "setpriority": (141, 140),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "ioprio_set": (251, 30),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "personality": (135, 92),
}
_CLONE, _CLONE3, _PRLIMIT = (56, 220), (435, 435), (302, 261)
_X32_CALLS = 0x40000000

_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
LANDLOCK_EXECUTE, LANDLOCK_WRITE_FILE, LANDLOCK_READ_FILE, LANDLOCK_READ_DIR, LANDLOCK_TRUNCATE = 1, 2, 4, 8, 1 << 14
_LANDLOCK_OF_FILES = LANDLOCK_EXECUTE | LANDLOCK_WRITE_FILE | LANDLOCK_READ_FILE | LANDLOCK_TRUNCATE | 1 << 15
# How many access rights to files each version of Landlock knows; the last, from version 5 on, is ioctl on devices.
_LANDLOCK_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_LANDLOCK_SCOPES = 3
"""Abstract Unix sockets and signals, from version 6 on."""


def _call(name: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def prctl(name: str, option: int, value: int) -> None:
    """prctl(2) with one argument."""
    _call(name, _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0))


def unshare(flags: int, name: str) -> None:
    """unshare(2): leave the namespaces in `flags` for new ones."""
    _call(f"unshare of the {name}", _libc.unshare(flags))


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """mount(2)."""
    words = [word if word is None else word.encode() for word in (source, target, kind, data)]
    _call(f"mount of {target}", _libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]))


def remount(target: str, flags: int) -> None:
    """Add `flags` to the mount at `target`, and keep those that it has: what another namespace set cannot be taken."""
    kept = 0
    found = os.statvfs(target).f_flag
    # statvfs numbers the first four as mount does; then noatime, nodiratime, relatime have numbers of their own
    kept |= found & 0xF
    kept |= found & 0x400 | found & 0x800  # ST_NOATIME = MS_NOATIME, ST_NODIRATIME = MS_NODIRATIME
    kept |= (1 << 21) if found & 0x1000 else 0  # ST_RELATIME, MS_RELATIME
    mount(None, target, None, MS_REMOUNT | MS_BIND | kept | flags)


def mount_points_below(directory: str, proc: str) -> list[str]:
    """Mount points at and below `directory`, as the file system at `proc` tells, top down."""
    found = []
    for line in Path(proc, "self/mountinfo").read_bytes().splitlines():
        # no codec: Python's own files may be out of sight by now
        path = os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8)]), line.split(b" ")[4]))
        if path == directory or path.startswith(directory.rstrip("/") + "/"):
            found.append(path)
    return found


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2)."""
    number = {"x86_64": 155, "aarch64": 41}.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"pivot_root: its number on {platform.machine()} is not known")
    _call("pivot_root", _libc.syscall(ctypes.c_long(number), new_root.encode(), put_old.encode()))


def unmount(target: str) -> None:
    """umount2(2), at once for whoever looks, later for who still uses it."""
    _call(f"umount of {target}", _libc.umount2(target.encode(), _MNT_DETACH))


def forget_capabilities() -> None:
    """Drop every capability, for good: also a program that would give some gives none."""
    for capability in range(64):
        if _libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) < 0:
            break  # past the last one, or we hold none and cannot gain any
    no_new_privileges()
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    _call("capset", _libc.capset(header, bytes(24)))


def no_new_privileges() -> None:
    """Set-user-id programs and file capabilities work no more."""
    prctl("no_new_privs", _PR_SET_NO_NEW_PRIVS, 1)


def can_filter() -> bool:
    """Whether the numbers of this machine's system calls are known here."""
    return platform.machine() in _ARCHITECTURES


def filter_system_calls() -> None:
    """Deny what `_DENIED` names, and new namespaces, to this process and all that it starts.

    Needs `no_new_privileges`. A denied call fails as one without permission, so that the program goes on.
    """
    which = list(_ARCHITECTURES).index(platform.machine())
    load, jump_equal, jump_greater, jump_set, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, deny, absent, kill = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS, 0x80000000
    namespaces = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET
    namespaces |= CLONE_NEWCGROUP
    code: list[tuple[int, int, int, int]] = [(load, 0, 0, 4), (jump_equal, 1, 0, _ARCHITECTURES[platform.machine()])]
    code += [(give, 0, 0, kill), (load, 0, 0, 0)]
    if platform.machine() == "x86_64":
        code += [(jump_greater, 0, 1, _X32_CALLS), (give, 0, 0, deny)]
    for numbers in _DENIED.values():
        code += [(jump_equal, 0, 1, numbers[which]), (give, 0, 0, deny)]
    code += [(jump_equal, 0, 1, _CLONE3[which]), (give, 0, 0, absent)]
    # the lower half of the first argument: for prlimit the process, of which 0 is the caller; for clone its flags
    code += [(jump_equal, 0, 4, _PRLIMIT[which]), (load, 0, 0, 16), (jump_equal, 0, 1, 0), (give, 0, 0, allow)]
    code += [(give, 0, 0, deny)]
    code += [(jump_equal, 0, 3, _CLONE[which]), (load, 0, 0, 16), (jump_set, 0, 1, namespaces), (give, 0, 0, deny)]
    code += [(give, 0, 0, allow)]
    program = b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(code), ctypes.addressof(buffer)))
    _call("seccomp", _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0))


def landlock_version() -> int:
    """The version of Landlock that the kernel has, 0 where it has none."""
    return max(0, int(_libc.syscall(ctypes.c_long(_LANDLOCK_CREATE_RULESET), None, ctypes.c_size_t(0), 1)))


def landlock(readable: Iterable[str], files: Iterable[str], writable: Iterable[str]) -> None:
    """Close the file system to this process and all that it starts, but for what is named.

    readable: directories and files to read and execute; files: single ones to read and write, such as /dev/null;
    writable: directories. Needs `no_new_privileges`.
    """
    version = landlock_version()
    if version < 1:
        raise OSError(errno.ENOSYS, "landlock: the kernel has none, or it is switched off")
    rights = (1 << _LANDLOCK_RIGHTS[min(version, 5)]) - 1
    attributes = struct.pack("=Q", rights)
    if version >= 4:
        attributes += struct.pack("=Q", 3)  # TCP: bind and connect
    if version >= 6:
        attributes += struct.pack("=Q", _LANDLOCK_SCOPES)
    rules = _call(
        "landlock_create_ruleset",
        _libc.syscall(ctypes.c_long(_LANDLOCK_CREATE_RULESET), attributes, ctypes.c_size_t(len(attributes)), 0),
    )
    read = LANDLOCK_EXECUTE | LANDLOCK_READ_FILE | LANDLOCK_READ_DIR
    allowed = [(path, read) for path in readable]
    allowed += [(path, LANDLOCK_READ_FILE | LANDLOCK_WRITE_FILE) for path in files]
    allowed += [(path, rights & ~LANDLOCK_EXECUTE) for path in writable]
    for path, access in allowed:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not Path(path).is_dir():
            access &= _LANDLOCK_OF_FILES
        rule = struct.pack("=Qi", access & rights, place)
        _call("landlock_add_rule", _libc.syscall(ctypes.c_long(_LANDLOCK_ADD_RULE), rules, 1, rule, 0))
        os.close(place)
    _call("landlock_restrict_self", _libc.syscall(ctypes.c_long(_LANDLOCK_RESTRICT_SELF), rules, 0))
    os.close(rules)
