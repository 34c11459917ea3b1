"""The attention engine: queries over paged KV, planned once per step and run per layer.

KV is block-sparse rows in FlashInfer's terms (arXiv 2501.01005, section 3): request i reads the pages
`indices[indptr[i]:indptr[i + 1]]`, the last of which holds `last_page_len[i]` tokens. `plan` cuts long sequences
in chunks of 128 tokens aligned to their start, deals equal work to the threads, and finds chunks that several
requests share; partial states are merged in order, so the result is the same bits whatever the plan.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dovetail.core.errors import ConfigError
from dovetail.core.seams import Variant
from dovetail.ops import cpu
from dovetail.ops.attention.kernel_variant import kernel_variant

LAYOUTS = ("NHD", "HND")
_KINDS = {(torch.float32, False): "float32", (torch.bfloat16, False): "bf16", (torch.int8, True): "int8"}


class Shape(NamedTuple):
    """Query heads, KV heads, head dimension (even), tokens per page."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int


class State(NamedTuple):
    """Attention over some keys, out [rows, heads, head_dim], and the natural logarithm of the sum of their
    exponentiated scores, lse [rows, heads]. Without keys they are 0 and -inf.
    """

    out: Tensor
    lse: Tensor


def merge_states(a: State, b: State) -> State:
    """Attention over the keys of both. Commutative; the empty state is the identity."""
    most = torch.maximum(a.lse, b.lse)
    base = most.masked_fill(most == -torch.inf, 0)
    wa, wb = torch.exp(a.lse - base), torch.exp(b.lse - base)
    total = wa + wb
    safe = total.masked_fill(total == 0, 1)[..., None]
    out = (wa[..., None] * a.out + wb[..., None] * b.out) / safe
    return State(out, base + torch.log(total))


class PagedAttention:
    """`plan` once for the lists of a step, then `run` for every layer.

    layout: "NHD", KV [pages, page_size, KV heads, head_dim], or "HND", [pages, KV heads, page_size, head_dim].
    cascade reads what several requests share once; split cuts long sequences over threads. Both change the time
    and not one bit of the result.
    """

    def __init__(
        self, shape: Shape, *, layout: str = "NHD", variant: Variant | None = None, threads: int = 1,
        isa: str = "", cascade: bool = True, split: bool = True,
    ) -> None:  # fmt: skip
        if layout not in LAYOUTS:
            raise ConfigError(f"layout '{layout}' is unknown; the known ones are {', '.join(LAYOUTS)}")
        if shape.num_heads % shape.num_kv_heads:
            raise ConfigError(f"{shape.num_heads} query heads do not divide over {shape.num_kv_heads} KV heads")
        self.shape = shape
        self.layout = layout
        self.variant = kernel_variant(variant or Variant(), shape.num_heads)
        heads = shape.num_heads, shape.num_kv_heads, shape.head_dim
        self._engine: Any = cpu.native().PagedAttention(isa, threads, heads, cascade, split)
        self._pages = 0

    def plan(
        self, qo_indptr: Sequence[int], indptr: Sequence[int], indices: Sequence[int] | Sequence[Sequence[int]],
        last_page_len: Sequence[int], *, positions: Sequence[Sequence[int]] | None = None,
        starts: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        """Rows qo_indptr[i]:qo_indptr[i + 1] of request i are the last of its sequence, or begin at starts[i].

        indices: one list for all KV heads, or one per KV head (all cut by the same `indptr`). positions: for lists
        that leave pages out, the position of the first token of each listed page, per KV head; `starts` is then
        needed.
        """
        many = len(indices) > 0 and not isinstance(indices[0], int)
        lists: list[list[int]] = [list(x) for x in indices] if many else [list(indices)]  # type: ignore[arg-type]
        lengths = self._lengths(qo_indptr, indptr, last_page_len, lists)
        if starts is None:
            if positions is not None:
                raise ConfigError("lists with positions leave pages out: give `starts`, the rows' own positions")
            starts = [n - (qo_indptr[i + 1] - qo_indptr[i]) for i, n in enumerate(lengths)]
            if min(starts, default=0) < 0:
                raise ConfigError("a request has more rows than keys; give `starts`, or pages for its own tokens")
        self._pages = 1 + max((p for x in lists for p in x), default=-1)
        flat = [p for x in lists for p in x]
        where = [p for x in positions for p in x] if positions is not None else []
        if where and len(where) != len(flat):
            raise ConfigError(f"{len(where)} positions were given for {len(flat)} listed pages")
        self._engine.plan(
            list(qo_indptr), list(indptr), lengths, list(starts), flat, where, len(lists), self.shape.page_size
        )
        self._rows = qo_indptr[-1]

    def _lengths(
        self, qo_indptr: Sequence[int], indptr: Sequence[int], last: Sequence[int], lists: list[list[int]]
    ) -> list[int]:
        size = self.shape.page_size
        if len(lists) not in (1, self.shape.num_kv_heads):
            raise ConfigError(f"{len(lists)} lists of pages were given; give 1 or {self.shape.num_kv_heads}")
        if not len(qo_indptr) == len(indptr) == len(last) + 1:
            raise ConfigError("qo_indptr and indptr need one entry more than last_page_len")
        for name, pointers in (("qo_indptr", qo_indptr), ("indptr", indptr)):
            if pointers[0] != 0 or any(b < a for a, b in itertools.pairwise(pointers)):
                raise ConfigError(f"{name} must begin with 0 and not decrease, got {list(pointers)}")
        if any(len(x) != indptr[-1] for x in lists) or any(p < 0 for x in lists for p in x):
            raise ConfigError(f"every list needs indptr[-1] = {indptr[-1]} page numbers of at least 0")
        out = []
        for i, n in enumerate(last):
            pages = indptr[i + 1] - indptr[i]
            if not (0 < n <= size if pages else n == 0):
                raise ConfigError(
                    f"last_page_len[{i}] is {n}; with {pages} pages it must be in 1..{size}, or 0 with none"
                )
            out.append(max(0, pages - 1) * size + n)
        return out

    def run(self, q: Tensor, k: Tensor, v: Tensor, *, scales: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """q float32 [rows, heads, head_dim] -> the same shape. k, v: pages in the layout, float32 or bfloat16; or
        int8 codes with scales [..] of one token and head, float32."""
        return self.run_state(q, k, v, scales=scales).out

    def run_state(
        self, q: Tensor, k: Tensor, v: Tensor, *, scales: tuple[Tensor, Tensor] | None = None
    ) -> State:  # fmt: skip
        """The result with its log-sum-exp, to be merged with others."""
        s = self.shape
        inner = (s.page_size, s.num_kv_heads) if self.layout == "NHD" else (s.num_kv_heads, s.page_size)
        kind = _KINDS.get((k.dtype, scales is not None), "")
        for name, t in (("k", k), ("v", v)):
            if (
                not kind
                or t.dtype != k.dtype
                or tuple(t.shape[1:]) != (*inner, s.head_dim)
                or len(t) < self._pages
            ):
                raise ConfigError(
                    f"{name} is {t.dtype} {list(t.shape)}; needed: float32, bfloat16, or int8 with scales, "
                    f"[at least {self._pages}, {inner[0]}, {inner[1]}, {s.head_dim}]"
                )
        if tuple(q.shape) != (self._rows, s.num_heads, s.head_dim):
            raise ConfigError(f"q is {list(q.shape)}; planned were {[self._rows, s.num_heads, s.head_dim]}")
        for codes, scale in zip((k, v), scales or (), strict=False):
            if tuple(scale.shape) != tuple(codes.shape[:3]):
                raise ConfigError(
                    f"scales are {list(scale.shape)}; needed: {list(codes.shape[:3])}, one per vector"
                )
        q, k, v = q.float().contiguous(), k.contiguous(), v.contiguous()
        out, lse = torch.empty_like(q), torch.empty(self._rows, s.num_heads)
        held = [t.float().contiguous() for t in scales] if scales is not None else []
        addresses = (k.data_ptr(), v.data_ptr(), *([t.data_ptr() for t in held] or [0, 0]))
        sizes = (len(k), s.page_size, s.num_kv_heads, s.head_dim)
        self._engine.run(
            self.layout, kind, addresses, sizes, q.data_ptr(), out.data_ptr(), lse.data_ptr(), self.variant.window,
            self.variant.address, self.variant.params,
        )  # fmt: skip
        return State(out, lse)

    def stats(self) -> dict[str, int]:
        """Of the plan: items of work, rows merged from several, tokens read per KV head, and without sharing."""
        found: dict[str, int] = self._engine.stats()
        return found
