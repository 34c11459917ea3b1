"""Queries and keys turned so that a few of their dimensions say most about their products.

InfiniGen (Lee et al., OSDI 2024, arXiv 2406.19707), section 4.2: for an orthogonal A, (q A) . (k A) = q . k. If A
holds the right singular vectors of many queries, the first columns of q A carry most of their length. The turn
does not commute with rotary positions, so queries and keys are turned after their rotation. One A serves the query
heads that share a KV head.

    s(t)           = (q A_n) . (k_t A_n) / sqrt(d)           A_n: the first n columns of A
    margin(page)   = max over the group's query heads of (max of s over the page - max of s over all pages)
    count          = the pages with a margin above -alpha, averaged over KV heads and rounded up
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dovetail.core.pages import IntArray
from dovetail.core.seams import Geometry
from dovetail.host.lazy_torch import torch
from dovetail.ops.memory import Memory

if TYPE_CHECKING:
    from torch import Tensor


def skew(q: NDArray[Any]) -> NDArray[np.float64]:
    """q [KV heads, n, head_dim] -> A [KV heads, head_dim, head_dim]: the right singular vectors of q, the largest
    first.

    They are computed as the eigenvectors of q^T q in float64, which are orthogonal whatever the queries are.
    """
    wide = q.astype(np.float64)
    found: NDArray[np.float64] = np.linalg.eigh(wide.swapaxes(1, 2) @ wide).eigenvectors[..., ::-1]
    return found


def kept_columns(head_dim: int, fraction: float) -> int:
    """How many columns this fraction of head_dim is, at least one."""
    return max(1, round(fraction * head_dim))


def partial_bytes(shape: Geometry, page_size: int, value: int, fraction: float) -> int:
    """Bytes of the partial keys of a page over all layers, with values of `value` bytes."""
    columns = kept_columns(shape.head_dim, fraction)
    return shape.num_layers * shape.num_kv_heads * page_size * (columns + columns % 2) * value


def margins(q: Tensor, keys: Tensor, readable: Tensor) -> Tensor:
    """How far each page's best token scores below the best token of all: [rows, KV heads, pages], at most 0.

    q [rows, KV heads, group, n] is already scaled; keys [rows, pages, KV heads, page_size, n]. Pages that are not
    `readable` [rows, KV heads, pages], and tokens whose score is NaN, count as -infinity.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("rhgn,rphtn->rhgpt", q.to(wide), keys.to(wide))
    best = torch.where(scores.isnan(), float("-inf"), scores).amax(-1)
    best = best.masked_fill(~readable[:, :, None], float("-inf"))
    top = best.amax(-1, keepdim=True)
    return torch.where(top > float("-inf"), best - top, float("-inf")).amax(2)


def counted(margin: Tensor, alpha: float) -> Tensor:
    """How many pages each KV head reads by margin [rows, KV heads, pages]: [rows], at least 1."""
    above, heads = (margin > -alpha).sum((1, 2)), margin.shape[1]
    return ((above + heads - 1) // heads).clamp_min(1)


class PartialKeys:
    """The first n columns of the turned keys of every page: `data` [layers x pages, KV heads, page_size, n]. Its
    type is that in which attention computes."""

    def __init__(self, kv: Any, basis: NDArray[Any], first: int) -> None:
        """basis: A_n of every layer, [layers, KV heads, head_dim, n]. Layers before `first` are left out."""
        self.kv = kv
        self.columns = basis
        self.first = first
        self.element = kv.k.element

    @cached_property
    def basis(self) -> Tensor:
        return torch.from_numpy(self.columns.copy()).to(self.kv.device)

    @cached_property
    def data(self) -> Tensor:
        """It takes no memory where a native program has its own (`TurnedKeys`)."""
        kv = self.kv
        shape = (kv.stage_pages * kv.num_stages, kv.num_kv_heads, kv.page_size, self.columns.shape[-1])
        return Memory(shape, self.element, kv.device).tensor

    def seal(self, pages: IntArray) -> None:
        """Turn the keys of the completed `pages` [n] of all layers."""
        at = torch.from_numpy(pages).to(self.kv.device)
        for layer in range(self.first, self.kv.geometry.num_layers):
            keys = self.kv.keys(layer, at).transpose(1, 2)  # [pages, KV heads, page_size, head_dim]
            wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
            found = wide @ self.basis[layer].to(wide.dtype)
            self.data[layer * self.kv.pages_per_layer + at] = found.to(self.data.dtype)

    def margins(self, layer: int, q: Tensor, pages: Tensor, readable: Tensor) -> Tensor:
        """`margins` of rotated q [rows, heads, head_dim] for physical pages [rows, n]: [rows, KV heads, n]. Only
        pages that are `readable` [rows, KV heads, n] are scored."""
        wide = torch.promote_types(q.dtype, torch.float32)
        grouped = q.to(wide).unflatten(1, (self.kv.num_kv_heads, -1)) * q.shape[-1] ** -0.5
        turned = grouped @ self.basis[layer].to(wide)
        return margins(turned, self.data[layer * self.kv.pages_per_layer + pages], readable)


class TurnedKeys:
    """`PartialKeys` in the layout of native programs: tiles of 16 tokens with an even number of dimensions.

    basis: A_n of every layer, float32 [layers, KV heads, head_dim, width]; if n is odd, the last column is 0.
    data: [layers x pages, KV heads, tiles, width x 16] in the type of the keys.
    """

    def __init__(self, program: Any, keys: PartialKeys) -> None:
        self.program, self.kv, self.first = program, keys.kv, keys.first
        columns = keys.columns.shape[-1]
        self.width = columns + columns % 2
        odd = [(0, 0)] * 3 + [(0, self.width - columns)]
        self.basis = np.ascontiguousarray(np.pad(keys.columns.astype(np.float32), odd))
        kv = keys.kv
        shape = (kv.stage_pages * kv.num_stages, kv.num_kv_heads, kv.page_size // 16, self.width * 16)
        self.data = Memory(shape, keys.element, kv.device)

    def seal(self, pages: IntArray) -> None:
        """Turn the keys of the completed `pages` [n] of all layers."""
        layers = self.first, self.kv.geometry.num_layers
        self.program.seal_partial(layers, self.basis.ctypes.data, self.width, self.data.address, pages.tolist())
