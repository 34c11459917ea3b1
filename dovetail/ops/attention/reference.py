"""The torch reference of attention. It is meant to be read; it runs on any device, a whole batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from dovetail.core.seams import Variant
from dovetail.host.lazy_torch import torch
from dovetail.ops.template import with_tables

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 20  # scores at a time: larger tensors are returned to the system and cost page faults each time


class ReadSpans(Protocol):
    """K and V [n, tokens, KV heads, head_dim] of spans [n], at least `length` tokens from position 0."""

    def __call__(self, spans: Tensor, length: int) -> tuple[Tensor, Tensor]: ...


class Keys(NamedTuple):
    """What each (row, KV head) reads: k, v [rows, KV heads, pages, page_size, head_dim] and positions [rows, KV
    heads, pages, page_size]."""

    k: Tensor
    v: Tensor
    positions: Tensor


class Places(NamedTuple):
    """Positions of queries and keys, and query heads: whole numbers that broadcast to scores [n, KV heads, group,
    c, t]."""

    q_pos: Tensor
    k_pos: Tensor
    head: Tensor


class Rows(NamedTuple):
    """positions [rows], and spans with equally many rows: (spans [n], rows [n, c], longest KV)."""

    positions: Tensor
    groups: Sequence[tuple[Tensor, Tensor, int]]


def attend_dense(q: Tensor, read: ReadSpans, variant: Variant, layout: Rows) -> Tensor:
    """Attention of rows q [rows, heads, head_dim] over everything before them -> the same shape.

    Rows that are in no group stay undefined.
    """
    out = torch.empty_like(q)
    variant = with_tables(variant)
    for spans, rows, length in layout.groups:
        k, v = (t.permute(0, 2, 1, 3) for t in read(spans, length))
        block = max(1, BLOCK // (len(spans) * q.shape[1] * k.shape[2]))
        for some in rows.split(block, dim=1):
            out[some] = _attend_block(q[some], (k, v), variant, layout.positions[some])
    return out


def _attend_block(q: Tensor, kv: tuple[Tensor, Tensor], variant: Variant, q_pos: Tensor) -> Tensor:
    """q [n, c, heads, d] at q_pos [n, c]; k, v [n, KV heads, t, d] from position 0 -> [n, c, heads, d]."""
    k, v = kv
    k_pos = torch.arange(k.shape[2], device=q.device)
    grouped = q.unflatten(2, (k.shape[1], -1)).permute(0, 2, 3, 1, 4)  # [n, KV heads, group, c, d]
    places = Places(q_pos[:, None, None, :, None], k_pos, _heads(grouped))
    weights = _softmax(_scores(grouped, k), variant, places)
    mixed = _mix(weights.flatten(2, 3), v).unflatten(2, weights.shape[2:4])
    return mixed.permute(0, 3, 1, 2, 4).flatten(2, 3).to(q.dtype)


def attend_pages(q: Tensor, keys: Keys, variant: Variant, positions: Tensor) -> Tensor:
    """Attention of rows q [rows, heads, head_dim] at `positions` [rows] over their own pages -> the same shape."""
    k, v, k_pos = keys.k.flatten(2, 3), keys.v.flatten(2, 3), keys.positions.flatten(2, 3)
    grouped = q.unflatten(1, (k.shape[1], -1))[:, :, :, None]  # [rows, KV heads, group, 1, d]
    places = Places(positions[:, None, None, None, None], k_pos[:, :, None, None], _heads(grouped))
    weights = _softmax(_scores(grouped, k), with_tables(variant), places)
    return _mix(weights.squeeze(3), v).flatten(1, 2).to(q.dtype)


def _heads(grouped: Tensor) -> Tensor:
    """The query heads of [n, KV heads, group, ...], as [1, KV heads, group, 1, 1]."""
    kv_heads, group = grouped.shape[1:3]
    return torch.arange(kv_heads * group, device=grouped.device).view(1, kv_heads, group, 1, 1)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q [n, KV heads, group, c, d], k [n, KV heads, t, d] -> [n, KV heads, group, c, t] in float32 or float64."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scaled = q.to(wide).flatten(2, 3) * q.shape[-1] ** -0.5
    return torch.matmul(scaled, k.to(wide).transpose(2, 3)).unflatten(2, q.shape[2:4])


def _softmax(scores: Tensor, variant: Variant, places: Places) -> Tensor:
    """Weights of scores [n, KV heads, group, c, t] as the variant changes them.

    A later key never counts, whatever the mask says, because it is not committed. A row that may read nothing
    gives 0.
    """
    readable = variant.mask(*places) & (places.k_pos <= places.q_pos)
    new = torch.where(readable, variant.score(scores, *places), float("-inf"))
    weights = torch.softmax(new.to(scores.dtype).expand_as(scores), dim=-1)
    return weights.masked_fill(~readable.any(-1, keepdim=True), 0)


def _mix(weights: Tensor, v: Tensor) -> Tensor:
    """weights [n, KV heads, rows, t], v [n, KV heads, t, d] -> [n, KV heads, rows, d].

    Memory that a row does not read may hold NaN, and 0 * NaN is NaN. So values that are not finite count only
    where they have weight, and there the result is NaN.
    """
    broken = ~torch.isfinite(v).all(-1, keepdim=True)
    if not broken.any():
        return torch.matmul(weights, v.to(weights.dtype))
    mixed = torch.matmul(weights, v.masked_fill(broken, 0).to(weights.dtype))
    read = torch.matmul(weights, broken.to(weights.dtype)) > 0
    return mixed.masked_fill(read, float("nan"))
