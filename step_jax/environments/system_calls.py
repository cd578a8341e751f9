"""Filters of system calls, for programs that nobody has read and for verifiers of what they write.

A filter is a classic BPF program that the kernel runs before each call (Linux,
Documentation/userspace-api/seccomp_filter.rst): instructions of eight bytes, made here for the
machines whose numbers are known.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Sequence
from typing import Literal, NamedTuple

from step_jax.core.errors import ConfigError

_EPERM, _ENOSYS = 1, 38
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_X32 = 0x40000000
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2  # of prctl

_CLONE_NEW = 0x7E020000  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}
_CLONE_THREAD = 0x00010000
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

#: calls that make namespaces (and file systems without a size), memory that no limit counts, or
#: reach into other processes and into little-tried parts of the kernel: x86-64, arm64
_REACHING = {
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "ptrace": (101, 117),
    "pivot_root": (155, 41), "chroot": (161, 51), "mount": (165, 40), "umount2": (166, 39),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "mq_open": (240, 180),
    "unshare": (272, 97), "perf_event_open": (298, 241), "setns": (308, 268),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "memfd_create": (319, 279),
    "bpf": (321, 280), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsmount": (432, 432), "pidfd_getfd": (438, 438), "memfd_secret": (447, 447),
}  # fmt: skip
#: calls that start programs, talk to others, or change files
_ACTING = {
    "execve": (59, 221), "execveat": (322, 281), "fork": (57, None), "vfork": (58, None),
    "socket": (41, 198), "socketpair": (53, 199), "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424), "prlimit64": (302, 261), "creat": (85, None),
    "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38),
    "renameat2": (316, 276), "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None),
    "symlink": (88, None), "symlinkat": (266, 36), "link": (86, None), "linkat": (265, 37),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None),
    "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54), "truncate": (76, 45),
    "mknod": (133, None), "mknodat": (259, 33), "setxattr": (188, 5), "utime": (132, None),
    "utimes": (235, None), "utimensat": (280, 88),
}  # fmt: skip
_CLONE, _OPEN, _OPENAT = (56, 220), (2, None), (257, 56)
_KILL_CALLS = {"kill": (62, 129), "tgkill": (234, 131)}
#: said not to exist: their flags lie where a filter cannot look; libraries then take older calls
_NEWER = {"clone3": (435, 435), "openat2": (437, 437)}

_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH

#: (instruction, how many to pass over where it holds, and where not); the next one refuses
_TESTS = {"some": (_BITS, 0, 1), "none": (_BITS, 1, 0), "other": (_EQUAL, 1, 0)}

_Numbers = tuple[int | None, int | None]


class _Rule(NamedTuple):
    """Refuses a call whose argument has some of the bits, none of them, or another value."""

    call: _Numbers
    argument: int
    when: Literal["some", "none", "other"]
    value: int


def denied(machine: str | None = None) -> bytes:
    """The filter of the sandbox for a machine (default: this one), as ``bwrap --seccomp`` reads it.

    Raises:
      ConfigError: the machine's calls are not known here.
    """
    rules = [_Rule(_CLONE, 0, "some", _CLONE_NEW)]
    return _program(machine, list(_REACHING.values()), rules)


def confine() -> bool:
    """From now on this process (and what it starts) opens files to read them, and starts threads;
    it starts no process, changes no file, talks to nobody and ends nobody but itself.

    Returns whether that holds: on Linux, on machines whose calls are known.
    """
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        return False
    rules = [
        _Rule(_CLONE, 0, "none", _CLONE_THREAD),
        _Rule(_OPEN, 1, "some", _WRITING),
        _Rule(_OPENAT, 2, "some", _WRITING),
        *(_Rule(call, 0, "other", os.getpid()) for call in _KILL_CALLS.values()),
    ]
    content = _program(None, [*_REACHING.values(), *_ACTING.values()], rules)

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]

    program = Program(len(content) // 8, content)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        return False
    return libc.prctl(_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0) == 0


def _program(machine: str | None, refused: Sequence[_Numbers], rules: Sequence[_Rule]) -> bytes:
    """A filter that lets through what it does not name. Calls of another architecture kill."""
    machine = machine or platform.machine()
    if machine not in _MACHINES:
        raise ConfigError(
            f"the system calls of {', '.join(_MACHINES)} are known, not those of {machine}"
        )
    column = list(_MACHINES).index(machine)
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, _MACHINES[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if machine == "x86_64":
        program += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    for numbers, error in [(n, _EPERM) for n in refused] + [(n, _ENOSYS) for n in _NEWER.values()]:
        if (number := numbers[column]) is not None:
            program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | error)]
    for rule in rules:
        if (number := rule.call[column]) is not None:
            program += [
                (_EQUAL, 0, 4, number),
                (_LOAD, 0, 0, _FIRST_ARGUMENT + 8 * rule.argument),
                (*_TESTS[rule.when], rule.value),
                (_RETURN, 0, 0, _ERRNO | _EPERM),
                (_RETURN, 0, 0, _ALLOW),
            ]
    program.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
