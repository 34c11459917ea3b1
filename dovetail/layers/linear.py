"""The default Format: a dense matrix in the model's compute type."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dovetail.checkpoint.tensor import StoredTensor


class Dense:
    """Weights expanded once, at load. Rows of several weights that share an input become one matrix."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device

    def linear(
        self, weights: Sequence[StoredTensor], bias: Sequence[StoredTensor]
    ) -> Callable[[Tensor], Tensor]:
        w = torch.cat([t.dequantize(self.dtype) for t in weights]) if len(weights) > 1 else weights[0].dequantize(self.dtype)
        b = torch.cat([t.dequantize(self.dtype) for t in bias]) if bias else None
        return DenseLinear(w.to(self.device), b.to(self.device) if b is not None else None)


class DenseLinear:
    """y = x W^T + b, with W [out, in] and b [out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)
