"""The filter of system calls under which a program runs: classic BPF, as seccomp(2) takes it.

It refuses what no namespace divides (keys, the kernel's log, sockets to a hypervisor), memory that no limit counts
(memfd, segments and message queues), namespaces of the program's own, and interfaces to the kernel that a program of a
data set has no use for and whose faults have let others out of sandboxes. Calls newer than Linux 6.1 do not exist for
the program, nor does `clone3`, whose flags no filter can read; C libraries then use older calls.
"""

from __future__ import annotations

import errno
import socket

Instruction = tuple[int, int, int, int]
"""Operation, instructions to skip where its test holds, those to skip where it does not, operand."""

MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""`platform.machine()` -> the kernel's AUDIT_ARCH_*; the columns of `NUMBERS`."""

NUMBERS = {
    # keys: shared by all of a session or user
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # memory outside of RLIMIT_AS, RLIMIT_FSIZE and the file system's bound
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "io_setup": (206, 0),
    # work that the kernel does beside the process, out of this filter's sight
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    # namespaces
    "unshare": (272, 97),
    "setns": (308, 268),
    # other processes and the kernel itself
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "fanotify_init": (300, 262),
    "syslog": (103, 116),
    # refused by their arguments, see `call_filter`
    "clone": (56, 220),
    "clone3": (435, 435),
    "socket": (41, 198),
    "socketpair": (53, 199),
}
BY_ARGUMENT = ("clone", "clone3", "socket", "socketpair")
NEWEST = 450
"""Both machines number alike from 424 on. The x32 calls of x86_64 (bit 30) lie above as well."""

NEW_NAMESPACES = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET."""
FAMILIES = tuple(map(int, (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)))
"""What the network namespace divides; AF_VSOCK, for one, it does not."""

LOAD, EQUAL, ABOVE, ANY_BIT, RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
NUMBER, MACHINE, ARGUMENT = 0, 4, 16
"""Offsets in `struct seccomp_data`; of the first argument its lower half, which is all the kernel reads of these."""
KILL, REFUSE, ALLOW = 0x80000000, 0x50000, 0x7FFF0000


def call_filter(machine: str) -> list[Instruction]:
    """The filter for a machine.

    Raises:
        ValueError: there is none for it.
    """
    if machine not in MACHINES:
        raise ValueError(f"no filter of system calls for {machine}, only for {', '.join(MACHINES)}")
    number = {name: numbers[list(MACHINES).index(machine)] for name, numbers in NUMBERS.items()}
    return [
        (LOAD, 0, 0, MACHINE),
        (EQUAL, 1, 0, MACHINES[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        *_refuse(ABOVE, NEWEST, errno.ENOSYS),
        *_refuse(EQUAL, number["clone3"], errno.ENOSYS),
        *(step for name in NUMBERS if name not in BY_ARGUMENT for step in _refuse(EQUAL, number[name], errno.EPERM)),
        (EQUAL, 0, 4, number["clone"]),
        (LOAD, 0, 0, ARGUMENT),
        *_refuse(ANY_BIT, NEW_NAMESPACES, errno.EPERM),
        (RETURN, 0, 0, ALLOW),
        (EQUAL, 1, 0, number["socket"]),
        (EQUAL, 0, 2 + len(FAMILIES), number["socketpair"]),
        (LOAD, 0, 0, ARGUMENT),
        *((EQUAL, len(FAMILIES) - index, 0, family) for index, family in enumerate(FAMILIES)),
        (RETURN, 0, 0, REFUSE | errno.EAFNOSUPPORT),
        (RETURN, 0, 0, ALLOW),
    ]


def _refuse(test: int, operand: int, error: int) -> list[Instruction]:
    return [(test, 0, 1, operand), (RETURN, 0, 0, REFUSE | error)]
