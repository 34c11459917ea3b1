"""Token embeddings."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from dovetail.host.lazy_torch import torch
from dovetail.ops.memory import as_tensor, rounded, widened
from dovetail.ops.stored import StoredTensor
from dovetail.runtime.target import Target

if TYPE_CHECKING:
    from torch import Tensor


class Embedding:
    """Rows of a matrix [vocabulary, width] in the compute type, times `scale` rounded to that type.

    On a CPU rows are expanded when they are needed, so the matrix takes no memory but the file's.
    """

    def __init__(self, stored: StoredTensor, kind: str, scale: float = 1.0, device: str = "cpu") -> None:
        """kind: the compute type, one of `ops.memory.ELEMENTS`."""
        self.stored = stored
        self.kind = kind
        self.scale = float(widened(rounded(np.array([scale], np.float32), kind), kind)[0])
        self.device = device

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens [rows] -> [rows, width]."""
        if self.device == "cpu":
            rows = as_tensor(self.stored.rows(tokens.numpy()).values(self.kind), self.kind)
        else:
            rows = self._expanded.index_select(0, tokens)
        return rows if self.scale == 1 else rows * self.scale

    def record(self, to: Target) -> None:
        to.embed(self.stored, self.scale)

    @cached_property
    def _expanded(self) -> Tensor:
        return self.stored.dequantize(getattr(torch, self.kind)).to(self.device)
