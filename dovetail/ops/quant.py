"""Quantizes values to the block formats of stored weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def q8_0(x: NDArray[Any]) -> NDArray[np.uint8]:
    """x [n, k], k a multiple of 32 -> uint8 [n, k / 32 * 34] in format Q8_0. Each 32 values become a float16
    scale, their largest magnitude / 127, and 32 signed bytes."""
    blocks = x.astype(np.float32).reshape(len(x), -1, 32)
    scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    steps = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0).round().astype(np.int8)
    data = np.concatenate([scale.astype(np.float16).view(np.uint8), steps.view(np.uint8)], -1)
    return data.reshape(len(x), -1)
