"""Timing in turns: runs that are compared alternate, so a change in the machine's speed affects all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from dovetail.bench.rounds import Turns, by_round
from dovetail.host import machine
from dovetail.ops import cpu

READ_MB = 256


class Interleaved(Turns[float]):
    """Runs that are timed in turns. `readings` [runs][rounds] are seconds, `reads` [rounds] the GB/s of a raw read
    with as many threads just before."""

    def __init__(self, runs: Sequence[Callable[[], object]], threads: int) -> None:
        super().__init__([partial(_seconds, run) for run in runs])
        self.threads = threads
        self.reads: list[float] = []
        for run in runs:
            run()  # allocates, and maps memory

    def ratios(self, baseline: int, ours: int, rounds: int) -> list[float]:
        """How many times as fast as run number `baseline` run number `ours` is, in each of so many rounds."""
        seconds = self.until(rounds)
        return by_round(seconds[baseline], seconds[ours])

    def _round(self, order: Sequence[int]) -> None:
        self.reads.append(read_bandwidth(self.threads))
        self.sides[order[0]]()  # not timed: the first run after the raw read, whose memory was unmapped, is slower
        super()._round(order)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def read_bandwidth(threads: int) -> float:
    """GB/s that this machine reads from memory just now."""
    if (native := cpu.native()) is not None:
        return float(native.read_bandwidth(READ_MB, threads))
    return machine.read_bandwidth(threads, READ_MB << 20, seconds=0.1) / 1e9
