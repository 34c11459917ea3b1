from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.bench.serving import vocabulary
from dovetail.bench.serving.arrivals import Arrivals, Pattern
from dovetail.bench.serving.trace import BLOCK, Kind, TraceRequest
from dovetail.bench.serving.workload import Lengths, Limits, Rows, Synthetic, Workload, check_synthetic
from dovetail.core.errors import ConfigError
from dovetail.text.byte_tokenizer import ByteTokenizer

IDS = vocabulary.token_ids(ByteTokenizer())
EXACT = Lengths(5, 5)


class ListTrace:
    """A trace that is a list."""

    kind = Kind.MOONCAKE
    path = Path("list")

    def __init__(self, rows: list[TraceRequest]) -> None:
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def rows(values: list[TraceRequest], scale: float = 1.0, **limits: Any) -> Rows:
    return Rows(ListTrace(values), Limits(**limits), scale)  # type: ignore[arg-type]


def synthetic(seed: int = 0, **limits: Any) -> Workload:
    return Workload(Synthetic(Lengths(10, 30), Lengths(1, 9), seed), IDS, Limits(**limits), seed)


def shared(a: list[int], b: list[int]) -> int:
    """Tokens that both begin with."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def test_synthetic_requests_have_the_lengths_and_are_all_different() -> None:
    load = synthetic(requests=200).at(Arrivals(), 5.0, 1)
    assert len(load) == 200
    assert {len(r.prompt) for r in load} == set(range(10, 31))
    assert all(len(r.prompt) == r.input_tokens and 1 <= r.max_tokens <= 9 for r in load)
    assert [r.arrival for r in load] == sorted(r.arrival for r in load)
    assert len({tuple(r.prompt[:8]) for r in load}) == 200


def test_points_have_the_same_lengths_and_new_prompts() -> None:
    workload = synthetic(requests=20)
    first, second = workload.at(Arrivals(), 1.0, 1), workload.at(Arrivals(), 1.0, 2)
    assert [(r.input_tokens, r.max_tokens) for r in first] == [(r.input_tokens, r.max_tokens) for r in second]
    assert max(shared(a.prompt, b.prompt) for a in first for b in second) < 8
    warm = workload.warm_up(2)
    assert [r.input_tokens for r in warm] == [r.input_tokens for r in first[:2]]
    assert max(shared(a.prompt, b.prompt) for a in warm for b in first) < 8


def test_a_seed_gives_the_same_load_again_and_another_seed_another() -> None:
    assert synthetic(3, requests=9).at(Arrivals(), 1.0, 1) == synthetic(3, requests=9).at(Arrivals(), 1.0, 1)
    assert synthetic(3, requests=9).at(Arrivals(), 1.0, 1) != synthetic(4, requests=9).at(Arrivals(), 1.0, 1)


def test_duration_ends_a_load() -> None:
    load = synthetic(duration=2.0).at(Arrivals(Pattern.CONSTANT), 4.0, 1)
    assert [r.arrival for r in load] == [0.25 * i for i in range(1, 9)]
    assert len(synthetic(duration=2.0, requests=3).at(Arrivals(Pattern.CONSTANT), 4.0, 1)) == 3
    assert {r.arrival for r in synthetic(requests=7).at(Arrivals(), math.inf, 1)} == {0.0}


BLOCKS = st.lists(st.integers(0, 5), min_size=1, max_size=5)


@given(
    st.lists(st.tuples(BLOCKS, st.integers(1, BLOCK)), min_size=2, max_size=4), st.sampled_from([1.0, 0.1, 0.03])
)
def test_equal_blocks_are_equal_tokens_and_nothing_else_is(requests, scale) -> None:
    values = [
        TraceRequest((len(blocks) - 1) * BLOCK + part, 10, float(i), tuple(blocks))
        for i, (blocks, part) in enumerate(requests)
    ]
    found = rows(values, scale)
    load = Workload(found.found, IDS, Limits(), 0, found.block).replay(1.0, 0)
    for (a_blocks, _), a in zip(requests, load, strict=True):
        assert len(a.prompt) == a.input_tokens
        for (b_blocks, _), b in zip(requests, load, strict=True):
            same = shared(a_blocks, b_blocks) * found.block
            least = min(same, a.input_tokens, b.input_tokens)
            assert least <= shared(a.prompt, b.prompt) <= least + (8 if least == same else 0)


def test_blocks_of_another_point_are_other_tokens() -> None:
    values = [TraceRequest(1000, 1, float(i), (1, 2)) for i in range(2)]
    workload = Workload(rows(values).found, IDS, Limits(), 0)
    first, second = workload.replay(1.0, 1), workload.replay(1.0, 2)
    assert first[0].prompt == first[1].prompt
    assert shared(first[0].prompt, second[0].prompt) < 8
    assert workload.shares and not synthetic().shares


def test_what_no_block_names_is_new() -> None:
    values = [TraceRequest(700, 1, 0.0, (1,)), TraceRequest(700, 1, 1.0, (1,))]
    a, b = Workload(rows(values).found, IDS, Limits(), 0).replay(1.0, 0)
    assert BLOCK <= shared(a.prompt, b.prompt) < BLOCK + 8


def test_scaling_keeps_the_last_blocks_part() -> None:
    found = rows([TraceRequest(13 * BLOCK + 102, 500, 0.0, tuple(range(14)))], 0.1)
    assert found.block == 51
    assert (found.found[0].input_tokens, found.found[0].output_tokens) == (13 * 51 + 10, 50)
    assert rows([TraceRequest(1, 1)], 0.001).found[0] == TraceRequest(1, 1)


def test_what_does_not_fit_is_skipped_and_counted() -> None:
    values = [TraceRequest(n, 10, float(i)) for i, n in enumerate((90, 91, 5, 200, 50, 60))]
    assert [r.input_tokens for r in rows(values, context=100).found] == [90, 5, 50, 60]
    assert rows(values, context=100).skipped == 2
    assert [r.input_tokens for r in rows(values, input_tokens=50).found] == [5, 50]
    found = rows(values, rows=2, context=100)
    assert ([r.input_tokens for r in found.found], found.skipped) == ([90, 5], 1)


def test_replay_begins_at_once_and_at_its_speed_in_order_of_time() -> None:
    values = [TraceRequest(n, 1, at) for n, at in ((1, 110.0), (2, 104.0), (3, 100.0))]
    workload = Workload(rows(values).found, IDS, Limits(duration=3.0), 0)
    assert [(r.arrival, r.input_tokens) for r in workload.replay(2.0, 0)] == [(0.0, 3), (2.0, 2)]
    assert [r.input_tokens for r in workload.at(Arrivals(), math.inf, 0)] == [3, 2, 1]


def test_a_traces_own_text_is_sent_as_it_is() -> None:
    row = TraceRequest(4, 2, prompt="text")
    for words, prompt in ((IDS, list(b"text")), (vocabulary.words(), "text")):
        (request,) = Workload([row], words, Limits(), 0).at(Arrivals(), 1.0, 0)
        assert request.prompt == prompt


def test_loads_take_texts_in_turn_and_say_when_they_repeat() -> None:
    texts = [TraceRequest(4, 2, prompt=f"t{i}") for i in range(5)]
    workload = Workload(texts, vocabulary.words(), Limits(requests=2), 0)
    assert [r.prompt for r in workload.warm_up(1)] == ["t0"]
    taken = [[r.prompt for r in workload.at(Arrivals(), math.inf, 1, first)] for first in (1, 3, 5, 9)]
    assert taken == [["t1", "t2"], ["t3", "t4"], ["t0", "t1"], ["t4", "t0"]]
    assert [workload.repeats(taken) for taken in (3, 5, 6)] == [False, False, True]
    assert not workload.shares and not synthetic().repeats(10**6)


def test_without_a_number_of_requests_a_load_lasts_long_enough() -> None:
    for rate, count in ((1.0, 100), (100 / 30, 100), (64.0, 1920), (math.inf, 100)):
        assert len(synthetic().at(Arrivals(), rate, 1)) == count
    assert len(synthetic(duration=2.0).at(Arrivals(Pattern.CONSTANT), 1000.0, 1)) > 1900
    assert len(synthetic(requests=3).at(Arrivals(), 64.0, 1)) == 3


def test_text_of_tokens_has_as_many_tokens() -> None:
    tokenizer = ByteTokenizer()
    for words, count in (
        (vocabulary.token_text(tokenizer), lambda t: len(tokenizer.encode(t))),
        (vocabulary.words(), lambda t: len(t.split())),
    ):
        workload = Workload(Synthetic(Lengths(40, 50), EXACT, 0), words, Limits(requests=5), 0)
        for request in workload.at(Arrivals(), 1.0, 0):
            assert isinstance(request.prompt, str) and count(request.prompt) == request.input_tokens


def test_words_are_enough_and_all_different() -> None:
    items = vocabulary.words().items
    assert len(items) == len(set(items)) > 300
    assert vocabulary.words().count("x" * 41) == 10


@pytest.mark.parametrize("text", ["", "0", "-1", "5:4", "a", "1:2:3", "1.5", "1:"])
def test_impossible_lengths_name_the_option(text) -> None:
    with pytest.raises(ConfigError, match="--input-tokens"):
        Lengths.parse(text, "--input-tokens")


def test_lengths() -> None:
    assert Lengths.parse("7", "x") == Lengths(7, 7)
    assert Lengths.parse("7:9", "x") == Lengths(7, 9)


def test_synthetic_requests_that_never_fit_are_refused() -> None:
    check_synthetic(Synthetic(Lengths(1, 90), Lengths(1, 10), 0), Limits(context=100))
    with pytest.raises(ConfigError, match="context holds 100"):
        check_synthetic(Synthetic(Lengths(1, 91), Lengths(1, 10), 0), Limits(context=100))
