"""Timing in turns: what is compared runs alternately, so that a machine whose speed changes changes it for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from dovetail.bench.rounds import in_turns
from dovetail.host import machine
from dovetail.ops import cpu

READ_MB = 256


def interleave(
    runs: Sequence[Callable[[], object]], rounds: int, threads: int
) -> tuple[list[list[float]], list[float]]:
    """Seconds of each run, [runs][rounds], and GB/s of a raw read with as many threads beside each round."""
    samples: list[list[float]] = [[] for _ in runs]
    reads = []
    for run in runs:
        run()  # allocates, and maps memory
    for i in range(rounds):
        reads.append(read_bandwidth(threads))
        order = in_turns(range(len(runs)), i)
        runs[order[0]]()  # the first run after the raw read, whose memory has just been unmapped, is slower
        for at in order:
            start = time.perf_counter()
            runs[at]()
            samples[at].append(time.perf_counter() - start)
    return samples, reads


def read_bandwidth(threads: int) -> float:
    """GB/s that this machine reads from memory just now."""
    if (native := cpu.native()) is not None:
        return float(native.read_bandwidth(READ_MB, threads))
    return machine.read_bandwidth(threads, READ_MB << 20, seconds=0.1) / 1e9
