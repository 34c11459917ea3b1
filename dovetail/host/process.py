"""This process: how long it has run, and the most memory that it has held."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import time
from pathlib import Path

_IMPORTED = time.monotonic()


def since_start() -> float:
    """Seconds since this process began, where the kernel tells; else since this file was imported."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - _IMPORTED


def peak_rss() -> int:
    """The largest resident memory so far, in bytes."""
    with contextlib.suppress(OSError):
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    # Only then: a new program inherits this one from the process that started it.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
