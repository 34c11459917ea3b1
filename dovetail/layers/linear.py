"""The default Format: a dense matrix in the model's compute type."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dovetail.ops.stored import StoredTensor


class Dense:
    """Weights expanded once, at load. Rows of several weights that share an input become one matrix."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device

    def linear(self, weights: Sequence[StoredTensor], bias: Sequence[StoredTensor]) -> Callable[[Tensor], Tensor]:
        b = torch.cat([t.dequantize(self.dtype) for t in bias]) if bias else None
        w = _stack(weights, self.dtype)
        return DenseLinear(w.to(self.device), b.to(self.device) if b is not None else None)


def _stack(weights: Sequence[StoredTensor], dtype: torch.dtype) -> Tensor:
    """The rows of all weights. Those of one format are joined as stored, where they are smallest."""
    first = weights[0]
    if len(weights) == 1:
        return first.dequantize(dtype)
    if any(w.format != first.format for w in weights):
        return torch.cat([w.dequantize(dtype) for w in weights])
    rows = sum(w.shape[0] for w in weights)
    data = torch.cat([w.data for w in weights])
    return StoredTensor(first.name, first.format, (rows, *first.shape[1:]), data).dequantize(dtype)


class DenseLinear:
    """y = x W^T + b, with W [out, in] and b [out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)
