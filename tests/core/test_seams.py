"""The defaults of seams: real answers that change nothing."""

from __future__ import annotations

import time

import pytest

from dovetail.core.errors import ConfigError
from dovetail.core.seams import (
    EVERY_ROW,
    NO_GUESS,
    WALL_CLOCK,
    Drafter,
    Geometry,
    Policy,
    Room,
    Seams,
    Selector,
    Site,
    SlidingWindow,
    Variant,
)  # fmt: skip
from dovetail.core.types import ALL, UNLIMITED


def test_defaults_let_everything_through() -> None:
    seams = Seams()
    waiting = [object(), object()]
    assert Policy().order(waiting) is waiting  # type: ignore[arg-type]
    assert Drafter().propose(waiting, [3, 3], Room(6)) == [NO_GUESS, NO_GUESS]  # type: ignore[arg-type]
    assert Selector().window == seams.codec.capacity == UNLIMITED
    assert Selector().select(0, None, None) is ALL is Selector().ahead(0, None, None)
    assert ALL.pages is None
    assert seams.rows.keep(0, None, None) is EVERY_ROW and list(seams.rows.cuts) == []
    assert Site(Geometry(1, 1, 1, 8, 9), 4, None).device == "cpu"
    assert Geometry(2, 1, 1, 8, 9).choosing("x") == 0
    assert dict(seams.codec.seal([], None)) == {}
    assert seams.codec.open(0, "pages", ("k", "v")) == ("k", "v")


def test_the_clock_on_the_wall_goes_on() -> None:
    before = time.monotonic()
    assert before <= WALL_CLOCK.now() <= time.monotonic()


def test_a_variant_is_causal_and_leaves_scores_alone() -> None:
    assert [Variant().mask(3, k, 0) for k in (2, 3, 4)] == [True, True, False]
    assert Variant().score(0.5, 3, 2, 0) == 0.5


def test_a_sliding_window_counts_the_query_and_keeps_what_it_wraps() -> None:
    class Odd(Variant):
        def score(self, score, q_pos, k_pos, head):
            return score + head

        def mask(self, q_pos, k_pos, head):
            return k_pos % 2 == 1

    assert [k for k in range(8) if SlidingWindow(3).mask(5, k, 0)] == [3, 4, 5]
    assert [k for k in range(6) if SlidingWindow(3, Odd()).mask(5, k, 0)] == [3, 5]
    assert [k for k in range(8) if SlidingWindow(1).mask(5, k, 0)] == [5]
    assert SlidingWindow(3, Odd()).score(1, 5, 4, 2) == 3
    assert SlidingWindow(3).score(1, 5, 4, 2) == 1


@pytest.mark.parametrize("window", [0, -1, True, 2.0, None, "3"])
def test_a_window_below_one_key_is_none(window: object) -> None:
    with pytest.raises(ConfigError, match="SlidingWindow needs a window of at least 1 key, got"):
        SlidingWindow(window)  # type: ignore[arg-type]
