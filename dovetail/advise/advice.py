"""From measured rates and losses to a recommendation and its reason in words.

The rule behind it is that of "Give Me BF16 or Give Me Death?" (Kurtic et al., ACL 2025, 2411.02355), section 5:
where reading weights takes the time, fewer bits in them win, and where arithmetic takes it, narrower arithmetic
does. Which of both holds is not assumed: it is measured with the least rounded setting.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dovetail.advise.workload import Workload
from dovetail.evals.plots import pareto

CLOSE = 0.02  # predicted times that differ by less are equal, and the smaller loss decides
WITHIN = 1.05  # times the best measured time, which the recommended setting may take
MEMORY, ARITHMETIC = "memory", "arithmetic"


@dataclass
class Loss:
    """A setting's perplexity on a text. windows: the same for each window, in order."""

    perplexity: float
    windows: Sequence[float]

    def beyond(self, reference: Loss) -> float:
        """By which share it is above the reference's."""
        return math.exp(statistics.fmean(self._logs(reference))) - 1

    def error(self, reference: Loss) -> float | None:
        """The standard error of that share, from window to window; None for one window."""
        logs = self._logs(reference)
        return statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else None

    def _logs(self, reference: Loss) -> list[float]:
        return [math.log(a / b) for a, b in zip(self.windows, reference.windows, strict=True)]


@dataclass
class Timing:
    """Readings of one setting with one workload, a round each. Rates are in tokens per second; `steps` are what
    `Worker.decode` says; `runs` are seconds of the whole workload."""

    prompt: list[float] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    runs: list[float] = field(default_factory=list)

    @property
    def prompt_rate(self) -> float:
        return statistics.median(self.prompt)

    @property
    def decode_rate(self) -> float:
        return statistics.median(step["rate"] for step in self.steps)

    @property
    def measured(self) -> float | None:
        """Seconds of the workload, if it was run."""
        return statistics.median(self.runs) if self.runs else None

    def predicted(self, workload: Workload) -> float:
        """Seconds of the workload."""
        return workload.seconds(self.prompt_rate, self.decode_rate)

    @property
    def step_bytes(self) -> float | None:
        """Bytes that a decode step moves, if they are counted."""
        return self.steps[0]["bytes"]

    def memory_share(self, workload: Workload) -> float | None:
        """The share of the workload's time that reading memory takes at least; None if bytes are not counted.

        Prompts are read in steps of many rows, whose weights are read once for all. Their reading is left out.
        """
        shares = [step["memory_share"] for step in self.steps]
        if None in shares:
            return None
        outputs = sum(output - 1 for _, output in workload.requests)
        return statistics.median(shares) * outputs / self.decode_rate / self.predicted(workload)


@dataclass(frozen=True)
class Advice:
    """What is recommended for a workload, and why. bound: what takes the time of the least rounded setting; None
    where it is not known. front: settings that no other beats in time and loss together. slower: for each setting
    that takes longer than the least rounded one, why."""

    recommended: str
    reason: str
    bound: str | None
    memory_share: float | None
    front: tuple[str, ...]
    slower: Mapping[str, str]


def advise(workload: Workload, timings: Mapping[str, Timing], losses: Mapping[str, float], most: float) -> Advice:
    """Advice on settings by name, of which the first is the least rounded. most: the largest loss that is taken.

    The recommended one has the shortest predicted time of those whose loss is small enough. Of several within
    CLOSE of it, the one with the smallest loss is taken.
    """
    seconds = {name: timing.predicted(workload) for name, timing in timings.items()}
    # Below the least rounded setting's there is only chance, which must not rank settings.
    losses = {name: max(0.0, loss) for name, loss in losses.items()}
    allowed = [name for name in seconds if losses[name] <= most]
    first = next(iter(seconds))
    if not allowed:
        raise ValueError("the first setting has no loss, so one is allowed")
    shortest = min(seconds[name] for name in allowed)
    close = [name for name in allowed if seconds[name] <= shortest * (1 + CLOSE)]
    chosen = min(close, key=lambda name: (losses[name], seconds[name]))
    share = timings[first].memory_share(workload)
    bound = None if share is None else MEMORY if share >= 0.5 else ARITHMETIC
    names = list(seconds)
    front = pareto([(-seconds[name], -losses[name]) for name in names])
    comparison = _Comparison(first, timings, seconds, bound)
    return Advice(
        chosen,
        comparison.reason(chosen, share, most),
        bound,
        share,
        tuple(names[i] for i in front),
        {name: comparison.slowness(name) for name in names if seconds[name] > seconds[first] * (1 + CLOSE)},
    )


@dataclass(frozen=True)
class _Comparison:
    """Settings beside the least rounded one, `first`, in words."""

    first: str
    timings: Mapping[str, Timing]
    seconds: Mapping[str, float]
    bound: str | None

    def reason(self, name: str, share: float | None, most: float) -> str:
        said = [self._why(share)]
        if name == self.first:
            said.append(f"Nothing that loses at most {most:.1%} is faster.")
        else:
            said.append(f"{name} takes {self._ratio(name):.2f} times the time{self._bytes(name)}.")
        return " ".join(said)

    def slowness(self, name: str) -> str:
        why = f"it takes {self._ratio(name):.2f} times the time of {self.first}{self._bytes(name)}"
        if self.bound == ARITHMETIC:
            return f"{why}; arithmetic takes the time here, and its own costs more"
        if self.bound == MEMORY:
            return f"{why}; its arithmetic costs more than it saves in memory"
        return why

    def _why(self, share: float | None) -> str:
        if share is None:
            return f"What takes the time of {self.first} is not known, because its bytes are not counted."
        taken = f"Reading memory takes {share:.0%} of the time of {self.first}"
        if self.bound == MEMORY:
            return f"{taken}, so fewer bits in weights and KV win."
        return f"{taken}, so arithmetic decides: narrower arithmetic wins, and fewer bits alone do not."

    def _ratio(self, name: str) -> float:
        return self.seconds[name] / self.seconds[self.first]

    def _bytes(self, name: str) -> str:
        ours, theirs = self.timings[name].step_bytes, self.timings[self.first].step_bytes
        return (
            "" if ours is None or theirs is None else f" and moves {ours / theirs:.2f} times the bytes in a step"
        )


def check(
    advice: Advice, timings: Mapping[str, Timing], losses: Mapping[str, float], most: float
) -> dict[str, Any]:
    """Whether the recommended setting is the best measured one of those whose loss is small enough, or within 5 %
    of it."""
    measured = {name: statistics.median(t.runs) for name, t in timings.items() if losses[name] <= most}
    best = min(measured, key=lambda name: measured[name])
    ratio = measured[advice.recommended] / measured[best]
    return {
        "best": best,
        "best_s": measured[best],
        "recommended_s": measured[advice.recommended],
        "ratio": ratio,
        "meets": ratio <= WITHIN,
    }
