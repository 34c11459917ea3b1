"""Numeric types of KV. A stored value is a function of its token alone.

Slots are numbered across layers: slot s of layer i is at i * slots per layer + s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dovetail.core.errors import ConfigError

KV_DTYPES = ("float32", "bf16", "float16", "int8", "float64")


def lazy_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose memory is taken when it is first written; torch.zeros would write all of it now."""
    if device.type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(*shape)


class FloatStore:
    """One tensor [layers, pages * page_size, KV heads, head_dim] of a floating type."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.slots = shape[1]
        self.data = lazy_zeros(shape, dtype, device).flatten(0, 1)

    @staticmethod
    def token_bytes(num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return num_kv_heads * head_dim * dtype.itemsize

    def write(self, layer: int, slots: Tensor, values: Tensor) -> None:
        """values [rows, KV heads, head_dim] into slots [rows]."""
        self.data.index_copy_(0, slots + layer * self.slots, values.to(self.data.dtype))

    def read(self, layer: int, slots: Tensor) -> Tensor:
        """slots [...] -> [..., KV heads, head_dim]."""
        return self.data.index_select(0, slots.flatten() + layer * self.slots).unflatten(0, slots.shape)

    def read_heads(self, layer: int, slots: Tensor) -> Tensor:
        """slots [rows, KV heads, n] -> [rows, KV heads, n, head_dim]: every head reads its own slots."""
        heads = torch.arange(slots.shape[1], device=slots.device)[None, :, None]
        return self.data[slots + layer * self.slots, heads]

    def copy(self, source: Tensor, target: Tensor) -> None:
        _copy(self.data, self.slots, source, target)


class Int8Store:
    """Symmetric int8 per token and head: scale = max|x| / 127 (float32), x ~ scale * round(x / scale)."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.slots = shape[1]
        self.codes = lazy_zeros(shape, torch.int8, device).flatten(0, 1)
        self.scales = lazy_zeros(shape[:3], torch.float32, device).flatten(0, 1)

    @staticmethod
    def token_bytes(num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return num_kv_heads * (head_dim + 4)

    def write(self, layer: int, slots: Tensor, values: Tensor) -> None:
        codes, scales = quantize_int8(values)
        at = slots + layer * self.slots
        self.codes.index_copy_(0, at, codes)
        self.scales.index_copy_(0, at, scales)

    def read(self, layer: int, slots: Tensor) -> Tensor:
        flat = slots.flatten() + layer * self.slots
        codes = self.codes.index_select(0, flat).to(torch.float32)
        return (codes * self.scales.index_select(0, flat)[..., None]).unflatten(0, slots.shape)

    def read_heads(self, layer: int, slots: Tensor) -> Tensor:
        heads = torch.arange(slots.shape[1], device=slots.device)[None, :, None]
        at = slots + layer * self.slots
        return self.codes[at, heads].to(torch.float32) * self.scales[at, heads][..., None]

    def copy(self, source: Tensor, target: Tensor) -> None:
        _copy(self.codes, self.slots, source, target)
        _copy(self.scales, self.slots, source, target)


def _copy(data: Tensor, slots: int, source: Tensor, target: Tensor) -> None:
    """Copy slots [n] of every layer."""
    layers = data.unflatten(0, (-1, slots))
    layers.index_copy_(1, target, layers.index_select(1, source))


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., d] -> codes int8 [..., d] and scales float32 [...]; |x - codes * scale| <= scale / 2."""
    x = x.to(torch.float32)
    scales = x.abs().amax(-1) / 127
    codes = torch.round(x / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None])
    return codes.clamp(-127, 127).to(torch.int8), scales


Store = FloatStore | Int8Store


def store_type(kv_cache_dtype: str) -> tuple[type[FloatStore] | type[Int8Store], torch.dtype]:
    """The class and element type that a `--kv-cache-dtype` names. Raises ConfigError for an unknown one."""
    floats = {"float32": torch.float32, "bf16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if kv_cache_dtype in floats:
        return FloatStore, floats[kv_cache_dtype]
    if kv_cache_dtype == "int8":
        return Int8Store, torch.int8
    raise ConfigError(f"kv_cache_dtype '{kv_cache_dtype}' is unknown; the known ones are {', '.join(KV_DTYPES)}")
