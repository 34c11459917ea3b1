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
        ratios = [b / a for b, a in zip(baseline, ours, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"
