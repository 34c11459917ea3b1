"""Attention in which each KV head reads the pages that score highest. They are chosen anew in each layer."""

from __future__ import annotations

import collections
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from dovetail.bench.kernels.attention import Attention, Kernels, KVPool, Request
from dovetail.core.pages import pages_for
from dovetail.host.lazy_torch import torch
from dovetail.ops.cpu import padded
from dovetail.ops.memory import ELEMENTS, zeros
from dovetail.ops.pages import num_vectors
from dovetail.runtime.store import TiledStore

SPAN = 16  # pages
NOISE = 0.5  # deviation of a token's key from its page's mean, relative to that mean


@dataclass(frozen=True)
class Choosing:
    """A row reads `budget` tokens for each KV head: its own page, the page before it, and pages chosen by
    summaries of the given `kind` (`dovetail.ops.pages`)."""

    budget: int
    kind: str = "bound"


def drift(pool: KVPool) -> None:
    """Give the keys of `pool` a mean that drifts from page to page, in straight lines between random points SPAN
    pages apart. Then neighbouring pages are alike, as in text, and no two pages are the same."""
    assert isinstance(pool.k, TiledStore)
    keys = pool.k.data  # the dimension of tokens is the one before the last, in tiles of both types
    shape = (*keys.shape[1:-2], 1, keys.shape[-1])
    last = torch.randn(shape)
    for at in range(0, len(keys), SPAN):
        part = keys[at : at + SPAN]
        first, last = last, torch.randn(shape)
        along = (torch.arange(len(part)) / SPAN).view(-1, *[1] * len(shape))
        part.mul_(NOISE).add_(torch.lerp(first, last, along).to(part.dtype))


class SparseAttention(Attention):
    """A step of one row per request: over the summaries of all pages, and then over the chosen pages."""

    _dense = False
    _operations = 2

    def __init__(
        self, pool: KVPool, requests: Sequence[Request], tokens: int, kernels: Kernels, *, choosing: Choosing
    ) -> None:  # fmt: skip
        self.choosing = choosing
        self.summaries: NDArray[Any]
        super().__init__(pool, requests, tokens, kernels)
        size = pool.pages.size
        listed = min(pages_for(choosing.budget, size), pages_for(tokens, size))
        self._listed = len(requests) * listed * size
        self._summarised = sum(max(0, r.stop - size) // size for r in requests)

    def _record(self, pages: int) -> None:
        program, choosing, pool = self.program, self.choosing, self.pool
        size, heads = pool.pages.size, pool.heads
        dtype = ELEMENTS[pool.k.element]
        vectors = num_vectors(choosing.kind, size, 0, dtype.itemsize)
        self.summaries = zeros((self.layers * pages, heads.kv, vectors, padded(heads.dim)), dtype)
        at = self.summaries.ctypes.data
        chosen = program.choosing(0, size, pages_for(choosing.budget, size), -1, False)
        program.summarise(choosing.kind, self.layers, list(range(pages)), at, vectors)
        for layer in range(self.layers):
            program.pick(chosen, self._q, layer, choosing.kind, at, vectors)
            program.attend((self._q, self._out, layer, 0, chosen), 0, 0, [])

    @property
    def bytes(self) -> int:
        """Bytes of summaries, K and V that one layer reads."""
        return self._summarised * self.summaries[0].nbytes + self._listed * self.pool.token_bytes

    def seconds(self, rounds: int) -> dict[str, float]:
        """Median seconds of choosing (`pick`) and of reading (`attend`) in one layer, timed apart."""
        samples: dict[str, list[float]] = collections.defaultdict(list)
        for _ in range(rounds):
            total: collections.Counter[str] = collections.Counter()
            for name, seconds in self.program.profile(0, self.layers * self._operations):
                total[name] += seconds
            for name, seconds in total.items():
                samples[name].append(seconds / self.layers)
        return {name: statistics.median(some) for name, some in samples.items()}
