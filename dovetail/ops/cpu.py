"""The Python side of the native CPU kernels: what this machine can run, how weights are packed, aligned memory."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dovetail.core.errors import ConfigError
from dovetail.core.model import PLAIN_FORMATS
from dovetail.ops.stored import StoredTensor

ALIGNMENT = 4096  # bytes
TORCH = "torch"  # the name of the reference kernels
MAX_HEAD_DIM = 512  # buffers of the attention kernels have that size


@cache
def native() -> Any:
    """The extension module. None if it was not built; None with a warning if it does not load."""
    try:
        from dovetail import _native
    except ImportError as error:
        if (file := extension_file()) is not None:
            warnings.warn(f"the slow torch reference runs, because {file} does not load: {error}", stacklevel=2)
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


def pack(weight: StoredTensor, dtype: torch.dtype, threads: int) -> Any:
    """Weights [out, in] in the kernels' layout. The stored bits are kept where a kernel reads that format.

    With dtype bfloat16 all values are rounded to bfloat16. Formats without a kernel are expanded to float32.
    """
    module = native()
    if module is None:
        raise ConfigError("the native kernels were not built; run with --kernels torch")
    if dtype is torch.bfloat16 and weight.format != "BF16":
        weight = plain(weight, torch.bfloat16)
    elif weight.format not in module.formats():
        weight = plain(weight, torch.float32)
    data = weight.data if weight.data.stride(-1) == 1 else weight.data.contiguous()
    n, k = weight.shape
    return module.Packed(weight.format, data.data_ptr(), data.stride(0), n, k, threads)


def plain(weight: StoredTensor, dtype: torch.dtype) -> StoredTensor:
    """The same values as a plain tensor of `dtype`."""
    name = next(name for name, kind in PLAIN_FORMATS.items() if getattr(torch, kind) is dtype)
    values: Tensor = weight.dequantize(dtype).contiguous()
    return StoredTensor(weight.name, name, weight.shape, values.view(-1, weight.shape[-1]).view(torch.uint8))


def lazy_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose memory is taken when it is first written; torch.zeros would write all of it now.

    They begin at a page of memory. Vectors that cross a cache line are read at half the speed, and a page of KV
    that is as large as a page of memory then is exactly one.
    """
    if device.type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + ALIGNMENT, np.uint8)
    skip = -memory.ctypes.data % ALIGNMENT
    return torch.from_numpy(memory[skip : skip + size]).view(dtype).view(*shape)


def padded(head_dim: int) -> int:
    return -(-head_dim // 16) * 16
