"""The Python side of the native CPU kernels: what this machine can run, and how weights are packed."""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dovetail.core.errors import ConfigError, ModelError
from dovetail.ops import tender
from dovetail.ops.activations import rule
from dovetail.ops.grids import SHARED, num_outliers
from dovetail.ops.stored import PARTED, StoredTensor

TORCH = "torch"  # the name of the reference kernels
_MOST_WITH_ZEROS = 512  # columns of a group whose codes have a zero point
MAX_HEAD_DIM = 512  # buffers of the attention kernels have that size


@cache
def native() -> Any:
    """The extension module. None if it was not built; None with a warning if it does not load."""
    try:
        from dovetail import _native
    except ImportError as error:
        if (file := extension_file()) is not None:
            warnings.warn(
                f"the native kernels cannot be used, because {file} does not load: {error}", stacklevel=2
            )
        return None
    return _native


def extension_file() -> str | None:
    """The file of the extension module, whether it is for this Python or for another one."""
    spec = importlib.util.find_spec("dovetail._native")
    if spec is not None:
        return spec.origin
    return next((str(f) for f in sorted(Path(__file__).parents[1].glob("_native*.so"))), None)


def isas() -> tuple[str, ...]:
    """The instruction sets that this build has and this CPU runs, best first; empty without the extension."""
    module = native()
    return tuple(module.isas()) if module is not None else ()


def emulated() -> tuple[str, ...]:
    """Instruction sets that run in emulation. They are slow, and meant for tests."""
    module = native()
    return tuple(module.emulated()) if module is not None else ()


def pack(weight: StoredTensor, dtype: str, threads: int) -> Any:
    """Weights [out, in] in the kernels' layout. The stored bits are kept where a kernel reads that format.

    With dtype "bfloat16" all values are rounded to bfloat16. Formats without a kernel are expanded to float32.
    Neither is done to weights whose checkpoint says how rows are quantized; ModelError if no kernel does that.
    """
    module = native()
    if module is None:
        raise ConfigError("the native kernels were not built; run with --kernels torch")
    if weight.format in PARTED and (weight.activation or dtype != "bfloat16"):
        if reason := _unpackable(weight):
            if weight.activation:
                kinds = f"{weight.format} weights and {weight.activation} activations"
                raise ModelError(
                    f"{weight.name}: no native kernel has {kinds} where {reason}; use --kernels torch"
                )
        else:
            return _pack_grid(weight, threads)
    if dtype == "bfloat16" and weight.format != "BF16":
        weight = plain(weight, "bfloat16")
    elif weight.format not in module.formats():
        weight = plain(weight)
    data = weight.data if weight.data.strides[-1] == 1 else np.ascontiguousarray(weight.data)
    n, k = weight.shape
    return module.Packed(weight.format, data.ctypes.data, data.strides[0], n, k, threads)


def _unpackable(weight: StoredTensor) -> str:
    """Why weights on a grid (`ops.grids`) have no packed layout, or nothing."""
    if weight.format not in native().grids():
        return "native layouts end"
    zero, k = weight.parts.get("zero"), weight.shape[1]
    groups = weight.parts["scale"].reshape(weight.shape[0], -1).shape[1]
    if weight.format == "ATOM":
        outliers = num_outliers(weight)
        fits = outliers % 32 == 0 and groups and (k - outliers) % (32 * groups) == 0
        return "" if fits else f"{k - outliers} columns have {groups} groups, beside {outliers} outliers"
    if zero is None:
        return f"{groups} groups have {k} columns" if groups > 1 and k % (32 * groups) else ""
    if k % 32 or k % (32 * groups):
        return f"{groups} groups with zero points have {k} columns"
    beyond = zero.size and (zero.min() < -128 or zero.max() > 127)
    return "a zero point does not fit 8 bits" if beyond else ""


def _pack_grid(weight: StoredTensor, threads: int) -> Any:
    n, k = weight.shape
    scale = np.ascontiguousarray(weight.parts["scale"].reshape(n, -1), np.float32)
    zero = weight.parts.get("zero")
    if zero is not None:
        times = _split(k // scale.shape[1])
        zero = np.ascontiguousarray(np.repeat(zero.reshape(n, -1), times, 1), np.int16)
        scale = np.repeat(scale, times, 1)
    codes = weight.data if weight.data.strides[-1] == 1 else np.ascontiguousarray(weight.data)
    known = tender.for_kernels(weight) if weight.activation == "tender" else rule(weight)
    outliers, pairs = 0, False
    if weight.format == "ATOM":
        outliers = num_outliers(weight)
        if pairs := n % 2 == 0 and np.array_equal(scale[::2], scale[1::2]):
            scale = np.ascontiguousarray(scale[::2])
    shared = [
        np.ascontiguousarray(known[name], kind) if name in known else np.empty(0, kind)
        for name, kind in SHARED.items()
    ]
    wide = np.ascontiguousarray(weight.parts["outlier_scale"], np.float32) if outliers else None
    bias = np.ascontiguousarray(weight.parts["bias"], np.float32) if "bias" in weight.parts else None
    try:
        return native().Packed.grid(
            weight.format, (n, k, scale.shape[1], outliers, pairs), (codes.ctypes.data, codes.strides[0]),
            (scale.ctypes.data, *(0 if part is None else part.ctypes.data for part in (zero, wide, bias))),
            weight.activation, [(array.ctypes.data, array.size) for array in shared], threads,
        )  # fmt: skip
    except ValueError as error:
        raise ModelError(f"{weight.name}: {error}") from error


def _split(size: int) -> int:
    """Into how many equal groups a group of `size` columns is divided: sums with zero points must stay small."""
    return next(
        times for times in range(1, size) if size % (32 * times) == 0 and size // times <= _MOST_WITH_ZEROS
    )


def plain(weight: StoredTensor, kind: str = "float32") -> StoredTensor:
    """The same values in a plain format."""
    return StoredTensor.of(weight.name, weight.values(), kind)


def padded(head_dim: int) -> int:
    return -(-head_dim // 16) * 16
