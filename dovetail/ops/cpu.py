"""The Python side of the native CPU kernels: what this machine can run, and how weights are packed."""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dovetail.core.errors import ConfigError
from dovetail.ops.stored import StoredTensor

TORCH = "torch"  # the name of the reference kernels
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
    """
    module = native()
    if module is None:
        raise ConfigError("the native kernels were not built; run with --kernels torch")
    if dtype == "bfloat16" and weight.format != "BF16":
        weight = plain(weight, "bfloat16")
    elif weight.format not in module.formats():
        weight = plain(weight)
    data = weight.data if weight.data.strides[-1] == 1 else np.ascontiguousarray(weight.data)
    n, k = weight.shape
    return module.Packed(weight.format, data.ctypes.data, data.strides[0], n, k, threads)


def plain(weight: StoredTensor, kind: str = "float32") -> StoredTensor:
    """The same values in a plain format."""
    return StoredTensor.of(weight.name, weight.values(), kind)


def padded(head_dim: int) -> int:
    return -(-head_dim // 16) * 16
