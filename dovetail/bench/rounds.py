"""Rounds: the order in which sides run, the readings that they give, and what a result keeps of these.

A result keeps the median, the lowest and the highest reading. Sides are compared round by round, so a change in
the machine's speed affects both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

PERCENTILES = (50, 90, 99)  # of latencies, in results
Path = tuple[str, ...]
Samples = dict[Path, list[float]]
"""Readings by the place that a figure has in a result: ("decode_tokens_per_s", "16")."""


T = TypeVar("T")


def in_turns(sides: Sequence[T], number: int) -> Sequence[T]:
    """The sides in the order of round `number`. Each is first in every other round."""
    return sides if number % 2 == 0 else sides[::-1]


class Turns(Generic[T]):
    """Sides that are read in turns, for as many rounds as are asked for. readings: [sides][rounds]."""

    def __init__(self, sides: Sequence[Callable[[], T]]) -> None:
        self.sides = sides
        self.readings: list[list[T]] = [[] for _ in sides]

    def until(self, rounds: int) -> list[list[T]]:
        """Go on until there are readings of so many rounds; those of the first `rounds`."""
        for number in range(len(self.readings[0]), rounds):
            self._round(in_turns(range(len(self.sides)), number))
        return [readings[:rounds] for readings in self.readings]

    def _round(self, order: Sequence[int]) -> None:
        for at in order:
            self.readings[at].append(self.sides[at]())


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


def medians(samples: Samples) -> dict[str, Any]:
    """The median of every figure, at its place."""
    return _nested(samples, _median)


def spreads(samples: Samples) -> dict[str, Any]:
    """[lowest, highest] of every figure that was read more than once, at its place."""
    several = {path: readings for path, readings in samples.items() if len(readings) > 1}
    return _nested(several, lambda readings: [min(readings), max(readings)])


def ratios(ours: Samples, theirs: Samples) -> Samples:
    """ours / theirs, round by round, of the figures that both have in every round, unless theirs is 0 in one."""
    both = [path for path in ours if len(ours[path]) == len(theirs.get(path, ())) and all(theirs[path])]
    return {path: by_round(ours[path], theirs[path]) for path in both}


def at(value: Any, path: Path) -> Any:
    """What is at a place of a result, or None."""
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def percentile(values: Sequence[float], q: float) -> float:
    """The `q`th percentile of `values` (at least one), interpolated linearly."""
    ordered, place = sorted(values), (len(values) - 1) * q / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _median(readings: Sequence[float]) -> float:
    """The median. For counts it is a whole number if possible."""
    median = statistics.median(readings)
    whole = all(isinstance(reading, int) for reading in readings) and median == int(median)
    return int(median) if whole else median


def _nested(samples: Samples, of: Callable[[list[float]], Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, readings in samples.items():
        *above, last = path
        place = found
        for name in above:
            place = place.setdefault(name, {})
        place[last] = of(readings)
    return found
