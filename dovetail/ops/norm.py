"""RMSNorm (arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * weight."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., d], weight [d] -> [..., d] in the type of x; the statistic in float32, or float64 for float64 x.

    The row is rounded to the type of x before it is multiplied, unless the weight's is wider.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * scaled.to(torch.promote_types(x.dtype, weight.dtype))).to(x.dtype)
