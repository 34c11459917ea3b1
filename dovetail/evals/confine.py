"""Starts a program that can compute and do nothing else. Run by path, in a process of its own:

    python -I -S confine.py SECONDS BYTES PROGRAM ARGUMENT...

The program gets SECONDS of processor time and BYTES of memory. The kernel then refuses it every other process: it
can start none and signal none (seccomp), and no thread. It can open no network connection. It can read files, but
create, change or remove none (Landlock). What it writes to its standard output or error is at most WRITTEN bytes
where these are files. It has no capability, even if root started it.

Programs inherit all of this and cannot undo it. No privilege is needed, but Linux 5.13 or later on x86-64 or
aarch64. Exits with CANNOT, and the reason on stderr, where a limit cannot be set.

The numbers are those of the kernel's interface: linux/seccomp.h, linux/filter.h, linux/landlock.h, asm/unistd.h.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys

CANNOT = 87
WRITTEN = 1 << 20
OPEN_FILES = 64

_SET_SECCOMP, _FILTER, _DROP_CAPABILITY, _NO_NEW_PRIVILEGES = 22, 2, 24, 38
_CREATE_RULESET, _RESTRICT_SELF = 444, 446
_TRUNCATE = 1 << 14  # known from the third version of Landlock on
# Writing, removing and making files and folders of every kind, and (from the second version on) moving them.
_WRITES = (1 << 1) | sum(1 << bit for bit in range(4, 13))
_REFER = 1 << 13

# The architecture as seccomp knows it, and the numbers of the calls that are refused.
CALLS = {
    "x86_64": (
        0xC000003E,
        {
            "fork": 57, "vfork": 58, "clone": 56, "clone3": 435, "kill": 62, "tkill": 200, "tgkill": 234,
            "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "pidfd_send_signal": 424, "ptrace": 101,
            "process_vm_writev": 311, "setpriority": 141, "sched_setscheduler": 144, "sched_setaffinity": 203,
            "socket": 41, "io_uring_setup": 425, "shmget": 29, "truncate": 76, "chmod": 90, "fchmod": 91,
            "fchmodat": 268, "fchmodat2": 452, "chown": 92, "fchown": 93, "lchown": 94, "fchownat": 260,
        },
        302,
    ),
    "aarch64": (
        0xC00000B7,
        {
            "clone": 220, "clone3": 435, "kill": 129, "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138,
            "rt_tgsigqueueinfo": 240, "pidfd_send_signal": 424, "ptrace": 117, "process_vm_writev": 271,
            "setpriority": 140, "sched_setscheduler": 119, "sched_setaffinity": 122, "socket": 198,
            "io_uring_setup": 425, "shmget": 194, "truncate": 45, "fchmod": 52, "fchmodat": 53,
            "fchmodat2": 452, "fchown": 55, "fchownat": 54,
        },
        261,
    ),
}  # fmt: skip
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_KILL, _ALLOW, _REFUSE = 0x80000000, 0x7FFF0000, 0x00050001  # EPERM
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # where a filter finds these
_OTHER_ABI = 0x40000000  # x32, whose numbers would pass


def filters(machine: str) -> list[tuple[int, int, int, int]]:
    """The seccomp filter for a machine, as (code, jump if true, jump if false, value). KeyError if it is not
    known."""
    architecture, calls, prlimit = CALLS[machine]
    refused = sorted(set(calls.values()))
    found = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    rest = len(refused) + 4  # instructions from here to the one that refuses
    found.append((_AT_LEAST, rest, 0, _OTHER_ABI))
    found += [(_EQUAL, rest - 1 - i, 0, number) for i, number in enumerate(refused)]
    # A process may ask for its own limits, not change another's.
    found += [
        (_EQUAL, 0, 2, prlimit),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_EQUAL, 0, 1, 0),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    return found


def confine(seconds: int, size: int) -> None:
    """Limit this process, for good. OSError where that is impossible."""
    libc = ctypes.CDLL(None, use_errno=True)
    limits = {
        resource.RLIMIT_CPU: (seconds, seconds + 1),
        resource.RLIMIT_AS: (size, size),
        resource.RLIMIT_FSIZE: (WRITTEN, WRITTEN),
        resource.RLIMIT_NOFILE: (OPEN_FILES, OPEN_FILES),
        resource.RLIMIT_CORE: (0, 0),
    }
    for name, (soft, hard) in limits.items():
        resource.setrlimit(name, (soft, hard))
    for capability in range(64):  # fails for those that there are not, and where there are none to drop
        libc.prctl(_DROP_CAPABILITY, capability, 0, 0, 0)
    _done(libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "no new privileges")
    _forbid_writes(libc)
    _forbid_calls(libc)


def _forbid_writes(libc: ctypes.CDLL) -> None:
    version = libc.syscall(_CREATE_RULESET, None, 0, 1)
    _done(version, "Landlock")
    handled = _WRITES | (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
    rules = ctypes.create_string_buffer(struct.pack("Q", handled), 8)
    ruleset = libc.syscall(_CREATE_RULESET, rules, 8, 0)
    _done(ruleset, "Landlock")
    _done(libc.syscall(_RESTRICT_SELF, ruleset, 0), "Landlock")
    os.close(ruleset)


def _forbid_calls(libc: ctypes.CDLL) -> None:
    machine = platform.machine()
    if machine not in CALLS:
        raise OSError(f"seccomp: system calls are known of {', '.join(CALLS)}, not of {machine}")
    program = filters(machine)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in program))
    described = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    _done(libc.prctl(_SET_SECCOMP, _FILTER, ctypes.c_char_p(described), 0, 0), "seccomp")


def _done(status: int, what: str) -> None:
    if status < 0:
        raise OSError(f"{what}: {os.strerror(ctypes.get_errno())}")


def main() -> None:
    seconds, size, *program = sys.argv[1:]
    try:
        confine(int(seconds), int(size))
        os.execv(program[0], program)
    except (OSError, ValueError, AttributeError) as error:
        print(error, file=sys.stderr)
        sys.exit(CANNOT)


if __name__ == "__main__":
    main()
