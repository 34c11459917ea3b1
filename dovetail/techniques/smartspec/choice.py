"""How many guessed tokens of each request to verify, and to draft: one choice for all requests of a step.

Goodput is expected tokens per second (SmartSpec, arXiv 2406.14066, section 4). A long run has the highest goodput
when each step has the highest `tokens - price * seconds`, where the price of a second is the goodput of the run
itself (renewal reward; Dinkelbach 1967). So a step with good guesses is not cut short because it alone is so fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verify:
    """What verification costs. seconds[b]: the step with b guessed tokens in all, which never falls; it has an
    entry more than tokens that are allowed. each[i]: for a token of request i, besides."""

    seconds: Sequence[float]
    each: Sequence[float]


@dataclass(frozen=True, slots=True)
class Draft:
    """What drafting costs in seconds: a call, a token, a further token of the longest guess, and what request i
    takes to begin (catching up)."""

    call: float
    token: float
    depth: float
    start: Sequence[float]


def lengths(curves: Sequence[Sequence[float]], cost: Verify, price: float) -> tuple[list[int], float]:
    """The lengths with the highest sum of probabilities minus price times seconds, and by how much that is more
    than without guesses.

    curves[i][j]: the probability that token j of request i and all before it are right. Ties go to shorter
    lengths.
    """
    most, base = len(cost.seconds) - 1, cost.seconds[0]
    if len(curves) == 1:
        gains = [(p - price * cost.each[0], 0) for p in curves[0]]
    else:
        gains = []
        for i, curve in enumerate(curves):
            off = price * cost.each[i]
            gains += [(p - off, -i) for p in curve]
        gains.sort(reverse=True)  # within a request earlier tokens are never less likely, so they come first
    total = best = 0.0
    taken = 0
    for b, (gain, _) in enumerate(gains[:most], 1):
        if gain <= 0:
            break
        total += gain
        value = total - price * (cost.seconds[b] - base)
        if value > best:
            best, taken = value, b
    found = [0] * len(curves)
    for _, i in gains[:taken]:
        found[-i] += 1
    return found, best


def ahead(curves: Sequence[Sequence[float]], cost: Verify, draft: Draft, price: float) -> tuple[list[int], float]:
    """The same before anything is drafted, where drafting costs too: the best of all depths."""
    best, found = 0.0, [0] * len(curves)
    off = [price * (e + draft.token) for e in cost.each]
    for depth in range(1, max(map(len, curves), default=0) + 1):
        cut: list[Sequence[float]] = []
        for curve, less, start in zip(curves, off, draft.start, strict=True):
            worth = sum(max(0.0, p - less) for p in curve[:depth]) - price * start
            cut.append(curve[:depth] if worth > 0 else ())
        each = [e + draft.token for e in cost.each]
        chosen, value = lengths(cut, Verify(cost.seconds, each), price)
        value -= price * (draft.call + draft.depth * max(chosen, default=0))
        value -= price * sum(start for n, start in zip(chosen, draft.start, strict=True) if n)
        if value > best:
            best, found = value, chosen
    return found, best
