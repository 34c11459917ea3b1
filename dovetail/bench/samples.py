"""Readings of figures, one a round, and what a result keeps of them: the median, the lowest and the highest."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dovetail.bench.ratio import by_round

PERCENTILES = (50, 90, 99)  # that results have of latencies
Path = tuple[str, ...]
Samples = dict[Path, list[float]]
"""Readings by the place that a figure has in a result: ("decode_tokens_per_s", "16")."""


def medians(samples: Samples) -> dict[str, Any]:
    """The median of every figure, at its place."""
    return _nested(samples, _median)


def spreads(samples: Samples) -> dict[str, Any]:
    """[lowest, highest] of every figure that was read more than once, at its place."""
    several = {path: readings for path, readings in samples.items() if len(readings) > 1}
    return _nested(several, lambda readings: [min(readings), max(readings)])


def ratios(ours: Samples, theirs: Samples) -> Samples:
    """ours / theirs, round by round, of the figures that both have in every round and theirs is never 0 in."""
    both = [path for path in ours if len(ours[path]) == len(theirs.get(path, ())) and all(theirs[path])]
    return {path: by_round(ours[path], theirs[path]) for path in both}


def at(value: Any, path: Path) -> Any:
    """What is at a place of a result, or None."""
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def percentile(values: Sequence[float], q: float) -> float:
    """The `q`th percentile of `values` (at least one), in between two of them on the line through both."""
    ordered, place = sorted(values), (len(values) - 1) * q / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _median(readings: Sequence[float]) -> float:
    """The median; of counts a count, where it is one."""
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
