"""The numeric types of KV. A stored value depends on its own token alone.

Slots are numbered across layers: slot s of layer i is at i * slots per layer + s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.core.errors import ConfigError
from dovetail.ops.cpu import lazy_zeros, padded

KV_DTYPES = ("float32", "bf16", "float16", "int8", "int4", "float64")


class FloatStore:
    """One tensor [layers, pages * page_size, KV heads, head_dim] of a floating type."""

    layout = "NHD"

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.slots = shape[1]
        self.data = lazy_zeros(shape, dtype, device).flatten(0, 1)
        self.kind = {torch.float32: "float32", torch.bfloat16: "bf16"}.get(dtype, "")

    def memory(self) -> tuple[int, int]:
        """Addresses of the data and of its scales, for the native kernels."""
        return self.data.data_ptr(), 0

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

    layout = "NHD"
    kind = "int8"

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.slots = shape[1]
        self.codes = lazy_zeros(shape, torch.int8, device).flatten(0, 1)
        self.scales = lazy_zeros(shape[:3], torch.float32, device).flatten(0, 1)

    def memory(self) -> tuple[int, int]:
        return self.codes.data_ptr(), self.scales.data_ptr()

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


class Int4Store:
    """Asymmetric int4 per token and head: x ~ low + scale * code, code 0..15, scale = (max - min) / 15."""

    layout = "NHD"
    kind = "int4"

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.slots = shape[1]
        self.codes = lazy_zeros((*shape[:3], shape[3] // 2), torch.uint8, device).flatten(0, 1)
        self.scales = lazy_zeros((*shape[:3], 2), torch.float32, device).flatten(0, 1)

    def memory(self) -> tuple[int, int]:
        return self.codes.data_ptr(), self.scales.data_ptr()

    @staticmethod
    def token_bytes(num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return num_kv_heads * (head_dim // 2 + 8)

    def write(self, layer: int, slots: Tensor, values: Tensor) -> None:
        codes, scales = quantize_int4(values)
        at = slots + layer * self.slots
        self.codes.index_copy_(0, at, codes)
        self.scales.index_copy_(0, at, scales)

    def read(self, layer: int, slots: Tensor) -> Tensor:
        flat = slots.flatten() + layer * self.slots
        return _from_int4(self.codes[flat], self.scales[flat]).unflatten(0, slots.shape)

    def read_heads(self, layer: int, slots: Tensor) -> Tensor:
        heads = torch.arange(slots.shape[1], device=slots.device)[None, :, None]
        at = slots + layer * self.slots
        return _from_int4(self.codes[at, heads], self.scales[at, heads])

    def copy(self, source: Tensor, target: Tensor) -> None:
        _copy(self.codes, self.slots, source, target)
        _copy(self.scales, self.slots, source, target)


def quantize_int4(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., d] -> codes uint8 [..., d / 2], even dimensions in the low half, and (scale, low) [..., 2]."""
    x = x.to(torch.float32)
    low, high = x.aminmax(dim=-1)
    scale = (high - low) / 15
    tiny = torch.finfo(torch.float32).tiny
    codes = torch.round((x - low[..., None]) / scale.clamp_min(tiny)[..., None]).clamp(0, 15).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, torch.stack([scale, low], -1)


def _from_int4(codes: Tensor, scales: Tensor) -> Tensor:
    values = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).to(torch.float32)
    return values * scales[..., :1] + scales[..., 1:]


class TiledStore:
    """K or V as the native kernels read it: per page and head, tiles of 16 tokens, head_dim padded to 16.

    K tiles have tokens in lanes: float32 [dim][16], bfloat16 [dim / 2][16][2]. V tiles have dimensions in lanes:
    float32 [16][dim], bfloat16 [8][dim][2]. V of a page and head lies behind its K, and all pages of a head lie
    together. So neighbouring pages are one stream.
    """

    layout = "tiled"

    def __init__(self, memory: Tensor, slots: int, head_dim: int, *, keys: bool) -> None:
        """memory: [layers * pages, KV heads, 2, tiles, 16 * padded(head_dim)], shared by K and V. In memory, heads
        are the outermost dimension."""
        self.slots, self.dim, self.keys = slots, head_dim, keys
        self.page_size = memory.shape[3] * 16
        self.kind = "float32" if memory.dtype is torch.float32 else "bf16"
        dim = padded(head_dim)
        inner: tuple[int, ...]
        if self.kind == "float32":
            inner = (dim, 16) if keys else (16, dim)
        else:
            inner = (dim // 2, 16, 2) if keys else (8, dim, 2)
        self.data = memory[:, :, 0 if keys else 1].unflatten(-1, inner)
        self.memory_tensor = memory

    @classmethod
    def pair(
        cls, shape: tuple[int, int, int, int], dtype: torch.dtype, page_size: int
    ) -> tuple[TiledStore, TiledStore]:
        """K and V of [layers, pages * page_size, KV heads, head_dim], zero."""
        layers, slots, heads, dim = shape
        by_head = (heads, layers * slots // page_size, 2, page_size // 16, 16 * padded(dim))
        memory = lazy_zeros(by_head, dtype, torch.device("cpu")).transpose(0, 1)
        return cls(memory, slots, dim, keys=True), cls(memory, slots, dim, keys=False)

    def memory(self) -> tuple[int, int]:
        return self.data.data_ptr(), 0

    @staticmethod
    def token_bytes(num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return num_kv_heads * padded(head_dim) * dtype.itemsize

    def write(self, layer: int, slots: Tensor, values: Tensor) -> None:
        self.write_heads((slots + layer * self.slots)[:, None].expand(-1, self.data.shape[1]), values)

    def write_heads(self, slots: Tensor, values: Tensor) -> None:
        """Write values [rows, KV heads, head_dim] to slots [rows, KV heads] of all layers. Each head has its
        own."""
        values = torch.nn.functional.pad(values.to(self.data.dtype), (0, padded(self.dim) - self.dim))
        heads = torch.arange(slots.shape[1])
        page, tile, t = self._place(0, slots)
        if self.keys and self.kind == "bf16":
            self.data[page, heads, tile, :, t] = values.unflatten(-1, (-1, 2))
        elif self.keys:
            self.data[page, heads, tile, :, t] = values
        elif self.kind == "bf16":
            self.data[page, heads, tile, t // 2, :, t % 2] = values
        else:
            self.data[page, heads, tile, t] = values

    def read(self, layer: int, slots: Tensor) -> Tensor:
        """slots [...] -> [..., KV heads, head_dim]."""
        page, tile, t = self._place(layer, slots.flatten())
        return self._vectors((page, slice(None), tile), t).unflatten(0, slots.shape)

    def read_heads(self, layer: int, slots: Tensor) -> Tensor:
        """slots [rows, KV heads, n] -> [rows, KV heads, n, head_dim]."""
        heads = torch.arange(slots.shape[1], device=slots.device)[None, :, None].expand_as(slots).flatten()
        page, tile, t = self._place(layer, slots.flatten())
        return self._vectors((page, heads, tile), t).unflatten(0, slots.shape)

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy whole pages, given as their slots."""
        per_layer = self.slots // self.page_size
        layers = self.data.unflatten(0, (-1, per_layer))
        old, new = (s[:: self.page_size] // self.page_size for s in (source, target))
        layers[:, new] = layers[:, old]  # index_select would first copy all of this strided view

    def _place(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at = slots + layer * self.slots
        inside = at % self.page_size
        return at // self.page_size, inside // 16, inside % 16

    def _vectors(self, where: tuple[Tensor, Tensor | slice, Tensor], t: Tensor) -> Tensor:
        page, head, tile = where
        if self.keys:
            found = self.data[page, head, tile, :, t]
            found = found.flatten(-2) if self.kind == "bf16" else found
        elif self.kind == "bf16":
            found = self.data[page, head, tile, t // 2, :, t % 2]
        else:
            found = self.data[page, head, tile, t]
        return found[..., : self.dim]


Store = FloatStore | Int8Store | Int4Store | TiledStore
Flat = type[FloatStore] | type[Int8Store] | type[Int4Store]


def store_type(kv_cache_dtype: str) -> tuple[Flat, torch.dtype]:
    """The class and element type that a `--kv-cache-dtype` names. Raises ConfigError for an unknown one."""
    floats = {"float32": torch.float32, "bf16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if kv_cache_dtype in floats:
        return FloatStore, floats[kv_cache_dtype]
    if kv_cache_dtype == "int8":
        return Int8Store, torch.int8
    if kv_cache_dtype == "int4":
        return Int4Store, torch.uint8
    raise ConfigError(f"kv_cache_dtype '{kv_cache_dtype}' is unknown; the known ones are {', '.join(KV_DTYPES)}")


def fits_tiles(kv_cache_dtype: str, page_size: int) -> bool:
    """Whether the native kernels' own layout can hold such pages."""
    return kv_cache_dtype in ("float32", "bf16") and page_size % 16 == 0
