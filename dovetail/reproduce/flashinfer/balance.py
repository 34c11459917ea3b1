"""Load-balanced scheduling: long KV is cut, and every unit gets the same work (FlashInfer, section 3.3.1).

The baseline has the same kernels and threads but does not cut. A piece is a request and KV head, so it is a whole
request if there is one KV head. Pieces are given out longest first, and idle threads take what others have left.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from dovetail.bench.interleave import Interleaved
from dovetail.bench.kernels.attention import GROUPED, PAGE, Attention, Heads, Kernels, KVPool, Request
from dovetail.bench.rounds import Ratio
from dovetail.bench.verdict import Bar, Looks, at_least, decide
from dovetail.reproduce.claim import Claim, Experiment
from dovetail.reproduce.flashinfer.effort import Effort

PIECES = {"per request": Heads(4, 1, 256), "per KV head": GROUPED[0]}  # of Gemma 3 270M, and SmolLM2-135M
NOISE = 0.95  # of the baseline's speed

_FIGURE_8 = "section 4.2, figure 8 (decode, batch of 16, A100 and H100): "
_AHEAD = _FIGURE_8 + "more of the bandwidth than FlashAttention, because of the scheduler (a plot without numbers)"
_WHY = (
    "The paper's GPUs have over a hundred units to leave idle. With {threads} threads a piece holds up others "
    "only where it is more than a thread's share, and one core alone reads more than half of what two do."
)


@dataclass(frozen=True)
class Load:
    """Lengths of a batch, and what the paper says about such a batch. skewed: one request is most of the work."""

    name: str
    what: str
    lengths: tuple[int, ...]
    paper: str
    theirs: tuple[float, float] | None = None
    skewed: bool = False


def loads(shorten: int) -> list[Load]:
    """The paper's distributions (section 4.2, G.3), and one request that is most of the work."""
    random = np.random.default_rng(0)
    ranks = 1 / np.arange(1, 17)
    batches: dict[str, Iterable[int]] = {
        "constant": [1024] * 16,
        "uniform": random.integers(512, 1025, 16),
        "zipf": random.permutation(ranks / ranks.mean() * 1024),
        "long": random.integers(4096, 16385, 8),
        "one-long": [65536] + [100] * 31,
    }
    of = {name: tuple(max(1, int(n) // shorten) for n in lengths) for name, lengths in batches.items()}
    even = _FIGURE_8 + "of equal lengths no gain by the scheduler is claimed"
    table = (
        "table 6 (Llama 3.1 8B, H100, SGLang, prompts of U(4096, 16384)): 8.63 ms a token with the scheduler, "
        "13.89 ms without, of the whole model"
    )
    alone = "not measured; algorithm 1 cuts what is longer than a unit's share"
    return [
        Load("constant", "16 requests of 1024 tokens", of["constant"], even),
        Load("uniform", "16 requests of U(512, 1024) tokens", of["uniform"], _AHEAD),
        Load("zipf", "16 requests by Zipf's law, 1024 tokens on average", of["zipf"], _AHEAD),
        Load("long", "8 requests of U(4096, 16384) tokens", of["long"], table, (13.89 / 8.63, 13.89 / 8.63)),
        Load("one-long", "a request of 65536 tokens beside 31 of 100", of["one-long"], alone, skewed=True),
    ]


def experiment(effort: Effort, kernels: Kernels) -> Experiment:
    names = tuple(_name(load, pieces) for load in loads(effort.shorten) for pieces in PIECES)
    return Experiment("load-balanced scheduling", names, partial(measure, effort, kernels))


def measure(effort: Effort, kernels: Kernels) -> Iterator[Claim]:
    """The planner against uncut work, for each load and both kinds of pieces."""
    for load in loads(effort.shorten):
        for pieces in PIECES:
            yield _claim(load, pieces, effort, kernels)


def _name(load: Load, pieces: str) -> str:
    return f"balance, {load.name}, {pieces}"


def _claim(load: Load, pieces: str, effort: Effort, kernels: Kernels) -> Claim:
    heads = PIECES[pieces]
    requests, tokens = decodes(load.lengths)
    pool = KVPool(heads, "bf16", tokens, effort.cold)
    cut = Attention(pool, requests, tokens, kernels)
    whole = Attention(pool, requests, tokens, kernels, split=False)
    timed = Interleaved([cut.run, whole.run], kernels.threads)
    bar = Bar(1.0, "faster") if load.skewed and pieces == "per request" else at_least(NOISE)
    decision = decide(bar, Looks(effort.rounds), partial(timed.ratios, 1, 0))
    fast, slow = timed.readings
    ratio = Ratio.of(slow, fast)
    share = busiest([n for n in load.lengths for _ in range(heads.kv)], kernels.threads)
    rate = cut.bytes * cut.layers / statistics.median(fast) / 1e9
    return Claim(
        _name(load, pieces),
        f"{load.what}, a decode step of attention, {heads}, bf16 KV, {kernels.threads} threads; baseline: uncut, "
        f"a thread {pieces}",
        load.paper,
        f"{ratio} times as fast; uncut, the busiest thread has {share:.2f} times its share; {rate:.1f} GB/s "
        f"beside a raw read of {statistics.median(timed.reads):.1f}",
        _WHY.format(threads=kernels.threads),
        ratio=ratio,
        paper_ratio=load.theirs,
        bar=decision,
    )


def decodes(lengths: Iterable[int]) -> tuple[list[Request], int]:
    """The last row of each request, on its own pages, and the tokens that all pages hold."""
    requests, page = [], 0
    for n in lengths:
        count = -(-n // PAGE)
        requests.append(Request(n - 1, n, range(page, page + count)))
        page += count
    return requests, page * PAGE


def busiest(pieces: Sequence[int], threads: int) -> float:
    """Work of the busiest thread over the mean, if each piece goes to the least busy thread, longest first."""
    work = [0] * threads
    for piece in sorted(pieces, reverse=True):
        work[work.index(min(work))] += piece
    return max(work) / (sum(work) / threads)
