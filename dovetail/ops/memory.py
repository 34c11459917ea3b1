"""Numbers in memory: zeros that native kernels read by address, and torch as a tensor.

numpy has no bfloat16, so its bits are kept as uint16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dovetail.host.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

ALIGNMENT = 4096  # bytes
ELEMENTS: dict[str, np.dtype[Any]] = {  # by torch's name: the numpy type that holds such values, or their bits
    "float32": np.dtype(np.float32), "bfloat16": np.dtype(np.uint16), "float16": np.dtype(np.float16),
    "float64": np.dtype(np.float64), "int8": np.dtype(np.int8), "uint8": np.dtype(np.uint8),
}  # fmt: skip


def zeros(shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros whose memory is taken when it is first written.

    They begin at a page of memory. Vectors that cross a cache line are read at half the speed, and a page of KV
    that is as large as a page of memory then is exactly one.
    """
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + ALIGNMENT, np.uint8)
    skip = -memory.ctypes.data % ALIGNMENT
    return memory[skip : skip + size].view(dtype).reshape(shape)


def to_bfloat16(values: NDArray[Any]) -> NDArray[np.uint16]:
    """The bits of float32 values as bfloat16, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, np.uint16(0x7FC0), rounded) if nan.any() else rounded


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: NDArray[Any], kind: str) -> NDArray[Any]:
    """float32 values as `kind` of `ELEMENTS`."""
    return to_bfloat16(values) if kind == "bfloat16" else values.astype(ELEMENTS[kind], copy=False)


def widened(values: NDArray[Any], kind: str) -> NDArray[Any]:
    """Values of `kind` as float32, or float64 if they are that."""
    if kind == "bfloat16":
        return from_bfloat16(values)
    return values if kind == "float64" else values.astype(np.float32, copy=False)


def as_tensor(values: NDArray[Any], kind: str) -> Tensor:
    """The same memory as a torch tensor."""
    found = torch.from_numpy(values if values.flags.writeable else values.copy())
    return found.view(torch.bfloat16) if kind == "bfloat16" else found


class Memory:
    """Zeros of `kind` (of `ELEMENTS`) on a device, of a shape.

    On a CPU `array` is the memory, and `tensor` is made of it when a reference operation first asks. On another
    device there is only the tensor.
    """

    def __init__(self, shape: Sequence[int], kind: str, device: str) -> None:
        self.kind = kind
        self.shape = tuple(shape)
        self.device = device
        self.array: Any = zeros(shape, ELEMENTS[kind]) if device == "cpu" else self.tensor

    @cached_property
    def tensor(self) -> Tensor:
        if self.device == "cpu":
            return as_tensor(self.array, self.kind)
        return torch.zeros(*self.shape, dtype=getattr(torch, self.kind), device=self.device)

    @property
    def address(self) -> int:
        return int(self.array.ctypes.data) if self.device == "cpu" else self.tensor.data_ptr()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ELEMENTS[self.kind].itemsize
