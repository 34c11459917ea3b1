"""How likely a guessed token is right if those before it are.

A logistic regression that is updated with every token: the log-odds are the sum of a bias of the source, of the
position in the guess, of the request, and of the drafter's own log-odds times a slope of the source. So a request
starts from what others have shown, odds of a drafter are corrected, and positions that were hardly reached
follow the others. The update is an extended Kalman filter with a diagonal covariance (dynamic generalized linear
models; West, Harrison, Migon 1985). Means may drift, so that old evidence fades.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

PLACES = 8  # positions in a guess with a bias of their own; the last is that of all later ones
LEAST = 0.02  # tokens that are reached less often are not worth a row
SURE = 6.0  # bound of log-odds


class Weight:
    """A coefficient: its mean and variance, and by how much the variance grows with each token, up to `widest`."""

    __slots__ = ("drift", "mean", "var", "widest")

    def __init__(self, mean: float, var: float, drift: float) -> None:
        self.mean, self.var, self.drift, self.widest = mean, var, drift, var


class _Source:
    def __init__(self, start: float, odds: bool) -> None:
        self.bias = Weight(0.0 if odds else start, 1.0, 0.002)
        self.slope = Weight(1.0, 0.1, 0.0002)
        self.places = [Weight(0.0, 0.15, 0.0005) for _ in range(PLACES)]


def _logit(p: float) -> float:
    return math.log(p / (1 - p)) if 0.0025 < p < 0.9975 else SURE if p >= 0.9975 else -SURE


class Acceptance:
    """start: the probability of a token's being right before anything is known."""

    def __init__(self, start: float = 0.6) -> None:
        self._start = _logit(start)
        self._sources: dict[tuple[str, bool], _Source] = {}
        self._requests: dict[str, Weight] = {}

    def curve(self, request: str, source: str, odds: Sequence[float], n: int) -> list[float]:
        """For each of the first n tokens of a guess, the probability that it and all before it are right. Ends
        early where that is hardly likely. odds: one for each token, or none."""
        s = self._source(source, bool(odds))
        lean = self._requests.get(request)
        if lean is None:
            lean = self._requests[request] = Weight(0.0, 0.8, 0.004)
        common, slope, places = s.bias.mean + lean.mean, s.slope.mean, s.places
        found, reached = [], 1.0
        for j in range(n):
            x = common + places[j if j < PLACES else PLACES - 1].mean
            if odds:
                x += slope * _logit(odds[j])
            reached /= 1 + math.exp(-x if -x < 30 else 30)
            if reached < LEAST:
                break
            found.append(reached)
        return found

    def observe(self, request: str, source: str, odds: Sequence[float], right: Sequence[bool]) -> None:
        """Which of a guess's first tokens were right, up to the first wrong one."""
        s = self._source(source, bool(odds))
        lean = self._requests.get(request) or Weight(0.0, 0.8, 0.004)
        for j, hit in enumerate(right):
            place = s.places[j if j < PLACES else PLACES - 1]
            if odds:
                _update((s.bias, lean, place), hit, s.slope, _logit(odds[j]))
            else:
                _update((s.bias, lean, place), hit)

    def forget(self, request: str) -> None:
        self._requests.pop(request, None)

    def _source(self, name: str, odds: bool) -> _Source:
        found = self._sources.get((name, odds))
        if found is None:
            found = self._sources[name, odds] = _Source(self._start, odds)
        return found


def _update(shared: tuple[Weight, Weight, Weight], hit: bool, slope: Weight | None = None, x: float = 0.0) -> None:
    a, b, c = shared
    mean, spread = a.mean + b.mean + c.mean, a.var + b.var + c.var
    if slope is not None:
        mean += slope.mean * x
        spread += slope.var * x * x
    p = 1 / (1 + math.exp(-mean if mean > -30 else 30))
    sure = p * (1 - p)
    gain = 1 / (1 + sure * spread)
    step, sure = (hit - p) * gain, sure * gain
    for w in shared:
        var = w.var
        m = w.mean + var * step
        w.mean = m if -SURE < m < SURE else SURE if m > 0 else -SURE
        var += w.drift - var * var * sure
        w.var = var if var < w.widest else w.widest
    if slope is not None:
        part = slope.var * x
        slope.mean = min(2.0, max(0.0, slope.mean + part * step))
        slope.var = min(slope.widest, slope.var - part * part * sure + slope.drift)
