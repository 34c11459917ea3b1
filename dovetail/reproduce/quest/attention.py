"""Self-attention alone, with the estimate and the choice of pages (Quest, section 4.3)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from dovetail.bench.interleave import Interleaved
from dovetail.bench.kernels.attention import PAGE, Attention, Kernels, KVPool, Request
from dovetail.bench.kernels.sparse_attention import Choosing, SparseAttention, drift
from dovetail.bench.rounds import Ratio
from dovetail.bench.verdict import Decision, Looks, at_least, decide
from dovetail.host.lazy_torch import torch
from dovetail.reproduce.claim import Claim, Experiment
from dovetail.reproduce.quest.effort import KIB, Effort

PUBLISHED = (32 * KIB, 2048, 7.03)  # tokens, budget, times as fast
OF_RAW_READ = 0.8
PARTS = 5  # times that choosing and reading are timed apart

_PAPER = "abstract and section 4.3 (Llama-2-7B's 32/32 heads, fp16, RTX 4090, against FlashInfer): "
_BYTES = (
    "Memory is the limit on both sides: what is not read is what is gained. Grouped heads cost nothing: each KV "
    "head has a list of its own, and the estimate reads one summary for a group."
)


def experiment(effort: Effort, kernels: Kernels) -> Experiment:
    names = [name for context in effort.contexts for name in (_speed(context), _share(context))]
    names.append(_by_codes(effort))
    return Experiment("self-attention", tuple(names), partial(measure, effort, kernels))


def measure(effort: Effort, kernels: Kernels) -> Iterator[Claim]:
    """Each context by itself, because the KV of the longest takes most of a gigabyte."""
    for context in effort.contexts:
        yield from _Comparison.of(context, effort, kernels).claims()
    found = _Comparison.of(_published(effort), effort, kernels, "codes")
    yield replace(next(found.claims()), name=_by_codes(effort))


def _by_codes(effort: Effort) -> str:
    """The choice by codes, which finds what reading everything finds; the bound does not."""
    return f"{_speed(_published(effort))}, chosen by codes"


def _published(effort: Effort) -> int:
    """The published context, or the first one if that is left out."""
    return PUBLISHED[0] if PUBLISHED[0] in effort.contexts else effort.contexts[0]


def _speed(context: int) -> str:
    return f"self-attention, {context // KIB}K"


def _share(context: int) -> str:
    return f"estimate and choice, {context // KIB}K"


@dataclass(frozen=True)
class _Comparison:
    """Dense and sparse attention in turns. of_raw: the speed at which each reads, as a part of a raw read."""

    context: int
    setting: str
    ratio: Ratio
    of_raw: tuple[float, float]
    raw: float
    bytes: float  # how many times fewer bytes are read
    seconds: tuple[float, float]  # a layer's
    parts: dict[str, float]
    bar: Decision | None  # at the published setting

    @classmethod
    def of(cls, context: int, effort: Effort, kernels: Kernels, kind: str = "bound") -> _Comparison:
        torch.manual_seed(0)
        pool = KVPool(effort.heads, "bf16", context, effort.cold)
        drift(pool)
        requests = [Request(context - 1, context, range(context // PAGE))]
        budget = effort.attention_budget
        dense = Attention(pool, requests, context, kernels)
        sparse = SparseAttention(pool, requests, context, kernels, choosing=Choosing(budget, kind))
        timed = Interleaved([dense.run, sparse.run], kernels.threads)
        bar = None
        if (context, budget, kind) == (*PUBLISHED[:2], "bound"):
            bar = decide(at_least(PUBLISHED[2]), Looks(effort.rounds), partial(timed.ratios, 0, 1))
        timed.until(effort.rounds)
        (slow, fast), reads = timed.readings, timed.reads
        gigabytes = [step.bytes * step.layers / 1e9 for step in (dense, sparse)]
        fractions = [
            statistics.median(size / time / read for time, read in zip(times, reads, strict=True))
            for size, times in zip(gigabytes, (slow, fast), strict=True)
        ]
        return cls(
            context,
            f"a row behind {context} tokens, budget {budget}, {effort.heads}, bf16 KV, {dense.layers} layers of "
            f"it in turn, {kernels.threads} threads; baseline: the dense kernel",
            Ratio.of(slow, fast),
            (fractions[0], fractions[1]),
            statistics.median(reads),
            gigabytes[0] / gigabytes[1],
            (statistics.median(slow) / dense.layers, statistics.median(fast) / sparse.layers),
            sparse.seconds(PARTS),
            bar,
        )

    def claims(self) -> Iterator[Claim]:
        dense, sparse = (f"{seconds * 1e6:.0f} us" for seconds in self.seconds)
        published = self.context == PUBLISHED[0]
        yield Claim(
            _speed(self.context),
            self.setting,
            _PAPER + ("7.03 times as fast" if published else "no figure at hand for this length"),
            f"{self.ratio} times as fast, of {self.bytes:.2f} that the bytes allow; a layer takes {sparse}, not "
            f"{dense}, at {self.of_raw[1]:.0%} and {self.of_raw[0]:.0%} of a raw read of {self.raw:.1f} GB/s",
            _BYTES,
            ratio=self.ratio,
            paper_ratio=(PUBLISHED[2], PUBLISHED[2]) if published else None,
            bar=self.bar,
        )
        choosing, reading = self.parts["pick"], self.parts["attend"]
        yield Claim(
            _share(self.context),
            self.setting,
            _PAPER + "the choice takes 5 to 10 us",
            f"{choosing / (choosing + reading):.0%} of the time: {choosing * 1e6:.0f} us, and "
            f"{reading * 1e6:.0f} us to read what was chosen",
            "Summaries are read from memory like the pages themselves; the choice among the scores is a few of "
            "these microseconds.",
        )
