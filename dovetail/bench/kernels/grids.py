"""Random weights on uniform grids, for kernels to be measured on."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.ops.stored import StoredTensor

GRIDS = ("I8", "I4", "F8", "ATOM")
ACTIVATION = {
    "I8": "int8-token",
    "I4": "",
    "F8": "fp8-token",
    "ATOM": "atom",
}  # that a checkpoint of these asks for


def random_grid(fmt: str, n: int, k: int) -> StoredTensor:
    """A weight [n, k] of `GRIDS`: I8 and F8 per channel, I4 in groups of 64, ATOM in groups of 128.

    ATOM has 128 outliers and an order of columns. Where 128 does not divide k, its groups and outliers are 64.
    """
    rng = np.random.default_rng(0)
    size = 128 if k % 128 == 0 else 64
    columns = {"I4": k // 2, "ATOM": (k + size) // 2}.get(fmt, k)
    groups = {"I4": k // 64, "ATOM": (k - size) // size}.get(fmt, 1)
    codes = rng.integers(0, 0x7F, (n, columns), dtype=np.uint8)
    scale = rng.uniform(0.001, 0.02, (n, groups)).astype(np.float16).astype(np.float32)
    parts: dict[str, NDArray[Any]] = {"scale": scale}
    shared: dict[str, NDArray[Any]] = {}
    if fmt == "ATOM":
        scale[1::2] = scale[: n // 2 * 2 : 2]
        parts["outlier_scale"] = scale[:, 0].copy()
        shared = {"order": rng.permutation(k), "clip": np.array([0.9], np.float32)}
    return StoredTensor(fmt, fmt, (n, k), codes, parts, shared, ACTIVATION[fmt])
