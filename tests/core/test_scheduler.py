"""The engine's loop over a made-up model whose next token is a function of the text so far."""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.core.engine import Engine
from dovetail.core.errors import CapacityError, RequestError
from dovetail.core.pages import PagePool, PageTable, pages_for
from dovetail.core.sampling import SamplingParams
from dovetail.core.scheduler import Limits
from dovetail.core.seams import WALL_CLOCK, Clock, Codec, Drafter, Guess, Policy, Seams, Selector
from dovetail.core.types import Request, SpanResult, StepPlan, StepResult
from tests.helpers.examples import examples


def next_token(tokens: list[int]) -> int:
    return (sum((i + 3) * t for i, t in enumerate(tokens)) * 31 + len(tokens)) % 17


@dataclass
class FakeExecutor:
    """Checks every promise that a plan makes, with the KV of a slot being the text up to it."""

    page_size: int
    budget: int
    num_stages: int = 1
    clock: Clock = WALL_CLOCK
    memory: dict[int, tuple[int, ...]] = field(default_factory=dict)
    plans: list[StepPlan] = field(default_factory=list)
    sealed: dict[int, tuple[int, ...]] = field(default_factory=dict)  # page -> the text to its end
    raises: set[int] = field(default_factory=set)  # calls that fail
    calls: int = 0

    def run(self, plan: StepPlan) -> StepResult:
        self.calls += 1
        if self.calls in self.raises:
            raise MemoryError
        self.plans.append(plan)
        for run in plan.sealed:
            for p in run.pages:
                self.sealed[p] = self.memory[(p + 1) * self.page_size - 1]
        for p in plan.reopened:
            self.sealed.pop(p, None)
        assert not {source for source, _ in plan.copies} & self.sealed.keys(), "a sealed page is copied"
        assert 0 < plan.num_tokens <= self.budget
        for source, target in plan.copies:
            for i in range(self.page_size):
                self.memory[target * self.page_size + i] = self.memory.get(source * self.page_size + i, ())
        return StepResult([self.result(s) for s in plan.spans])

    def result(self, span: object) -> SpanResult:
        r = span.request
        text = r.tokens + r.drafts
        slot = lambda i: int(r.table.pages[i // self.page_size]) * self.page_size + i % self.page_size  # noqa: E731
        for i in range(span.start):  # everything before the span must be there, in this request's pages
            assert self.memory[slot(i)] == tuple(text[: i + 1]), (r.id, i)
        for i in range(span.start, span.stop):
            assert r.table.pool.refs[int(r.table.pages[i // self.page_size])] == 1, "a shared page is written"
            self.memory[slot(i)] = tuple(text[: i + 1])
        for i in range(self.page_size, span.start, self.page_size):  # whole pages before the span are sealed
            assert self.sealed[slot(i - 1) // self.page_size] == tuple(text[:i])
        rows = range(span.stop - span.sample, span.stop)
        return SpanResult(tuple(next_token(text[: i + 1]) for i in rows))


class Guesser(Drafter):
    """Guesses right with some probability."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def propose(self, requests, limits, room):
        out = []
        for r in requests:
            text = list(r.tokens)
            for _ in range(self.random.randint(0, 6)):
                wrong = self.random.choice([16, -3, 10**6])
                text.append(next_token(text) if self.random.random() < 0.7 else wrong)
            out.append(Guess(text[len(r.tokens) :]))  # limits, total and vocabulary are for the core to keep
        return out


class Shuffled(Policy):
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def order(self, waiting):
        return self.random.sample(list(waiting), len(waiting))

    def shares(self, backlogs, left, others):
        return [self.random.randint(0, left) for _ in backlogs]


def build(pages: int, budget: int, seqs: int, seams: Seams | None = None, size: int = 4, **more) -> Engine:
    pool = PagePool(pages, size)
    limits = Limits(pages * size, budget, seqs, vocab_size=17, **more)
    return Engine(FakeExecutor(size, budget), pool, seams or Seams(), limits)


def make(engine: Engine, name: str, prompt: list[int], n: int, **params) -> Request:
    p = SamplingParams(max_tokens=n, temperature=0, **params)
    return Request(name, prompt, p, PageTable(engine.pool), max_total=len(prompt) + n, seed=0)


def expected(prompt: list[int], n: int) -> list[int]:
    text = list(prompt)
    for _ in range(n):
        text.append(next_token(text))
    return text[len(prompt) :]


jobs = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=20), st.integers(1, 20), st.integers(0, 12)),
    min_size=1,
    max_size=7,
)


@given(
    jobs,
    st.integers(10, 30),
    st.integers(1, 24),
    st.integers(1, 5),
    st.integers(0, 99),
    st.booleans(),
    st.sets(st.integers(1, 60), max_size=6),
)
@examples(150)
def test_every_request_gets_its_text_whatever_the_schedule(
    jobs, pages, budget, seqs, seed, caching, raises
) -> None:
    seams = Seams(drafter=Guesser(seed), policy=Shuffled(seed))
    engine = build(pages, budget, seqs, seams, prefix_caching=caching)
    engine.executor.raises = raises
    arrivals = sorted(enumerate(jobs), key=lambda j: j[1][2])
    requests: dict[int, Request] = {}
    step = 0
    while arrivals or engine.busy:
        while arrivals and (arrivals[0][1][2] <= step or not engine.busy):
            i, (prompt, n, _) = arrivals.pop(0)
            requests[i] = make(engine, str(i), prompt, n)
            engine.add(requests[i])
            if prompt[0] == 1 and len(prompt) > 2:  # some come with a sibling that shares their prompt
                fork = requests[i + 100] = make(engine, f"{i}/1", prompt, n)
                fork.fork_of = requests[i]
                engine.add(fork)
        with contextlib.suppress(MemoryError):
            engine.step()
        engine.check()
        step += 1
        assert step < 3000
    for i, r in requests.items():
        assert r.output == expected(jobs[i % 100][0], jobs[i % 100][1])
    for i, (prompt, n, _) in enumerate(jobs):
        assert requests[i].output == expected(prompt, n)
        assert requests[i].finish_reason == "length"
    cached = sum(map(len, engine.scheduler.reuse.held))
    assert engine.pool.num_free == pages - cached


@given(jobs, st.integers(10, 30), st.integers(2, 24), st.lists(st.integers(0, 40), max_size=5), st.integers(0, 9))
@examples(80)
def test_cancelling_frees_pages_at_once_and_spares_the_others(jobs, pages, budget, cuts, seed) -> None:
    engine = build(pages, budget, 4, Seams(drafter=Guesser(seed)))
    requests = [make(engine, str(i), p, n) for i, (p, n, _) in enumerate(jobs)]
    for r in requests:
        engine.add(r)
    for step in range(3000):
        if not engine.busy:
            break
        for cut in cuts:
            victim = requests[cut % len(requests)]
            if step == cut // 2 and victim.finish_reason is None:
                engine.abort(victim)
                assert len(victim.table) == 0
                engine.check()
        engine.step()
        engine.check()
    for r, (prompt, n, _) in zip(requests, jobs, strict=True):
        if r.finish_reason == "abort":
            assert r.output == expected(prompt, n)[: r.num_output]
        else:
            assert r.output == expected(prompt, n)


@pytest.mark.timeout(20)  # it would take a minute if one that leaves cost something for each that stays
def test_cancelling_many_that_wait_is_quick_in_any_order() -> None:
    engine = build(pages=8, budget=16, seqs=1)
    requests = [make(engine, str(i), [1], 2) for i in range(60_000)]
    for r in requests:
        engine.add(r)
    engine.step()
    for r in [*requests[:1:-2], *requests[2::2]]:
        engine.abort(r)
    assert list(engine.scheduler.waiting) == [requests[1]]
    while engine.busy:
        engine.step()
        engine.check()
    assert [r.finish_reason for r in requests] == ["length", "length", *["abort"] * 59_998]


def test_shares_are_asked_for_where_more_than_one_token_is_wanted() -> None:
    class Recording(Policy):
        asked: list[tuple[list[tuple[str, int]], int, int]] = []

        def shares(self, backlogs, left, others):
            self.asked.append(([(b.request.id, b.tokens) for b in backlogs], left, others))
            return [2] * len(backlogs)

    engine = build(pages=8, budget=16, seqs=2, seams=Seams(policy=Recording()))
    r, s = make(engine, "r", [1, 2, 0, 1, 2], 4), make(engine, "s", [2, 1], 2)
    engine.add(r)
    engine.step()
    engine.add(s)
    while engine.busy:
        engine.step()
    assert Recording.asked == [([("r", 5)], 16, 0), ([("r", 3), ("s", 2)], 16, 0)]
    assert r.output == expected(r.prompt, 4) and s.output == expected(s.prompt, 2)


def test_preemption_happens_and_loses_nothing() -> None:
    engine = build(pages=8, budget=16, seqs=4, prefix_caching=False)
    requests = [make(engine, str(i), [i, i, i], 20) for i in range(4)]
    for r in requests:
        engine.add(r)
    while engine.busy:
        engine.step()
        engine.check()
    assert engine.scheduler.stats.preemptions > 0
    assert [r.output for r in requests] == [expected([i, i, i], 20) for i in range(4)]


def test_rows_that_may_leave_pages_unread_begin_when_the_dense_part_is_committed() -> None:
    class Recent(Selector):
        window = 6

    engine = build(pages=8, budget=16, seqs=4, seams=Seams(selector=Recent()), prefix_caching=False)
    requests = [make(engine, str(i), [i, i, i], 20) for i in range(4)]
    for r in requests:
        engine.add(r)
    while engine.busy:
        engine.step()
    assert any(s.start == 3 and s.stop > 4 for p in engine.executor.plans for s in p.spans)  # after a preemption
    for plan in engine.executor.plans:
        for s in plan.spans:
            assert s.stop <= 3 or (s.start >= 3 and s.stop <= s.start + 6)


def test_dense_parts_that_a_codec_has_no_room_for_wait() -> None:
    class Small(Codec):
        capacity = 5

    engine = build(pages=40, budget=64, seqs=8, seams=Seams(codec=Small()))
    shared = [1] * 11  # two whole pages each, of the same pool pages
    requests = [make(engine, str(i), shared, 9) for i in range(5)]
    engine.add(requests[0])
    engine.step()
    for r in requests[1:]:
        engine.add(r)
    most = 0
    while engine.busy:
        engine.step()
        engine.check()
        most = max(most, len(engine.scheduler.running))
    assert most == 2
    assert [r.output for r in requests] == [expected(shared, 9)] * 5


def test_a_prefix_is_computed_once() -> None:
    engine = build(pages=32, budget=64, seqs=4)
    prompt = [1, 2, 0, 1] * 4
    for name in "ab":
        r = make(engine, name, [*prompt, 2], 4)
        engine.add(r)
        while engine.busy:
            engine.step()
    assert r.cached_tokens == 16
    assert sum(p.num_tokens for p in engine.executor.plans) == (17 + 3) + (1 + 3)


def test_forks_share_the_prompt_and_copy_the_page_they_write() -> None:
    engine = build(pages=32, budget=64, seqs=8, prefix_caching=False)
    first = make(engine, "a/0", [1, 2, 0, 1, 2, 2], 6)
    forks = [make(engine, f"a/{i}", first.prompt, 6) for i in (1, 2)]
    for fork in forks:
        fork.fork_of = first
    for r in (first, *forks):
        engine.add(r)
    while engine.busy:
        engine.step()
        engine.check()
    assert {tuple(r.output) for r in (first, *forks)} == {tuple(expected(first.prompt, 6))}
    assert sum(len(p.copies) for p in engine.executor.plans) == 2
    assert sum(p.num_tokens for p in engine.executor.plans) == 6 + 5 + 2 * 6


@pytest.mark.parametrize(
    ("prompt", "n", "error", "words"),
    [
        ([], 4, RequestError, "empty"),
        ([1] * 32, 1, RequestError, "32"),
        ([1] * 8, 25, RequestError, "max_tokens"),
    ],
)
def test_what_can_never_fit_is_refused_with_the_numbers(prompt, n, error, words) -> None:
    engine = build(pages=8, budget=16, seqs=4)
    with pytest.raises(error, match=words):
        engine.add(make(engine, "r", prompt, n))
    assert not engine.busy


def test_a_context_larger_than_the_pool_is_refused_with_the_numbers() -> None:
    engine = Engine(FakeExecutor(4, 8), PagePool(4, 4), Seams(), Limits(100, 8, 2))
    with pytest.raises(CapacityError, match=r"30 tokens need 8 pages.* has 4"):
        engine.add(make(engine, "r", [1] * 10, 20))
    assert pages_for(30, 4) == 8


def test_an_erroneous_span_ends_its_request_only() -> None:
    engine = build(pages=16, budget=16, seqs=4)
    good, bad = make(engine, "good", [1, 2], 6), make(engine, "bad", [2, 1], 6)
    run = engine.executor.result
    engine.executor.result = lambda s: SpanResult(error="NaN") if s.request is bad else run(s)
    for r in (good, bad):
        engine.add(r)
    errors = []
    while engine.busy:
        errors += [p.error for p in engine.step() if p.error]
        engine.check()
    assert errors == ["NaN"]
    assert bad.finish_reason == "error"
    assert good.output == expected([1, 2], 6)


def test_a_plan_can_be_logged_as_plain_data() -> None:
    engine = build(pages=16, budget=16, seqs=4)
    engine.add(make(engine, "r", [1, 2, 0], 2))
    engine.step()
    assert engine.last_plan.describe()["spans"] == [
        {"request": "r", "start": 0, "stop": 3, "stage": 0, "sample": 1}
    ]
