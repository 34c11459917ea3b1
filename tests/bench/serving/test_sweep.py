from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.bench.serving.sweep import BISECTIONS, MAX_DOUBLINGS, first_rate, parse_rates, to_saturation
from dovetail.core.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "rates"),
    [
        ("2", [2.0]),
        ("1,2.5, 4", [1.0, 2.5, 4.0]),
        ("1..32", [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]),
        ("0.5..3", [0.5, 1.0, 2.0]),
        ("max", [math.inf]),
        ("1..2,max", [1.0, 2.0, math.inf]),
    ],
)
def test_rates(text, rates) -> None:
    assert parse_rates(text) == rates


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "fast", "1,,2", "4..1", "1..max", "nan", "inf", "1,1", "max,max", ".."]
)
def test_impossible_rates(text) -> None:
    with pytest.raises(ConfigError, match="--rate"):
        parse_rates(text)


@given(st.floats(1e-6, 1e6))
def test_the_first_rate_is_well_below_one_at_a_time(seconds) -> None:
    assert 0.25 / seconds <= first_rate(seconds) * 1.0000001 and first_rate(seconds) <= 0.5 / seconds


def tried(start: float, *capacities: float) -> list[float]:
    rates: list[float] = []

    async def run(rate: float) -> list[bool]:
        rates.append(rate)
        return [rate > capacity for capacity in capacities]

    asyncio.run(to_saturation(start, run))
    return rates


@given(st.floats(0.3, 500), st.floats(0.3, 500))
def test_the_search_brackets_every_targets_capacity(a, b) -> None:
    rates = tried(0.25, a, b)
    assert len(rates) == len(set(rates)) <= MAX_DOUBLINGS + 2 * BISECTIONS
    for capacity in (a, b):
        low = max(rate for rate in rates if rate <= capacity)
        high = min(rate for rate in rates if rate > capacity)
        assert high / low <= 2 ** (1 / 4) * 1.02  # two halvings of a doubling, rates of three digits


def test_the_search_ends_where_nothing_saturates_or_everything_does() -> None:
    assert len(tried(1.0, math.inf)) == MAX_DOUBLINGS
    assert tried(1.0, 0.1) == [1.0]
