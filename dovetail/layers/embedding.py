"""Token embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.ops.stored import StoredTensor
from dovetail.runtime.target import Target


class Embedding:
    """Rows of a matrix [vocabulary, width] in the compute type, times `scale` rounded to that type."""

    def __init__(self, weight: Tensor, scale: float = 1.0) -> None:
        self.weight = weight
        self.scale = _rounded(scale, weight.dtype)

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens [rows] -> [rows, width]."""
        return _scaled(self.weight.index_select(0, tokens), self.scale)

    def record(self, to: Target) -> None:
        """For a ledger only: rows of 16 or 32 bits a value."""
        rows = self.weight.contiguous()
        name = "F32" if rows.element_size() == 4 else "BF16"
        to.embed(StoredTensor("embedding", name, tuple(rows.shape), rows.view(torch.uint8)), self.scale)


class StoredEmbedding:
    """The same, but rows are expanded when they are needed. So the matrix takes no memory but the file's."""

    def __init__(self, stored: StoredTensor, dtype: torch.dtype, scale: float = 1.0) -> None:
        self.stored = stored
        self.dtype = dtype
        self.scale = _rounded(scale, dtype)

    def __call__(self, tokens: Tensor) -> Tensor:
        return _scaled(self.stored.rows(tokens).dequantize(self.dtype), self.scale)

    def record(self, to: Target) -> None:
        to.embed(self.stored, self.scale)


def _rounded(scale: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(scale, dtype=dtype))


def _scaled(rows: Tensor, scale: float) -> Tensor:
    return rows if scale == 1 else rows * scale
