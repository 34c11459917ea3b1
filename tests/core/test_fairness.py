"""Long prompts do not stop short ones, and short ones do not stop long ones."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dovetail.core.engine import Engine
from dovetail.core.seams import Backlog, Policy, Seams
from dovetail.core.types import Request
from tests.core.test_planning import Guesses, add, finish, fork_of, planned
from tests.core.test_scheduler import build, expected, make
from tests.helpers.examples import examples


class Crowded(Policy):
    """The default, with a smaller bound."""

    crowded = 8


def engine_of(pages: int = 64, budget: int = 16, seqs: int = 8, **more) -> Engine:
    return build(pages, budget, seqs, Seams(policy=Crowded()), prefix_caching=more.pop("caching", False), **more)


def took(engine: Engine) -> dict[str, int]:
    """Tokens that each request takes in the next step."""
    return {name: stop - start for name, start, stop, _ in planned(engine)}


def shares(left: int, tokens: list[int], others: int = 0) -> list[int]:
    return list(Crowded().shares([Backlog(None, n) for n in tokens], left, others))  # type: ignore[arg-type]


def test_the_oldest_keeps_half_and_shorter_ones_go_by_length() -> None:
    assert shares(16, [40]) == [16]
    assert shares(16, [40], others=3) == [8]
    assert shares(16, [40, 50, 40]) == [16, 0, 0]  # nobody is shorter
    assert shares(64, [40, 50, 40], others=1) == [24, 0, 0]
    assert shares(16, [10, 50, 40]) == [10, 6, 0]
    assert shares(64, [40, 30]) == [8, 8]
    assert shares(16, [40, 30, 2]) == [8, 6, 2]
    assert shares(16, [40, 30, 2, 1, 1, 9]) == [8, 0, 2, 1, 1, 4]
    assert shares(16, [5, 4, 30]) == [5, 4, 7]
    assert shares(16, [5, 1, 30]) == [5, 1, 10]
    assert shares(1, [40, 1]) == [1, 0]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(1, 24), st.integers(0, 4))
@examples(200)
def test_shares_add_up_and_leave_nobody_without(tokens: list[int], left: int, others: int) -> None:
    found = shares(left, tokens, others)
    most = min(left, Crowded.crowded * len(tokens)) if others or min(tokens) < tokens[0] else left
    assert sum(found) == min(most, sum(tokens))  # nothing is left over
    assert all(0 <= n <= want for n, want in zip(found, tokens, strict=True))
    assert found[0] >= min(tokens[0], most - most // 2)
    shortest = min(range(len(tokens)), key=lambda i: (tokens[i], i))
    assert found[shortest] >= min(tokens[shortest], most // 2)


def test_a_prompt_alone_takes_whole_steps() -> None:
    engine = engine_of()
    engine.add(make(engine, "long", [1] * 40, 2))
    assert [took(engine) for _ in range(4)] == [{"long": 16}, {"long": 16}, {"long": 8}, {"long": 1}]


def test_a_short_prompt_overtakes_and_its_answer_does_not_wait() -> None:
    engine = engine_of()
    long, other = make(engine, "long", [1] * 40, 2), make(engine, "other", [1] * 40, 2)
    add(engine, long, other)
    assert took(engine) == {"long": 16}
    short = make(engine, "short", [2, 1], 3)
    engine.add(short)
    assert took(engine) == {"long": 14, "short": 2}
    assert took(engine) == {"long": 10, "short": 1, "other": 5}  # the other one was not begun before
    assert took(engine) == {"long": 1, "short": 1, "other": 8}  # a step that is short
    finish(engine)
    assert [r.output for r in (long, other, short)] == [expected(r.prompt, r.max_total - len(r.prompt))
                                                        for r in (long, other, short)]  # fmt: skip


def test_answers_go_on_while_older_prompts_are_computed() -> None:
    """The oldest request is a prompt that would fill every step."""
    engine = engine_of(budget=4)
    add(engine, make(engine, "long", [1] * 30, 2), make(engine, "short", [2], 9))
    assert took(engine) == {"long": 3, "short": 1}
    for _ in range(8):
        assert took(engine) == {"long": 3, "short": 1}


def test_the_oldest_advances_also_where_others_fill_the_step() -> None:
    engine = engine_of(budget=2)
    add(engine, make(engine, "long", [1] * 30, 2), *(make(engine, name, [2], 9) for name in "abc"))
    found = [took(engine) for _ in range(6)]
    assert all(plan["long"] >= 1 and sum(plan.values()) == 2 for plan in found)


def test_a_prompt_that_is_stored_counts_as_what_is_left_of_it() -> None:
    """The next turn of a conversation is short, however long the conversation is."""
    engine = engine_of(caching=True)
    turn = make(engine, "turn", [1, 2] * 20, 4)
    engine.add(turn)
    finish(engine)
    add(engine, make(engine, "long", [2] * 30, 2), make(engine, "next", [*turn.tokens, 2, 1], 2))
    assert took(engine) == {"long": 10, "next": 6}
    assert took(engine) == {"long": 8, "next": 1}


def test_siblings_begin_as_soon_as_their_prompt_is_computed() -> None:
    engine = engine_of()
    parent = make(engine, "parent", [1] * 7, 4)
    add(engine, parent, fork_of(engine, parent, "fork", 4))
    assert took(engine) == {"parent": 7}
    engine.scheduler.waiting = {make(engine, "long", [2] * 40, 2): None, **engine.scheduler.waiting}
    assert took(engine) == {"parent": 1, "fork": 1, "long": 14}


def test_what_was_preempted_is_computed_again_beside_others() -> None:
    engine = engine_of(pages=8, budget=16, seqs=4)
    requests = [make(engine, str(i), [i] * 5, 15) for i in range(3)]
    add(engine, *requests)
    while not engine.scheduler.stats.preemptions:
        engine.step()
        engine.check()
    finish(engine)
    assert [r.output for r in requests] == [expected([i] * 5, 15) for i in range(3)]


def test_guesses_leave_half_of_a_step_to_prompts() -> None:
    seams = Seams(policy=Crowded(), drafter=Guesses(9))
    engine = build(64, 16, 8, seams, prefix_caching=False)
    add(engine, *(make(engine, name, [1], 30) for name in "ab"))
    engine.step()
    engine.add(make(engine, "long", [2] * 40, 2))
    assert took(engine) == {"a": 7, "b": 1, "long": 8}


long_or_short = st.tuples(st.booleans(), st.integers(0, 20), st.integers(1, 4))


@given(st.lists(long_or_short, min_size=2, max_size=12), st.integers(0, 99), st.booleans())
@examples(100)
def test_nobody_starves_and_the_short_do_not_wait_for_the_long(jobs, seed, drafts) -> None:
    """With seats and pages for all: a prompt of at most 3 tokens waits for those that are as short, at 4 tokens a
    step. The oldest one that has begun gets 4 tokens in each step."""
    seams = Seams(policy=Crowded(), drafter=Guesses(2 * drafts))
    engine = build(512, 64, 16, seams, prefix_caching=False)
    jobs = [(40 + 7 * i if long else 1 + i % 3, arrival, n) for i, (long, arrival, n) in enumerate(jobs)]
    waiting = sorted(enumerate(jobs), key=lambda job: (job[1][1], job[0]))
    requests: list[Request] = []
    born: dict[Request, int] = {}
    step = 0
    while waiting or engine.busy:
        while waiting and waiting[0][1][1] <= step:
            i, (length, _, n) = waiting.pop(0)
            requests.append(make(engine, str(i), [i % 3] * length, n))
            born[requests[-1]] = step
            engine.add(requests[-1])
        behind = next((r for r in engine.scheduler.running if len(r.tokens) - r.computed > 1), None)
        before = behind.computed if behind is not None else 0
        engine.step()
        engine.check()
        if behind is not None:
            assert behind.computed - before >= min(4, len(behind.prompt) - before)
        step += 1
        for r in requests:
            if len(r.prompt) <= 3 and r.num_output and r in born:
                alike = sum(len(other.prompt) for other in requests if len(other.prompt) <= 3)
                assert step - born.pop(r) <= 2 + alike // 4
    assert all(r.output == expected(r.prompt, r.max_total - len(r.prompt)) for r in requests)
