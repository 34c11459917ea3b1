"""Latency from an idle server to a full one: smartspec beside no guesses and fixed lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from dovetail.bench.rounds import Ratio
from dovetail.bench.verdict import decide_exact
from dovetail.reproduce.claim import Claim, Experiment
from dovetail.reproduce.smartspec.policies import FIXED, run
from dovetail.reproduce.smartspec.replay import Job, Machine, Model, Outcomes
from dovetail.reproduce.smartspec.workloads import (
    CODER,
    DRAFT,
    LOOKUP,
    SMALL,
    Kind,
    chatting,
    coding,
    copying,
    jobs,
)  # fmt: skip

WITHIN, CHANGING_GAIN = 0.02, 1.03
PAPER = "abstract: up to 3.2 times lower average latency than without speculation (five models, GPUs)"
REST = ("none", *map(str, FIXED))


@dataclass(frozen=True)
class Effort:
    """requests: in each load. alone: tokens of an answer that is generated alone."""

    requests: int
    alone: int = 2000


EFFORTS = {"quick": Effort(60, 1000), "default": Effort(250), "full": Effort(600)}


@dataclass(frozen=True)
class Setup:
    """A machine with a drafter. rates: requests in a second, from idle to full. slow, fast: those of the load that
    changes every `period` seconds."""

    machine: Machine
    model: Model
    drafter: str
    kinds: tuple[Kind, ...]
    rates: tuple[float, ...]
    slow: float
    fast: float
    period: float

    def load(self, effort: Effort, rate: float) -> list[Job]:
        return jobs(1, effort.requests, lambda time: rate, self.kinds)

    def changing(self, effort: Effort) -> list[Job]:
        def rate(time: float) -> float:
            return self.fast if time // self.period % 2 else self.slow

        return jobs(3, 2 * effort.requests, rate, self.kinds)

    def name(self, what: str) -> str:
        return f"{self.machine.name}, {self.drafter}: {what}"

    def run(self, policy: str, load: list[Job]) -> Outcomes:
        return run(policy, load, self.machine, self.model)


SETUPS = (
    Setup(SMALL, LOOKUP, "lookup in the text", (copying, chatting), (0.3, 1.0, 1.5, 2.0, 2.4), 0.5, 2.6, 20.0),
    Setup(CODER, DRAFT, "draft model", (coding,), (0.05, 0.1, 0.2, 0.3), 0.05, 0.35, 60.0),
)


def experiment(effort: Effort) -> Experiment:
    names = [s.name(f"{rate:g} requests/s") for s in SETUPS for rate in s.rates]
    names += [s.name("a load that changes") for s in SETUPS]
    return Experiment("latency from idle to full, by replay", tuple(names), partial(claims, effort))


def claims(effort: Effort) -> Iterator[Claim]:
    for setup in SETUPS:
        for rate in setup.rates:
            load = setup.load(effort, rate)
            yield _claim(setup, f"{rate:g} requests/s", load, lambda o: o.median, 1 / (1 + WITHIN))
    for setup in SETUPS:
        yield _claim(setup, "a load that changes", setup.changing(effort), lambda o: o.mean, None)


def _claim(
    setup: Setup, what: str, load: list[Job], latency: Callable[[Outcomes], float], least: float | None
) -> Claim:
    """`least`: of the best other policy's latency over ours. None: a load that changes, beside fixed lengths."""
    found = {policy: latency(setup.run(policy, load)) for policy in (*REST, "smartspec")}
    ours = found["smartspec"]
    best = min(REST if least is not None else REST[1:], key=lambda policy: found[policy])
    changing = least is None
    needs = f"{CHANGING_GAIN:g} times the best fixed length" if changing else f"within {WITHIN:.0%} of the best"
    shown = ", ".join(f"{policy} {seconds:.3g}" for policy, seconds in found.items())
    ratio = found["none"] / ours
    return Claim(
        setup.name(what),
        f"{len(load)} requests of about 200 + 120 tokens; {'mean' if changing else 'median'} latency in seconds",
        PAPER,
        f"{ratio:.2f} times lower than none, {found[best] / ours:.3f} times lower than the best other: {shown}",
        "A CPU computes more slowly, so a row costs more of a step than on a GPU, and guesses pay less.",
        kind="simulated",
        ratio=Ratio(ratio, ratio, ratio),
        paper_ratio=(1.0, 3.2),
        bar=decide_exact(needs, found[best] / ours >= (CHANGING_GAIN if least is None else least)),
    )
