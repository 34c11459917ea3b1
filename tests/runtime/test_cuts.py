"""Rows that a filter drops at a cut, and spans that list their rows: the same in both executors."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from dovetail.core.errors import ConfigError
from dovetail.core.sampling import SamplingParams
from dovetail.core.seams import EVERY_ROW, RowFilter
from dovetail.core.technique import Technique
from dovetail.core.types import Span, StepPlan
from dovetail.ops.cpu import isas
from dovetail.runtime.executor import ModelExecutor
from dovetail.runtime.native import NativeExecutor
from tests.tiny import TinyCheckpoint, make_request, run_all, tiny_config, tiny_engine

NATIVE = isas()[0] if isas() else ""
KERNELS = ["torch", pytest.param(NATIVE, marks=pytest.mark.skipif(not NATIVE, reason="not built"))]
GREEDY = SamplingParams(temperature=0, max_tokens=12)
PROMPTS = [tuple(i * 7 % 61 for i in range(40)), (1, 2, 3), tuple(i * 5 % 11 for i in range(37))]
CHECKPOINT = TinyCheckpoint(tiny_config(num_layers=4, hidden_size=64, head_dim=16))


class Every(RowFilter):
    """Leaves every n-th position behind, at each cut by another remainder."""

    def __init__(self, cuts: tuple[int, ...], n: int) -> None:
        self.cuts = cuts
        self.n = n
        self.asked: list[int] = []

    def keep(self, layer: int, hidden: Any, batch: Any) -> Any:
        assert len(hidden) == len(batch.positions) and torch.isfinite(torch.as_tensor(hidden)).all()
        self.asked.append(layer)
        return np.flatnonzero(np.asarray(batch.positions) % self.n != layer % self.n)


def engine_of(kernels: str, rows: RowFilter, *use: str, **changes: Any):
    base: dict[str, Any] = dict(
        dtype="float32", kv_cache_dtype="float32", page_size=16, enable_prefix_caching=False
    )
    engine = tiny_engine(
        Technique("filter", ("rows",), lambda site: {"rows": rows}), *use,
        checkpoint=CHECKPOINT, kernels=kernels, pages=32, **(base | changes),
    )  # fmt: skip
    assert isinstance(engine.executor, ModelExecutor if kernels == "torch" else NativeExecutor)
    return engine


@pytest.mark.slow
@pytest.mark.parametrize("cuts", [(0,), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize(
    "use", [(), ("ngram:min_n=1",), ("sink-window:sink=4,window=16",), ("quest:budget=48,skip_layers=0",)]
)
def test_dropped_rows_give_the_same_text_in_both_executors(cuts: tuple[int, ...], use: tuple[str, ...]) -> None:
    # What a dropped row does not write stays zero, in both: no page is used twice here.
    plain = run_all(engine_of("torch", RowFilter(), *use), PROMPTS, GREEDY)
    told = run_all(engine_of("torch", Every(cuts, 3), *use), PROMPTS, GREEDY)
    assert told != plain
    if NATIVE:
        assert run_all(engine_of(NATIVE, Every(cuts, 3), *use), PROMPTS, GREEDY) == told
        assert run_all(engine_of(NATIVE, Every(cuts, 3), *use, max_num_batched_tokens=11), PROMPTS, GREEDY) == told
        alone = [run_all(engine_of(NATIVE, Every(cuts, 3), *use, threads=2), [p], GREEDY)[0] for p in PROMPTS]
        assert alone == told


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_filter_is_asked_at_its_cuts_alone_and_never_behind_the_last_layer(kernels: str) -> None:
    rows = Every((0, 2, 3), 1000)
    engine = engine_of(kernels, rows)
    run_all(engine, [(1, 2, 3)], SamplingParams(temperature=0, max_tokens=2))
    assert rows.asked == [0, 2] * engine.steps


@pytest.mark.parametrize("kernels", KERNELS)
def test_keeping_every_row_changes_nothing(kernels: str) -> None:
    class All(RowFilter):
        cuts = (0, 1)

        def keep(self, layer: int, hidden: Any, batch: Any) -> Any:
            return EVERY_ROW if layer else torch.arange(len(hidden))

    plain = run_all(engine_of(kernels, RowFilter()), PROMPTS, GREEDY)
    assert run_all(engine_of(kernels, All()), PROMPTS, GREEDY) == plain


@pytest.mark.parametrize("kernels", KERNELS)
def test_all_rows_may_be_dropped(kernels: str) -> None:
    class Nothing(RowFilter):
        cuts = (1,)

        def keep(self, layer: int, hidden: Any, batch: Any) -> Any:
            return torch.arange(0)

    shallow = run_all(engine_of(kernels, Nothing()), PROMPTS, GREEDY)
    assert shallow != run_all(engine_of(kernels, RowFilter()), PROMPTS, GREEDY)
    assert all(len(out) == 12 for out in shallow)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("use", [(), ("quest:budget=48,skip_layers=0",)])
def test_a_span_computes_the_rows_that_it_lists(kernels: str, use: tuple[str, ...]) -> None:
    """With the KV of all tokens stored, any of them computed again give what they gave."""
    engine = engine_of(kernels, RowFilter(), *use)
    request = make_request(engine, "r", PROMPTS[0], GREEDY)
    request.dense_until = 20
    request.table.grow(0, 40)
    run = engine.executor.run

    def tokens(*spans: Span) -> list[int]:
        return [t for result in run(StepPlan(spans)).spans for t in result.tokens]

    whole = tokens(Span(request, 0, 40, sample=40))
    rows = [3, 4, 17, 30, 39]
    assert tokens(Span(request, 0, 40, sample=5, rows=rows)) == [whole[r] for r in rows]
    other = make_request(engine, "other", PROMPTS[2], GREEDY)
    other.table.grow(0, 37)
    beside = tokens(Span(request, 2, 40, sample=2, rows=rows), Span(other, 0, 37, sample=1))
    assert beside[:2] == [whole[30], whole[39]]
    assert beside[2:] == tokens(Span(other, 0, 37, sample=1))


@pytest.mark.parametrize("rows", [[5, 4], [4, 4], [1, 40], [-1], []])
def test_rows_out_of_order_or_out_of_their_span_are_refused(rows: list[int]) -> None:
    request = make_request(engine_of("torch", RowFilter()), "r", PROMPTS[0], GREEDY)
    with pytest.raises(ValueError, match="ascend"):
        Span(request, 0, 40, sample=1, rows=rows)


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_span_that_lists_rows_scores_no_prompt(kernels: str) -> None:
    engine = engine_of(kernels, RowFilter())
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=0)
    request = make_request(engine, "r", PROMPTS[0], params)
    request.table.grow(0, 40)
    with pytest.raises(ValueError, match="scores no prompt"):
        engine.executor.run(StepPlan((Span(request, 0, 40, sample=1, rows=[3, 39]),)))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(
    "chosen", [slice(1, 2), torch.tensor([2, 1]), torch.tensor([1, 1]), torch.tensor([3]), torch.tensor([True])]
)
def test_a_filter_that_gives_something_else_than_rows_is_told_so(kernels: str, chosen: Any) -> None:
    class Wrong(RowFilter):
        cuts = (0,)

        def keep(self, layer: int, hidden: Any, batch: Any) -> Any:
            return chosen

    engine = engine_of(kernels, Wrong())
    engine.add(make_request(engine, "r", (1, 2, 3), GREEDY))
    with pytest.raises(ValueError, match="row filter"):
        engine.step()


@pytest.mark.parametrize("cut", [-1, 4])
def test_a_cut_behind_no_layer_is_refused_at_load(cut: int) -> None:
    with pytest.raises(ConfigError, match=f"no layer {cut} to cut behind: the layers are 0 to 3"):
        engine_of("torch", Every((1, cut), 3))


@pytest.mark.parametrize("kernels", KERNELS)
def test_what_a_filter_keeps_of_hidden_rows_stays(kernels: str) -> None:
    seen: list[torch.Tensor] = []

    class Keeps(RowFilter):
        cuts = (0, 1)

        def keep(self, layer: int, hidden: Any, batch: Any) -> Any:
            seen.extend([hidden, copy.deepcopy(hidden)])
            return EVERY_ROW

    run_all(engine_of(kernels, Keeps()), PROMPTS[:1], GREEDY)
    assert all(np.array_equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))


@pytest.mark.skipif(not NATIVE, reason="not built")
def test_cuts_and_guesses_run_operation_by_operation() -> None:
    """What was chosen ahead for a row that a cut drops would be read by others; the torch side drops it too."""
    use = "infinigen:alpha=1,budget=48,skip_layers=1,fit=none"
    changes: dict[str, Any] = dict(dtype="float32", kv_cache_dtype="float32", page_size=16)
    rows = Technique("filter", ("rows",), lambda site: {"rows": Every((1,), 3)})
    engine = tiny_engine(use, rows, checkpoint=CHECKPOINT, kernels=NATIVE, **changes)
    assert isinstance(engine.executor, ModelExecutor)
    plain = tiny_engine(use, checkpoint=CHECKPOINT, kernels=NATIVE, **changes)
    assert isinstance(plain.executor, NativeExecutor)


def test_a_plan_counts_and_describes_listed_rows() -> None:
    engine = engine_of("torch", RowFilter())
    request = make_request(engine, "r", PROMPTS[0], GREEDY)
    plan = StepPlan((Span(request, 2, 9), Span(request, 10, 40, rows=[11, 30])))
    assert plan.num_tokens == 9
    assert [list(s.positions) for s in plan.spans] == [list(range(2, 9)), [11, 30]]
    assert [s.get("rows") for s in plan.describe()["spans"]] == [None, [11, 30]]
