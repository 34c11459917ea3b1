"""Codes of keys as native programs keep them."""

from __future__ import annotations

import torch


def unpacked(data: torch.Tensor, dim: int, tiles: int) -> torch.Tensor:
    """Codes as native programs keep them [pages, KV heads, vectors, width] -> as `ops.pages.codes` has them."""
    width = data.shape[-1]
    second = data[:, :, 1].contiguous().view(torch.uint8)
    parts = second[..., :dim].float()
    largest = second[..., width : width + 4].contiguous().view(torch.float32).expand(*data.shape[:2], dim)
    head = torch.stack([data[:, :, 0, :dim].float(), parts, largest], 2)
    lanes = data[:, :, 2:].flatten(2).view(torch.int32).view(*data.shape[:2], tiles, width // 16, 16).long()
    found = torch.empty(*data.shape[:2], tiles * 16, width)
    for d in range(width):
        bits = lanes[..., d // 16, :] >> (8 * (d % 4) + d % 16 // 4 * 2)
        found[..., d] = (bits & 3).flatten(2)
    return torch.cat([head, found[..., :dim]], 2)
