"""The numeric types of KV. A stored value depends on its own token alone.

Slots are numbered across layers: slot s of layer i is at i * slots per layer + s.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dovetail.core.errors import ConfigError
from dovetail.core.pages import IntArray
from dovetail.host.lazy_torch import torch
from dovetail.ops.cpu import padded
from dovetail.ops.memory import ELEMENTS, Memory, as_tensor, widened, zeros

if TYPE_CHECKING:
    from torch import Tensor

NATIVE_KINDS = {"float32": "float32", "bfloat16": "bf16"}  # what native kernels call the types of numbers
KV_DTYPES = ("float32", "bf16", "float16", "int8", "int4", "float64")


class FloatStore:
    """One tensor [layers, pages * page_size, KV heads, head_dim] of a floating type."""

    layout = "NHD"

    def __init__(self, shape: tuple[int, int, int, int], kind: str, device: str) -> None:
        self.slots = shape[1]
        self._data = Memory(_flat(shape), kind, device)
        self.element = kind  # of `ops.memory.ELEMENTS`: what is read
        self.kind = NATIVE_KINDS.get(kind, "")

    @property
    def data(self) -> Tensor:
        """[layers * slots, KV heads, head_dim]."""
        return self._data.tensor

    def memory(self) -> tuple[int, int]:
        """Addresses of the data and of its scales, for the native kernels."""
        return self._data.address, 0

    @staticmethod
    def token_bytes(num_kv_heads: int, head_dim: int, kind: str) -> int:
        return num_kv_heads * head_dim * ELEMENTS[kind].itemsize

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

    def copy(self, source: IntArray, target: IntArray) -> None:
        """Copy slots [n] of every layer."""
        _copy(self._data, self.slots, source, target)


class CodeStore:
    """Codes and their scales: what KV in 8 and in 4 bits has in common."""

    layout = "NHD"
    element = "float32"  # what is read

    def __init__(self, codes: Sequence[int], scales: Sequence[int], kind: str, device: str) -> None:
        """Shapes [layers, slots, ...] of codes of `kind` (of `ops.memory.ELEMENTS`) and of float32 scales."""
        self.slots = codes[1]
        self._codes = Memory(_flat(codes), kind, device)
        self._scales = Memory(_flat(scales), "float32", device)

    @property
    def codes(self) -> Tensor:
        return self._codes.tensor

    @property
    def scales(self) -> Tensor:
        return self._scales.tensor

    def memory(self) -> tuple[int, int]:
        return self._codes.address, self._scales.address

    def copy(self, source: IntArray, target: IntArray) -> None:
        _copy(self._codes, self.slots, source, target)
        _copy(self._scales, self.slots, source, target)


class Int8Store(CodeStore):
    """Symmetric int8 per token and head: scale = max|x| / 127 (float32), x ~ scale * round(x / scale)."""

    kind = "int8"

    def __init__(self, shape: tuple[int, int, int, int], kind: str, device: str) -> None:
        super().__init__(shape, shape[:3], kind, device)

    @staticmethod
    def token_bytes(num_kv_heads: int, head_dim: int, kind: str) -> int:
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


def _flat(shape: Sequence[int]) -> tuple[int, ...]:
    """[layers, slots, ...] with both first dimensions as one."""
    return (shape[0] * shape[1], *shape[2:])


def _copy(data: Memory, slots: int, source: IntArray, target: IntArray) -> None:
    layers = data.array.reshape(-1, slots, *data.shape[1:])
    layers[:, target] = layers[:, source]


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., d] -> codes int8 [..., d] and scales float32 [...]; |x - codes * scale| <= scale / 2."""
    x = x.to(torch.float32)
    scales = x.abs().amax(-1) / 127
    codes = torch.round(x / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None])
    return codes.clamp(-127, 127).to(torch.int8), scales


class Int4Store(CodeStore):
    """Asymmetric int4 per token and head: x ~ low + scale * code, code 0..15, scale = (max - min) / 15."""

    kind = "int4"

    def __init__(self, shape: tuple[int, int, int, int], kind: str, device: str) -> None:
        super().__init__((*shape[:3], shape[3] // 2), (*shape[:3], 2), kind, device)

    @staticmethod
    def token_bytes(num_kv_heads: int, head_dim: int, kind: str) -> int:
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

    def __init__(self, blobs: NDArray[Any], slots: int, head_dim: int, *, keys: bool) -> None:
        """blobs: [layers * pages, KV heads, 2, tiles, 16 * padded(head_dim)] of float32 or the bits of bfloat16,
        shared by K and V. In memory, heads are the outermost dimension."""
        self.slots, self.dim, self.keys = slots, head_dim, keys
        self.page_size = blobs.shape[3] * 16
        self.element = "float32" if blobs.dtype == np.float32 else "bfloat16"
        self.kind = NATIVE_KINDS[self.element]
        dim = padded(head_dim)
        inner: tuple[int, ...]
        if self.kind == "float32":
            inner = (dim, 16) if keys else (16, dim)
        else:
            inner = (dim // 2, 16, 2) if keys else (8, dim, 2)
        part = blobs[:, :, 0 if keys else 1]
        self.array = part.reshape(*part.shape[:-1], *inner)  # a view: only the last dimension is divided
        self.blobs = blobs

    @cached_property
    def data(self) -> Tensor:
        """`array` as a tensor."""
        return as_tensor(self.array, self.element)

    @classmethod
    def pair(cls, shape: tuple[int, int, int, int], kind: str, page_size: int) -> tuple[TiledStore, TiledStore]:
        """K and V of [layers, pages * page_size, KV heads, head_dim], zero."""
        layers, slots, heads, dim = shape
        by_head = (heads, layers * slots // page_size, 2, page_size // 16, 16 * padded(dim))
        blobs = zeros(by_head, ELEMENTS[kind]).swapaxes(0, 1)
        return cls(blobs, slots, dim, keys=True), cls(blobs, slots, dim, keys=False)

    def memory(self) -> tuple[int, int]:
        return self.array.ctypes.data, 0

    @staticmethod
    def token_bytes(num_kv_heads: int, head_dim: int, kind: str) -> int:
        return num_kv_heads * padded(head_dim) * ELEMENTS[kind].itemsize

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

    def pages(self, cells: IntArray) -> NDArray[Any]:
        """Whole pages in float32: cells [n, KV heads], the number of each head's page over all layers -> [n,
        page_size, KV heads, head_dim]."""
        found = widened(self.array[cells, np.arange(cells.shape[1])], self.element)  # [n, heads, tiles, ...]
        if self.keys:  # [.., dim, 16] or [.., dim / 2, 16, 2]: tokens behind dimensions
            found = np.moveaxis(found, 4, 3)
        elif self.kind == "bf16":  # [.., 8, dim, 2]: a pair of tokens behind dimensions
            found = np.moveaxis(found, 5, 4)
        n, heads = cells.shape
        return found.reshape(n, heads, self.page_size, -1)[..., : self.dim].swapaxes(1, 2)

    def read(self, layer: int, slots: Tensor) -> Tensor:
        """slots [...] -> [..., KV heads, head_dim]."""
        page, tile, t = self._place(layer, slots.flatten())
        return self._vectors((page, slice(None), tile), t).unflatten(0, slots.shape)

    def read_heads(self, layer: int, slots: Tensor) -> Tensor:
        """slots [rows, KV heads, n] -> [rows, KV heads, n, head_dim]."""
        heads = torch.arange(slots.shape[1], device=slots.device)[None, :, None].expand_as(slots).flatten()
        page, tile, t = self._place(layer, slots.flatten())
        return self._vectors((page, heads, tile), t).unflatten(0, slots.shape)

    def copy(self, source: IntArray, target: IntArray) -> None:
        """Copy whole pages, given as their slots."""
        per_layer = self.slots // self.page_size
        layers = np.arange(len(self.array) // per_layer)[:, None] * per_layer
        old, new = (s[:: self.page_size] // self.page_size + layers for s in (source, target))
        self.array[new] = self.array[old]

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


def store_type(kv_cache_dtype: str) -> tuple[Flat, str]:
    """The class and element type (of `ops.memory.ELEMENTS`) that a `--kv-cache-dtype` names.

    Raises ConfigError for an unknown one.
    """
    floats = {"float32": "float32", "bf16": "bfloat16", "float16": "float16", "float64": "float64"}
    if kv_cache_dtype in floats:
        return FloatStore, floats[kv_cache_dtype]
    if kv_cache_dtype == "int8":
        return Int8Store, "int8"
    if kv_cache_dtype == "int4":
        return Int4Store, "uint8"
    raise ConfigError(f"kv_cache_dtype '{kv_cache_dtype}' is unknown; the known ones are {', '.join(KV_DTYPES)}")


def fits_tiles(kv_cache_dtype: str, page_size: int) -> bool:
    """Whether the native kernels' own layout can hold such pages."""
    return kv_cache_dtype in ("float32", "bf16") and page_size % 16 == 0
