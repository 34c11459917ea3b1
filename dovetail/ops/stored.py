"""One tensor as it is stored in a checkpoint: raw bytes by row, and the name of their format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from dovetail.core.errors import ModelError
from dovetail.core.model import PLAIN_FORMATS
from dovetail.ops.dequant import BLOCKS

CUT_SHORT = "the file is cut short; fetch it again"  # how errors about missing bytes end

_NATIVE = {name: getattr(torch, dtype) for name, dtype in PLAIN_FORMATS.items()}
_CHUNK = 1 << 18  # values decoded at a time, so that the float32 intermediate stays in cache


@dataclass(frozen=True)
class StoredTensor:
    """`shape` values in `format` (a key of `ops.dequant.BLOCKS` or of `PARTED`).

    `data` is uint8 [rows, row_bytes]. Rows run over all but the last dimension. `data` is usually a view of a
    mapped file: do not write to it. A format may keep more than codes. `parts` are by name what belongs to a row
    (scales, zero points): their first dimension runs over the rows. `shared` is what all rows have in common (a
    permutation of the columns).
    """

    name: str
    format: str
    shape: tuple[int, ...]
    data: torch.Tensor
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    shared: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values as `dtype` in `shape`, rounded once from float32. May alias `data` if no conversion is
        needed.
        """
        if self.format in PARTED:
            return PARTED[self.format](self).to(dtype)
        if self.format in _NATIVE and self.data.is_contiguous():
            native = _NATIVE[self.format]
            if self.data.data_ptr() % native.itemsize == 0:
                return self.data.view(-1).view(native).view(self.shape).to(dtype)
        block = BLOCKS[self.format]
        blocks = self.data.reshape(-1, block.bytes)
        out = torch.empty(blocks.shape[0], block.values, dtype=dtype)
        step = max(1, _CHUNK // block.values)
        if blocks.shape[0] <= step and dtype is torch.float32:
            return block.dequantize(blocks).view(self.shape)
        for start in range(0, blocks.shape[0], step):
            out[start : start + step] = block.dequantize(blocks[start : start + step])
        return out.view(self.shape)

    def permute_rows(self, index: torch.Tensor) -> StoredTensor:
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
        return self._with(rows.index_select(0, index).view(self.data.shape), index, self.shape)

    def rows(self, index: torch.Tensor) -> StoredTensor:
        """Rows `index` (int64 [n]) of a matrix, which need not be all of them."""
        return self._with(self.data.index_select(0, index), index, (len(index), *self.shape[1:]))

    @property
    def nbytes(self) -> int:
        """Of all parts together."""
        return sum(t.nbytes for t in (self.data, *self.parts.values(), *self.shared.values()))

    def _with(self, data: torch.Tensor, index: torch.Tensor, shape: tuple[int, ...]) -> StoredTensor:
        parts = {name: part.index_select(0, index) for name, part in self.parts.items()}
        return replace(self, data=data, shape=shape, parts=parts)


def _by_channel(stored: StoredTensor) -> torch.Tensor:
    """int8 codes and a float scale for each row; `order`, if there is one, says of which column each code is."""
    codes = stored.data.view(torch.int8).view(stored.shape).float()
    values = codes * stored.parts["scale"].float().view(-1, *[1] * (len(stored.shape) - 1))
    if "order" not in stored.shared:
        return values
    return torch.empty_like(values).index_copy_(-1, stored.shared["order"], values)


# Formats of several parts: how their values come about, in float32.
PARTED: dict[str, Callable[[StoredTensor], torch.Tensor]] = {"INT8_CHANNEL": _by_channel}
