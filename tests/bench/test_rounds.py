"""Medians, ranges and ratios of readings."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.bench.rounds import medians, percentile, ratios, spreads

values = st.lists(st.floats(1, 100), min_size=1, max_size=9)


def test_figures_lie_at_their_place():
    samples = {("a", "16"): [3.0, 1.0, 2.0], ("a", "8"): [5, 5], ("b",): [1.5]}
    assert medians(samples) == {"a": {"16": 2.0, "8": 5}, "b": 1.5}
    assert spreads(samples) == {"a": {"16": [1.0, 3.0], "8": [5, 5]}}


def test_counts_stay_counts():
    found = medians({("a",): [36, 36], ("b",): [1, 2], ("c",): [2.0, 2.0]})
    assert found == {"a": 36, "b": 1.5, "c": 2.0}
    assert isinstance(found["a"], int) and isinstance(found["c"], float)


@given(st.lists(st.tuples(st.floats(1, 100), st.floats(1, 100)), min_size=1, max_size=9))
def test_a_ratio_is_made_round_by_round(rounds):
    ours, theirs = ([pair[i] for pair in rounds] for i in (0, 1))
    found = ratios({("x",): ours, ("y",): ours, ("z",): ours}, {("x",): theirs, ("z",): [*theirs, 1.0]})
    assert list(found) == [("x",)]
    assert medians(found)["x"] == statistics.median(a / b for a, b in rounds)


def test_nothing_is_divided_by_zero():
    assert ratios({("x",): [1, 2]}, {("x",): [1, 0]}) == {}


@given(values, st.sampled_from([0, 50, 90, 99, 100]))
def test_percentiles_are_those_of_numpy(readings, q):
    assert percentile(readings, q) == pytest.approx(np.percentile(readings, q))
