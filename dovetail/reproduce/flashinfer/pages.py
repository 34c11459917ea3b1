"""Pages anywhere in memory against contiguous KV (FlashInfer, appendix B)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

import numpy as np

from dovetail.bench.interleave import Interleaved
from dovetail.bench.kernels.attention import GROUPED, PAGE, Attention, Heads, Kernels, KVPool, Pages, Request
from dovetail.bench.rounds import Ratio
from dovetail.bench.verdict import Bar, Looks, decide, decide_exact
from dovetail.host.lazy_torch import torch
from dovetail.ops.attention.paged import PagedAttention, Shape
from dovetail.reproduce.claim import Claim, Experiment
from dovetail.reproduce.flashinfer.effort import Effort

SAME_BITS = "scattered pages, the same bits"
SIZES = (16, 8, 1)  # tokens of a page
ROWS = 512  # of a prefill
CLOSE = Bar(0.9, "within 10 % of contiguous")  # in speed

_FIGURE_12 = "appendix B, figure 12 (32/32 d128, pages of 1 token, A100 and H100): "
_IN_PLACE = "Pages of 16 tokens are whole tiles of the kernels, which are 2 KiB or more each and read in place."
_GATHERED = (
    "Pages that are no multiple of 16 tokens are gathered into tiles as they are read, contiguous ones as well, "
    "and that costs far more than where they lie. The GPU's kernels gather too, but beside the arithmetic."
)


def experiment(effort: Effort, kernels: Kernels) -> Experiment:
    names = [SAME_BITS]
    for heads in effort.page_heads:
        names += [*(_decode(size, heads) for size in SIZES), _prefill(heads)]
    return Experiment("pages", tuple(names), partial(measure, effort, kernels))


def measure(effort: Effort, kernels: Kernels) -> Iterator[Claim]:
    """Pages in random order against one page that holds everything."""
    yield _same_bits(kernels)
    for heads in effort.page_heads:
        yield from _decodes(heads, effort, kernels)
        yield _prefills(heads, effort, kernels)


def _decode(size: int, heads: Heads) -> str:
    return f"scattered pages of {size}, decode, {heads}"


def _prefill(heads: Heads) -> str:
    return f"scattered pages of {PAGE}, prefill, {heads}"


def _same_bits(kernels: Kernels) -> Claim:
    heads, tokens, rows = GROUPED[0], 1000, 4
    random = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1008, heads.kv, heads.dim, generator=random).to(torch.bfloat16) for _ in range(2))
    q = torch.randn(rows, heads.query, heads.dim, generator=random)
    found = {}
    for size in (len(k), *SIZES):
        order = torch.randperm(len(k) // size, generator=random)
        places = torch.argsort(order)[: -(-tokens // size)]
        engine = PagedAttention(Shape(heads.query, heads.kv, heads.dim, size), threads=kernels.threads)
        engine.plan([0, rows], [0, len(places)], places, [tokens - (len(places) - 1) * size])
        found[size] = engine.run(q, *(t.unflatten(0, (-1, size))[order] for t in (k, v)))
    same = [size for size in SIZES if torch.equal(found[size], found[len(k)])]
    return Claim(
        SAME_BITS,
        f"{rows} rows behind {tokens} tokens, {heads}, bf16 KV; baseline: one page",
        "section 3.2.1: once loaded, sparse and dense KV take the same path (no figures)",
        f"equal to the last bit with pages of {', '.join(map(str, same)) or 'no size'} tokens",
        "None: where a token lies does not enter the arithmetic.",
        bar=decide_exact(f"equal to the last bit with pages of {', '.join(map(str, SIZES))}", same == list(SIZES)),
    )


def _decodes(heads: Heads, effort: Effort, kernels: Kernels) -> Iterator[Claim]:
    """Scattered tiles against contiguous tiles, and gathered pages against gathered contiguous KV."""
    layouts = [
        *(Pages(size, size % 16 == 0) for size in SIZES),
        *(Pages(effort.context, t) for t in (True, False)),
    ]
    steps = {layout: _attention(heads, layout, effort, kernels) for layout in layouts}
    timed = Interleaved([s.run for s in steps.values()], kernels.threads)
    in_tiles = partial(timed.ratios, layouts.index(Pages(effort.context)), layouts.index(Pages()))
    decision = decide(CLOSE, Looks(effort.rounds), in_tiles)  # both have as many layers
    seconds = {
        layout: [t / steps[layout].layers for t in run]
        for layout, run in zip(layouts, timed.readings, strict=True)
    }
    tiles = seconds[Pages(effort.context)]
    for layout in layouts[: len(SIZES)]:
        ratio = Ratio.of(seconds[Pages(effort.context, layout.tiled)], seconds[layout])
        rate = steps[layout].bytes / statistics.median(seconds[layout]) / 1e9
        ours = f"{ratio} times as fast; {rate:.1f} GB/s beside a raw read of {statistics.median(timed.reads):.1f}"
        if not layout.tiled:
            ours += f"; {Ratio.of(tiles, seconds[layout])} times as fast as contiguous tiles"
        yield Claim(
            _decode(layout.size, heads),
            f"a row behind {effort.context} tokens, bf16 KV, {kernels.threads} threads; baseline: one page, "
            f"{'in tiles' if layout.tiled else 'token by token'}",
            _FIGURE_12 + "within 1 % of contiguous KV",
            ours,
            _IN_PLACE if layout.tiled else _GATHERED,
            ratio=ratio,
            paper_ratio=(0.99, 1.0),
            bar=decision if layout.tiled else None,
        )


def _prefills(heads: Heads, effort: Effort, kernels: Kernels) -> Claim:
    rows = min(ROWS, effort.context)
    layouts = (Pages(effort.context), Pages())
    contiguous, scattered = (_attention(heads, layout, effort, kernels, rows) for layout in layouts)
    timed = Interleaved([contiguous.run, scattered.run], kernels.threads)
    decision = decide(CLOSE, Looks(effort.rounds), partial(timed.ratios, 0, 1))
    dense, sparse = timed.readings
    ratio = Ratio.of(dense, sparse)
    rate = scattered.operations * scattered.layers / statistics.median(sparse) / 1e9
    return Claim(
        _prefill(heads),
        f"the last {rows} rows of {effort.context} tokens, bf16 KV, {kernels.threads} threads; baseline: one page",
        _FIGURE_12 + "about 10 % slower than contiguous KV",
        f"{ratio} times as fast; {rate:.0f} GFLOP/s",
        "There contiguous KV is loaded by a unit that cannot follow a page table; here the same loads read both, "
        "and arithmetic is the limit.",
        ratio=ratio,
        paper_ratio=(0.9, 0.9),
        bar=decision,
    )


def _attention(heads: Heads, layout: Pages, effort: Effort, kernels: Kernels, rows: int = 1) -> Attention:
    """The last rows of one request, whose pages lie in random order."""
    context, by_memory = effort.context, rows == 1 and layout.tiled
    order = np.random.default_rng(0).permutation(context // layout.size).tolist()
    # Where arithmetic or gathering is the limit, fewer layers show the same in less time.
    pool = KVPool(heads, "bf16", context, effort.cold // (1 if by_memory else 8), pages=layout)
    return Attention(pool, [Request(context - rows, context, order)], context, kernels)
