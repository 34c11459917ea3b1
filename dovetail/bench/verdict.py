"""Whether a bar is met. An interval that holds the figure decides, not a single number that noise may have moved.

A bar is met if the whole interval is on its good side, missed if the whole interval is on the other side, and
undecided if the bar lies inside. Then more rounds follow, up to a limit. A bar that is undecided at the limit is
no failure.

**Timed figures** are medians of rounds. A round's reading is a ratio of two sides that ran in turns, or a rate.
The interval lies between two readings, the k-th lowest and the k-th highest. The chance that the median is
below the k-th lowest of n readings is that of fewer than k heads in n throws of a coin. This is the sign test
turned round. It holds for any distribution of the noise, from six rounds on. An interval from a mean would need
noise without outliers, and a bootstrap of so few readings covers too rarely. What is assumed: rounds do not
depend on each other and have one median. Ratios of sides that run in turns come close to that, because slow
times of a machine slow both sides.

Several looks make wrong verdicts likelier. So the looks share the chance of error: each uses an interval of higher
confidence, and all of them hold together with CONFIDENCE. A verdict is wrong only if the figure lies on the far
side, so the chance of a wrong one is at most (1 - CONFIDENCE) / 2.

**Shares** (needles found, questions answered) have Wilson's score interval. It is sound for few trials and for
shares near 1, where the usual one has no width. **Exact figures** (bytes counted, the perplexity of one text)
are compared as they are.
"""

from __future__ import annotations

import enum
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

CONFIDENCE = 0.95


class Verdict(enum.StrEnum):
    """What is known about a bar."""

    MET = "met"
    MISSED = "missed"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Interval:
    """Where a figure lies."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.3g} to {self.high:.3g}"

    def apart(self, other: Interval) -> bool:
        """Whether the two have no number in common."""
        return self.high < other.low or other.high < self.low


@dataclass(frozen=True)
class Bar:
    """A figure must reach `bound`, or with `most` must not pass it. `needs` says so in words."""

    bound: float
    needs: str
    most: bool = False

    def judge(self, interval: Interval) -> Verdict:
        if self.most:
            met, missed = interval.high <= self.bound, interval.low > self.bound
        else:
            met, missed = interval.low >= self.bound, interval.high < self.bound
        return Verdict.MET if met else Verdict.MISSED if missed else Verdict.UNDECIDED


def at_least(bound: float) -> Bar:
    return Bar(bound, f"at least {bound:g}")


@dataclass(frozen=True)
class Decision:
    """The verdict on a bar. interval: what it rests on; None for an exact figure, and where nothing is known yet.
    why: the same in words, and for an undecided bar what stands in the way."""

    needs: str
    verdict: Verdict
    why: str
    interval: Interval | None = None

    @property
    def meets(self) -> bool | None:
        """None where it is undecided."""
        return None if self.verdict is Verdict.UNDECIDED else self.verdict is Verdict.MET

    def to_dict(self) -> dict[str, Any]:
        return {
            "needs": self.needs,
            "meets": self.meets,
            "verdict": str(self.verdict),
            "interval": None if self.interval is None else [self.interval.low, self.interval.high],
            "verdict_why": self.why,
        }

    @property
    def word(self) -> str:
        """The verdict for people, who must not overlook a miss."""
        return "MISSED" if self.verdict is Verdict.MISSED else str(self.verdict)

    def __str__(self) -> str:
        return f"{self.word} ({self.why})"


@dataclass(frozen=True)
class Looks:
    """After how many rounds a bar is judged: after `first`, and as long as it is undecided after twice as many as
    before, `doublings` times."""

    first: int
    doublings: int = 2

    @property
    def rounds(self) -> list[int]:
        return [self.first << i for i in range(self.doublings + 1)]

    @property
    def confidence(self) -> float:
        """Of the interval of one look, such that those of all looks hold together with CONFIDENCE."""
        return 1 - (1 - CONFIDENCE) / len(self.rounds)


def decide(bar: Bar, looks: Looks, readings: Callable[[int], Sequence[float]]) -> Decision:
    """Judge the median of as many rounds as it takes. `readings(n)` gives the readings of the first n rounds."""
    for rounds in looks.rounds:
        decision = judge(bar, readings(rounds), looks.confidence)
        if decision.verdict is not Verdict.UNDECIDED:
            break
    return decision


def judge(bar: Bar, readings: Sequence[float], confidence: float = CONFIDENCE) -> Decision:
    """Judge the median of these readings."""
    interval, count = median_interval(readings, confidence), f"{len(readings)} rounds"
    if interval is None:
        return Decision(bar.needs, Verdict.UNDECIDED, f"{count} are too few to decide")
    verdict = bar.judge(interval)
    why = f"{interval} after {count}"
    if verdict is Verdict.UNDECIDED:
        why = f"this machine is too noisy to decide: {why}"
    return Decision(bar.needs, verdict, why, interval)


def decide_share(bar: Bar, successes: float, trials: int) -> Decision:
    """Judge a share of trials. `successes` need not be whole: trials that succeed in part count in part."""
    if not trials:
        return Decision(bar.needs, Verdict.UNDECIDED, "there was no trial")
    interval = share_interval(successes, trials)
    verdict = bar.judge(interval)
    why = f"{interval.low:.1%} to {interval.high:.1%} after {trials} trials"
    if verdict is Verdict.UNDECIDED:
        why = f"too few trials to decide: {why}"
    return Decision(bar.needs, verdict, why, interval)


def decide_exact(needs: str, holds: bool) -> Decision:
    """Judge what does not change from run to run."""
    return Decision(needs, Verdict.MET if holds else Verdict.MISSED, "exact")


def median_interval(readings: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Two of the readings. The median of what all are drawn from lies between them with at least this confidence.
    None for too few readings."""
    n, tail = len(readings), (1 - confidence) / 2
    k, below = 0, 0.0  # the chance of at most k - 1 heads in n throws
    while (more := below + math.comb(n, k) / 2**n) <= tail:
        k, below = k + 1, more
    ordered = sorted(readings)
    return Interval(ordered[k - 1], ordered[-k]) if k else None


def share_interval(successes: float, trials: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval for a share of at least one trial. It is wider than it need be for trials that
    succeed in part, since their variance is at most that of all or nothing."""
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    share, weight = successes / trials, z * z / trials
    centre = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / trials + weight / (4 * trials))
    return Interval(max(0.0, centre - half), min(1.0, centre + half))
