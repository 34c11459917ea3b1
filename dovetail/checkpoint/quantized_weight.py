"""The weight of a linear layer that its files hold in several tensors: codes, scales, zero points, an order.

Readers of quantized checkpoints make one `QuantizedWeight` for each. Its values are read when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.checkpoint.safetensors_folder import SafetensorsFolder
from dovetail.core.errors import ModelError
from dovetail.ops.grids import to_nibbles
from dovetail.ops.stored import StoredTensor

FLOATS = ("F32", "BF16", "F16")  # dtypes of scales
SMALLEST_GROUP = 16  # columns that share a scale where a block does not divide a row

Array = NDArray[Any]


@dataclass(frozen=True)
class QuantizedWeight:
    """`X.weight` [N, K]. sources: the tensors of the files that take part in it, which nobody else sees."""

    name: str
    shape: tuple[int, ...]
    format: str
    activation: str
    sources: tuple[str, ...]
    read: Callable[[], StoredTensor]


class Module:
    """The tensors of a linear layer X: `X.weight_packed` and so on. `name` is X."""

    def __init__(self, folder: SafetensorsFolder, name: str) -> None:
        self.folder, self.name = folder, name

    def __contains__(self, part: str) -> bool:
        return f"{self.name}.{part}" in self.folder

    def shape(self, part: str) -> tuple[int, ...]:
        return self.folder.find(self._full(part)).shape

    def kind(self, part: str) -> str:
        """The dtype of a tensor, as safetensors calls it."""
        return self.folder.find(self._full(part)).dtype

    def array(self, part: str, *kinds: str, shape: Sequence[tuple[int, ...]] = ()) -> Array:
        """A tensor of one of the dtypes `kinds`, see `SafetensorsFolder.array`; ModelError naming it if it has
        none of the shapes."""
        if shape:
            self.check(part, *shape)
        return self.folder.array(self._full(part), *kinds)

    def check(self, part: str, *shapes: tuple[int, ...]) -> None:
        """ModelError naming the tensor if it is missing or has none of the shapes."""
        full, found = self._full(part), self.shape(part)
        if found not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise ModelError(f"{self.folder.file(full)}: tensor {full} is {list(found)}, it must be {wanted}")

    def scales(self, part: str, shapes: Sequence[tuple[int, ...]]) -> NDArray[np.float32]:
        """Finite numbers of one of the shapes, as float32."""
        values = self.array(part, *FLOATS, shape=shapes)
        if not np.isfinite(values).all():
            full = self._full(part)
            raise ModelError(f"{self.folder.file(full)}: tensor {full} has values that are not finite")
        return values.astype(np.float32, copy=False)

    def wrong(self, text: str) -> ModelError:
        return ModelError(f"{self.folder.path}: {self.name}: {text}")

    def weight(
        self, shape: tuple[int, int], form: str, activation: str, read: Callable[[str], StoredTensor]
    ) -> QuantizedWeight:
        """The weight that `read(name)` gives; all tensors of this layer but its bias are its sources."""
        prefix, name = f"{self.name}.", f"{self.name}.weight"
        sources = (s for s in self.folder.of(self.name) if s != f"{prefix}bias")
        return QuantizedWeight(name, shape, form, activation, tuple(sources), partial(read, name))

    def _full(self, part: str) -> str:
        full = f"{self.name}.{part}"
        if full not in self.folder:
            raise ModelError(f"{self.folder.path}: tensor {full} is missing, and {self.name} is quantized")
        return full


@dataclass(frozen=True)
class Grid:
    """Where integer codes lie: q [N, K] int8, scale [N, groups], and what goes with them."""

    scale: NDArray[np.float32]
    zero: Array | None = None  # [N, groups]
    order: NDArray[np.int64] | None = None  # of the columns, see `ops.grids`

    def parts(self) -> dict[str, Array]:
        found: dict[str, Array] = {"scale": self.scale}
        if self.zero is not None and self.zero.any():
            found["zero"] = self.zero.astype(np.int16)
        return found

    def shared(self) -> dict[str, Array]:
        return {} if self.order is None else {"order": self.order}

    def stored(self, name: str, q: Array, bits: int, activation: str) -> StoredTensor:
        """Codes q [N, K], int8, whose columns follow `order`, as I4 or I8."""
        data = to_nibbles(q) if bits == 4 else np.ascontiguousarray(q, np.int8).view(np.uint8)
        return StoredTensor(name, f"I{bits}", q.shape, data, self.parts(), self.shared(), activation)


def num_groups(module: Module, k: int, size: int) -> int:
    """How many groups of `size` columns a row of k has; ModelError naming the layer if they do not divide it."""
    if size < 1 or (k >= size and k % size):
        raise module.wrong(f"groups of {size} columns do not divide its {k}")
    return max(1, k // size)


def unpacked(words: Array, bits: int, count: int) -> NDArray[np.uint8]:
    """int32 [rows, n] -> its first `count` fields of 4 or 8 bits, lowest bits first, uint8 [rows, count]."""
    data = np.ascontiguousarray(words).view(np.uint8)
    if bits == 4:
        data = np.stack([data & 15, data >> 4], -1).reshape(len(data), -1)
    return data[:, :count]


def by_group(module: Module, index: Array, groups: int) -> NDArray[np.int64] | None:
    """int32 [K], the group of each column -> the order that brings groups together; None if they are already.

    ModelError unless all groups are equally large.
    """
    if not np.array_equal(np.bincount(index[index >= 0], minlength=groups), [len(index) // groups] * groups):
        raise module.wrong(f"its group index does not name each of {groups} groups {len(index) // groups} times")
    order = np.argsort(index, kind="stable")
    return None if np.array_equal(order, np.arange(len(order))) else order


def from_blocks(
    module: Module, scale: NDArray[np.float32], shape: tuple[int, int], block: tuple[int, int]
) -> Array:
    """Scales of blocks [ceil(N / rows), ceil(K / columns)] -> of rows and groups [N, groups].

    Where blocks do not divide a row, groups are as large as divides both. ModelError if that is small.
    """
    (n, k), (rows, columns) = shape, block
    group = k if k <= columns else gcd(k, columns)
    if group < min(k, SMALLEST_GROUP):
        raise module.wrong(f"blocks of {columns} columns do not divide its {k}, and they share only {group}")
    starts = np.arange(0, k, group)
    return np.ascontiguousarray(scale[np.arange(n)[:, None] // rows, starts // columns])
