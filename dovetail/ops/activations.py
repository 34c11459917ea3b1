"""How rows of activations are quantized for weights of a checkpoint that asks for it (`StoredTensor.activation`).

These are the references of the native kernels. Everything belongs to one row, so a row's codes depend neither on
the other rows nor on their number. Rounding is to the nearest, ties to the even one.

| kind | codes | scale of a row |
|---|---|---|
| int8-token | int8: round(x * 127 / max\\|x\\|) | max\\|x\\| / 127 |
| fp8-token | e4m3: x * 448 / max\\|x\\| | max\\|x\\| / 448 |
| int16 | int16: round(x * 32639 / max\\|x\\|) of each 32 columns, as codes lie | max\\|x\\| / 32639 |
| atom | columns in the weight's order; groups: round(x * 7 / m) within [-8, 7] | m / 7 of each group |
| | outliers: round(x * 127 / max\\|x\\|) | max\\|x\\| / 127 of the outliers |

m is `clip` times the largest magnitude of a group (Atom, 2310.19102, section 4.3).

A row of zeros has zeros as codes and scale. So has a block of int16 whose values are all below 2^-100. A row with
a value that is not finite becomes NaN; with int16 its block does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.ops.grids import Parts, e4m3, num_outliers, to_e4m3

Floats = NDArray[np.float32]


def rule(weight: Parts) -> dict[str, NDArray[Any]]:
    """What quantizing rows for a weight takes: what all its rows share.

    For Atom these are also `clip` float32 [1], and `sizes` int64 [2]: of a group and of the outliers, in blocks
    of 32 columns.
    """
    found = dict(weight.shared)
    if weight.format == "ATOM":
        outliers, groups = num_outliers(weight), weight.parts["scale"].shape[1]
        found.setdefault("clip", np.ones(1, np.float32))
        found["sizes"] = np.array([(weight.shape[1] - outliers) // groups // 32, outliers // 32])
    return found


def _scaled(x: Floats, most: float, clip: float = 1.0) -> tuple[Floats, Floats]:
    """x [rows, K], scaled so that `clip` times the largest magnitude of a row becomes `most`; and the scales
    [rows, 1] that undo it."""
    top = np.abs(x).max(-1, keepdims=True).astype(np.float32) * np.float32(clip)
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.where(top == 0, np.float32(0), np.float32(most) / top)
        return x * factor, top / np.float32(most)


def int8_token(x: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Codes int8 [rows, K] and scales [rows, 1] of finite rows x [rows, K]."""
    scaled, scale = _scaled(x, 127)
    return np.round(scaled).astype(np.int8), scale


def fp8_token(x: Floats) -> tuple[NDArray[np.uint8], Floats]:
    """e4m3 codes uint8 [rows, K] and scales [rows, 1] of rows x [rows, K]."""
    scaled, scale = _scaled(x, 448)
    return to_e4m3(scaled), scale


def _int8_values(x: Floats, shared: Mapping[str, NDArray[Any]]) -> Floats:
    scaled, scale = _scaled(x, 127)
    with np.errstate(invalid="ignore"):
        return np.round(scaled) * scale


def _fp8_values(x: Floats, shared: Mapping[str, NDArray[Any]]) -> Floats:
    codes, scale = fp8_token(x)
    with np.errstate(invalid="ignore"):
        return e4m3()[codes] * scale


def _int16_values(x: Floats, shared: Mapping[str, NDArray[Any]]) -> Floats:
    order = shared.get("order", np.arange(x.shape[1]))
    blocks = np.pad(x[:, order], ((0, 0), (0, -x.shape[1] % 32))).reshape(len(x), -1, 32)
    top = np.abs(blocks).max(-1, keepdims=True)
    out = np.empty_like(x)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        factor = np.where(top > 2.0**-100, np.float32(32639) / top, np.float32(0))
        codes = np.where(np.isfinite(top), np.round(blocks * factor), np.float32(0))
        out[:, order] = (codes * (top / np.float32(32639))).reshape(len(x), -1)[:, : x.shape[1]]
    return out


def atom(x: Floats, known: Mapping[str, NDArray[Any]]) -> tuple[NDArray[np.int8], Floats]:
    """Codes int8 [rows, K] of rows x [rows, K], in the order of the weight's columns; and the scale of each code
    [rows, K]. known: see `rule`."""
    if "order" in known:
        x = x[:, known["order"]]
    group, outliers = (32 * int(size) for size in known["sizes"])
    narrow = x.shape[1] - outliers
    parts = [(x[:, i : i + group], 7, float(known["clip"][0])) for i in range(0, narrow, group)]
    if outliers:
        parts.append((x[:, narrow:], 127, 1.0))
    codes, scales = [], []
    for values, most, clip in parts:
        scaled, scale = _scaled(values, most, clip)
        with np.errstate(invalid="ignore"):
            codes.append(np.clip(np.round(scaled), -8 if most == 7 else -most, most).astype(np.int8))
        scales.append(np.broadcast_to(scale, values.shape))
    return np.concatenate(codes, 1), np.concatenate(scales, 1)


def _atom_values(x: Floats, known: Mapping[str, NDArray[Any]]) -> Floats:
    codes, scales = atom(x, known)
    found = np.empty_like(x)
    with np.errstate(invalid="ignore"):
        found[:, known.get("order", slice(None))] = codes * scales
    found[~np.isfinite(x).all(1)] = np.nan
    return found


# The values that a product sees of rows [rows, K], in the order of its input's columns. Other kinds round nothing.
FAKE: dict[str, Callable[[Floats, Mapping[str, NDArray[Any]]], Floats]] = {
    "int8-token": _int8_values, "fp8-token": _fp8_values, "int16": _int16_values, "atom": _atom_values,
}  # fmt: skip
