"""Attention over random KV, as a step of the engine runs it: planned once, replayed for layer after layer.

KV is not in the caches: a run goes through as many layers as the pool holds, each of them once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dovetail.core.seams import Variant
from dovetail.host.lazy_torch import torch
from dovetail.ops import cpu
from dovetail.ops.attention.kernel_variant import KernelVariant
from dovetail.ops.cpu import padded
from dovetail.ops.template import with_tables
from dovetail.runtime.store import CodedTiles, FloatStore, TiledStore, store_type, tiles_type

if TYPE_CHECKING:
    from torch import Tensor

PAGE = 16  # tokens
KV_DTYPES = ("bf16", "float32", "fp8", "int8", "int4")
SOME = 1 << 20  # random values, which repeat


@dataclass(frozen=True)
class Heads:
    query: int
    kv: int
    dim: int

    def __str__(self) -> str:
        return f"{self.query}/{self.kv} d{self.dim}"


GROUPED = (Heads(9, 3, 64), Heads(32, 8, 128))  # of SmolLM2-135M and Llama-3-8B
MULTI_HEAD = Heads(32, 32, 128)  # of Llama-2-7B


@dataclass(frozen=True)
class Kernels:
    """An instruction set and how many threads run it."""

    isa: str
    threads: int


@dataclass(frozen=True)
class Pages:
    """How KV lies in memory: tokens of a page, and the layout. That is either the kernels' own tiles (multiples of
    16 tokens), or token by token (NHD), from which tiles are gathered while they are read."""

    size: int = PAGE
    tiled: bool = True


IN_PLACE = Pages()


@dataclass(frozen=True)
class Request:
    """Rows [start, stop) of a sequence, and the pages that hold its first `stop` tokens."""

    start: int
    stop: int
    pages: Sequence[int]


class KVPool:
    """Random K and V: as many layers of `tokens` tokens as fill `size` bytes."""

    def __init__(self, heads: Heads, kind: str, tokens: int, size: int, *, pages: Pages = IN_PLACE) -> None:
        self.heads, self.kind, self.pages = heads, kind, pages
        dtype = store_type(kind)[1]
        self.token_bytes = 2 * tiles_type(dtype).token_bytes(heads.kv, heads.dim, dtype)
        self.tokens = tokens * -(-size // (tokens * self.token_bytes))
        shape = (1, self.tokens, heads.kv, heads.dim)
        self.k: TiledStore | CodedTiles | FloatStore
        self.v: TiledStore | CodedTiles | FloatStore
        if pages.tiled:
            self.k, self.v = tiles_type(dtype).pair(shape, dtype, pages.size)
        else:
            self.k, self.v = (FloatStore(shape, dtype, "cpu") for _ in range(2))
        for store in (self.k, self.v):
            self._fill(store)

    def _fill(self, store: TiledStore | CodedTiles | FloatStore) -> None:
        if isinstance(store, CodedTiles):
            some = min(self.tokens, max(1, SOME // (self.heads.kv * self.heads.dim)) // PAGE * PAGE)
            store.write(0, torch.arange(some), torch.randn(some, self.heads.kv, self.heads.dim))
            data, first = torch.from_numpy(store.array), some // store.page_size
            part = data[:first].clone()
        else:
            data, most = store.data, max(1, SOME // store.data[0].numel())
            part = torch.randn(min(most, len(data)), *data.shape[1:]).to(data.dtype)
        for at in range(0, len(data), len(part)):
            to = data[at : at + len(part)]
            to.copy_(part[: len(to)])


class Attention:
    """A step's attention over all layers of `tokens` tokens for which the pool has room, at most `layers` of
    them."""

    _dense = True  # rows read everything
    _operations = 1  # of the program, for a layer

    def __init__(
        self, pool: KVPool, requests: Sequence[Request], tokens: int, kernels: Kernels, *, layers: int = 1 << 30,
        cascade: bool = True, split: bool = True, variant: KernelVariant | None = None,
    ) -> None:  # fmt: skip
        heads, size = pool.heads, pool.pages.size
        self.pool, self.variant = pool, variant  # a compiled variant lives as long as this
        self.layers = min(layers, pool.tokens // tokens)
        keys = sum((r.start + 1 + r.stop) * (r.stop - r.start) / 2 for r in requests)
        self.operations = 4.0 * heads.query * heads.dim * keys
        self.program = program = cpu.native().Program(kernels.isa, kernels.threads, cascade, split)
        sizes = (tokens // size, size, heads.kv, heads.dim, pool.tokens // size)
        addresses = (pool.k.memory()[0], pool.v.memory()[0], 0, 0)
        program.shape(heads.query, pool.k.layout, pool.kind, addresses, sizes)
        self._q, self._out = (program.slot(heads.query * padded(heads.dim)) for _ in range(2))
        self._record(tokens // size)
        self._plan(requests)

    def _record(self, pages: int) -> None:
        """The operations of all layers of `pages` pages."""
        v = self.variant
        asked = (v.window, v.address, v.params) if v else (0, 0, [])
        for layer in range(self.layers):
            self.program.attend((self._q, self._out, layer, 0, -1), *asked)

    def _plan(self, requests: Sequence[Request]) -> None:
        program = self.program
        program.clear()
        for r in requests:
            dense_until = r.stop if self._dense else 0
            program.add(r.start, r.stop, [0] * r.stop, [], list(r.pages), 0, 1, dense_until)
        program.plan()
        self.stats: dict[str, int] = program.attention_stats()
        program.run(0, 0)
        self.rows = program.num_rows()
        self.q = self._queries(program.view(self._q, self.rows).reshape(-1))
        program.run(0, self._operations)
        check_finite(program, self._out, self.rows, f"attention {self.pool.heads} {self.pool.kind}")

    def _queries(self, memory: np.ndarray) -> Tensor:
        """Scaled queries [rows, heads, padded dim] in the compute type, one after the other."""
        heads = self.pool.heads
        random = torch.Generator().manual_seed(2)
        q = torch.randn(self.rows, heads.query, padded(heads.dim), generator=random)
        scaled = (q * heads.dim**-0.5).flatten()
        if self.pool.kind != "float32":
            memory.view(np.int16)[: len(scaled)] = scaled.to(torch.bfloat16).view(torch.int16).numpy()
        else:
            memory[: len(scaled)] = scaled.numpy()
        return q

    def run(self) -> None:
        """Every layer once."""
        self.program.run(0, self.layers * self._operations)

    def first_layer(self) -> Tensor:
        """What attention over the first layer gives: [rows, heads, dim]."""
        self.program.run(0, self._operations)
        heads = self.pool.heads
        out = torch.from_numpy(self.program.view(self._out, self.rows)[:, : heads.query * heads.dim])
        return out.unflatten(1, (heads.query, heads.dim)).clone()

    @property
    def bytes(self) -> int:
        """Of K and V that one layer reads."""
        return self.stats["tokens_read"] * self.pool.token_bytes


class Unfused:
    """The same step as torch operations on contiguous K and V: scores are a tensor, which the variant changes.

    For requests of one row each and equal lengths, over at most `layers` layers. RuntimeError if the kernels'
    result is another one.
    """

    def __init__(self, fused: Attention, requests: Sequence[Request], variant: Variant, layers: int = 2) -> None:
        pool, heads, length = fused.pool, fused.pool.heads, requests[0].stop
        self.variant = with_tables(variant)
        self.q = fused.q[..., : heads.dim].unflatten(1, (heads.kv, -1)) * heads.dim**-0.5
        self.q_pos = torch.tensor([r.start for r in requests])[:, None, None, None]
        self.k_pos = inside = torch.arange(length)
        self.head = torch.arange(heads.query).view(heads.kv, -1, 1)
        pages = torch.tensor([list(r.pages) for r in requests])
        slots = pages[:, inside // pool.pages.size] * pool.pages.size + inside % pool.pages.size
        k, v = (store.read(0, slots).float().transpose(1, 2).contiguous() for store in (pool.k, pool.v))
        self.layers = min(layers, fused.layers)
        self.kv = [(k.clone(), v.clone()) for _ in range(self.layers)]
        wrong = (self._layer(0).flatten(1, 2) - fused.first_layer()).abs().max().item()
        if not wrong < 1e-3:
            raise RuntimeError(f"{variant}: the kernels' result is {wrong} off; their time would mean nothing")

    def run(self) -> None:
        """Every layer once."""
        for layer in range(self.layers):
            self._layer(layer)

    def _layer(self, layer: int) -> Tensor:
        """[requests, KV heads, query heads of each, dim]."""
        k, v = self.kv[layer]  # [requests, KV heads, tokens, dim]
        where = (self.q_pos, self.k_pos, self.head)
        scores = self.variant.score(self.q @ k.transpose(2, 3), *where)
        readable = self.variant.mask(*where) & (self.k_pos <= self.q_pos)
        return torch.softmax(scores.masked_fill(~readable, -torch.inf), -1) @ v


def check_finite(program: Any, slot: int, rows: int, what: str) -> None:
    """A kernel that computed nothing, or nonsense, must not be timed."""
    out = program.view(slot, rows)
    if not (np.isfinite(out).all() and out.any(axis=1).all()):
        raise RuntimeError(f"{what}: the result is not finite, or zero; its time would mean nothing")
