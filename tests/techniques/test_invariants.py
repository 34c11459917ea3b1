"""What must hold of pages that are chosen, whatever is asked, in what chunks and on which pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dovetail.core.engine import Engine
from dovetail.core.sampling import SamplingParams
from dovetail.core.types import Request
from dovetail.ops.cpu import isas
from dovetail.ops.pages import codes, landmarks, summary, unpacked
from dovetail.runtime.kv import NEVER
from tests.helpers.examples import examples
from tests.tiny import finish, make_request, run_all, run_staggered, tiny_engine

NEW = 16
GREEDY = SamplingParams(temperature=0, max_tokens=NEW)
SCORED = SamplingParams(temperature=0, max_tokens=NEW, logprobs=2)
KERNELS = ["torch", *isas()[:1]]


def text(n: int, k: int = 7) -> tuple[int, ...]:
    return tuple((i * i * k + i // 3) % 61 for i in range(n))


def sizes(kernels: str, pages: int = 16) -> dict[str, Any]:
    """Pages of 4 tokens for the reference, of 16 for native kernels."""
    if kernels == "torch":
        return {"page_size": 4, "pages": 4 * pages}
    return dict(
        page_size=16,
        pages=pages,
        dtype="float32",
        kv_cache_dtype="float32",
        kernels=kernels,
        num_kv_cells=2 * pages,
    )


def scored(engine: Engine, request: Request) -> list[tuple[int, float]]:
    """Tokens of a request with their log-probabilities."""
    engine.add(request)
    found = []
    while engine.busy:
        for p in engine.step():
            found += [(t.token, t.logprob) for t in p.logprobs]
    return found


# -- budgets

COVERING = {
    "quest": "quest:budget={},skip_layers=0,score=bound",
    "codes": "quest:budget={},skip_layers=0",
    "infinigen": "infinigen:alpha=inf,budget={},skip_layers=1",
    "shadowkv": "shadowkv:rank=0,budget={},chunk=2,outliers=2",
    "sink-window": "sink-window:sink=0,window={}",
}


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", COVERING)
def test_a_budget_of_exactly_the_context_is_dense(name: str, kernels: str) -> None:
    """Also where the last page is partial. Bit for bit where the same kernels run in the same shapes."""
    shape = sizes(kernels)
    plain = tiny_engine(enable_prefix_caching=False, **shape)
    least = 5 * shape["page_size"]  # below that there is nothing to choose

    @examples(12)
    @given(st.integers(1, 80), st.integers(0, 80))
    def check(n: int, dense: int) -> None:
        more: dict[str, Any] = {"dense_until": dense} if dense < n else {}
        want = scored(plain, make_request(plain, "r", text(n), SCORED))
        engine = tiny_engine(COVERING[name].format(max(least, n + NEW)), enable_prefix_caching=False, **shape)
        found = scored(engine, make_request(engine, "r", text(n), SCORED, **more))
        selector: Any = engine.seams.selector
        assert selector.dropped == 0
        assert [t for t, _ in found] == [t for t, _ in want]
        if not more and (kernels != "torch" or name not in ("shadowkv", "sink-window")):
            assert found == want
        else:
            torch.testing.assert_close(
                torch.tensor([p for _, p in found]), torch.tensor([p for _, p in want]), rtol=1e-5, atol=1e-5
            )

    check()


@examples(25)
@given(st.integers(20, 90), st.integers(6, 16), st.integers(0, 6), st.sampled_from([1, 2, 4]), st.integers(0, 90))
def test_outliers_chosen_and_recent_pages_are_disjoint_and_tile_what_the_budget_covers(
    n: int, pages: int, outliers: int, chunk: int, dense: int
) -> None:
    """Of shadowkv: what attention reads, for each row and head."""
    size = 4
    pages = max(pages, -(-outliers * chunk // size) + (4 * chunk - 1) // size + 3)  # the least that is accepted
    engine = tiny_engine(f"shadowkv:rank=5,budget={pages * size},chunk={chunk},outliers={outliers}")
    kv, prompts = engine.executor.kv, engine.seams.codec.prompts  # type: ignore[attr-defined]
    always, seen = kv.pages_read, []

    def watched(chosen: torch.Tensor, batch: Any) -> torch.Tensor:
        logical = always(chosen, batch)
        for i, row in enumerate(batch.sparse_rows.tolist()):
            position, eligible = int(batch.positions[row]), int(batch.eligible[row])
            apart = prompts.of(batch.spans[batch.row_spans[row]].request.id).outliers  # [layers, heads, pages]
            for head, read in enumerate(logical[i].tolist()):
                mine = [p for p in read if p != NEVER]
                last = position // size
                assert len(mine) == len(set(mine)) == min(pages, last + 1)
                assert set(mine) <= set(range(last + 1)) and set(range(eligible, last + 1)) <= set(mine)
                assert (last + 1 - eligible) * size >= min(4 * chunk, position + 1)
                marked = apart[:, head, :eligible].all(0)  # of every layer; which layer this is, is not said
                assert set(marked.nonzero()[0].tolist()) <= set(mine)
                seen.append(len(mine) == last + 1)
        return logical

    kv.pages_read = watched
    more = {"dense_until": dense} if dense < n else {}
    scored(engine, make_request(engine, "r", text(n), SCORED, **more))
    assert seen or n + NEW <= 5 * size + 4 * chunk


# -- summaries

SUMMARISED = [
    "quest:budget=16,skip_layers=0,score=bound",
    "quest:budget=16,skip_layers=0,score=mean_std,chunk=2",
    "quest:budget=16,skip_layers=0",
    "shadowkv:rank=4,budget=24,chunk=2,outliers=2",
    "shadowkv:rank=4,budget=24,chunk=2,outliers=2,score=codes",
    "infinigen:alpha=3,budget=16,skip_layers=1",
]
NATIVE = [
    "quest:budget=48,skip_layers=0,score=bound",
    "quest:budget=48,skip_layers=0,score=mean_std,chunk=8",
    "quest:budget=48,skip_layers=0",
    "shadowkv:rank=4,budget=96,chunk=8,outliers=2",
]


def check_summaries(engine: Engine, request: Request) -> int:
    """Of the pages that rows of a running request may leave unread: what is kept is what their keys give now."""
    kv: Any = engine.executor.kv  # type: ignore[attr-defined]
    selector: Any = engine.seams.selector
    eligible = max(0, request.computed - selector.window) // kv.page_size
    if request.computed <= request.dense_until or not eligible:
        return 0
    pages = torch.tensor(request.table.ids[:eligible])
    for layer in range(getattr(selector, "rule", None) is not None, kv.geometry.num_layers):
        found, want = kept_of(selector, kv, layer, pages)
        torch.testing.assert_close(found, want, rtol=1e-6 if want.dtype is torch.float64 else 1e-5, atol=1e-6)
    return eligible


def kept_of(selector: Any, kv: Any, layer: int, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is kept of physical pages, and the definition applied to their keys."""
    at, keys = layer * kv.pages_per_layer + pages, kv.keys(layer, pages)
    if hasattr(selector, "rule"):
        turned = keys.transpose(1, 2) @ selector.keys.basis[layer].to(keys.dtype)
        return selector.keys.data[at], turned.to(selector.keys.data.dtype)
    kept = selector.summaries
    if kept.kind == "codes":
        found = codes(keys)
        return unpacked(kept.data[at], kv.head_dim, kv.page_size).to(found.dtype), found
    chunk = kept.chunk or kv.page_size
    want = landmarks(keys, chunk) if kept.kind == "landmarks" else summary(keys, kept.kind, chunk)
    return kept.data[at][..., : kv.head_dim], want.to(kept.data.dtype)


@pytest.mark.parametrize("spec", [*SUMMARISED, *(NATIVE if isas() else [])])
def test_summaries_are_those_of_the_keys_whatever_the_chunks_and_whoever_had_the_page_before(spec: str) -> None:
    """Few pages, so that they are used again; shared prefixes, forks that copy pages as they write, preemption,
    and drafts that are taken back."""
    kernels = KERNELS[-1] if spec in NATIVE else "torch"
    reached = []

    @examples(15)
    @given(
        st.lists(st.tuples(st.integers(1, 3), st.integers(5, 90)), min_size=2, max_size=4),
        st.sampled_from([3, 7, 64]), st.booleans(), st.booleans(), st.booleans(),
    )  # fmt: skip
    def check(prompts: Sequence[tuple[int, int]], tokens: int, caching: bool, forks: bool, drafts: bool) -> None:
        shape = sizes(kernels, 9)
        use = [spec, *(["ngram:tokens=3,min_n=1,max_n=2"] if drafts else [])]
        engine = tiny_engine(
            *use, **shape, max_num_batched_tokens=tokens, enable_prefix_caching=caching, max_num_seqs=3
        )
        requests = [make_request(engine, f"r{i}", text(n, k), GREEDY) for i, (k, n) in enumerate(prompts)]
        if forks:
            twin = make_request(engine, "twin", requests[0].prompt, GREEDY)
            twin.fork_of = requests[0]
            requests.append(twin)
        for r in requests:
            engine.add(r)
        while engine.busy:
            engine.step()
            engine.check()
            reached.append(sum(check_summaries(engine, r) for r in engine.scheduler.running))

    check()
    assert any(reached)


# -- physical pages

LOSSY = [*SUMMARISED, "sink-window:sink=4,window=8"]


@examples(20)
@given(st.sampled_from(LOSSY), st.permutations(range(48)), st.permutations(range(4)))
def test_text_depends_neither_on_which_pages_hold_it_nor_on_the_order_of_requests(
    spec: str, order: list[int], place: list[int]
) -> None:
    prompts = [text(30 + 5 * i, 7 + i) for i in range(4)]
    engine = tiny_engine(spec, pages=48, enable_prefix_caching=False)
    engine.pool.allocate(48)
    engine.pool.release(order)  # and so they are handed out from its end
    requests = [make_request(engine, f"r{i}", p, GREEDY) for i, p in enumerate(prompts)]
    run_staggered(engine, [requests[i] for i in place], range(4))
    want = tiny_engine(spec, pages=48, enable_prefix_caching=False)
    assert [r.output for r in requests] == run_all(want, prompts, GREEDY)
    finish(engine)
