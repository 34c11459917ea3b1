"""Seconds that a drafter takes for guesses, learned from its calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

FORGET = 0.98
SWEEPS = 12


class Ask(NamedTuple):
    """The size of a call: requests, tokens that were asked for in all, the longest, and tokens of text that the
    drafter had not computed yet."""

    requests: int
    tokens: int
    depth: int
    behind: int


class DraftTime:
    """Seconds of a call, plus those of requests, tokens, depth and tokens behind: least squares of the relative
    errors of recent calls. No part is negative.

    prior: seconds of each part before anything is known, in the order of `Ask`.
    """

    def __init__(self, prior: Sequence[float] = (0.0,) * 4) -> None:
        self.parts = [0.0, *prior]
        self.calls = 0
        self._prior = list(self.parts)
        self._xx = [[0.0] * 5 for _ in range(5)]
        self._xy = [0.0] * 5

    def __call__(self, ask: Ask) -> float:
        p = self.parts
        return p[0] + p[1] * ask.requests + p[2] * ask.tokens + p[3] * ask.depth + p[4] * ask.behind

    def observe(self, ask: Ask, seconds: float) -> None:
        usual = self(ask)
        if self.calls > 8:  # another process had the core
            seconds = min(seconds, 4 * usual)
        weight = 1 / max(seconds, 1e-6) ** 2
        x = (1.0, *ask)
        for i, row in enumerate(self._xx):
            if x[i]:
                wx = weight * x[i]
                for j in range(5):
                    row[j] += wx * x[j]
                self._xy[i] += wx * seconds
        self.calls += 1
        if self.calls <= 8 or self.calls % 16 == 0:
            self._fit()

    def _fit(self) -> None:
        p = self.parts
        for _ in range(SWEEPS):
            for i, row in enumerate(self._xx):
                if row[i] > 0:
                    pull = 0.02 * row[i] / (1 + 0.1 * self.calls)
                    left = self._xy[i] - sum(r * q for r, q in zip(row, p, strict=True)) + row[i] * p[i]
                    p[i] = max(0.0, (left + pull * self._prior[i]) / (row[i] + pull))
        for i in range(5):
            self._xy[i] *= FORGET
            self._xx[i] = [FORGET * v for v in self._xx[i]]
