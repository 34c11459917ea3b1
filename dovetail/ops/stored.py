"""One tensor as it is stored in a checkpoint: raw bytes by row, and the name of their format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dovetail.core.errors import ModelError
from dovetail.core.model import PLAIN_FORMATS
from dovetail.host.lazy_torch import torch
from dovetail.ops.dequant import BLOCKS
from dovetail.ops.grids import DEQUANTIZE
from dovetail.ops.memory import ELEMENTS, as_tensor, rounded

if TYPE_CHECKING:
    from torch import Tensor

CUT_SHORT = "the file is cut short; fetch it again"  # how errors about missing bytes end

_CHUNK = 1 << 18  # values decoded at a time, so that the float32 intermediate stays in cache


@dataclass(frozen=True)
class StoredTensor:
    """`shape` values in `format` (a key of `ops.dequant.BLOCKS` or of `PARTED`).

    `data` is uint8 [rows, row_bytes]. Rows run over all but the last dimension. `data` is usually a view of a
    mapped file: do not write to it. A format may keep more than codes. `parts` are by name what belongs to a row
    (scales, zero points): their first dimension runs over the rows. `shared` is what all rows have in common (a
    permutation of the columns). `activation`: how the checkpoint wants the rows quantized that it is multiplied
    with, one of `ops.grids.ACTIVATIONS`.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]
    parts: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    shared: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    activation: str = ""

    @classmethod
    def of(cls, name: str, values: NDArray[Any], kind: str = "float32") -> StoredTensor:
        """float32 values [rows, ...] or [n] in a plain format: `kind` is one of `core.model.PLAIN_FORMATS`'
        types."""
        plain = next(name for name, known in PLAIN_FORMATS.items() if known == kind)
        data = np.ascontiguousarray(rounded(values, kind)).reshape(-1, values.shape[-1]).view(np.uint8)
        return cls(name, plain, tuple(values.shape), data)

    def values(self, kind: str = "float32") -> NDArray[Any]:
        """The values as `kind` of `ops.memory.ELEMENTS` (bfloat16 as its bits) in `shape`, rounded once from
        float32. May alias `data` if no conversion is needed."""
        if self.format in PARTED:
            return rounded(PARTED[self.format](self), kind)
        if PLAIN_FORMATS.get(self.format) == kind and self.data.flags.c_contiguous:
            flat = self.data.reshape(-1)
            if flat.ctypes.data % ELEMENTS[kind].itemsize == 0:
                return flat.view(ELEMENTS[kind]).reshape(self.shape)
        block = BLOCKS[self.format]
        blocks = self.data.reshape(-1, block.bytes)
        step = max(1, _CHUNK // block.values)
        out = np.empty((len(blocks), block.values), ELEMENTS[kind])
        for start in range(0, len(blocks), step):
            out[start : start + step] = rounded(block.dequantize(blocks[start : start + step]), kind)
        return out.reshape(self.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """`values` as a torch tensor of `dtype`; None is float32."""
        kind = "float32" if dtype is None else str(dtype).removeprefix("torch.")
        return as_tensor(self.values(kind), kind)

    def permute_rows(self, index: NDArray[np.int64]) -> StoredTensor:
        """The same tensor with row `index[i]` (int64 [rows]) as row i. Bytes move; values do not change.

        The rows of a 1-d tensor are its values. ModelError if `index` has another length, or a 1-d tensor is
        stored in blocks.
        """
        rows = self.data
        if len(self.shape) == 1:
            if self.format in PARTED or BLOCKS[self.format].values != 1:
                raise ModelError(f"{self.name}: a {self.format} vector cannot be reordered value by value")
            rows = self.data.reshape(self.shape[0], -1)
        if index.shape != (rows.shape[0],):
            raise ModelError(f"{self.name}: {tuple(index.shape)} row numbers for {rows.shape[0]} rows")
        return self._with(rows[index].reshape(self.data.shape), index, self.shape)

    def rows(self, index: NDArray[np.int64]) -> StoredTensor:
        """Rows `index` (int64 [n]) of a matrix, which need not be all of them."""
        return self._with(self.data[index], index, (len(index), *self.shape[1:]))

    @property
    def nbytes(self) -> int:
        """Of all parts together."""
        return sum(a.nbytes for a in (self.data, *self.parts.values(), *self.shared.values()))

    def _with(self, data: NDArray[np.uint8], index: NDArray[np.int64], shape: tuple[int, ...]) -> StoredTensor:
        parts = {name: part[index] for name, part in self.parts.items()}
        return replace(self, data=data, shape=shape, parts=parts)


# Formats of several parts: how their values come about, in float32.
PARTED: dict[str, Callable[[StoredTensor], NDArray[np.float32]]] = dict(DEQUANTIZE)
