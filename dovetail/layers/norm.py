"""RMSNorm with its weight, and a norm of what is added to the hidden rows, for models that have one."""

from __future__ import annotations

from torch import Tensor

from dovetail.layers.linear import Linear
from dovetail.ops.norm import rms_norm
from dovetail.runtime.target import Fused, Target


class Norm:
    """weight [width], in the compute type or wider; called with x [..., width]."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def normed(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else norm(x)


def added(to: Target, source: int, linear: Linear, post: Norm | None) -> None:
    """Record x += linear(source), or x += post(linear(source)) if the model has such a norm."""
    if post is None:
        linear.record(to, source, to.x, Fused(add=True))
        return
    result = to.slot("result", len(post.weight))
    linear.record(to, source, result)
    to.norm_add(result, to.x, post)
