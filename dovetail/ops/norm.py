"""RMSNorm (arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * weight."""

from __future__ import annotations

from typing import Any

import numpy as np

from dovetail.host.lazy_torch import torch


def rms_norm(x: Any, weight: Any, eps: float) -> Any:
    """x [..., d], weight [d] -> [..., d] in the type of x; the statistic in float32, or float64 for float64 x.

    Both are tensors, or both float32 arrays.

    The row is rounded to the type of x before it is multiplied, unless the weight's is wider.
    """
    if isinstance(x, np.ndarray):
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + x.dtype.type(eps)) * weight
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * scaled.to(torch.promote_types(x.dtype, weight.dtype))).to(x.dtype)
