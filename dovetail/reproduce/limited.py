"""Decoding of a batch under one limit of device memory, with and without a technique."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from dovetail import hub
from dovetail.bench.engine.limited import Batch, Decoded
from dovetail.bench.rounds import Ratio, Turns, by_round
from dovetail.bench.verdict import Bar, Decision, Looks, decide
from dovetail.core.pages import pages_for
from dovetail.llm import LLM
from dovetail.models import geometry, open_checkpoint
from dovetail.reproduce import MODEL
from dovetail.reproduce.needles import Needles
from dovetail.reproduce.runner import must_have_acted
from dovetail.runtime.kv import bytes_per_token
from dovetail.text.corpus import DEFAULT, corpus

BLOCK, DTYPE = 16, "bf16"  # of KV
DOUBLINGS = 1  # of the rounds where a bar is undecided: answers must last as long
BATCHED = 256  # tokens of a step: what a step writes takes device memory too
MEMORY, CONTEXT = 402_000_000, 7000  # bytes, tokens of a prompt
AMOUNTS = {  # rounds and their steps, lengths of needles and trials
    "quick": (8, 3, "2048", 2),
    "default": (9, 8, "2048,4096", 3),
    "full": (9, 12, "1024,2048,4096,7424", 9),
}
WAITING = "the same engine without technique and slow tier, where the other requests wait"  # `Side(())`


@dataclass(frozen=True)
class Limit:
    """`requests` prompts of `context` tokens of text at once, each answered with `tokens` tokens. memory: bytes of
    the device for KV and for what techniques keep. link: GB/s of a slow tier in the host's memory. Each side has
    `rounds` rounds of `steps` timed steps, in turns."""

    model: str
    memory: int
    context: int
    requests: int
    rounds: int
    steps: int
    tokens: int = 400
    link: float = 25.0

    def __str__(self) -> str:
        return (
            f"{self.model}, {self.requests} prompts of {self.context} tokens at once, bf16 KV, "
            f"{self.memory / 1e6:.0f} MB of device memory for KV and what is kept beside it"
        )

    @property
    def pages(self) -> int:
        return self.requests * pages_for(self.context + self.tokens, BLOCK)

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of a token over all layers."""
        return bytes_per_token(geometry(open_checkpoint(hub.resolve(self.model)).config), DTYPE, BLOCK)

    def tier(self, backend: str) -> str:
        """The slow tier of a `Side`, in words."""
        link = f"memory behind an emulated link of {self.link:.0f} GB/s"
        return f"slow tier: {link if backend == 'host' else 'this disk'}"


@dataclass(frozen=True)
class Side:
    """Techniques, and the slow tier: none, "host" or "disk"."""

    use: tuple[str, ...]
    backend: str = ""

    def start(self, limit: Limit) -> LLM:
        """An engine. CapacityError if the limit is too low for it."""
        options: dict[str, Any] = {}
        if self.backend:
            size = limit.pages * BLOCK * limit.token_bytes
            options = {"kv_offloading_size": size, "kv_offloading_backend": self.backend}
        if self.backend == "host":
            options["emulate_link"] = limit.link
        return LLM(
            limit.model, use=self.use, kv_cache_dtype=DTYPE, kv_memory=limit.memory, block_size=BLOCK,
            max_model_len=limit.context + limit.tokens, max_num_seqs=limit.requests,
            max_num_batched_tokens=BATCHED, enable_prefix_caching=False, **options,
        )  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Tokens per second of ours to the baseline's, the median round of each, and whether a bar on it is met."""

    ratio: Ratio
    baseline: Decoded
    ours: Decoded
    decision: Decision | None

    def __str__(self) -> str:
        a, b = self.baseline, self.ours
        return (
            f"{self.ratio} times as fast: {b.rate:.0f} tokens/s of {b.batch} requests instead of {a.rate:.0f} of "
            f"{a.batch}, {b.bytes_in / 1e6:.2f} MB a token from the slow tier instead of {a.bytes_in / 1e6:.2f}"
        )


@dataclass(frozen=True)
class Effort:
    """limit: the batch and its device memory. needles: the grid. use: the technique in both."""

    limit: Limit
    needles: Needles
    use: str

    @classmethod
    def by_name(cls, requests: int, use: str, memory: int = MEMORY) -> dict[str, Self]:
        """The effort called `name`. requests: those of the batch. memory: bytes of the device."""
        return {
            name: cls(
                Limit(MODEL, memory, CONTEXT, requests, rounds, steps),
                Needles(MODEL, lengths, "10,50,90", trials),
                use,
            )
            for name, (rounds, steps, lengths, trials) in AMOUNTS.items()
        }


def compare(limit: Limit, baseline: Side, ours: Side, bar: Bar | None = None) -> Comparison:
    """Decode the same prompts on both sides in turns. RuntimeError if a technique of ours did nothing."""
    engines = [side.start(limit) for side in (baseline, ours)]
    text = prompts(engines[0], limit)
    batches = [Batch(llm, text, limit.tokens) for llm in engines]
    for batch in batches:
        batch.settle()
    turns = Turns([partial(batch.decode, limit.steps) for batch in batches])
    looks = Looks(limit.rounds, DOUBLINGS)
    decision = decide(bar, looks, lambda rounds: _ratios(*turns.until(rounds))) if bar is not None else None
    turns.until(limit.rounds)
    must_have_acted(engines[1])
    for batch in batches:
        batch.close()
    slow, fast = turns.readings
    return Comparison(Ratio.of_rounds(_ratios(slow, fast)), _median(slow), _median(fast), decision)


def prompts(llm: LLM, limit: Limit) -> list[list[int]]:
    """Text that every Python ships, one part after the other."""
    cut = range(0, limit.requests * limit.context, limit.context)
    text = corpus(DEFAULT).text[: 8 * cut.stop]
    tokens = llm.tokenizer.encode(text, add_special_tokens=False)
    return [[tokens[(at + i) % len(tokens)] for i in range(limit.context)] for at in cut]


def _ratios(slow: Sequence[Decoded], fast: Sequence[Decoded]) -> list[float]:
    return by_round([decoded.rate for decoded in fast], [decoded.rate for decoded in slow])


def _median(some: Sequence[Decoded]) -> Decoded:
    return sorted(some, key=lambda d: d.rate)[len(some) // 2]
