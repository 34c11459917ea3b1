"""A speed beside a baseline's, measured in the same rounds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as a baseline: the median of the rounds' ratios, their lowest and highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, baseline: Sequence[float], ours: Sequence[float]) -> Ratio:
        """From seconds of each round."""
        return cls.of_rounds(by_round(baseline, ours))

    @classmethod
    def of_rounds(cls, ratios: Sequence[float]) -> Ratio:
        """From the ratio of each round (at least one)."""
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def by_round(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """a / b, round by round."""
    return [x / y for x, y in zip(a, b, strict=True)]
