"""The numeric types of KV. Codes are in `codes`. A stored value depends on its own token alone.

Slots are numbered across layers: slot s of layer i is at i * slots per layer + s.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dovetail.core.errors import ConfigError
from dovetail.core.pages import IntArray
from dovetail.host.lazy_torch import torch
from dovetail.ops.cpu import padded
from dovetail.ops.memory import ELEMENTS, Memory, as_tensor, widened, zeros
from dovetail.runtime.codes import CODES, CodedTiles, CodeStore

if TYPE_CHECKING:
    from torch import Tensor

NATIVE_KINDS = {"float32": "float32", "bfloat16": "bf16"}  # what native kernels call the types of numbers
TILED = ("float32", "bf16", *CODES)  # the types that native kernels have tiles for
KV_DTYPES = ("float32", "bf16", "float16", "fp8", "int8", "int4", "float64")


class FloatStore:
    """One tensor [layers, pages * page_size, KV heads, head_dim] of a floating type."""

    layout = "NHD"

    def __init__(self, shape: tuple[int, int, int, int], kind: str, device: str) -> None:
        self.slots = shape[1]
        self._data = Memory((shape[0] * shape[1], *shape[2:]), kind, device)
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

    def rounded(self, values: Tensor) -> Tensor:
        """values [..., head_dim] as they would be read."""
        return values.to(self.data.dtype)

    def read(self, layer: int, slots: Tensor) -> Tensor:
        """slots [...] -> [..., KV heads, head_dim]."""
        return self.data.index_select(0, slots.flatten() + layer * self.slots).unflatten(0, slots.shape)

    def read_heads(self, layer: int, slots: Tensor) -> Tensor:
        """slots [rows, KV heads, n] -> [rows, KV heads, n, head_dim]: every head reads its own slots."""
        heads = torch.arange(slots.shape[1], device=slots.device)[None, :, None]
        return self.data[slots + layer * self.slots, heads]

    def copy(self, source: IntArray, target: IntArray) -> None:
        """Copy slots [n] of every layer."""
        layers = self._data.array.reshape(-1, self.slots, *self._data.shape[1:])
        layers[:, target] = layers[:, source]


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

    def rounded(self, values: Tensor) -> Tensor:
        """values [..., head_dim] as they would be read."""
        return values.to(self.data.dtype)

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


Store = FloatStore | TiledStore | CodeStore | CodedTiles
FLOATS = {"float32": "float32", "bf16": "bfloat16", "float16": "float16", "float64": "float64"}


def store_type(kv_cache_dtype: str) -> tuple[type[FloatStore] | type[CodeStore], str]:
    """The class and its type (of `ops.memory.ELEMENTS`, or of `codes.CODES`) that a `--kv-cache-dtype` names.

    Raises ConfigError for an unknown one.
    """
    if kv_cache_dtype in FLOATS:
        return FloatStore, FLOATS[kv_cache_dtype]
    if kv_cache_dtype in CODES:
        return CodeStore, kv_cache_dtype
    raise ConfigError(f"kv_cache_dtype '{kv_cache_dtype}' is unknown; the known ones are {', '.join(KV_DTYPES)}")


def tiles_type(kind: str) -> type[TiledStore] | type[CodedTiles]:
    """The class of tiles with values of `kind`, as `store_type` gives it."""
    return CodedTiles if kind in CODES else TiledStore


def fits_tiles(kv_cache_dtype: str, page_size: int) -> bool:
    """Whether the native kernels' own layout can hold such pages."""
    return kv_cache_dtype in TILED and page_size % 16 == 0
