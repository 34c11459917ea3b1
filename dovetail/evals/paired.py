"""Two settings that answered the same questions: by how much the share of right answers differs.

Most questions are easy or hard for both, so the difference is known far better than either share. Only questions
that one of them answered and the other did not say anything about it.

**Interval:** Newcombe's for paired shares ("Improved confidence intervals for the difference between binomial
proportions based on paired data", 1998, method 10). It is made of the shares' Wilson intervals (`bench.verdict`)
and the correlation between them. It holds for few questions and for shares near 0 and 1, where a bootstrap of
differences has no width.
**Test:** McNemar's, exact and two-sided. If both were equally good, each question that only one of them answered
would be a throw of a coin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dovetail.bench.verdict import CONFIDENCE, Interval, share_interval


@dataclass(frozen=True)
class Paired:
    """How many questions were answered by `both`, only by the `first`, only by the `second`, and by `neither`."""

    both: int
    first: int
    second: int
    neither: int

    @classmethod
    def of(cls, first: Mapping[Any, bool], second: Mapping[Any, bool]) -> Paired:
        """From what each answered right, by question. Questions that only one of them was asked are left out."""
        pairs = [(first[key], second[key]) for key in first if key in second]
        counts = [pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))]
        return cls(*counts)

    @property
    def trials(self) -> int:
        return self.both + self.first + self.second + self.neither

    @property
    def difference(self) -> float:
        """The second's share minus the first's."""
        return (self.second - self.first) / self.trials

    def interval(self, confidence: float = CONFIDENCE) -> Interval:
        """Where the difference lies."""
        mine, theirs = self.both + self.second, self.both + self.first
        a, b = (share_interval(n, self.trials, confidence) for n in (mine, theirs))
        p, q = mine / self.trials, theirs / self.trials
        phi = self._correlation()
        below = _length(p - a.low, b.high - q, phi)
        above = _length(a.high - p, q - b.low, phi)
        return Interval(max(-1.0, self.difference - below), min(1.0, self.difference + above))

    def p_value(self) -> float:
        """The chance of so uneven a split of the questions that only one answered, if both were equally good."""
        n = self.first + self.second
        tail = sum(math.comb(n, k) for k in range(min(self.first, self.second) + 1)) / 2**n
        return min(1.0, 2 * tail)

    def to_dict(self) -> dict[str, Any]:
        interval = self.interval()
        return {
            "questions": self.trials,
            "difference": self.difference,
            "interval": [interval.low, interval.high],
            "gained": self.second,
            "lost": self.first,
            "p_value": self.p_value(),
        }

    def _correlation(self) -> float:
        """Phi of the two, with Newcombe's correction for continuity where it is positive; 0 if a share is 0 or
        1."""
        margins = (self.both + self.first) * (self.second + self.neither)
        margins *= (self.both + self.second) * (self.first + self.neither)
        if not margins:
            return 0.0
        product = float(self.both * self.neither - self.first * self.second)
        if product > 0:
            product = max(0.0, product - self.trials / 2)
        return product / math.sqrt(margins)


def _length(a: float, b: float, phi: float) -> float:
    return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))
