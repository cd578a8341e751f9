"""The system calls that no program in the sandbox has a use for, as a filter of the kernel.

They make new namespaces (and with them file systems without a size), memory that no limit counts,
or reach into other processes and into little-tried parts of the kernel. The filter is a classic BPF
program (Linux, Documentation/userspace-api/seccomp_filter.rst): instructions of eight bytes.
"""

from __future__ import annotations

import platform
import struct

from step_jax.core.errors import ConfigError

_EPERM, _ENOSYS = 1, 38
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_CLONE_NEW = 0x7E020000  # CLONE_NEW{CGROUP,UTS,IPC,USER,PID,NET} and NEWNS
_X32 = 0x40000000

#: machine -> (AUDIT_ARCH, clone, clone3, calls that are refused)
_MACHINES: dict[str, tuple[int, int, int, dict[str, int]]] = {
    "x86_64": (0xC000003E, 56, 435, {
        "shmget": 29, "msgget": 68, "semget": 64, "ptrace": 101, "pivot_root": 155, "chroot": 161,
        "mount": 165, "umount2": 166, "add_key": 248, "request_key": 249, "keyctl": 250,
        "mq_open": 240, "unshare": 272, "perf_event_open": 298, "setns": 308,
        "process_vm_readv": 310, "process_vm_writev": 311, "memfd_create": 319, "bpf": 321,
        "userfaultfd": 323, "io_uring_setup": 425, "open_tree": 428, "move_mount": 429,
        "fsopen": 430, "fsmount": 432, "memfd_secret": 447,
    }),
    "aarch64": (0xC00000B7, 220, 435, {
        "shmget": 194, "msgget": 186, "semget": 190, "ptrace": 117, "pivot_root": 41, "chroot": 51,
        "mount": 40, "umount2": 39, "add_key": 217, "request_key": 218, "keyctl": 219,
        "mq_open": 180, "unshare": 97, "perf_event_open": 241, "setns": 268,
        "process_vm_readv": 270, "process_vm_writev": 271, "memfd_create": 279, "bpf": 280,
        "userfaultfd": 282, "io_uring_setup": 425, "open_tree": 428, "move_mount": 429,
        "fsopen": 430, "fsmount": 432, "memfd_secret": 447,
    }),
}  # fmt: skip


def denied(machine: str | None = None) -> bytes:
    """The filter for a machine (default: this one), as ``bwrap --seccomp`` reads it.

    A call of another architecture kills the process. ``clone3`` is said not to exist, since a
    filter cannot see its flags; the C library then takes ``clone``.

    Raises:
      ConfigError: the machine's calls are not known here.
    """
    machine = machine or platform.machine()
    if machine not in _MACHINES:
        raise ConfigError(
            f"the sandbox knows the system calls of {', '.join(_MACHINES)}, not of {machine}"
        )
    architecture, clone, clone3, calls = _MACHINES[machine]
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if machine == "x86_64":
        program += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    for number in calls.values():
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    program += [
        (_EQUAL, 0, 1, clone3),
        (_RETURN, 0, 0, _ERRNO | _ENOSYS),
        (_EQUAL, 0, 3, clone),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_BITS, 0, 1, _CLONE_NEW),
        (_RETURN, 0, 0, _ERRNO | _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
