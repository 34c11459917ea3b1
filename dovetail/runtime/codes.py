"""KV as codes: 8 or 4 bits a value, and scales for each token and KV head. A stored value depends on its own token
alone.

    fp8     x ~ scale * code, code in e4m3, scale = max|x| / 448
    int8    x ~ scale * code, code -127 to 127, scale = max|x| / 127
    int4    x ~ low + scale * code, code 0 to 15, scale = (max - min) / 15
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dovetail.core.pages import IntArray
from dovetail.host.lazy_torch import torch
from dovetail.ops.cpu import padded
from dovetail.ops.memory import Memory, zeros

if TYPE_CHECKING:
    from torch import Tensor


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., d] -> codes uint8 [..., d], the bits of e4m3, and scales float32 [...]."""
    x = x.to(torch.float32)
    scales = x.abs().amax(-1) / 448
    codes = (x / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).clamp(-448, 448)
    return codes.to(torch.float8_e4m3fn).view(torch.uint8), scales


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., d] -> codes int8 [..., d] and scales float32 [...]; |x - codes * scale| <= scale / 2."""
    x = x.to(torch.float32)
    scales = x.abs().amax(-1) / 127
    codes = torch.round(x / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None])
    return codes.clamp(-127, 127).to(torch.int8), scales


def quantize_int4(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., d] -> codes uint8 [..., d / 2], even dimensions in the low half, and (scale, low) [..., 2]."""
    x = x.to(torch.float32)
    low, high = x.aminmax(dim=-1)
    scale = (high - low) / 15
    tiny = torch.finfo(torch.float32).tiny
    codes = torch.round((x - low[..., None]) / scale.clamp_min(tiny)[..., None]).clamp(0, 15).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, torch.stack([scale, low], -1)


def _e4m3_values() -> NDArray[np.float32]:
    """[256]: what each code stands for."""
    code = np.arange(256)
    exponent, fraction = code >> 3 & 15, code & 7
    whole = np.where(exponent > 0, 8 + fraction, fraction) * 2.0 ** (np.maximum(exponent, 1) - 10)
    values = np.where(code & 127 == 127, np.nan, whole) * np.where(code & 128, -1, 1)
    return values.astype(np.float32)


E4M3 = _e4m3_values()


@dataclass(frozen=True)
class Codes:
    """A type of codes. per_byte: codes in a byte. scales: floats for each token and KV head.

    quantize: x [..., d] -> codes [..., d / per_byte] as bytes, even dimensions in the low half, and scales [...,
    scales], or [...] if there is one. values: codes [..., d], one each, -> what they count as, in float32.
    """

    per_byte: int
    scales: int
    element: str  # of `ops.memory.ELEMENTS`
    quantize: Callable[[Tensor], tuple[Tensor, Tensor]]
    values: Callable[[NDArray[np.uint8]], NDArray[np.float32]]

    def dequantized(self, codes: NDArray[np.uint8], scales: NDArray[np.float32]) -> NDArray[np.float32]:
        """codes [..., d], one each, with scales [..., `scales`] -> values [..., d]."""
        found: NDArray[np.float32] = self.values(codes) * scales[..., :1]
        return found if self.scales == 1 else found + scales[..., 1:]


CODES = {
    "fp8": Codes(1, 1, "uint8", quantize_fp8, lambda c: E4M3[c]),
    "int8": Codes(1, 1, "int8", quantize_int8, lambda c: c.view(np.int8).astype(np.float32)),
    "int4": Codes(2, 2, "uint8", quantize_int4, lambda c: c.astype(np.float32)),
}


def _values(kind: str, codes: Tensor, scales: Tensor) -> Tensor:
    """What `Codes.quantize` gave, as values [..., d] in float32."""
    if kind == "int4":
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
        return codes.to(torch.float32) * scales[..., :1] + scales[..., 1:]
    if kind == "fp8":
        codes = codes.view(torch.float8_e4m3fn)
    return codes.to(torch.float32) * scales[..., None]


class CodeStore:
    """Codes [layers * slots, KV heads, head_dim / per_byte] and their scales, of a type of `CODES`."""

    layout = "NHD"
    element = "float32"  # what is read

    def __init__(self, shape: tuple[int, int, int, int], kind: str, device: str) -> None:
        """shape: [layers, pages * page_size, KV heads, head_dim]."""
        layers, self.slots, heads, dim = shape
        self.kind, self.how = kind, CODES[kind]
        rows = (layers * self.slots, heads)
        self._codes = Memory((*rows, dim // self.how.per_byte), self.how.element, device)
        self._scales = Memory((*rows, *((2,) if self.how.scales == 2 else ())), "float32", device)

    @property
    def codes(self) -> Tensor:
        return self._codes.tensor

    @property
    def scales(self) -> Tensor:
        return self._scales.tensor

    def memory(self) -> tuple[int, int]:
        return self._codes.address, self._scales.address

    @staticmethod
    def token_bytes(num_kv_heads: int, head_dim: int, kind: str) -> int:
        return num_kv_heads * (head_dim // CODES[kind].per_byte + 4 * CODES[kind].scales)

    def write(self, layer: int, slots: Tensor, values: Tensor) -> None:
        """values [rows, KV heads, head_dim] into slots [rows]."""
        codes, scales = self.how.quantize(values)
        at = slots + layer * self.slots
        self.codes.index_copy_(0, at, codes)
        self.scales.index_copy_(0, at, scales)

    def rounded(self, values: Tensor) -> Tensor:
        """values [..., head_dim] as they would be read."""
        return _values(self.kind, *self.how.quantize(values))

    def read(self, layer: int, slots: Tensor) -> Tensor:
        """slots [...] -> [..., KV heads, head_dim] in float32."""
        flat = slots.flatten() + layer * self.slots
        found = _values(self.kind, self.codes.index_select(0, flat), self.scales.index_select(0, flat))
        return found.unflatten(0, slots.shape)

    def read_heads(self, layer: int, slots: Tensor) -> Tensor:
        """slots [rows, KV heads, n] -> [rows, KV heads, n, head_dim]: every head reads its own slots."""
        heads = torch.arange(slots.shape[1], device=slots.device)[None, :, None]
        at = slots + layer * self.slots
        return _values(self.kind, self.codes[at, heads], self.scales[at, heads])

    def copy(self, source: IntArray, target: IntArray) -> None:
        """Copy slots [n] of every layer."""
        for data in (self._codes, self._scales):
            layers = data.array.reshape(-1, self.slots, *data.shape[1:])
            layers[:, target] = layers[:, source]


class CodedTiles:
    """K or V as codes, as the native kernels read them: in the order of `TiledStore`, in tiles of bytes.

    The codes of a tile have the order of a bfloat16 tile (csrc/kernels.h, `KVStored`). With 4 bits two codes of
    the same token share a byte. Behind the codes are the scales of the sixteen tokens, and for int4 their lows.
    Reading gives float32. What techniques keep beside KV is bfloat16, as the kernels compute.
    """

    layout = "tiled"
    element = "bfloat16"

    def __init__(self, blobs: NDArray[np.uint8], slots: int, head_dim: int, kind: str, *, keys: bool) -> None:
        """blobs: [layers * pages, KV heads, 2, tiles, bytes of a tile], shared by K and V."""
        self.slots, self.dim, self.kind, self.keys = slots, head_dim, kind, keys
        self.how = CODES[kind]
        self.page_size = blobs.shape[3] * 16
        self.blobs = blobs
        self.array = blobs[:, :, 0 if keys else 1]
        scales = self.array[..., -64 * self.how.scales :].view(np.float32)
        self._scales = scales.reshape(*scales.shape[:-1], self.how.scales, 16)
        self._bytes, self._shifts = _places(padded(head_dim), self.how.per_byte, keys=keys)

    @classmethod
    def pair(cls, shape: tuple[int, int, int, int], kind: str, page_size: int) -> tuple[CodedTiles, CodedTiles]:
        """K and V of [layers, pages * page_size, KV heads, head_dim], zero."""
        layers, slots, heads, dim = shape
        by_head = (heads, layers * slots // page_size, 2, page_size // 16, tile_bytes(dim, kind))
        blobs = zeros(by_head, np.dtype(np.uint8)).swapaxes(0, 1)
        return cls(blobs, slots, dim, kind, keys=True), cls(blobs, slots, dim, kind, keys=False)

    def memory(self) -> tuple[int, int]:
        return self.array.ctypes.data, 0

    @staticmethod
    def token_bytes(num_kv_heads: int, head_dim: int, kind: str) -> int:
        return num_kv_heads * tile_bytes(head_dim, kind) // 16

    def write(self, layer: int, slots: Tensor, values: Tensor) -> None:
        self.write_heads((slots + layer * self.slots)[:, None].expand(-1, self.array.shape[1]), values)

    def write_heads(self, slots: Tensor, values: Tensor) -> None:
        """Write values [rows, KV heads, head_dim] to slots [rows, KV heads] of all layers. Each head has its
        own."""
        found, scales = (x.numpy() for x in self.how.quantize(values))
        codes = np.zeros((*slots.shape, self._bytes.shape[1]), np.uint8)
        codes[..., : self.dim] = _single(found.view(np.uint8), self.how.per_byte)
        first = np.flatnonzero(self._shifts == 0)  # the dimensions whose codes are a byte, or its low half
        halves = codes[..., first]
        if self.how.per_byte == 2:
            halves = halves | codes[..., first + (2 if self.keys else 16)] << 4
        page, tile, t = self._place(0, slots.numpy())
        heads = np.arange(slots.shape[1])
        self.array[page[..., None], heads[:, None], tile[..., None], self._bytes[t][..., first]] = halves
        self._scales[page, heads, tile, :, t] = scales.reshape(*t.shape, self.how.scales)

    def pages(self, cells: IntArray) -> NDArray[Any]:
        """Whole pages in float32: cells [n, KV heads], the number of each head's page over all layers -> [n,
        page_size, KV heads, head_dim]."""
        heads = np.arange(cells.shape[1])[:, None, None]
        tokens = np.arange(self.page_size)
        found = self._vectors((cells[:, :, None], heads[..., 0], tokens // 16), tokens % 16)
        return found.swapaxes(1, 2)

    def rounded(self, values: Tensor) -> Tensor:
        """values [..., head_dim] as they would be read."""
        return _values(self.kind, *self.how.quantize(values))

    def read(self, layer: int, slots: Tensor) -> Tensor:
        """slots [...] -> [..., KV heads, head_dim] in float32."""
        page, tile, t = (x[..., None] for x in self._place(layer, slots.numpy()))
        return torch.from_numpy(self._vectors((page, np.arange(self.array.shape[1]), tile), t))

    def read_heads(self, layer: int, slots: Tensor) -> Tensor:
        """slots [rows, KV heads, n] -> [rows, KV heads, n, head_dim]."""
        page, tile, t = self._place(layer, slots.numpy())
        return torch.from_numpy(self._vectors((page, np.arange(slots.shape[1])[:, None], tile), t))

    def copy(self, source: IntArray, target: IntArray) -> None:
        """Copy whole pages, given as their slots."""
        per_layer = self.slots // self.page_size
        layers = np.arange(len(self.array) // per_layer)[:, None] * per_layer
        old, new = (s[:: self.page_size] // self.page_size + layers for s in (source, target))
        self.array[new] = self.array[old]

    def _place(self, layer: int, slots: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        at = slots + layer * self.slots
        inside = at % self.page_size
        return at // self.page_size, inside // 16, inside % 16

    def _vectors(self, where: tuple[NDArray[Any], ...], t: NDArray[Any]) -> NDArray[np.float32]:
        """The vectors [..., head_dim] at (page, head, tile) and column t, which broadcast."""
        page, head, tile, t = np.broadcast_arrays(*where, t)
        codes = self.array[page[..., None], head[..., None], tile[..., None], self._bytes[t][..., : self.dim]]
        if self.how.per_byte == 2:
            codes = codes >> self._shifts[: self.dim] & 15
        return self.how.dequantized(codes, self._scales[page, head, tile, :, t])


def tile_bytes(head_dim: int, kind: str) -> int:
    """Bytes of K or V of 16 tokens of a KV head: codes (4 bits of a multiple of 32 dimensions), then scales."""
    width = padded(head_dim) if CODES[kind].per_byte == 1 else -(-head_dim // 32) * 16
    return 16 * width + 64 * CODES[kind].scales


def _places(dim: int, per_byte: int, *, keys: bool) -> tuple[IntArray, NDArray[np.uint8]]:
    """Where the code of token t and dimension d is in a tile: its byte [16, dim], and its shift there [dim]. With
    two in a byte, `dim` is rounded up to a multiple of 32."""
    dim = -(-dim // 32) * 32 if per_byte == 2 else dim
    t, d = np.arange(16)[:, None], np.arange(dim)
    vector, word = (d // 2, 2 * t + d % 2) if keys else (t // 2 * (dim // 16) + d // 16, 2 * (d % 16) + t % 2)
    shifts = 4 * (d // (2 if keys else 16) % per_byte)
    return 32 * (vector // per_byte) + word, shifts.astype(np.uint8)


def _single(codes: NDArray[np.uint8], per_byte: int) -> NDArray[np.uint8]:
    """Codes one in a byte: [..., d / per_byte] -> [..., d]."""
    if per_byte == 1:
        return codes
    return np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1)
