"""Attention over a shared prefix, read once for all or once for each request (FlashInfer, section 3.1.2)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from dovetail.bench.interleave import Interleaved
from dovetail.bench.kernels.attention import PAGE, Attention, Kernels, KVPool, Request
from dovetail.bench.rounds import Ratio
from dovetail.bench.verdict import decide_exact
from dovetail.reproduce.claim import Claim, Experiment
from dovetail.reproduce.flashinfer.effort import Effort, Prefix

OWN = 128  # tokens of each request, as in the paper's table 5


def experiment(effort: Effort, kernels: Kernels) -> Experiment:
    names = tuple(_name(prefix) for prefix in effort.prefixes)
    return Experiment("attention on a shared prefix", names, partial(measure, effort, kernels))


def measure(effort: Effort, kernels: Kernels) -> Iterator[Claim]:
    """Attention alone, for each shape."""
    for prefix in effort.prefixes:
        yield _claim(prefix, effort, kernels)


def _name(prefix: Prefix) -> str:
    return f"shared prefix, {prefix}"


def _requests(prefix: Prefix) -> list[Request]:
    """The last row of each, on the shared pages and its own."""
    shared, own, length = prefix.shared // PAGE, OWN // PAGE, prefix.shared + OWN
    return [
        Request(length - 1, length, [*range(shared), *range(shared + i * own, shared + (i + 1) * own)])
        for i in range(prefix.requests)
    ]


def _claim(prefix: Prefix, effort: Effort, kernels: Kernels) -> Claim:
    requests, tokens = _requests(prefix), prefix.shared + prefix.requests * OWN
    pool = KVPool(prefix.heads, "bf16", tokens, effort.cold)
    once = Attention(pool, requests, tokens, kernels)
    each = Attention(pool, requests, tokens, kernels, cascade=False)
    fast, slow = Interleaved([once.run, each.run], kernels.threads).until(effort.rounds)
    ratio = Ratio.of(slow, fast)
    exact = (once.stats["tokens_read"], each.stats["tokens_read"]) == (tokens, sum(r.stop for r in requests))
    return Claim(
        _name(prefix),
        f"a decode step of attention, bf16 KV, {OWN} more tokens of each one's own, {kernels.threads} threads; "
        "baseline: each request reads the same pages by itself",
        "the authors' post of 2024-02-02 on flashinfer.ai (H100 SXM): up to 26 times as fast as without sharing; "
        "table 5 of the paper: long prefixes (32k) and large batches (64) gain (its figures are not at hand)",
        f"{ratio} times as fast; {once.bytes / 1e6:.2f} MB of KV a layer instead of {each.bytes / 1e6:.2f}, "
        f"{each.bytes / once.bytes:.2f} times fewer",
        "A prefix that is read again comes from this CPU's caches, faster than from memory, so reading it once "
        "saves less; and where several query heads share a KV head, both ways are bound by arithmetic.",
        ratio=ratio,
        bar=decide_exact("the prefix is read once and the rest by each, to the token", exact),
    )
