"""Loads against brute force, costs as sums, and the predicted time of a step."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.core.cost import Cost, Load, Operation, Speeds, StepTime, total
from dovetail.core.errors import ConfigError
from dovetail.core.types import Span, StepPlan

spans = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 40)).map(lambda s: (s[0], s[0] + s[1])), max_size=5)


@given(spans, st.integers(0, 50))
def test_keys_are_counted_as_rows_read_them(spans: list[tuple[int, int]], window: int) -> None:
    load, seen, pairs = Load(tuple(spans)), 0, 0
    for rows, context in spans:
        keys = [
            {k for k in range(context) if k <= at and (not window or k > at - window)}
            for at in range(context - rows, context)
        ]
        pairs += sum(map(len, keys))
        seen += len(set().union(*keys))
    assert load.pairs(window) == pairs
    assert load.read(window) == seen
    assert load.rows == sum(rows for rows, _ in spans)


def test_the_load_of_a_plan_is_its_rows_keys_and_samples() -> None:
    r: Any = None
    plan = StepPlan((Span(r, 0, 4), Span(r, 6, 9, sample=2), Span(r, 2, 9, sample=1, rows=(3, 8))))
    load = Load.of(plan)
    assert load == Load(((4, 4), (3, 9), (2, 9)), 3)
    assert Load.of(StepPlan(())) == Load(()) and Load(()).sampled == 0
    assert (load.read(), load.pairs()) == (4 + 9 + 9, (1 + 2 + 3 + 4) + (7 + 8 + 9) + (8 + 9))


def test_an_operation_is_native_and_starts_at_once_unless_it_is_said_otherwise() -> None:
    assert Operation("a", 0, lambda load: Cost()).native
    assert Speeds({}, {}).seconds(Cost()) == 0.0


def by_rows(name: str, arithmetic: str, each: float, size: float) -> Operation:
    return Operation(name, 0, lambda load: Cost({arithmetic: each * load.rows}, {"device": size}))


def test_a_step_costs_the_sum_of_its_operations() -> None:
    found = total([by_rows("a", "int8", 2.0, 10.0), by_rows("b", "bf16", 3.0, 5.0)], Load(((4, 9),)))
    assert found == Cost({"int8": 8.0, "bf16": 12.0}, {"device": 15.0})
    assert found.all_bytes == 15.0
    assert total([], Load(())) == Cost()


def test_each_operation_takes_what_is_longer_of_its_arithmetic_and_its_bytes() -> None:
    program = [by_rows("bytes", "int8", 1.0, 100.0), by_rows("arithmetic", "int8", 100.0, 1.0)]
    predict = StepTime(program, Speeds({"int8": 10.0}, {"device": 10.0}, start=0.5))
    assert predict(Load(((1, 1),))) == 0.5 + 10.0 + 0.5 + 10.0
    assert predict(Load(((2, 2),))) == 0.5 + 10.0 + 0.5 + 20.0
    memory = StepTime(program, Speeds(None, {"device": 10.0}))
    assert memory(Load(((2, 2),))) == 10.0 + 0.1


@given(spans, spans)
def test_more_work_never_takes_less(spans: list[tuple[int, int]], more: list[tuple[int, int]]) -> None:
    attend = Operation(
        "attend", 0, lambda load: Cost({"float32": load.pairs(7)}, {"device": load.read(7) + load.sampled})
    )
    predict = StepTime([attend], Speeds({"float32": 3.0}, {"device": 2.0}))
    assert predict(Load(tuple(spans), 1)) <= predict(Load((*spans, *more), 2))


@pytest.mark.parametrize(
    ("speeds", "words"),
    [
        (Speeds({}, {"device": 1.0}), "arithmetic 'int8'; known: none"),
        (Speeds({"int8": 1.0}, {"host": 1.0}), "tier 'device'; known: host"),
        (Speeds({"int8": 0.0}, {"device": 1.0}), "above 0"),
    ],
)
def test_an_unknown_speed_is_refused_by_name(speeds: Speeds, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        StepTime([by_rows("a", "int8", 1.0, 1.0)], speeds)(Load(((1, 1),)))
