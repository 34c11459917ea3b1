"""smartspec chooses the best lengths, learns what is true, and no drafter changes the text."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.core.cost import Load
from dovetail.core.engine import Engine
from dovetail.core.errors import ConfigError
from dovetail.core.sampling import SamplingParams
from dovetail.core.seams import Drafter, Guess, Room
from dovetail.core.technique import Beside, Technique, compose
from dovetail.core.types import Request, StepPlan, StepResult
from dovetail.techniques import technique
from dovetail.techniques.smartspec import smartspec
from dovetail.techniques.smartspec.acceptance import Acceptance
from dovetail.techniques.smartspec.choice import Draft, Verify, ahead, lengths
from dovetail.techniques.smartspec.draft_time import Ask, DraftTime
from dovetail.techniques.smartspec.step_time import StepTime, monotone
from tests.helpers.examples import examples
from tests.tiny import make_request, run_all, run_staggered, tiny_engine

odds = st.lists(st.floats(0, 1), max_size=4)
rises = st.lists(st.floats(0, 0.5), min_size=12, max_size=12)


# -- choice --------------------------------------------------------------------------------------------


def goodput(curves: Sequence[Sequence[float]], chosen: Sequence[int], cost: Verify, base: float) -> float:
    """Expected tokens per second of these lengths; `base` tokens come without guesses."""
    tokens = base + sum(sum(c[:n]) for c, n in zip(curves, chosen, strict=True))
    return tokens / (cost.seconds[sum(chosen)] + sum(e * n for e, n in zip(cost.each, chosen, strict=True)))


def most_goodput(curves: Sequence[Sequence[float]], cost: Verify, base: float) -> list[int]:
    """The lengths with the highest goodput of this step alone."""
    chosen = [0] * len(curves)
    rate = goodput(curves, chosen, cost, base)
    while True:
        better, _ = lengths(curves, cost, rate)
        found = goodput(curves, better, cost, base)
        if found <= rate * (1 + 1e-12):
            return chosen
        chosen, rate = better, found


def expected(odds: Sequence[float]) -> list[float]:
    """Running products: a curve from probabilities of single tokens."""
    return list(accumulate(odds, lambda a, b: a * b))


def verify_cost(rises: Sequence[float], each: Sequence[float], n: int) -> Verify:
    return Verify([1.0, *itertools.accumulate(rises, initial=1.0)][1:], each[:n])


def every(curves: Sequence[Sequence[float]]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(len(c) + 1) for c in curves)))


@given(st.lists(odds, min_size=1, max_size=3), rises, st.lists(st.floats(0, 0.2), min_size=3, max_size=3))
@examples(200)
def test_lengths_are_those_of_the_highest_goodput_of_all(several, rises, each) -> None:
    curves, n = [expected(o) for o in several], len(several)
    cost = verify_cost(rises, each, n)
    best = max(goodput(curves, ks, cost, n) for ks in every(curves))
    assert goodput(curves, most_goodput(curves, cost, n), cost, n) == pytest.approx(best, rel=1e-9)


@given(
    st.lists(odds, min_size=1, max_size=3),
    rises,
    st.lists(st.floats(0, 0.2), min_size=3, max_size=3),
    st.floats(0, 3),
)
@examples(200)
def test_at_any_price_of_a_second_no_lengths_are_better(several, rises, each, price) -> None:
    curves = [expected(o) for o in several]
    cost = verify_cost(rises, each, len(curves))

    def value(ks: Sequence[int]) -> float:
        tokens = sum(sum(c[:k]) for c, k in zip(curves, ks, strict=True))
        seconds = cost.seconds[sum(ks)] - 1 + sum(e * k for e, k in zip(cost.each, ks, strict=True))
        return tokens - price * seconds

    chosen, gain = lengths(curves, cost, price)
    best = max(map(value, every(curves)))
    assert value(chosen) == pytest.approx(best, abs=1e-9) and gain == pytest.approx(best, abs=1e-9)


def test_ties_go_to_shorter_lengths() -> None:
    assert lengths([[0.5, 0.5]], Verify([1.0, 1.5, 2.0], [0.0]), 1.0) == ([0], 0.0)
    assert lengths([[1.0], [1.0]], Verify([1.0, 1.0, 1.0], [0.0, 0.0]), 1.0)[0] == [1, 1]


@given(st.lists(odds, min_size=1, max_size=3), rises, st.floats(0, 0.3), st.floats(0, 0.3), st.floats(0, 0.3))
@examples(200)
def test_lengths_before_drafting_are_those_of_the_highest_value(several, rises, call, token, depth) -> None:
    """Where beginning costs nothing. Where it costs, they are never worse than no guess."""
    curves, price = [expected(o) for o in several], 1.3
    n = len(curves)
    cost, draft = verify_cost(rises, [0.0] * 3, n), Draft(call, token, depth, [0.0] * n)

    def value(ks: Sequence[int]) -> float:
        if not any(ks):
            return 0.0
        tokens = sum(sum(c[:k]) for c, k in zip(curves, ks, strict=True))
        seconds = cost.seconds[sum(ks)] - 1 + call + token * sum(ks) + depth * max(ks)
        return tokens - price * seconds

    chosen, gain = ahead(curves, cost, draft, price)
    assert value(chosen) == pytest.approx(max(map(value, every(curves))), abs=1e-9)
    assert gain == pytest.approx(value(chosen), abs=1e-9)
    dear = Draft(call, token, depth, [100.0] * n)
    assert ahead(curves, cost, dear, price) == ([0] * n, 0.0)


@given(st.floats(0.05, 0.99), st.floats(0.01, 0.3), st.integers(1, 12))
@examples(200)
def test_a_larger_batch_never_guesses_longer_where_guesses_are_free(alpha, row, batch) -> None:
    """A theorem where time is affine in rows, all requests are alike, and contexts cost nothing."""

    def longest(n: int) -> int:
        curves = [expected([alpha] * 6)] * n
        cost = Verify([1 + row * (n + b) for b in range(6 * n + 1)], [0.0] * n)
        return max(most_goodput(curves, cost, n))

    assert longest(batch + 1) <= longest(batch)


def test_certain_guesses_are_taken_whole_and_hopeless_ones_not_at_all() -> None:
    cost = Verify([1 + 0.1 * b for b in range(20)], [0.0, 0.0])
    assert most_goodput([[1.0] * 8, [0.0] * 8], cost, 2) == [8, 0]
    assert ahead([[0.0] * 8], Verify([1.0] * 9, [0.0]), Draft(0.0, 0.0, 0.01, [0.0]), 1.0) == ([0], 0.0)


# -- acceptance ----------------------------------------------------------------------------------------


def taught(alpha: float, calls: int, source: str = "", given: Sequence[float] = ()) -> Acceptance:
    known, draw = Acceptance(), random.Random(1)
    for call in range(calls):
        name = "r" if call % 4 == 0 else f"r{call % 40}"
        right: list[bool] = []
        while len(right) < 4 and (not right or right[-1]):
            right.append(draw.random() < alpha)
        known.curve(name, source, given, 4)
        known.observe(name, source, given, right)
    return known


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8, 0.95])
def test_an_acceptance_rate_is_learned_and_positions_are_conditional(alpha: float) -> None:
    curve = taught(alpha, 400).curve("r", "", (), 4)
    for n, p in enumerate(curve, 1):
        assert p == pytest.approx(alpha**n, abs=0.12)


def test_a_new_request_begins_with_what_others_have_shown() -> None:
    assert taught(0.95, 200).curve("new", "", (), 1)[0] > 0.85
    assert taught(0.05, 200).curve("new", "", (), 1)[0] < 0.2
    assert taught(0.05, 200).curve("new", "other source", (), 1)[0] > 0.4


def test_odds_of_a_drafter_are_corrected() -> None:
    """It says 0.9 and is right half of the time."""
    assert taught(0.5, 400, given=[0.9] * 4).curve("r", "", [0.9] * 4, 1)[0] == pytest.approx(0.5, abs=0.12)


def test_limits_of_certainty() -> None:
    assert taught(1.0, 300).curve("r", "", (), 4)[-1] > 0.9
    assert taught(0.0, 300).curve("r", "", (), 4) == [] or taught(0.0, 300).curve("r", "", (), 4)[0] < 0.05


@given(st.lists(st.one_of(st.floats(), st.just(float("nan"))), min_size=3, max_size=3))
@examples(100)
def test_odds_that_mean_nothing_do_no_harm(given_odds) -> None:
    known = Acceptance()
    known.observe("r", "", given_odds, [True, True, False])
    curve = known.curve("r", "", given_odds, 3)
    assert all(0 <= b <= a <= 1 for a, b in itertools.pairwise([1.0, *curve]))


# -- times ---------------------------------------------------------------------------------------------


def test_monotone_is_the_nearest_sequence_that_does_not_fall() -> None:
    assert monotone([1, 3, 2, 4], [1, 1, 1, 1]) == [1, 2.5, 2.5, 4]
    assert monotone([3, 1, 2], [1, 1, 1]) == [2, 2, 2]
    assert monotone([2, 1], [3, 1]) == [1.75, 1.75]


def stair(rows: int, context: int, speed: float) -> float:
    """Blocks of four rows, of which the first is bound by memory; keys are read once."""
    return speed * (0.003 + 0.001 * ((rows - 1) // 4) + 1e-7 * context * (1 + 0.2 * rows))


def held_out(seed: int, noise: float, states: Sequence[float]) -> list[float]:
    """Relative errors of predictions of steps that come next, on a machine with noise and states of its memory."""
    draw, time, errors = random.Random(seed), StepTime(), []
    for step in range(3000):
        speed = states[step // 500 % len(states)]
        rows, context = (
            draw.choice([1, 1, 2, 3, 4, 5, 6, 8, 12, 16, 64 + draw.randrange(9)]),
            draw.randrange(50, 2000),
        )
        load = Load(((rows, context + rows),), rows)
        seconds = stair(rows, context, speed) * draw.lognormvariate(0, noise) * (8 if draw.random() < 0.02 else 1)
        if step > 200:
            errors.append(abs(time(load) - seconds) / seconds)
        time.observe(load, seconds)
    return sorted(errors)


@pytest.mark.parametrize(("noise", "states"), [(0.0, [1.0]), (0.08, [1.0]), (0.08, [1.0, 2.5])])
def test_steps_to_come_are_predicted_within_a_tenth(noise: float, states: Sequence[float]) -> None:
    errors = held_out(3, noise, states)
    assert errors[len(errors) // 2] < 0.1


@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 4000), st.floats(1e-4, 1)), min_size=1, max_size=80))
@examples(60)
def test_predictions_never_fall_in_rows_or_keys(steps) -> None:
    time = StepTime()
    for rows, context, seconds in steps:
        time.observe(Load(((rows, rows + context),), 1), seconds)
    by_rows = [time.rows(n) for n in range(1, 1200)]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(by_rows)) and by_rows[0] > 0
    assert 0 <= time.context(10, 10) <= time.context(20, 20)


def test_steps_without_a_time_teach_nothing() -> None:
    time = StepTime()
    for seconds in (0.0, -1.0, float("inf"), float("nan")):
        assert time.observe(Load(((1, 5),), 1), seconds) == 0
    assert not time.known


def test_a_drafter_s_time_is_learned_by_its_parts() -> None:
    draw, time = random.Random(2), DraftTime()
    for _ in range(300):
        ask = Ask(draw.randint(1, 8), 0, draw.randint(1, 8), draw.choice([0, 0, 1, 200]))
        ask = Ask(ask.requests, ask.depth * ask.requests, ask.depth, ask.behind)
        time.observe(ask, 1e-4 + 2e-3 * ask.depth + 1e-5 * ask.behind)
    for ask in (Ask(1, 4, 4, 1), Ask(4, 32, 8, 0), Ask(2, 4, 2, 500)):
        assert time(ask) == pytest.approx(1e-4 + 2e-3 * ask.depth + 1e-5 * ask.behind, rel=0.15)


# -- in the engine -------------------------------------------------------------------------------------

NEW = 24
USES = ["smartspec", "smartspec:drafter=ngram,tokens=16,min_n=1", "smartspec:drafter=ngram,fixed=5,tokens=8"]


@cache
def alone(prompt: tuple[int, ...], temperature: float) -> list[int]:
    params = SamplingParams(temperature=temperature, max_tokens=NEW, seed=5)
    return run_all(tiny_engine(), [prompt], params)[0]


prompts = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=30).map(tuple), min_size=1, max_size=5)


def wrapped(drafter: Drafter, **options: Any) -> Technique:
    return smartspec(
        (Technique("given", ("drafter",), lambda site: {"drafter": drafter}, lossless=True),), **options
    )


class Random(Drafter):
    """Guesses of any length at any time, right ones among them; sometimes garbage, too much, or an exception."""

    def __init__(self, seed: int, writes: bool = False) -> None:
        self.draw = random.Random(seed)
        self.writes = writes
        self.texts: dict[tuple[int, ...], list[int]] = {}

    def behind(self, request: Request) -> int:
        return self.draw.randrange(40)

    def propose(self, requests: Sequence[Request], limits: Sequence[int], room: Room) -> list[Guess]:
        if self.draw.random() < 0.05:
            raise ValueError("no")
        out = []
        for request, limit in zip(requests, limits, strict=True):
            at = request.num_output
            tokens = self.texts[tuple(request.prompt)][at : at + self.draw.randrange(limit + 4)]
            tokens = [t if self.draw.random() < 0.8 else self.draw.choice([-3, 10**9, 1, 2]) for t in tokens]
            odds = [self.draw.choice([0.0, 0.3, 0.9, 1.0, 7.0, float("nan")]) for _ in tokens]
            out.append(Guess(tokens, odds[: self.draw.choice([0, 1, 99])], self.draw.choice("ab")))
        return out if self.draw.random() > 0.05 else out[1:]


@pytest.mark.filterwarnings("ignore:the drafter failed")
@given(
    prompts,
    st.integers(0, 10**6),
    st.booleans(),
    st.sampled_from([-1, -1, 0, 3, 32]),
    st.sampled_from([1, 3, 8, 64]),
    st.integers(14, 40),
    st.lists(st.integers(0, 12), min_size=5, max_size=5),
    st.sampled_from([0.0, 0.8]),
)
@examples(60)
def test_no_drafter_changes_the_text(batch, seed, writes, fixed, budget, pages, arrivals, temperature) -> None:
    drafter = Random(seed, writes)
    drafter.texts = {p: alone(p, temperature) for p in batch}
    engine = tiny_engine(wrapped(drafter, fixed=fixed), pages=pages, max_num_batched_tokens=budget)
    params = SamplingParams(temperature=temperature, max_tokens=NEW, seed=5)
    requests = [make_request(engine, f"r{i}", p, params) for i, p in enumerate(batch)]
    run_staggered(engine, requests, arrivals)
    assert [r.output for r in requests] == [alone(p, temperature) for p in batch]


@pytest.mark.parametrize("use", USES)
def test_repeated_text_takes_fewer_steps(use: str) -> None:
    engine = tiny_engine(use, pages=80)
    Timed(engine)
    texts = run_all(engine, [(1, 2, 3, 4) * 6], SamplingParams(temperature=0, max_tokens=64))
    assert texts == run_all(
        tiny_engine(pages=80), [(1, 2, 3, 4) * 6], SamplingParams(temperature=0, max_tokens=64)
    )
    assert engine.steps < 64 and engine.scheduler.stats.accepted > 0


class Timed:
    """A clock that only steps move, and an engine by it: a step takes 1 and 0.2 for each row."""

    def __init__(self, engine: Engine) -> None:
        self.time, run = 0.0, engine.executor.run

        def timed(plan: StepPlan) -> StepResult:
            self.time += 1 + 0.2 * plan.num_tokens
            return run(plan)

        engine.clock = self
        engine.executor.run = timed  # type: ignore[method-assign]
        engine.seams.drafter.now = self.now  # type: ignore[attr-defined]

    def now(self) -> float:
        return self.time


class Told(Drafter):
    """Guesses that are all right, or all wrong. writes: whether it seems to be a model."""

    def __init__(self, text: Sequence[int], right: bool, writes: bool = False) -> None:
        self.text, self.right, self.writes = text, right, writes
        self.asked = 0

    def propose(self, requests: Sequence[Request], limits: Sequence[int], room: Room) -> list[Guess]:
        self.asked += 1
        at = [r.num_output for r in requests]
        wrong = 0 if self.right else 1
        return [
            Guess([(t + wrong) % 61 for t in self.text[i : i + min(8, limit)]])
            for i, limit in zip(at, limits, strict=True)
        ]


@pytest.mark.parametrize("writes", [False, True])
def test_useless_guesses_are_hardly_verified_and_good_ones_are(writes: bool) -> None:
    params = SamplingParams(temperature=0, max_tokens=200)
    [text] = run_all(tiny_engine(pages=80), [(3, 1, 2)], params)
    drafted, asked = [], []
    for right in (False, True):
        drafter = Told(text, right, writes)
        engine = tiny_engine(wrapped(drafter), pages=80)
        Timed(engine)
        assert run_all(engine, [(3, 1, 2)], params) == [text]
        drafted.append(engine.scheduler.stats.drafted)
        asked.append(drafter.asked)
    assert drafted[0] < 30 and drafted[1] > 100
    assert asked[0] < 40 if writes else 50 < asked[0] < 120


def test_of_two_drafters_the_better_is_used() -> None:
    params = SamplingParams(temperature=0, max_tokens=120)
    [text] = run_all(tiny_engine(pages=80), [(3, 1, 2)], params)

    def part(name: str, drafter: Drafter) -> Technique:
        return Technique(name, ("drafter",), lambda site: {"drafter": drafter}, lossless=True)

    for order in (1, -1):
        parts = [part("bad", Told(text, False)), part("good", Told(text, True))][::order]
        engine = tiny_engine(smartspec(tuple(parts)), pages=80)
        Timed(engine)
        assert run_all(engine, [(3, 1, 2)], params) == [text]
        assert engine.scheduler.stats.accepted > 60


# -- the record ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("smartspec:drafter=nothing", "technique 'nothing' is unknown"),
        (
            "smartspec:drafter=ngram,speed=3",
            r"'speed=3' is no option of smartspec\+ngram; write .*fixed, tokens, min_n",
        ),
        ("smartspec:speed=3", r"'speed=3' is no option of smartspec\+suffix; write .*drafter, fixed, tokens"),
        ("smartspec:drafter", "'drafter' is no option of smartspec; write key=value with drafter, fixed"),
        ("smartspec:drafter=quest", "quest is no drafter that can be wrapped"),
        ("smartspec:drafter=smartspec", "smartspec is no drafter that can be wrapped"),
        ("smartspec:drafter=ngram+ngram", "names a drafter twice"),
        ("smartspec:drafter=ngram,tokens=0", "ngram needs tokens >= 1"),
        ("smartspec:drafter=ngram,ngram.tokens=x", "ngram: tokens must be an int"),
        ("smartspec:drafter=ngram,tokens=1,tokens=2", "ngram: tokens is given twice"),
        ("smartspec:fixed=1000000", "fixed must be -1 .* to 32 tokens, got 1000000"),
        ("smartspec:fixed=-2", "fixed must be -1"),
    ],
)
def test_wrong_specs_say_what_is_known(spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        technique(spec)


def test_options_reach_the_wrapped_drafter() -> None:
    built = technique("smartspec:drafter=ngram,tokens=9,ngram.max_n=7")
    assert built.options == {"drafter": "ngram", "fixed": -1, "tokens": 9, "min_n": 2, "max_n": 7}


def test_what_the_wrapped_need_and_keep_is_the_wrapper_s() -> None:
    def part(name: str, page: int) -> Technique:
        return Technique(
            name, ("drafter",), lambda site: {"drafter": Drafter()}, {"size": page}, frozenset({name}),
            lossless=True, beside=lambda shape, size, value: Beside(page=page),
        )  # fmt: skip

    both = smartspec((part("one", 3), part("two", 5)))
    assert both.needs == {"one", "two"} and both.beside(None, 16, 2).page == 8  # type: ignore[arg-type]
    assert both.spec == "smartspec:drafter=one+two,fixed=-1,one.size=3,two.size=5"
    with pytest.raises(ConfigError, match="smartspec needs one, two"):
        compose(both)
