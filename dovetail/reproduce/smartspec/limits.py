"""How close smartspec comes to an oracle, what useless drafters cost, and what trees would give."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import numpy as np

from dovetail.bench.verdict import decide_exact
from dovetail.reproduce.claim import Claim, Experiment
from dovetail.reproduce.smartspec.policies import run
from dovetail.reproduce.smartspec.replay import Job, Machine, Model
from dovetail.reproduce.smartspec.sweep import SETUPS, Effort, Setup

OF_ORACLE, USELESS, TREES = 0.97, 1.02, 1.05
ORACLE, NOTHING, BRANCHES = "beside an oracle", "a useless drafter", "two branches at the first token"
SECOND = 0.4  # of the first tokens that are wrong, those for which the second guess is right: a generous share
SKIPPED = {False: 100, True: 500}  # tokens of an answer that are not counted, by whether the drafter is a model


def experiment(effort: Effort) -> Experiment:
    names = [setup.name(what) for what in (ORACLE, NOTHING, BRANCHES) for setup in SETUPS]
    return Experiment("limits of smartspec, by replay", tuple(names), partial(claims, effort))


def claims(effort: Effort) -> Iterator[Claim]:
    for setup in SETUPS:
        load = setup.changing(effort)
        share = setup.run("oracle", load).mean / setup.run("smartspec", load).mean
        yield Claim(
            setup.name(ORACLE),
            f"{len(load)} requests, a load that changes; the oracle knows probabilities and times, not the tokens",
            "no such figure",
            f"{share:.1%} of the oracle's speed (mean latency), probes included",
            "Probabilities and times have to be learned.",
            kind="simulated",
            bar=decide_exact(f"at least {OF_ORACLE:.0%}", share >= OF_ORACLE),
        )
    for setup in SETUPS:
        skipped = SKIPPED[setup.model.writes]
        cost = useless(setup, skipped, effort.alone)
        yield Claim(
            setup.name(NOTHING),
            f"random guesses, one stream, {effort.alone} tokens after the first {skipped}; without the time of "
            "the controller itself",
            "section 5: never slower than without speculation",
            f"{cost - 1:.2%} slower than without",
            "Probes go on, less and less often.",
            kind="simulated",
            bar=decide_exact(f"at most {USELESS - 1:.0%}", cost <= USELESS),
        )
    for setup in SETUPS:
        gain, right = max(
            (tree_gain(setup.machine, setup.model, right / 20), right / 20) for right in range(4, 20)
        )
        yield Claim(
            setup.name(BRANCHES),
            f"one stream; the second guess is right for {SECOND:.0%} of the first tokens that are wrong",
            "section 4 counts all nodes of a tree as rows; no figure for a CPU",
            f"at most {gain:.3f} times as fast as the best chain (where {right:.0%} of guesses are right)",
            "A second branch takes rows that a CPU computes at their full cost."
            if gain < TREES
            else "Only at this share of right guesses; drafters differ.",
            kind="simulated",
        )


def useless(setup: Setup, skipped: int, tokens: int) -> float:
    """Seconds with guesses that are hardly ever right over those without, after the first `skipped` tokens."""

    def seconds(policy: str) -> float:
        times = []
        for n in (skipped, skipped + tokens):
            job = Job(0.0, 50, np.full(n, 0.005), np.ones(n), 5)
            times.append(run(policy, [job], setup.machine, setup.model).seconds)
        return times[1] - times[0]

    return seconds("smartspec") / seconds("none")


def tree_gain(machine: Machine, model: Model, right: float, longest: int = 8) -> float:
    """Goodput of the best tree with a second branch at the first token over that of the best chain; one stream.

    A token of either branch is right with the same probability if those before it are. The second branch's first
    is never likelier than the first branch's. Drafting both branches takes no longer than drafting one.
    """

    def goodput(first: int, second: int) -> float:
        chain = sum(right**j for j in range(1, first + 1))
        branch = min(right, (1 - right) * SECOND) * sum(right**j for j in range(second))
        drafting = model.call + model.depth * max(first, second) if first else 0.0
        return (1 + chain + branch) / (machine.seconds(1 + first + second, 0) + machine.host + drafting)

    chains = max(goodput(first, 0) for first in range(longest + 1))
    return max(goodput(first, second) for first, second in product(range(1, longest + 1), repeat=2)) / chains
