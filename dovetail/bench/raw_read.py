"""A raw read of memory: what the machine gives just now."""

from __future__ import annotations

from dovetail.host import machine
from dovetail.ops import cpu

READ_MB = 256


def read_bandwidth(threads: int) -> float:
    """GB/s that this machine reads from memory just now."""
    if (native := cpu.native()) is not None:
        return float(native.read_bandwidth(READ_MB, threads))
    return machine.read_bandwidth(threads, READ_MB << 20, seconds=0.1) / 1e9
