"""Quantizes values to the block formats of stored weights."""

from __future__ import annotations

import torch
from torch import Tensor


def q8_0(x: Tensor) -> Tensor:
    """x [n, k], k a multiple of 32 -> uint8 [n, k / 32 * 34] in format Q8_0. Each 32 values become a float16
    scale, their largest magnitude / 127, and 32 signed bytes."""
    blocks = x.float().unflatten(1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    steps = torch.where(scale > 0, blocks / scale, 0.0).round().to(torch.int8)
    data = torch.cat([scale.half().view(torch.uint8), steps.view(torch.uint8)], -1)
    return data.flatten(1).contiguous()
