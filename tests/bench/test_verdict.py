"""Verdicts on made-up noise: the right one soon, a wrong one no more often than is said."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.bench.verdict import (
    CONFIDENCE,
    Bar,
    Decision,
    Interval,
    Looks,
    Verdict,
    at_least,
    decide,
    decide_exact,
    decide_share,
    judge,
    median_interval,
    share_interval,
)

MET, MISSED, UNDECIDED = Verdict.MET, Verdict.MISSED, Verdict.UNDECIDED
WRONG = (1 - CONFIDENCE) / 2
RUNS = 2000
Draw = Callable[[random.Random], float]

# Each has the median 1: symmetric, with a long tail, with outliers as other work on a machine makes, two states.
NOISE: dict[str, Draw] = {
    "normal": lambda r: r.gauss(1, 0.05),
    "log-normal": lambda r: math.exp(r.gauss(0, 0.3)),
    "outliers": lambda r: r.gauss(1, 0.02) if r.random() < 0.8 else r.choice([0.5, 2.0]),
    "two states": lambda r: r.choice([0.9, 1.1]) + r.gauss(0, 0.08),
}


def draws(noise: str, seed: int, shift: float = 0.0) -> Callable[[int], list[float]]:
    """Readings of the first n rounds, the same ones for the same n."""
    generator, made = random.Random(f"{noise} {seed} {shift}"), []

    def first(n: int) -> list[float]:
        while len(made) < n:
            made.append(NOISE[noise](generator) + shift)
        return made[:n]

    return first


def verdicts(noise: str, bar: Bar, looks: Looks, shift: float = 0.0) -> list[Verdict]:
    return [decide(bar, looks, draws(noise, seed, shift)).verdict for seed in range(RUNS)]


def allowed(chance: float, runs: int = RUNS) -> float:
    """More than this share would be seen once in thousands of tests if the chance is what is said."""
    return chance + 4 * math.sqrt(chance * (1 - chance) / runs)


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("rounds", [6, 9, 15, 31])
def test_the_interval_holds_the_median_as_often_as_it_says(noise: str, rounds: int) -> None:
    held = 0
    for seed in range(RUNS):
        interval = median_interval(draws(noise, seed)(rounds))
        assert interval is not None
        held += interval.low <= 1 <= interval.high
    exact = 1 - 2 * sum(math.comb(rounds, i) for i in range(_rank(rounds))) / 2**rounds
    assert held / RUNS == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / RUNS))
    assert CONFIDENCE <= exact < 0.99


def _rank(n: int) -> int:
    """By trial: the largest k for which the tails beyond the k-th readings are small enough."""
    tails = [sum(math.comb(n, i) for i in range(k)) / 2**n for k in range(n)]
    return max(k for k, tail in enumerate(tails) if tail <= WRONG)


@pytest.mark.parametrize("noise", NOISE)
def test_noise_at_the_bar_is_undecided_and_rarely_anything_else(noise: str) -> None:
    """At the bar both words are wrong in spirit, so both are counted."""
    found = verdicts(noise, at_least(1.0), Looks(8))
    assert found.count(UNDECIDED) / RUNS > 1 - allowed(2 * WRONG)
    assert found.count(MISSED) / RUNS <= allowed(WRONG)


@pytest.mark.parametrize("noise", NOISE)
def test_a_wrong_verdict_is_as_rare_as_is_said(noise: str) -> None:
    """Just beside the bar, where wrong verdicts are likeliest."""
    below = verdicts(noise, at_least(1.0), Looks(8), shift=-0.001)
    above = verdicts(noise, at_least(1.0), Looks(8), shift=0.001)
    assert below.count(MET) / RUNS <= allowed(WRONG)
    assert above.count(MISSED) / RUNS <= allowed(WRONG)


@pytest.mark.parametrize(("noise", "later"), [("normal", 0.0), ("outliers", 0.3)])
@pytest.mark.parametrize(("shift", "right"), [(0.2, MET), (-0.2, MISSED)])
def test_what_is_clear_is_decided_soon(noise: str, later: float, shift: float, right: Verdict) -> None:
    """`later`: the share that may need a second look; a third one is for what is not clear."""
    taken: list[int] = []
    for seed in range(200):
        first = draws(noise, seed, shift)

        def counted(rounds: int, first=first) -> list[float]:
            taken.append(rounds)
            return first(rounds)

        assert decide(at_least(1.0), Looks(15), counted).verdict is right
    assert taken.count(30) <= 200 * later and taken.count(60) <= 4


def test_no_worse_than_is_decided_with_more_rounds_where_the_first_ones_do_not_tell() -> None:
    """An equal side and the bar 0.95, as in balancing: undecided at first, met in the end."""
    found = verdicts("normal", at_least(0.97), Looks(15))
    first = [
        judge(at_least(0.97), draws("normal", seed)(15), Looks(15).confidence).verdict for seed in range(RUNS)
    ]
    assert first.count(MET) < 0.5 * RUNS < 0.9 * RUNS < found.count(MET)
    assert found.count(MISSED) == 0


@given(st.lists(st.floats(0.1, 10), max_size=40), st.floats(0.5, 0.999))
def test_the_interval_is_of_readings_and_narrows_with_less_confidence(
    values: list[float], confidence: float
) -> None:
    wide, narrow = median_interval(values, confidence), median_interval(values, confidence / 2)
    if wide is None:
        assert 2 ** (1 - len(values)) > 1 - confidence - 1e-9
        return
    assert narrow is not None
    assert {wide.low, wide.high} <= set(values)
    assert wide.low <= narrow.low <= narrow.high <= wide.high


@given(st.lists(st.floats(0.1, 10), min_size=6, max_size=40), st.floats(0.1, 10))
def test_at_most_is_at_least_turned_round(values: list[float], bound: float) -> None:
    mirrored = [-v for v in values]
    least, most = Bar(bound, ""), Bar(-bound, "", most=True)
    assert judge(least, values).verdict is judge(most, mirrored).verdict


def test_too_few_rounds_decide_nothing_and_say_so() -> None:
    decision = decide(at_least(1.0), Looks(1), lambda n: [5.0] * n)
    assert (decision.verdict, decision.meets, decision.interval) == (UNDECIDED, None, None)
    assert decision.why == "4 rounds are too few to decide"


def test_an_undecided_bar_names_the_machine_and_the_interval() -> None:
    decision = decide(at_least(1.0), Looks(8), lambda n: [0.9, 1.1] * (n // 2))
    assert str(decision) == "undecided (this machine is too noisy to decide: 0.9 to 1.1 after 32 rounds)"
    assert decision.to_dict() == {
        "needs": "at least 1", "meets": None, "verdict": "undecided", "interval": [0.9, 1.1],
        "verdict_why": "this machine is too noisy to decide: 0.9 to 1.1 after 32 rounds",
    }  # fmt: skip


def test_looks_share_the_chance_of_error() -> None:
    assert Looks(15).rounds == [15, 30, 60]
    assert 1 - Looks(15).confidence == pytest.approx((1 - CONFIDENCE) / 3)
    assert Looks(9, 0).rounds == [9] and Looks(9, 0).confidence == pytest.approx(CONFIDENCE)


def test_a_bar_holds_at_what_it_needs() -> None:
    assert at_least(3.0).judge(Interval(3.0, 4.0)) is MET
    assert at_least(3.0).judge(Interval(2.0, 3.0)) is UNDECIDED
    assert at_least(3.0).judge(Interval(2.0, 2.9)) is MISSED
    assert decide_exact("equal", True) == Decision("equal", MET, "exact")
    assert decide_exact("equal", False).meets is False


@given(st.integers(1, 300), st.data())
def test_wilsons_interval_solves_its_equation(trials: int, data: st.DataObject) -> None:
    """Its ends are the shares p for which the observed share is z standard errors of p away."""
    successes = data.draw(st.integers(0, trials))
    share, z = successes / trials, 1.959963984540054
    interval = share_interval(successes, trials)
    for end in (interval.low, interval.high):
        assert (share - end) ** 2 == pytest.approx(z * z * end * (1 - end) / trials, abs=1e-9)
    assert interval.low <= share + 1e-12 and share - 1e-12 <= interval.high


@pytest.mark.parametrize("share", [0.5, 0.9, 0.97])
def test_a_share_is_held_about_as_often_as_is_said(share: float) -> None:
    """Averaged over numbers of trials: at any one of them it jumps, as binomial counts do."""
    held, runs, generator = 0, 4000, random.Random(share)
    for run in range(runs):
        trials = 20 + run % 100
        interval = share_interval(sum(generator.random() < share for _ in range(trials)), trials)
        held += interval.low <= share <= interval.high
    assert held / runs == pytest.approx(CONFIDENCE, abs=0.02)


def test_few_trials_can_miss_a_high_share_but_not_show_it() -> None:
    bar = Bar(0.95, "at least 95%")
    assert decide_share(bar, 6, 6).verdict is UNDECIDED and "too few trials" in decide_share(bar, 6, 6).why
    assert decide_share(bar, 3, 6).verdict is MISSED
    assert decide_share(bar, 108, 108).verdict is MET
    assert decide_share(bar, 0, 0).verdict is UNDECIDED


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_shares_in_part_are_no_surer_than_whole_ones(parts: list[float]) -> None:
    share = sum(parts) / len(parts)
    variance = sum((p - share) ** 2 for p in parts) / len(parts)
    assert variance <= share * (1 - share) + 1e-9
    interval = share_interval(min(sum(parts), len(parts)), len(parts))
    assert 0 <= interval.low <= share + 1e-9 and share - 1e-9 <= interval.high <= 1


def test_intervals_are_apart_where_nothing_is_in_both() -> None:
    assert Interval(1, 2).apart(Interval(2.1, 3)) and Interval(3, 4).apart(Interval(1, 2))
    assert not Interval(1, 2).apart(Interval(2, 3))
