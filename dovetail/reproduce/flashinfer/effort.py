"""How much of the reproduction is run."""

from __future__ import annotations

from dataclasses import dataclass

from dovetail.bench.kernels.attention import GROUPED, MULTI_HEAD, Heads
from dovetail.reproduce import MODEL

MIB = 1 << 20


@dataclass(frozen=True)
class Prefix:
    """`requests` that share a prompt of `shared` tokens, a multiple of 128."""

    heads: Heads
    shared: int
    requests: int

    def __str__(self) -> str:
        return f"{self.shared} tokens, {self.requests} requests, {self.heads}"


@dataclass(frozen=True)
class Effort:
    """rounds: of each comparison of attention. generations: of parallel generation, with and without the cascade.

    cold: bytes of KV that a timed run goes through. streams: values of n in parallel generation by `model`.
    context: tokens behind which variants and pages are measured, a multiple of 32. shorten: what lengths of the
    balance are divided by.
    """

    rounds: int
    generations: int
    cold: int
    streams: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    prefixes: tuple[Prefix, ...]
    context: int
    page_heads: tuple[Heads, ...]
    shorten: int = 1
    model: str = MODEL


_SMALL, _MIDDLE = GROUPED
_STREAMS = (1, 2, 4, 8, 16, 32)
_PREFIXES = (Prefix(_SMALL, 2048, 32), Prefix(MULTI_HEAD, 2048, 32), Prefix(_MIDDLE, 2048, 32))
_LONG = Prefix(_SMALL, 32768, 64)
EFFORTS = {
    "quick": Effort(15, 4, 128 * MIB, (1, 4, 32), 1032, 24, _PREFIXES[:1], 4096, (_SMALL,)),
    "default": Effort(31, 8, 256 * MIB, _STREAMS, 1032, 32, _PREFIXES[:2], 4096, (_SMALL, MULTI_HEAD)),
    "full": Effort(
        61, 15, 512 * MIB, _STREAMS, 2056, 64, (*_PREFIXES, _LONG), 16384, (_SMALL, _MIDDLE, MULTI_HEAD)
    ),
}
