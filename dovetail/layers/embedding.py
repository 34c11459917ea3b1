"""Token embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.ops.stored import StoredTensor
from dovetail.runtime.target import Target


class Embedding:
    """Rows of a matrix [vocabulary, width] in the compute type."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens [rows] -> [rows, width]."""
        return self.weight.index_select(0, tokens)

    def record(self, to: Target) -> None:
        """For a ledger only: as rows of 16 or 32 bits."""
        rows = self.weight.contiguous()
        name = "F32" if rows.element_size() == 4 else "BF16"
        to.embed(StoredTensor("embedding", name, tuple(rows.shape), rows.view(torch.uint8)), 1.0)


class StoredEmbedding:
    """Rows are expanded when they are asked for, so the matrix takes no memory but the file's."""

    def __init__(self, stored: StoredTensor, dtype: torch.dtype) -> None:
        self.stored = stored
        self.dtype = dtype

    def __call__(self, tokens: Tensor) -> Tensor:
        rows = self.stored.data.index_select(0, tokens)
        shape = (len(rows), self.stored.shape[1])
        return StoredTensor(self.stored.name, self.stored.format, shape, rows).dequantize(self.dtype)

    def record(self, to: Target) -> None:
        to.embed(self.stored, 1.0)
