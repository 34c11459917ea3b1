"""RMSNorm with its weight, and a norm of what is added to the hidden rows, for models that have one."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dovetail.layers.linear import Linear
from dovetail.ops.memory import as_tensor, widened
from dovetail.ops.norm import rms_norm
from dovetail.ops.stored import StoredTensor
from dovetail.runtime.target import Fused, Target

if TYPE_CHECKING:
    from torch import Tensor


class Norm:
    """A weight [width], in the compute type or wider; called with x [..., width]."""

    def __init__(self, stored: StoredTensor, kind: str, eps: float, device: str = "cpu") -> None:
        """kind: the type to which the weight is rounded, one of `ops.memory.ELEMENTS`."""
        self._weight, self._kind, self._device = stored.values(kind), kind, device
        self.eps = eps

    @property
    def values(self) -> NDArray[Any]:
        """The weight in float32, or float64 if it is that."""
        return widened(self._weight, self._kind)

    @cached_property
    def weight(self) -> Tensor:
        return as_tensor(self._weight, self._kind).to(self._device)

    def __call__(self, x: Any) -> Any:
        """x: a tensor, or a float32 array."""
        return rms_norm(x, self.values if isinstance(x, np.ndarray) else self.weight, self.eps)


def normed(x: Any, norm: Norm | None) -> Any:
    return x if norm is None else norm(x)


def added(to: Target, source: int, linear: Linear, post: Norm | None) -> None:
    """Record x += linear(source), or x += post(linear(source)) if the model has such a norm."""
    if post is None:
        linear.record(to, source, to.x, Fused(add=True))
        return
    result = to.slot("result", len(post.values))
    linear.record(to, source, result)
    to.norm_add(result, to.x, post)
