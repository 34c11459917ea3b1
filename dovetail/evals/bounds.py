"""Bars on the figures of a result: `--min` and `--max` of `dovetail eval`.

Shares of trials, their differences and the speed of decoding are known by intervals (`bench.verdict`,
`evals.paired`). All other figures are exact:
the same text or prompts give the same figure again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dovetail.bench.verdict import (
    Bar,
    Decision,
    Interval,
    Looks,
    Verdict,
    decide_exact,
    decide_share,
    judge,
)
from dovetail.evals.suite import Result, Suite

SPEED = "decode_tokens_per_s"
DIFFERENCE = "difference"  # from the answers that a result is paired with
LOOKS = Looks(8)  # of decoding, after so many parts of answers


@dataclass(frozen=True)
class Bound:
    """A bar on the figure `key`."""

    key: str
    bar: Bar

    @classmethod
    def least(cls, key: str, bound: float) -> Bound:
        return cls(key, Bar(bound, f"{key} of at least {bound:g}"))

    @classmethod
    def most(cls, key: str, bound: float) -> Bound:
        return cls(key, Bar(bound, f"{key} of at most {bound:g}", most=True))

    def decide(self, suite: Suite, result: Result) -> Decision:
        bar = self.bar
        if self.key == DIFFERENCE:
            return _decide_difference(bar, result["paired"])
        if self.key not in result:
            return Decision(bar.needs, Verdict.MISSED, "it was not measured: the context leaves no room")
        if self.key == SPEED:
            return judge(bar, result["decode_rates"], LOOKS.confidence)
        if (share := suite.share(result, self.key)) is not None:
            return decide_share(bar, *share)
        value = result[self.key]
        return decide_exact(bar.needs, value <= bar.bound if bar.most else value >= bar.bound)


def decided(suite: Suite, result: Result, bounds: Sequence[Bound]) -> list[dict]:
    """The decision on each bound, as in the JSON of a result: with the `figure` it is about and its `value`. There
    is none on the difference of a result that is paired with nothing."""
    found = []
    for bound in bounds:
        values = result
        if bound.key == DIFFERENCE:
            if "paired" not in result:
                continue
            values = result["paired"]
        found.append(
            {"figure": bound.key, "value": values.get(bound.key), **bound.decide(suite, result).to_dict()}
        )
    return found


def _decide_difference(bar: Bar, paired: dict[str, Any]) -> Decision:
    """Judge a difference of shares by the interval that holds it."""
    interval = Interval(*paired["interval"])
    verdict = bar.judge(interval)
    why = f"{interval.low:+.1%} to {interval.high:+.1%} over {paired['questions']} questions"
    if verdict is Verdict.UNDECIDED:
        why = f"too few questions to decide: {why}"
    return Decision(bar.needs, verdict, why, interval)
