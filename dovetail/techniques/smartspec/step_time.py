"""Seconds of a step, learned from the steps that this machine has run.

A step of R rows takes `speed * (rows[R] + a * keys read + b * pairs)`. `rows` is a table of medians of recent
steps, made monotone: the cost of rows is a staircase, because kernels work in blocks of rows, and it is flat
while reading weights takes longer than computing. `a` and `b` come from steps with the same rows and other
contexts. `speed` follows the machine: memory that others use makes all steps slower at once, also those of a size
that did not run lately.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dovetail.core.cost import Load

KEPT = 15  # steps of a count of rows
EXACT = (
    32  # counts of rows up to here have an entry each; above, those within an eighth of a power of two share one
)
TABLE = 768  # rows
STEADY = 4  # steps after which an entry may say how fast the machine is now
REFIT = 16  # steps
SLOPES = 64  # steps
RISE = 0.12  # of one row's time, for each further row, before any second count of rows was seen


@dataclass(slots=True)
class _Entry:
    """The last steps with about so many rows: (seconds at speed 1, keys read, pairs)."""

    rows: float
    steps: deque[tuple[float, int, int]] = field(default_factory=lambda: deque(maxlen=KEPT))
    mean: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    seen: int = 0
    level: float = 0.0
    changed: bool = True


class StepTime:
    """Predicts seconds. Never falls in rows, nor in keys read and pairs of the same rows."""

    def __init__(self) -> None:
        self.speed = 1.0
        self.read = self.pairs = 0.0  # seconds for a key read, and for a pair of a row and a key
        self.known = False  # whether any step has been seen
        self.errors: deque[float] = deque(maxlen=256)  # of the last predictions: |predicted - measured| / measured
        self._entries: dict[int, _Entry] = {}
        self._table: list[float] = [0.0] * TABLE
        self._beyond = 0.0
        self._products = [0.0] * 5
        self._steps = 0

    def rows(self, n: int) -> float:
        """Seconds of a step with n rows, as far as rows are the cause."""
        n = max(0, n)
        if n < TABLE:
            return self.speed * self._table[n]
        return self.speed * (self._table[-1] + (n - TABLE + 1) * self._beyond)

    def unseen(self, rows: int) -> bool:
        """Whether so few rows are told apart from others, and no step had so many."""
        return rows <= EXACT and rows not in self._entries

    def context(self, read: int, pairs: int) -> float:
        """Seconds for keys."""
        return self.speed * (self.read * read + self.pairs * pairs)

    def __call__(self, load: Load) -> float:
        return self.rows(load.rows) + self.context(load.read(), load.pairs())

    def observe(self, load: Load, seconds: float) -> float:
        """A step has taken so long. Returns what was predicted; 0 before anything was known."""
        n, read, pairs = load.rows, load.read(), load.pairs()
        if not (n > 0 and 0 < seconds < math.inf):
            return 0.0
        predicted = self.rows(n) + self.context(read, pairs) if self.known else 0.0
        key = n if n <= EXACT else EXACT + round(8 * math.log2(n / EXACT))
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(n)
        if predicted:
            self.errors.append(abs(predicted - seconds) / seconds)
            if entry.seen >= STEADY:
                drift = math.log(seconds / predicted)
                self.speed *= math.exp(0.08 * min(0.3, max(-0.3, drift)))
        self._learn(entry, n, (seconds / self.speed, read, pairs))
        self._steps += 1
        if self._steps % SLOPES == 0:
            self._fit_slopes()
        if entry.seen <= KEPT or self._steps % REFIT == 0:
            self._fit_rows()
        self.known = True
        return predicted

    def _learn(self, entry: _Entry, rows: int, step: tuple[float, int, int]) -> None:
        entry.steps.append(step)
        entry.seen += 1
        entry.changed = True
        entry.rows += (rows - entry.rows) / min(entry.seen, KEPT)
        rate = 1 / min(entry.seen, 256)
        y, a, b = (v - m for v, m in zip(step, entry.mean, strict=True))
        usual = entry.mean[0] or step[0]
        if entry.seen > 1:
            y = min(0.3 * usual, max(-0.3 * usual, y))
            p, w = self._products, 1 / (usual * usual)
            for i, more in enumerate((a * a, a * b, b * b, a * y, b * y)):
                p[i] = 0.999 * p[i] + w * more
        entry.mean = [
            m + rate * d for m, d in zip(entry.mean, (y if entry.seen > 1 else step[0], a, b), strict=True)
        ]

    def _fit_slopes(self) -> None:
        """Least squares within counts of rows, with slopes that are not negative."""
        aa, ab, bb, ay, by = self._products
        weight = 1e4 / max(1e-18, statistics.median(e.mean[0] for e in self._entries.values()) ** 2)
        aa, bb = aa + weight, bb + weight
        a, b = max(0.0, ay / aa), 0.0
        both = aa * bb - ab * ab
        if both > 0:
            a2, b2 = (ay * bb - by * ab) / both, (by * aa - ay * ab) / both
            a, b = (a2, b2) if a2 >= 0 and b2 >= 0 else (a, 0.0) if b2 < 0 else (0.0, max(0.0, by / bb))
        self.read, self.pairs = a, b
        for entry in self._entries.values():
            entry.changed = True

    def _fit_rows(self) -> None:
        entries = sorted(self._entries.values(), key=lambda e: e.rows)
        for e in entries:
            if e.changed:
                left = [y - self.read * a - self.pairs * b for y, a, b in e.steps]
                e.level, e.changed = max(1e-9, statistics.median(left)), False
        at = [e.rows for e in entries]
        levels = monotone([e.level for e in entries], [min(e.seen, KEPT) for e in entries])
        alone = RISE / (1 + RISE * (at[0] - 1))
        rise = alone * levels[0] if len(at) == 1 else (levels[-1] - levels[0]) / (at[-1] - at[0])
        if at[0] > 1:  # a single row takes no less than half of that
            at, levels = [1.0, *at], [max(0.5 * levels[0], levels[0] - rise * (at[0] - 1)), *levels]
        self._beyond = max(rise, 0.01 * levels[0])
        if at[-1] < TABLE - 1:
            at, levels = [*at, TABLE - 1.0], [*levels, levels[-1] + (TABLE - 1 - at[-1]) * self._beyond]
        self._table = np.interp(np.arange(TABLE), at, levels).tolist()


def monotone(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest sequence that does not fall, by weighted squares (pooling of adjacent violators)."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        pool = (value, float(weight), 1)
        while pools and pools[-1][0] > pool[0]:
            v, w, n = pools.pop()
            pool = ((v * w + pool[0] * pool[1]) / (w + pool[1]), w + pool[1], n + pool[2])
        pools.append(pool)
    return [v for v, _, n in pools for _ in range(n)]
