"""What each plan holds, step by step, in cases small enough to say it in full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from dovetail.core.engine import Engine
from dovetail.core.errors import RequestError
from dovetail.core.pages import PagePool
from dovetail.core.prefix import RadixPrefix
from dovetail.core.scheduler import Limits, Scheduler, SchedulerStats
from dovetail.core.seams import NO_GUESS, Codec, Drafter, Guess, Policy, Seams, Selector
from dovetail.core.types import Request, Sealed, Stored
from tests.core.test_scheduler import FakeExecutor, build, expected, make


def planned(engine: Engine) -> list[tuple[str, int, int, int]]:
    """The spans of the next step: request, start, stop, rows that are sampled."""
    engine.step()
    engine.check()
    return [(s.request.id, s.start, s.stop, s.sample) for s in engine.last_plan.spans]


def finish(engine: Engine) -> None:
    while engine.busy:
        engine.step()
        engine.check()


def add(engine: Engine, *requests: Request) -> None:
    for r in requests:
        engine.add(r)


class Guesses(Drafter):
    """Proposes `drafts` tokens each, right ones first."""

    def __init__(self, right: int, wrong: Sequence[int] = ()) -> None:
        self.right, self.wrong = right, list(wrong)
        self.forgotten: list[str] = []

    def propose(self, requests, limits, room):
        right = [expected(r.tokens, self.right) if self.right else [] for r in requests]
        return [Guess(tokens + self.wrong) for tokens in right]

    def forget(self, request):
        self.forgotten.append(request.id)


class Recorded(RadixPrefix):
    """Notes what it is asked and given: (request, tokens)."""

    def __init__(self, pool: PagePool) -> None:
        super().__init__(pool)
        self.asked: list[tuple[str, int]] = []
        self.given: list[tuple[str, int]] = []

    def match(self, request: Request, limit: int) -> Stored:
        self.asked.append((request.id, limit))
        return super().match(request, limit)

    def store(self, request: Request, limit: int) -> None:
        self.given.append((request.id, limit))
        super().store(request, limit)


def recorded(pages: int, budget: int, seqs: int, caching: bool = True, **seams: Any) -> tuple[Engine, Recorded]:
    pool = PagePool(pages, 4)
    reuse = Recorded(pool)
    limits = Limits(pages * 4, budget, seqs, prefix_caching=caching, vocab_size=17)
    return Engine(FakeExecutor(4, budget), pool, Seams(reuse=reuse, **seams), limits), reuse


# -- entering


def test_a_request_may_fill_the_context_to_its_last_token() -> None:
    engine = build(pages=8, budget=16, seqs=1)
    for prompt, n, field in (([1] * 32, 1, "prompt"), ([1] * 33, 1, "prompt"), ([1] * 8, 25, "max_tokens")):
        with pytest.raises(RequestError) as info:
            engine.add(make(engine, "r", prompt, n))
        assert info.value.param == field
        assert f"has {len(prompt)} tokens and asks for {n} more, but the context holds 32" in str(info.value)
    with pytest.raises(RequestError) as info:
        engine.add(make(engine, "r", [], 4))
    assert info.value.param == "prompt"
    full = make(engine, "r", [1] * 32, 1)
    full.max_total = 32  # "to the end of the context"
    with pytest.raises(RequestError, match="asks for 1 more"):
        engine.add(full)
    r = make(engine, "r", [1] * 8, 24)
    engine.add(r)
    finish(engine)
    assert r.num_output == 24


def test_a_program_has_one_stage_unless_it_is_said() -> None:
    pool = PagePool(4, 4)
    assert Scheduler(pool, Seams(), Limits(16, 4, 1)).num_stages == 1
    assert not any(v if isinstance(v, int) else any(v) for v in vars(SchedulerStats()).values())


def test_whoever_leaves_is_released_and_forgotten_once() -> None:
    drafter = Guesses(0)
    engine = build(pages=8, budget=16, seqs=1, seams=Seams(drafter=drafter))
    a, b, c = (make(engine, name, [1, 2], 2) for name in "abc")
    add(engine, a, b, c)
    engine.abort(c)  # it never ran
    assert planned(engine) == [("a", 0, 2, 1)] and engine.last_plan.released == ("c",)
    assert planned(engine) == [("a", 2, 3, 1)] and engine.last_plan.released == ()
    assert planned(engine) == [("b", 0, 2, 1)] and engine.last_plan.released == ("a",)
    assert drafter.forgotten == ["c", "a"]


# -- sharing a step


def test_requests_are_admitted_in_order_and_nobody_overtakes() -> None:
    engine = build(pages=8, budget=32, seqs=3, prefix_caching=False)
    first, large, small = (
        make(engine, "first", [1] * 12, 8),
        make(engine, "large", [2] * 20, 4),
        make(engine, "small", [1], 2),
    )
    add(engine, first, large, small)
    assert planned(engine) == [("first", 0, 12, 1)]  # 3 pages; the large one needs 5 and one of room for the first
    while not first.finish_reason:
        assert [name for name, *_ in planned(engine)] == ["first"]
    assert [name for name, *_ in planned(engine)] == ["large", "small"]


def test_no_more_run_together_than_may() -> None:
    engine = build(pages=32, budget=32, seqs=2)
    add(engine, *(make(engine, name, [1, 2], 3) for name in "abc"))
    assert [name for name, *_ in planned(engine)] == ["a", "b"]
    assert [name for name, *_ in planned(engine)] == ["a", "b"]


def test_a_policy_is_asked_for_an_order_where_somebody_can_be_admitted() -> None:
    asked: list[list[str]] = []

    class Order(Policy):
        def order(self, waiting):
            asked.append([r.id for r in waiting])
            return waiting

    places = build(pages=32, budget=16, seqs=2, seams=Seams(policy=Order()), prefix_caching=False)
    add(places, *(make(places, name, [1] * 6, 3) for name in "abc"))
    finish(places)
    assert asked == [["a", "b", "c"], ["c"]]
    asked.clear()
    budget = build(pages=32, budget=2, seqs=4, seams=Seams(policy=Order()), prefix_caching=False)
    add(budget, make(budget, "a", [1] * 6, 3), make(budget, "b", [2], 2))
    assert [[name for name, *_ in planned(budget)] for _ in range(2)] == [["a", "b"], ["a", "b"]]
    assert asked == [["a", "b"]]


def test_what_was_preempted_is_computed_again_in_one_go() -> None:
    engine = build(pages=16, budget=32, seqs=1, prefix_caching=False)
    r = make(engine, "r", [1] * 5, 6)
    engine.add(r)
    for _ in range(3):
        engine.step()
    engine.executor.raises = {4}  # type: ignore[attr-defined]
    with pytest.raises(MemoryError):
        engine.step()
    assert planned(engine) == [("r", 0, 8, 1)]  # also what lies behind the prompt


def test_a_budget_is_spent_on_those_that_run_first() -> None:
    engine = build(pages=32, budget=6, seqs=4, prefix_caching=False)
    add(engine, *(make(engine, name, [1] * 4, 3) for name in "abc"))
    assert planned(engine) == [("a", 0, 4, 1), ("b", 0, 2, 0)]
    assert planned(engine) == [("a", 4, 5, 1), ("b", 2, 4, 1), ("c", 0, 3, 0)]
    assert planned(engine) == [("a", 5, 6, 1), ("b", 4, 5, 1), ("c", 3, 4, 1)]


def test_a_policy_says_how_much_and_at_least_one_token_goes() -> None:
    class Share(Policy):
        amount = 0

        def shares(self, backlogs, left, others):
            return [self.amount]

    policy = Share()
    engine = build(pages=32, budget=8, seqs=1, seams=Seams(policy=policy))
    r = make(engine, "r", [1] * 20, 2)
    engine.add(r)
    for amount, span in ((0, (0, 1)), (-3, (1, 2)), (3, (2, 5)), (99, (5, 13)), (7, (13, 20))):
        policy.amount = amount
        assert planned(engine)[0][1:3] == span


def test_dense_parts_and_windows_cut_chunks() -> None:
    class Recent(Selector):
        window = 5

    engine = build(pages=32, budget=64, seqs=1, seams=Seams(selector=Recent()))
    r = make(engine, "r", [1] * 20, 2)
    r.dense_until = 8
    engine.add(r)
    assert [planned(engine)[0][1:3] for _ in range(4)] == [(0, 8), (8, 13), (13, 18), (18, 20)]


# -- drafts


def test_drafts_are_cut_to_what_a_step_has_room_for() -> None:
    engine = build(pages=32, budget=5, seqs=3, seams=Seams(drafter=Guesses(4)), prefix_caching=False)
    a, b = make(engine, "a", [1, 2], 20), make(engine, "b", [2, 1], 20)
    add(engine, a, b)
    assert planned(engine) == [("a", 0, 2, 1), ("b", 0, 2, 1)]
    assert planned(engine) == [("a", 2, 6, 4), ("b", 2, 3, 1)]  # 3 guesses are what 2 rows of 5 leave
    assert engine.scheduler.stats.drafted == engine.scheduler.stats.accepted == 3
    assert (a.output, b.output) == (expected([1, 2], 5), expected([2, 1], 2))


def test_guesses_leave_every_running_request_its_row() -> None:
    few = build(pages=32, budget=2, seqs=2, seams=Seams(drafter=Guesses(4)), prefix_caching=False)
    add(few, make(few, "a", [1], 9), make(few, "b", [2], 9))
    few.step()
    assert planned(few) == [("a", 1, 2, 1), ("b", 1, 2, 1)]
    engine = build(pages=32, budget=6, seqs=3, seams=Seams(drafter=Guesses(4)), prefix_caching=False)
    add(engine, make(engine, "a", [1], 4), make(engine, "b", [2], 9), make(engine, "c", [0], 9))
    engine.step()
    assert planned(engine) == [("a", 1, 4, 3), ("b", 1, 3, 2), ("c", 1, 2, 1)]


def test_guesses_fit_in_the_window_of_what_is_always_read() -> None:
    class Recent(Selector):
        window = 6

    limits: list[list[int]] = []

    class Asked(Drafter):
        def propose(self, requests, asked, room):
            limits.append(list(asked))
            return [NO_GUESS] * len(requests)

    engine = build(pages=32, budget=16, seqs=1, seams=Seams(drafter=Asked(), selector=Recent()))
    engine.add(make(engine, "r", [1], 8))
    finish(engine)
    assert limits == [[5], [5], [4], [3], [2], [1], [0]]


def test_drafts_that_a_step_has_no_room_for_are_dropped() -> None:
    """Spans between two stages are fixed, so they may leave less room than guesses were made for."""
    engine = build(pages=32, budget=5, seqs=2, seams=Seams(drafter=Guesses(4)), prefix_caching=False)
    engine.scheduler.num_stages = engine.executor.num_stages = 2
    a, b = make(engine, "a", [1], 9), make(engine, "b", [2], 9)
    engine.add(a)
    assert planned(engine) == [("a", 0, 1, 0)]
    engine.add(b)
    assert planned(engine) == [("a", 0, 1, 1), ("b", 0, 1, 0)]
    assert planned(engine) == [("b", 0, 1, 1), ("a", 1, 5, 0)]
    assert planned(engine) == [("a", 1, 5, 4), ("b", 1, 2, 0)] and b.drafts == []
    finish(engine)
    assert (a.output, b.output) == (expected([1], 9), expected([2], 9))


@pytest.mark.parametrize(("token", "kept"), [(0, True), (16, True), (17, False), (-1, False)])
def test_a_draft_that_is_no_token_ends_the_drafts(token: int, kept: bool) -> None:
    seen: list[list[int]] = []
    drafter = Guesses(1, [token, 3])
    drafter.observe = lambda outcomes, plan, seconds: seen.append(list(outcomes[0].drafts))  # type: ignore[method-assign]
    engine = build(pages=32, budget=16, seqs=1, seams=Seams(drafter=drafter))
    engine.add(make(engine, "r", [1, 2], 9))
    engine.step()
    engine.step()
    assert seen[1][1:] == ([token, 3] if kept else [])


def test_nobody_is_asked_for_drafts_before_a_prompt_is_computed() -> None:
    asked: list[list[str]] = []

    class Asked(Drafter):
        def propose(self, requests, limits, room):
            asked.append([r.id for r in requests])
            return [NO_GUESS] * len(requests)

    engine = build(pages=32, budget=4, seqs=2, seams=Seams(drafter=Asked()))
    add(engine, make(engine, "a", [1] * 3, 3), make(engine, "b", [2] * 6, 3))
    finish(engine)
    assert asked == [["a"], ["a"], ["b"], ["b"]]


# -- what is stored


def test_whole_pages_of_a_prompt_are_offered_as_soon_as_they_are_computed() -> None:
    engine, reuse = recorded(16, 6, 2)
    a, b = make(engine, "a", [1] * 8, 3), make(engine, "b", [1] * 9, 3)
    engine.add(a)
    engine.step()
    assert reuse.given == [("a", 6)]
    engine.step()
    assert reuse.given == [("a", 6), ("a", 8)]
    engine.add(b)
    assert planned(engine) == [("a", 8, 9, 1), ("b", 8, 9, 1)]
    assert reuse.asked == [("a", 7), ("b", 8)]
    stats = engine.scheduler.stats
    assert (b.cached_tokens, a.cached_tokens) == (8, 0)
    assert (stats.cached_tokens, stats.queried_tokens) == (8, 8 + 9)
    finish(engine)
    assert reuse.given[2:] == [("a", 10), ("b", 11)]  # generated pages only at the end


def test_rows_that_are_scored_are_computed_and_those_before_them_need_not_be() -> None:
    engine, reuse = recorded(16, 32, 1)
    first = make(engine, "first", [1] * 12, 1)
    engine.add(first)
    finish(engine)
    whole, part = (
        make(engine, "whole", [1] * 12, 1, prompt_logprobs=0),
        make(engine, "part", [1] * 12, 1, prompt_logprobs=0),
    )
    part.scored = 9
    add(engine, whole, part)
    assert planned(engine) == [("whole", 0, 12, 1)]
    assert planned(engine) == [("part", 8, 12, 1)]
    assert reuse.asked == [("first", 11), ("part", 9), ("part", 9)]  # once while it waits


def test_with_a_lossy_selector_only_dense_parts_are_stored_and_looked_for() -> None:
    class Recent(Selector):
        window = 8

    engine, reuse = recorded(16, 32, 1, selector=Recent())
    r = make(engine, "r", [1] * 12, 6)
    r.dense_until = 8
    engine.add(r)
    finish(engine)
    assert reuse.asked == [("r", 8)]
    assert {limit for _, limit in reuse.given} == {8}


def test_without_prefix_caching_nothing_is_asked_or_offered() -> None:
    engine, reuse = recorded(16, 32, 1, caching=False)
    add(engine, *(make(engine, name, [1] * 9, 3) for name in "ab"))
    finish(engine)
    engine.add(c := make(engine, "c", [1] * 9, 3))
    engine.step()
    engine.abort(c)
    assert reuse.asked == reuse.given == []
    one, asked = recorded(16, 32, 1)
    one.add(make(one, "r", [1], 2))  # a prompt of which nothing could be used
    one.step()
    assert asked.asked == []


def test_pages_are_sealed_once_when_they_are_full() -> None:
    engine = build(pages=16, budget=6, seqs=1)
    r = make(engine, "r", [1] * 9, 4)
    engine.add(r)
    sealed = []
    while engine.busy:
        engine.step()
        ids = list(r.table.ids)
        sealed.append([(s.request, s.first, list(s.pages)) for s in engine.last_plan.sealed])
        assert all(s.pages for s in engine.last_plan.sealed)
        assert engine.last_plan.sealed == () or ids == [] or engine.last_plan.sealed[0].pages[0] in ids
    assert [[(name, first, len(p)) for name, first, p in s] for s in sealed] == [
        [], [("r", 0, 1)], [("r", 1, 1)], [], [],
    ]  # fmt: skip
    assert engine.scheduler.schedule().sealed == ()  # the last one waits for a plan that runs
    engine.add(make(engine, "next", [2], 1))
    engine.step()
    assert engine.last_plan.sealed == (Sealed("r", 2, engine.last_plan.sealed[0].pages),)


# -- forks


def fork_of(engine: Engine, parent: Request, name: str, n: int) -> Request:
    fork = make(engine, name, parent.prompt, n)
    fork.fork_of = parent
    return fork


def test_a_fork_starts_when_all_of_the_prompt_but_its_last_token_is_there() -> None:
    engine = build(pages=16, budget=4, seqs=2)
    parent = make(engine, "parent", [1, 2, 0, 1, 2], 3)
    fork = fork_of(engine, parent, "fork", 3)
    add(engine, parent, fork)
    assert planned(engine) == [("parent", 0, 4, 0)]
    assert planned(engine) == [("parent", 4, 5, 1), ("fork", 4, 5, 1)]
    assert fork.fork_of is None and fork.cached_tokens == 4
    assert engine.scheduler.stats.queried_tokens == 5  # of the parent only
    finish(engine)
    assert parent.output == fork.output == expected(parent.prompt, 3)


def test_a_fork_that_waits_holds_nobody_up() -> None:
    engine = build(pages=16, budget=8, seqs=3)
    parent = make(engine, "parent", [1, 2, 0, 1, 2, 0, 1], 3)
    add(engine, parent, fork_of(engine, parent, "fork", 3), make(engine, "other", [2], 3))
    assert planned(engine) == [("parent", 0, 7, 1), ("other", 0, 1, 1)]
    assert [name for name, *_ in planned(engine)] == ["parent", "other", "fork"]


@pytest.mark.parametrize(("length", "start", "copies"), [(8, 4, 0), (7, 6, 1), (6, 5, 1), (5, 4, 0), (9, 8, 0)])
def test_a_fork_copies_a_page_that_is_not_full_and_computes_a_sealed_one_again(
    length: int, start: int, copies: int
) -> None:
    engine = build(pages=16, budget=32, seqs=2, prefix_caching=False)
    parent = make(engine, "parent", [1] * length, 6)
    fork = fork_of(engine, parent, "fork", 2)
    add(engine, parent)
    engine.step()
    engine.add(fork)
    found = planned(engine)
    assert found == [("parent", length, length + 1, 1), ("fork", start, length, 1)]
    assert len(engine.last_plan.copies) == copies
    shared = start // 4
    assert (
        fork.table.ids[:shared] == parent.table.ids[:shared]
        and fork.table.ids[shared:] != parent.table.ids[shared:]
    )


def test_a_fork_whose_parent_has_gone_runs_on_its_own() -> None:
    for end in ("aborted", "preempted", "finished"):
        engine = build(pages=16, budget=32, seqs=2, prefix_caching=False)
        parent = make(engine, "parent", [1] * 6, 1 if end == "finished" else 9)
        fork = fork_of(engine, parent, "fork", 2)
        add(engine, parent)
        engine.step()
        if end == "aborted":
            engine.abort(parent)
        elif end == "preempted":
            engine.executor.raises = {2}  # type: ignore[attr-defined]
            with pytest.raises(MemoryError):
                engine.step()
            engine.scheduler.waiting.pop(parent)
            parent.computed = 5
        engine.add(fork)
        assert ("fork", 0, 6, 1) in planned(engine), end
        assert fork.fork_of is None


# -- when pages or steps fail


def test_the_youngest_gives_its_pages_back_and_waits_at_the_head() -> None:
    engine, reuse = recorded(6, 32, 4)
    a, b, c = make(engine, "a", [1] * 4, 12), make(engine, "b", [2] * 4, 12), make(engine, "c", [3], 3)
    add(engine, a, b)
    while not b.preemptions:
        engine.step()
        engine.check()
        if b.num_output == 2:
            engine.add(c)
    assert (a.preemptions, b.preemptions, engine.scheduler.stats.preemptions) == (0, 1, 1)
    assert next(iter(engine.scheduler.waiting)) is b and engine.scheduler.running == [a]
    assert (b.computed, b.drafts, b.stage, len(b.table), b.cached_tokens) == (0, [], 0, 0, 0)
    assert reuse.given[-1][0] == "b" and reuse.given[-1][1] > 8  # what it had computed is offered
    written = b.num_output
    finish(engine)
    assert b.output == expected([2] * 4, 12) and b.num_output > written
    assert b.cached_tokens == 0  # of its first admission


def test_a_step_that_fails_is_taken_back_with_all_that_it_said() -> None:
    engine = build(pages=16, budget=16, seqs=3)
    first, a, b = make(engine, "first", [1] * 4, 1), make(engine, "a", [1] * 8, 3), make(engine, "b", [2] * 5, 3)
    engine.add(first)
    engine.step()
    add(engine, a, b)
    engine.executor.raises = {2}  # type: ignore[attr-defined]
    with pytest.raises(MemoryError):
        engine.step()
    failed = engine.last_plan
    assert failed.released == ("first",) and failed.sealed and failed.reopened
    assert list(engine.scheduler.waiting) == [a, b] and engine.scheduler.running == []
    assert (a.computed, a.flying, len(a.table), engine.steps) == (0, 0, 0, 1)
    engine.check()
    engine.step()
    plan = engine.last_plan
    assert plan.released == ("first", "b", "a") and plan.sealed == failed.sealed
    assert plan.reopened[: len(failed.reopened)] == failed.reopened and len(plan.reopened) > len(failed.reopened)
    finish(engine)
    assert [r.output for r in (a, b)] == [expected(a.prompt, 3), expected(b.prompt, 3)]


def test_who_left_while_a_step_failed_does_not_come_back() -> None:
    engine = build(pages=16, budget=16, seqs=2)
    a, b = make(engine, "a", [1] * 4, 3), make(engine, "b", [2] * 4, 3)
    add(engine, a, b)
    run = engine.executor.run

    def leaving(plan: Any) -> Any:
        engine.executor.run = run  # type: ignore[method-assign]
        engine.abort(a)
        raise MemoryError

    engine.executor.run = leaving  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        engine.step()
    assert list(engine.scheduler.waiting) == [b]
    finish(engine)
    assert (a.finish_reason, a.num_output, b.output) == ("abort", 0, expected(b.prompt, 3))


def test_an_admission_leaves_a_page_for_each_that_runs() -> None:
    engine = build(pages=3, budget=32, seqs=3, prefix_caching=False)
    a, b = make(engine, "a", [1] * 4, 3), make(engine, "b", [2] * 8, 3)
    add(engine, a, b)
    assert planned(engine) == [("a", 0, 4, 1)]  # b would take the last two pages
    assert planned(engine) == [("a", 4, 5, 1)]
    finish(engine)
    assert engine.scheduler.stats.preemptions == 0


def test_a_request_that_could_not_start_has_taken_nothing() -> None:
    engine = build(pages=6, budget=32, seqs=2)
    first, large = make(engine, "first", [1] * 8, 1), make(engine, "large", [2] * 12, 4)
    engine.add(first)
    finish(engine)
    engine.add(large)
    engine.step()
    waiting = make(engine, "waiting", [1] * 12, 2)
    engine.add(waiting)
    assert [name for name, *_ in planned(engine)] == ["large"]
    assert (waiting.computed, len(waiting.table), waiting.cached_tokens) == (0, 0, -1)
    finish(engine)
    assert waiting.output == expected(waiting.prompt, 2)


def test_a_store_that_gives_nothing_back_is_an_error_and_no_endless_wait() -> None:
    class Keeps(RadixPrefix):
        def evict(self, what: int | Request) -> int:
            return 0

    pool = PagePool(4, 4)
    engine = Engine(FakeExecutor(4, 16), pool, Seams(reuse=Keeps(pool)), Limits(16, 16, 1, vocab_size=17))
    engine.add(make(engine, "a", [1] * 12, 1))
    finish(engine)
    engine.add(make(engine, "b", [2] * 8, 1))
    with pytest.raises(RuntimeError, match="does not fit the empty pool"):
        engine.step()


def test_nobody_is_admitted_in_a_step_that_preempts() -> None:
    engine = build(pages=4, budget=32, seqs=3, prefix_caching=False)
    a, b, c = make(engine, "a", [1] * 3, 9), make(engine, "b", [2] * 3, 9), make(engine, "c", [3], 2)
    add(engine, a, b)
    while not engine.scheduler.stats.preemptions:
        if a.num_output == 5 and c not in engine.scheduler.waiting:
            engine.add(c)
        engine.step()
        engine.check()
    assert engine.scheduler.running == [a] and [s.request for s in engine.last_plan.spans] == [a]
    finish(engine)
    assert [r.output for r in (a, b, c)] == [expected(a.prompt, 9), expected(b.prompt, 9), expected(c.prompt, 2)]


def test_a_codec_counts_whole_dense_pages_that_can_ever_be_reached() -> None:
    class Small(Codec):
        capacity = 3

    engine = build(pages=32, budget=64, seqs=4, seams=Seams(codec=Small()))
    a, b, c = make(engine, "a", [1] * 7, 4), make(engine, "b", [2] * 8, 4), make(engine, "c", [3] * 4, 4)
    add(engine, a, b, c, make(engine, "tiny", [0], 2))
    assert [name for name, *_ in planned(engine)] == ["a", "b"]  # 1 + 2 pages; nobody overtakes the third
    dense = make(engine, "dense", [1] * 2, 6)
    dense.dense_until = 10**6  # more than it will ever have
    finish(engine)
    engine.add(dense)
    assert [name for name, *_ in planned(engine)] == ["dense"]
