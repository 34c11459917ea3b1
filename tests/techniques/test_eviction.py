"""Pools of limited size: what is given up, against a simulation in which rows come one by one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.techniques.infinigen.eviction import FULL, POLICIES, Evictions
from tests.helpers.examples import examples

SIZE = 2


def rows(seed: int, count: int, heads: int) -> list[np.ndarray]:
    """What rows would like to read: pages in order of preference, which depends on the row and the head."""
    random = np.random.default_rng(seed)
    taste = random.random((heads, count)) * 2
    return [np.argsort(random.random((heads, count)) + taste, axis=1) for _ in range(count * SIZE)]


def choose(wanted: np.ndarray, given_up: np.ndarray, budget: int) -> np.ndarray:
    """The first `budget` pages of each head that it may read, -1 where there are fewer."""
    found = np.full((len(wanted), budget), -1)
    for head, order in enumerate(wanted):
        left = [p for p in order if p < given_up.shape[1] and not given_up[head, p]][:budget]
        found[head, : len(left)] = left
    return found


@examples(80)
@given(
    st.integers(0, 2**31), st.integers(1, 24), st.integers(1, 3), st.integers(1, 6), st.sampled_from(POLICIES),
    st.integers(0, 12), st.sets(st.integers(0, 30), max_size=3),
)  # fmt: skip
def test_any_schedule_gives_up_what_rows_one_by_one_do(
    seed: int, pages: int, heads: int, limit: int, policy: str, dense: int, restarts: set[int]
) -> None:
    wanted, random = rows(seed, pages, heads), np.random.default_rng(seed)
    start = min(dense, len(wanted))

    def run(scheduled: bool) -> tuple[list[np.ndarray], Evictions]:
        pool, found, at = Evictions(heads, SIZE, limit, policy), [np.zeros(0)] * len(wanted), start
        for step in itertools.count():
            if at >= len(wanted):
                return found, pool
            span = int(random.integers(1, SIZE + 1)) if scheduled else 1
            accepted = int(random.integers(1, span + 1))
            for row in range(at, min(at + span, len(wanted))):
                eligible = max(0, row + 1 - SIZE) // SIZE
                chosen = choose(wanted[row], pool.given_up(eligible), 3)
                if row >= at + accepted:  # a draft that turns out wrong
                    chosen = chosen[:, ::-1] // 2
                pool.chose(row, chosen)
                found[row] = chosen
            at = start if scheduled and step in restarts else at + accepted
        raise AssertionError

    (one, alone), (other, scheduled) = run(False), run(True)
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    for n in range(scheduled.settled + 1):
        assert np.array_equal(scheduled.given_up(n), alone.given_up(n))


@examples(80)
@given(
    st.integers(0, 2**31), st.integers(1, 24), st.integers(1, 3), st.integers(1, 6), st.sampled_from(POLICIES),
    st.integers(0, 12),
)  # fmt: skip
def test_victims_are_distinct_never_chosen_again_and_what_the_policy_says(
    seed: int, pages: int, heads: int, limit: int, policy: str, dense: int
) -> None:
    wanted, pool = rows(seed, pages, heads), Evictions(heads, SIZE, limit, policy)
    history: list[tuple[int, np.ndarray]] = []
    given_up: list[list[int]] = [[] for _ in range(heads)]
    for row in range(min(dense, len(wanted)), len(wanted)):
        eligible = max(0, row + 1 - SIZE) // SIZE
        gone = pool.given_up(eligible)
        for head in range(heads):
            now = np.flatnonzero(gone[head])
            new = [p for p in now if p not in given_up[head]]
            assert set(given_up[head]) <= set(now)
            if new:
                seen = [(r, c[head]) for r, c in history if r < eligible * SIZE]
                before = [p for p in range(eligible - 1) if p not in given_up[head]]
                count = {p: sum(p in c for _, c in seen) for p in before}
                used = {p: max([r for r, c in seen if p in c], default=(p + 1) * SIZE - 1) for p in before}
                order = {"fifo": dict.fromkeys(before, 0), "lru": used, "counter": count}[policy]
                assert sorted(new) == sorted(sorted(before, key=lambda p: (order[p], p))[: len(new)])
                given_up[head] += sorted(new)
            if (eligible - 1) * SIZE >= min(dense, len(wanted)):
                assert eligible - len(now) == min(limit, eligible)
            else:
                assert len(now) == 0
        chosen = choose(wanted[row], gone, 3)
        history.append((row, chosen))
        pool.chose(row, chosen)
    assert all(len(set(g)) == len(g) for g in given_up)
    assert pool.evicted == sum(map(len, given_up))


def test_counts_are_halved_when_one_is_full() -> None:
    """So that old reads weigh less: page 0 is read first and more often, page 1 after it."""
    size = 4 * FULL
    for reads, victim in ((50, 1), (FULL - 2, 0)):  # of page 1
        pool = Evictions(1, size, 2, "counter")
        for row in range(2 * size, 3 * size):
            pool.chose(row, np.array([[int(row >= 3 * size - reads)]]))
        assert pool.given_up(3)[0].tolist() == [victim == 0, victim == 1, False]


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_given_up_while_there_is_room_or_rows_read_everything(policy: str) -> None:
    roomy = Evictions(2, SIZE, 10, policy)
    dense = Evictions(2, SIZE, 1, policy)
    for row in range(2 * SIZE, 9 * SIZE):
        roomy.chose(row, np.array([[0], [1]]))
    assert not roomy.given_up(9).any()
    assert not dense.given_up(9).any()
