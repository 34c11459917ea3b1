"""Timing in turns: what is compared runs alternately, so that a machine whose speed changes changes it for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from dovetail.ops import cpu

READ_MB = 256  # of a raw read


def interleave(
    runs: Sequence[Callable[[], object]], rounds: int, threads: int
) -> tuple[list[list[float]], list[float]]:
    """Seconds of each run, [runs][rounds], and GB/s of a raw read with as many threads beside each round."""
    samples: list[list[float]] = [[] for _ in runs]
    reads = []
    for run in runs:
        run()  # allocates, and maps memory
    for i in range(rounds):
        reads.append(cpu.native().read_bandwidth(READ_MB, threads))
        order = range(len(runs)) if i % 2 == 0 else range(len(runs) - 1, -1, -1)
        runs[order[0]]()  # the first run after the raw read, whose memory has just been unmapped, is slower
        for at in order:
            start = time.perf_counter()
            runs[at]()
            samples[at].append(time.perf_counter() - start)
    return samples, reads
