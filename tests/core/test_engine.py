"""Plan, run, commit: what a step brings to each request, with made-up results of the executor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.core.engine import Engine
from dovetail.core.seams import Drafter, Guess, Seams
from dovetail.core.types import Request, Span, SpanResult, StepPlan, TokenLogprobs
from tests.core.test_scheduler import FakeExecutor, Guesser, build, expected, make
from tests.helpers.examples import examples


class Fixed(Drafter):
    """Always proposes the same; notes what it is told."""

    def __init__(self, drafts: Sequence[int] | Callable[[Request], list[int]]) -> None:
        self.drafts = drafts
        self.told: list[tuple[list[int], int]] = []
        self.asked: list[tuple[list[int], int]] = []

    def propose(self, requests, limits, room):
        self.asked.append((list(limits), room.tokens))
        return [Guess(self.drafts(r) if callable(self.drafts) else self.drafts) for r in requests]

    def observe(self, outcomes, plan, seconds):
        self.told += [(list(o.drafts), o.accepted) for o in outcomes]


def right(r: Request, n: int = 3) -> list[int]:
    """The n tokens that will be chosen."""
    return expected(r.tokens, n)


def wrong_after(r: Request, n: int, count: int) -> list[int]:
    """`count` guesses, of which the first n are right."""
    tokens = expected(r.tokens, count)
    return [t if i < n else (t + 1) % 17 for i, t in enumerate(tokens)]


def answering(engine: Engine, change: Callable[[Span, SpanResult], SpanResult]) -> None:
    """Let `change` have the last word on what every span yields."""
    executor: FakeExecutor = engine.executor  # type: ignore[assignment]
    plain = executor.result
    executor.result = lambda span: change(span, plain(span))  # type: ignore[method-assign]


def finish(engine: Engine) -> None:
    while engine.busy:
        engine.step()
        engine.check()


@pytest.mark.parametrize("sound", range(5))
@pytest.mark.parametrize("good", range(4))
def test_an_error_counts_only_if_its_row_is_reached(good: int, sound: int) -> None:
    """Of three drafts the first `good` are right, and the rows from number `sound` on cannot be sampled."""
    drafter = Fixed(lambda r: wrong_after(r, good, 3))
    engine = build(pages=16, budget=16, seqs=1, seams=Seams(drafter=drafter))
    r = make(engine, "r", [1, 2, 0], 9)
    engine.add(r)
    engine.step()
    guesses = wrong_after(r, good, 3)

    def fail(span: Span, result: SpanResult) -> SpanResult:
        if span.start == 3 and sound < 4:
            return SpanResult(result.tokens[:sound], error="NaN")
        return result

    answering(engine, fail)
    (progress,) = engine.step()
    if sound <= good:
        assert (progress.error, r.finish_reason) == ("NaN", "error")
        assert list(progress.tokens) == right_of([1, 2, 0], sound)
        assert not engine.busy and engine.pool.num_free == 16  # nothing of it is kept
    else:
        assert (progress.error, r.finish_reason) == (None, None)
        assert list(progress.tokens) == right_of([1, 2, 0], good + 1)
        assert r.computed == len(r.tokens) - 1
        finish(engine)
        assert r.output == expected([1, 2, 0], 9)
    if sound:  # else nothing was sampled that says anything of the drafts
        assert drafter.told[1] == (guesses, min(good, sound))


def right_of(prompt: list[int], n: int) -> list[int]:
    """n tokens after the first one."""
    return expected(prompt, n + 1)[1:]


def test_a_request_that_ends_before_the_row_that_failed_has_no_error() -> None:
    engine = build(pages=16, budget=16, seqs=1, seams=Seams(drafter=Fixed(right)))
    r = make(engine, "r", [1, 2, 0], 9)
    r.stop_ids = frozenset(right_of([1, 2, 0], 2)[1:])
    engine.add(r)
    engine.step()
    answering(engine, lambda span, result: SpanResult(result.tokens[:3], error="NaN"))
    (progress,) = engine.step()
    assert (progress.error, r.finish_reason, r.stop_reason) == (None, "stop", r.tokens[-1])
    assert list(progress.tokens) == right_of([1, 2, 0], 2)
    assert not engine.busy


def test_what_an_erroneous_request_has_read_is_not_offered_again() -> None:
    engine = build(pages=16, budget=16, seqs=2)
    prompt = [1, 2, 0, 1] * 2
    first, again, last = (make(engine, name, [*prompt, 2], 4) for name in "abc")
    engine.add(first)
    finish(engine)
    answering(engine, lambda s, result: SpanResult(error="NaN") if s.request is again else result)
    engine.add(again)
    assert [p.error for p in engine.step()] == ["NaN"]
    assert (again.cached_tokens, again.finish_reason, again.num_output) == (8, "error", 0)
    engine.check()
    engine.add(last)
    finish(engine)
    assert last.cached_tokens == 0 and last.output == first.output


def test_drafts_are_accepted_as_far_as_they_are_right() -> None:
    drafter = Fixed(lambda r: wrong_after(r, 2, 4))
    engine = build(pages=16, budget=16, seqs=1, seams=Seams(drafter=drafter))
    r = make(engine, "r", [1, 2, 0], 9)
    engine.add(r)
    steps = []
    while engine.busy:
        steps += [len(p.tokens) for p in engine.step()]
    assert steps == [1, 3, 3, 2]
    assert r.output == expected([1, 2, 0], 9) and r.drafts == []
    assert [accepted for _, accepted in drafter.told] == [0, 2, 2, 1]
    assert drafter.told[0] == ([], 0)
    stats = engine.scheduler.stats
    assert (stats.drafted, stats.accepted) == (4 + 4 + 1, 5)
    assert engine.steps == 4


def test_a_drafter_is_told_how_much_may_be_of_use() -> None:
    """No more than are left of the request before its last token, of 32, and of the step's budget."""
    drafter = Fixed(())
    engine = build(pages=30, budget=40, seqs=2, seams=Seams(drafter=drafter))
    long, short = make(engine, "long", [1, 2], 60), make(engine, "short", [2, 1], 3)
    for r in (long, short):
        engine.add(r)
    finish(engine)
    assert drafter.asked[:3] == [([32, 1], 38), ([32, 0], 38), ([32], 39)]
    assert [limits for limits, _ in drafter.asked[-31:]] == [[n] for n in range(30, -1, -1)]


def test_a_stop_token_ends_a_request_once_it_has_its_least() -> None:
    want = expected([1, 2, 0], 9)
    for at in range(4):
        for least in (0, want.index(want[at]), want.index(want[at]) + 1, want.index(want[at]) + 2):
            engine = build(pages=16, budget=16, seqs=1)
            r = make(engine, "r", [1, 2, 0], 9, min_tokens=least)
            r.stop_ids = frozenset({want[at]})
            engine.add(r)
            finish(engine)
            ends = [i for i, t in enumerate(want) if t == want[at] and i + 1 > least]
            assert r.output == (want[: ends[0] + 1] if ends else want)
            assert (r.finish_reason, r.stop_reason) == (("stop", want[at]) if ends else ("length", None))


def test_what_is_known_of_tokens_is_passed_on_and_cut_with_them() -> None:
    engine = build(pages=16, budget=16, seqs=1, seams=Seams(drafter=Fixed(right)))
    r = make(engine, "r", [1, 2, 0], 3, logprobs=0)
    engine.add(r)

    def known(span: Span, result: SpanResult) -> SpanResult:
        about = [TokenLogprobs(t, -1.0, 1) for t in result.tokens]
        return SpanResult(result.tokens, about)

    answering(engine, known)
    while engine.busy:
        for p in engine.step():
            assert [about.token for about in p.logprobs] == list(p.tokens) != []
    assert r.output == expected([1, 2, 0], 3)


def test_scores_of_a_prompt_arrive_with_its_chunks() -> None:
    engine = build(pages=16, budget=2, seqs=1)
    prompt = [1, 2, 0, 1, 2]
    r = make(engine, "r", prompt, 2, prompt_logprobs=0)
    engine.add(r)

    def scored(span: Span, result: SpanResult) -> SpanResult:
        about = [TokenLogprobs(t, -1.0, 1) for t in prompt[span.start + 1 : span.stop + 1]]
        return SpanResult(result.tokens, prompt_logprobs=about)

    answering(engine, scored)
    found: list[int] = []
    while engine.busy:
        progress = engine.step()
        found += [about.token for p in progress for about in p.prompt_logprobs]
        assert len(found) == r.scored
    assert found == prompt[1:]


def test_a_chunk_that_yields_nothing_is_no_progress() -> None:
    engine = build(pages=16, budget=2, seqs=1)
    r = make(engine, "r", [1, 2, 0, 1, 2], 1)
    engine.add(r)
    assert [len(engine.step()) for _ in range(3)] == [0, 0, 1]
    assert engine.step() == [] and engine.steps == 3
    assert engine.last_plan == StepPlan(())


def test_aborting_says_why_once_and_keeps_what_was_computed() -> None:
    engine = build(pages=16, budget=16, seqs=1)
    r = make(engine, "r", [1, 2, 0, 1, 2, 0, 1, 2, 0], 9)
    assert not engine.busy and engine.last_plan.num_tokens == engine.steps == 0
    engine.add(r)
    assert engine.busy
    engine.step()
    engine.abort(r, "disconnect")
    engine.abort(r)
    assert r.finish_reason == "disconnect" and not engine.busy
    assert engine.pool.num_free == 16 - 2  # two whole pages of the prompt can be used again
    engine.check()
    other = make(engine, "other", r.prompt, 1)
    engine.add(other)
    engine.abort(other)
    assert other.finish_reason == "abort" and other.cached_tokens == -1


def test_what_was_generated_can_be_used_again_too() -> None:
    engine = build(pages=16, budget=16, seqs=1)
    first = make(engine, "first", [1, 2, 0, 1], 10)
    engine.add(first)
    finish(engine)
    again = make(engine, "again", [*first.tokens, 2], 2)
    engine.add(again)
    finish(engine)
    assert again.cached_tokens == 12  # of 13 that were computed, in whole pages
    assert again.output == expected(again.prompt, 2)


def test_time_is_the_executors() -> None:
    engine = build(pages=16, budget=16, seqs=1)
    assert engine.clock is engine.executor.clock


def test_an_executor_that_answers_for_other_spans_is_an_error() -> None:
    engine = build(pages=16, budget=16, seqs=1)
    engine.add(make(engine, "r", [1, 2], 3))
    run = engine.executor.run

    def short(plan: StepPlan):
        result = run(plan)
        result.spans = []
        return result

    engine.executor.run = short  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="shorter"):
        engine.step()


def test_check_sees_a_page_that_nobody_owns() -> None:
    engine = build(pages=16, budget=16, seqs=1)
    engine.pool.allocate(1)
    with pytest.raises(RuntimeError, match="differ"):
        engine.check()


def test_a_program_of_several_stages_yields_tokens_after_the_last_one() -> None:
    class Staged(FakeExecutor):
        def run(self, plan: StepPlan):
            self.seen = [(s.request.id, s.start, s.stop, s.stage, s.sample) for s in plan.spans]
            return super().run(plan)

        def result(self, span: Span) -> SpanResult:
            return super().result(span) if span.stage == 2 else SpanResult()

    engine = build(pages=16, budget=8, seqs=2)
    executor = Staged(4, 8, num_stages=3)
    engine.executor, engine.scheduler.num_stages = executor, 3
    a, b = make(engine, "a", [1, 2, 0], 2), make(engine, "b", [2, 1], 2)
    engine.add(a)
    engine.step()
    assert executor.seen == [("a", 0, 3, 0, 0)] and (a.stage, a.computed) == (1, 0)
    engine.add(b)
    engine.step()
    assert executor.seen == [("a", 0, 3, 1, 0), ("b", 0, 2, 0, 0)] and a.num_output == 0
    assert [p.request for p in engine.step()] == [a]
    assert executor.seen == [("a", 0, 3, 2, 1), ("b", 0, 2, 1, 0)] and (a.stage, a.computed) == (0, 3)
    finish(engine)
    assert [a.output, b.output] == [expected([1, 2, 0], 2), expected([2, 1], 2)]


class Watched:
    """A constraint that forbids a token, ends after another, and notes what it is told. forces: what must come."""

    def __init__(
        self, forbids: int = -1, last: int = -1, fails: str | None = None, forces: list[int] | None = None
    ) -> None:
        self.forbids, self.last, self.error, self.forces = forbids, last, fails, forces
        self.committed: list[int] = []

    def drafts(self, guesses: list[int]) -> list[int]:
        return self.forces or guesses[: [*guesses, self.forbids].index(self.forbids)]

    def masks(self, drafts: Sequence[int]) -> list[None]:
        raise AssertionError("the sampler's to ask")

    def commit(self, token: int) -> bool:
        self.committed.append(token)
        return token == self.last


def test_drafts_are_cut_where_the_form_forbids_them() -> None:
    drafter = Fixed(right)
    engine = build(pages=16, budget=16, seqs=1, seams=Seams(drafter=drafter))
    r = make(engine, "r", [1, 2, 0], 9)
    r.constraint = Watched(forbids=expected([1, 2, 0], 3)[2])
    engine.add(r)
    engine.step()
    engine.step()
    assert drafter.told[1] == (right_of([1, 2, 0], 1), 1)


def test_what_must_come_is_drafted_without_a_drafter() -> None:
    engine = build(pages=16, budget=16, seqs=1)
    r = make(engine, "r", [1, 2, 0], 5)
    r.constraint = Watched(forces=right_of([1, 2, 0], 3))
    engine.add(r)
    steps = [[list(p.tokens) for p in engine.step()] for _ in range(2)]
    assert steps[1] == [right_of([1, 2, 0], 4)] and r.finish_reason == "length"


@given(st.integers(0, 99), st.integers(10, 20), st.sets(st.integers(1, 40), max_size=5))
@examples(60)
def test_a_constraint_is_told_each_token_once_in_order(seed: int, pages: int, raises: set[int]) -> None:
    """Whatever happens in between: drafts, preemption, steps that fail."""
    engine = build(pages, 12, 4, Seams(drafter=Guesser(seed)))
    engine.executor.raises = raises  # type: ignore[attr-defined]
    requests = [make(engine, f"r{i}", [1, i, 0], 15) for i in range(4)]
    for r in requests:
        r.constraint = Watched()
        engine.add(r)
    while engine.busy:
        with contextlib.suppress(MemoryError):
            engine.step()
    for r in requests:
        assert r.constraint.committed == r.output == expected(r.prompt, 15)


@pytest.mark.parametrize("drafts", [0, 4])
def test_an_answer_ends_when_its_form_is_complete(drafts: int) -> None:
    engine = build(pages=16, budget=16, seqs=1, seams=Seams(drafter=Fixed(lambda r: right(r, drafts))))
    r = make(engine, "r", [1, 2, 0], 9)
    r.constraint = Watched(last=expected([1, 2, 0], 4)[3])
    engine.add(r)
    finish(engine)
    assert (r.finish_reason, r.stop_reason) == ("stop", None)
    assert r.output == r.constraint.committed == expected([1, 2, 0], 4)


def test_an_error_of_a_constraint_is_shown() -> None:
    engine = build(pages=16, budget=16, seqs=1)
    r = make(engine, "r", [1, 2, 0], 9)
    r.constraint = Watched(fails="the grammar is too complex")
    answering(engine, lambda span, result: SpanResult(error="no token"))
    engine.add(r)
    assert [p.error for p in engine.step()] == ["the grammar is too complex"]
    assert r.finish_reason == "error" and not engine.busy
