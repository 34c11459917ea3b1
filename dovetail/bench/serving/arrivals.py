"""When requests arrive: synthetic patterns, and the times of a trace."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from random import Random

from dovetail.core.errors import ConfigError


class Pattern(enum.StrEnum):
    """How the gaps between arrivals are distributed."""

    POISSON = "poisson"
    CONSTANT = "constant"
    BURSTY = "bursty"


@dataclass(frozen=True)
class Arrivals:
    """Independent gaps: exponential (a Poisson process), all the same, or gamma distributed.

    `cv` is the coefficient of variation of bursty gaps; 1 would be Poisson, larger is burstier.
    """

    pattern: Pattern = Pattern.POISSON
    cv: float = 2.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.cv) and self.cv > 0):
            raise ConfigError(f"--cv {self.cv:g}: the coefficient of variation must be above 0")

    def times(self, rate: float, rng: Random) -> Iterator[float]:
        """Seconds since the start, without end, `rate` per second on average. An infinite rate is all at once."""
        if math.isinf(rate):
            yield from repeat(0.0)
        at = 0.0
        while True:
            at += self._gap(rate, rng)
            yield at

    def _gap(self, rate: float, rng: Random) -> float:
        if self.pattern is Pattern.CONSTANT:
            return 1 / rate
        if self.pattern is Pattern.POISSON:
            return rng.expovariate(rate)
        shape = self.cv**-2  # of a gamma distribution with mean 1/rate
        return rng.gammavariate(shape, 1 / (rate * shape))
