"""Codes of keys as native programs keep them."""

from __future__ import annotations

import torch


def unpacked(data: torch.Tensor, dim: int, tiles: int) -> torch.Tensor:
    """Codes as native programs keep them [pages, KV heads, vectors, width] -> the keys that they stand for."""
    width = data.shape[-1]
    low, step = (data[:, :, i, :dim].float() for i in (0, 1))
    lanes = data[:, :, 2:].flatten(2).view(torch.int32).view(*data.shape[:2], tiles, width // 16, 16).long()
    found = torch.empty(*data.shape[:2], tiles * 16, width)
    for d in range(width):
        bits = lanes[..., d // 16, :] >> (16 * (d % 2) + d % 16 // 2 * 2)
        found[..., d] = (bits & 3).flatten(2)
    return low[:, :, None] + step[:, :, None] * found[..., :dim]
