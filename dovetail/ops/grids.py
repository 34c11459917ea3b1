"""Weights on uniform grids: integer or 8-bit floating codes, and scales beside them.

These are what quantized Hugging Face checkpoints hold. A weight [N, K] is a `StoredTensor` of several parts; group
g of a row is columns [g K / groups, (g + 1) K / groups), and one group is a scale per row ("per channel").

| format | data, uint8 | parts | value |
|---|---|---|---|
| I8 | int8 codes q [N, K] | scale float32 [N, groups]; zero int16 [N, groups] or none | (q - zero) scale |
| I4 | u = q + 8, q in [-8, 7]: [N, K / 2], even columns in the low half | as I8 | (q - zero) scale |
| F8 | e4m3 codes [N, K] | scale float32 [N, groups] | e4m3(code) scale |
| ATOM | I4 codes [N, (K - o) / 2], then int8 codes [N, o] | scale [N, groups]; outlier_scale [N] | q scale |
| TENDER8, TENDER4 | codes as of I8, I4 | scale [N]; bias [N, chunks] or none | q scale |

`shared["order"]` (int64 [K]), if there is one, says of which input column each code is: ATOM and TENDER have one,
and GPTQ with act-order. Then groups are of the codes' columns, not of the input's.

How rows of activations are quantized for a weight is `StoredTensor.activation`; what that needs is in `shared`:

- atom: `clip` float32 [1], which the magnitudes of a group are multiplied with (Atom, section 4.3).
- tender: `sizes` int64 [G], how many codes each group has, largest scale first; groups begin at multiples of 4
  codes. `scales` float32 [chunks], of the last group; `means` float32 [chunks, K] by input column, subtracted from
  rows, or none; `chunk` int64 [1], rows of one. `bias` is the product of the means and the unquantized weight, if
  there are means (`ops.tender`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

ACTIVATIONS = ("", "int16", "int8-token", "fp8-token", "atom", "tender")  # of weights; "" as `--activations` says

Floats = NDArray[np.float32]


class Parts(Protocol):
    """What is read here of a `StoredTensor`."""

    @property
    def format(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def data(self) -> NDArray[np.uint8]: ...

    @property
    def parts(self) -> Mapping[str, NDArray[Any]]: ...

    @property
    def shared(self) -> Mapping[str, NDArray[Any]]: ...


# What native kernels know of rows (`activations.rule`), in their order, and the types there.
SHARED: dict[str, type[np.generic]] = {
    "order": np.int32, "clip": np.float32, "sizes": np.int32, "scales": np.float32, "means": np.float32,
}  # fmt: skip


def to_nibbles(codes: NDArray[Any]) -> NDArray[np.uint8]:
    """Signed codes [..., K] in [-8, 7], K even -> uint8 [..., K / 2]."""
    shifted = (codes + 8).astype(np.uint8)
    return np.bitwise_or(shifted[..., 0::2], shifted[..., 1::2] << 4, dtype=np.uint8)


def from_nibbles(data: NDArray[np.uint8]) -> NDArray[np.int8]:
    """uint8 [..., K / 2] -> signed codes [..., K] in [-8, 7]."""
    out = np.empty((*data.shape[:-1], 2 * data.shape[-1]), np.int8)
    out[..., 0::2] = data & 15
    out[..., 1::2] = data >> 4
    return out - np.int8(8)


@cache
def e4m3() -> Floats:
    """The values of all 256 codes: sign, 4 bits of exponent (bias 7), 3 of mantissa. 0x7f and 0xff are NaN; there
    is no infinity (Micikevicius et al., 2209.05433)."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    size[(code & 127) == 127] = np.nan
    return np.where(code & 128, -size, size).astype(np.float32)


def to_e4m3(x: NDArray[Any]) -> NDArray[np.uint8]:
    """The nearest codes, ties to the even one; what is beyond 448 becomes 448, and NaN 0x7f."""
    x = np.asarray(x, np.float32)
    size = np.minimum(np.abs(x), np.float32(448))
    exponent = np.clip(np.frexp(size)[1] - 1, -6, 8)
    steps = np.round(np.ldexp(np.nan_to_num(size), 3 - exponent)).astype(np.int32)  # of 2^(e - 3); 16 carries
    code = np.where(steps < 8, steps, (exponent + 7) * 8 + steps - 8)
    return (np.where(np.isnan(x), 127, code) | np.where(np.signbit(x), 128, 0)).astype(np.uint8)


def codes(stored: Parts) -> NDArray[Any]:
    """The codes [N, K] of I8, I4 and TENDER, in their own order; int8."""
    if stored.format in ("I4", "TENDER4"):
        return from_nibbles(stored.data)
    return stored.data.view(np.int8)


def _scaled(q: Floats, scale: NDArray[Any], zero: NDArray[Any] | None = None) -> Floats:
    """q [N, K] times scale [N, groups] of its column's group, after zero points were subtracted."""
    groups = q.reshape(len(q), scale.shape[1], -1)
    if zero is not None:
        groups = groups - zero[..., None].astype(np.float32)
    return (groups * scale[..., None].astype(np.float32)).reshape(q.shape)


def _restored(stored: Parts, values: Floats) -> Floats:
    """Columns of the codes back to those of the input."""
    if "order" not in stored.shared:
        return values.reshape(stored.shape)
    out = np.empty_like(values)
    out[:, stored.shared["order"]] = values
    return out.reshape(stored.shape)


def _integers(stored: Parts) -> Floats:
    q = codes(stored).astype(np.float32)
    return _restored(stored, _scaled(q, stored.parts["scale"].reshape(len(q), -1), stored.parts.get("zero")))


def _eights(stored: Parts) -> Floats:
    return _restored(stored, _scaled(e4m3()[stored.data], stored.parts["scale"]))


def _mixed(stored: Parts) -> Floats:
    outliers = num_outliers(stored)
    split = (stored.shape[1] - outliers) // 2
    narrow = _scaled(from_nibbles(stored.data[:, :split]).astype(np.float32), stored.parts["scale"])
    wide = stored.data[:, split:].view(np.int8).astype(np.float32) * stored.parts["outlier_scale"][:, None]
    return _restored(stored, np.concatenate([narrow, wide], 1))


def num_outliers(stored: Parts) -> int:
    """Columns of an ATOM weight that have 8 bits; the last ones of its order."""
    return 2 * stored.data.shape[1] - stored.shape[1]


DEQUANTIZE: dict[str, Callable[[Parts], Floats]] = {
    "I8": _integers, "I4": _integers, "F8": _eights, "ATOM": _mixed, "TENDER8": _integers, "TENDER4": _integers,
}  # fmt: skip
