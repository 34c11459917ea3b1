"""RMSNorm with its weight."""

from __future__ import annotations

from torch import Tensor

from dovetail.ops.norm import rms_norm


class Norm:
    """weight [width]; called with x [..., width]."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
