"""Grouped-query attention with rotary positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dovetail.core.seams import Variant
from dovetail.layers.loader import Loader
from dovetail.layers.norm import Norm, added, normed
from dovetail.ops.rope import Rope, rotate
from dovetail.runtime.batch import Batch
from dovetail.runtime.kv import KV
from dovetail.runtime.target import Fused, Target, Turning

if TYPE_CHECKING:
    from torch import Tensor


class Attention:
    """Attention of one layer: projections, norms of heads if the model has them, rotation, attention over paged
    KV.

    rope and variant may differ from layer to layer. scale: the factor on scores q . k.
    """

    def __init__(self, load: Loader, prefix: str, rope: Rope, variant: Variant) -> None:
        c = load.config
        self.sizes = [c.num_heads * c.head_dim, *[c.num_kv_heads * c.head_dim] * 2]
        self.head_dim = c.head_dim
        self.scale = c.query_scale or c.head_dim**-0.5
        self.rope = rope
        self.variant = variant
        self.qkv = load.linear(*(f"{prefix}.{n}_proj" for n in "qkv"), bias=c.qkv_bias)
        self.o = load.linear(f"{prefix}.o_proj", bias=c.o_bias)
        self.q_norm = load.norm(f"{prefix}.q_norm") if c.qk_norm else None
        self.k_norm = load.norm(f"{prefix}.k_norm") if c.qk_norm else None

    def __call__(self, x: Tensor, layer: int, batch: Batch, kv: KV) -> Tensor:
        """x [rows, width], normed -> [rows, width]."""
        q, k, v = (t.unflatten(1, (-1, self.head_dim)) for t in self.qkv(x).split(self.sizes, dim=-1))
        angles = batch.once(self.rope, lambda: self.rope.angles(batch.positions, x.dtype))
        kv.write(layer, rotate(normed(k, self.k_norm), angles), v, batch)
        return self.o(kv.attend(layer, self.queries(q, angles), batch, self.variant).flatten(1))

    def queries(self, q: Any, angles: tuple[Any, Any]) -> Any:
        """Projected queries [rows, heads, head_dim], prepared for attention, which multiplies by head_dim^-0.5.

        All are tensors, or all float32 arrays.
        """
        q = rotate(normed(q, self.q_norm), angles)
        factor = self.scale * self.head_dim**0.5
        return q if abs(factor - 1) < 1e-6 else q * factor

    @property
    def turning(self) -> Turning:
        """How a program prepares queries and keys."""
        return Turning(self.rope if self.rope.rotates else None, self.q_norm, self.k_norm, self.scale)

    def record(self, to: Target, layer: int, norm: Norm, post: Norm | None) -> None:
        """Record x += post(attention(norm(x))) on the program's buffers."""
        qkv = to.slot("qkv", sum(self.sizes))
        self.qkv.record(to, to.x, qkv, Fused(norm=norm))
        to.rope(qkv, layer, self.turning)
        to.attend(layer, self.variant)
        added(to, to.attended, self.o, post)
