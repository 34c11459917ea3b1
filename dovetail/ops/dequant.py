"""Block formats of stored weights: bytes -> float32, and back for the one that is also made here.

Every quantized format cuts a row into blocks of `values` numbers that share a scale d, and in the `_1` and K
formats an offset m: value = d * q - m, or d * (q - zero). K formats have two levels: 256 values share a float16
scale, which multiplies small integer scales of 16 or 32 values each. Products and sums are rounded in float32 one
at a time, in the order of the format's reference. So results equal the reference bit for bit.

All functions take uint8 [blocks, block_bytes] and return float32 [blocks, values]; they allocate the result
and small intermediates only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.ops.memory import from_bfloat16

Bytes = NDArray[Any]  # uint8
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class BlockFormat:
    """`values` numbers in `bytes` bytes; `dequantize` maps uint8 [n, bytes] to float32 [n, values]."""

    name: str
    values: int
    bytes: int
    dequantize: Callable[[Bytes], Floats]


def _view(blocks: NDArray[Any], dtype: type[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(blocks).view(dtype)


def _half(blocks: Bytes, at: int) -> Floats:
    """float32 [n, 1] from the float16 at byte `at`."""
    return _view(blocks[:, at : at + 2], np.float16).astype(np.float32)


def _floats(codes: NDArray[Any]) -> Floats:
    return codes.astype(np.float32)


def _nibbles(bytes_: Bytes) -> Bytes:
    """uint8 [..., 2k]: the low halves of k bytes, then the high halves."""
    return np.concatenate((bytes_ & 15, bytes_ >> 4), axis=-1)


def _fifth_bits(blocks: Bytes, at: int) -> Bytes:
    """uint8 [n, 32]: 16 where the bit of the little-endian uint32 at byte `at` is set, else 0."""
    shifts = np.arange(8, dtype=np.uint8)
    bits = (blocks[:, at : at + 4, None] >> shifts) & np.uint8(1)
    return bits.reshape(-1, 32) << 4


def _q4_0(blocks: Bytes) -> Floats:
    """d * (q - 8), 32 values."""
    q = _floats(_nibbles(blocks[:, 2:]))
    q -= 8.0
    q *= _half(blocks, 0)
    return q


def _q4_1(blocks: Bytes) -> Floats:
    """d * q + m, 32 values."""
    q = _floats(_nibbles(blocks[:, 4:]))
    q *= _half(blocks, 0)
    q += _half(blocks, 2)
    return q


def _q5_0(blocks: Bytes) -> Floats:
    """d * (q - 16), 32 values of 5 bits."""
    q = _floats(_nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2))
    q -= 16.0
    q *= _half(blocks, 0)
    return q


def _q5_1(blocks: Bytes) -> Floats:
    """d * q + m, 32 values of 5 bits."""
    q = _floats(_nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4))
    q *= _half(blocks, 0)
    q += _half(blocks, 2)
    return q


def _q8_0(blocks: Bytes) -> Floats:
    """d * q, 32 values of 8 bits with sign."""
    q = _floats(_view(blocks[:, 2:], np.int8))
    q *= _half(blocks, 0)
    return q


_IQ4_LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def _iq4_nl(blocks: Bytes) -> Floats:
    """d * level[q], 32 values of 4 bits; the levels are closer to each other near 0."""
    q: Floats = _IQ4_LEVELS[_nibbles(blocks[:, 2:])]
    q *= _half(blocks, 0)
    return q


_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def _mxfp4(blocks: Bytes) -> Floats:
    """2^(e - 128) * twice the e2m1 value, 32 values of 4 bits (OCP Microscaling Formats 1.0, MXFP4).

    As in GGML, an e of 255 is a power of two like any other, and both zeros are positive.
    """
    e = blocks[:, :1].astype(np.uint32)
    bits = np.where(e < 2, np.uint32(0x00200000) << (e & 1), (np.maximum(e, 1) - 1) << np.uint32(23))
    q: Floats = _E2M1[_nibbles(blocks[:, 1:])]
    q *= bits.astype(np.uint32).view(np.float32)
    return q


def _planes(bytes_: Bytes, step: int, width: int) -> Bytes:
    """uint8 [n, groups, 8/step, width]: the `step`-bit fields of each group of `width` bytes, lowest bits
    first.
    """
    shifts = np.arange(0, 8, step, dtype=np.uint8).reshape(1, 1, -1, 1)
    return (bytes_.reshape(bytes_.shape[0], -1, 1, width) >> shifts) & np.uint8((1 << step) - 1)


def _q2_k(blocks: Bytes) -> Floats:
    """d * sc * q - dmin * mn: 16 groups of 16 values of 2 bits, 4-bit scale and minimum each."""
    scales = blocks[:, :16]
    scale = _floats(scales & 15) * _half(blocks, 80)
    minimum = _floats(scales >> 4) * _half(blocks, 82)
    q = _floats(_planes(blocks[:, 16:80], 2, 32).reshape(-1, 16, 16))
    q *= scale[..., None]
    q -= minimum[..., None]
    return q.reshape(-1, 256)


def _q3_k(blocks: Bytes) -> Floats:
    """d * (sc - 32) * (q - 4): 16 groups of 16 values of 3 bits (the high bit apart), 6-bit scales."""
    packed = blocks[:, 96:108]
    low = _nibbles(packed[:, :8])
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 4, 1)
    high = ((packed[:, 8:][:, None] >> shifts) & np.uint8(3)).reshape(-1, 16) << 4
    scale = (_floats(low | high) - 32.0) * _half(blocks, 108)
    codes = _planes(blocks[:, 32:96], 2, 32).reshape(-1, 256)
    codes = codes | (_planes(blocks[:, :32], 1, 32).reshape(-1, 256) << 2)
    q = _floats(codes.reshape(-1, 16, 16))
    q -= 4.0
    q *= scale[..., None]
    return q.reshape(-1, 256)


def _six_bit_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Scales and minima, uint8 [n, 8] each, from 12 bytes: four whole pairs, then four split over two
    places.
    """
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scale = np.concatenate((first & 63, (rest & 15) | ((first >> 6) << 4)), axis=1)
    minimum = np.concatenate((second & 63, (rest >> 4) | ((second >> 6) << 4)), axis=1)
    return scale, minimum


def _affine_k(blocks: Bytes, codes: Bytes) -> Floats:
    """d * sc * q - dmin * mn for the 8 groups of 32 of Q4_K and Q5_K; codes are uint8 [n, 8, 32]."""
    scale, minimum = _six_bit_scales(blocks[:, 4:16])
    q = _floats(codes)
    q *= (_floats(scale) * _half(blocks, 0))[..., None]
    q -= (_floats(minimum) * _half(blocks, 2))[..., None]
    return q.reshape(-1, 256)


def _q4_k(blocks: Bytes) -> Floats:
    return _affine_k(blocks, _planes(blocks[:, 16:], 4, 32).reshape(-1, 8, 32))


def _q5_k(blocks: Bytes) -> Floats:
    high = _planes(blocks[:, 16:48], 1, 32).reshape(-1, 8, 32)
    return _affine_k(blocks, _planes(blocks[:, 48:], 4, 32).reshape(-1, 8, 32) | (high << 4))


def _q6_k(blocks: Bytes) -> Floats:
    """d * sc * (q - 32): 16 groups of 16 values of 6 bits (4 low, 2 high), 8-bit scales with sign."""
    low = _planes(blocks[:, :128], 4, 64).reshape(-1, 256)
    high = _planes(blocks[:, 128:192], 2, 32).reshape(-1, 256)
    scale = _floats(_view(blocks[:, 192:208], np.int8)) * _half(blocks, 208)
    q = _floats((low | (high << 4)).reshape(-1, 16, 16))
    q -= 32.0
    q *= scale[..., None]
    return q.reshape(-1, 256)


def _iq4_xs(blocks: Bytes) -> Floats:
    """d * (sc - 32) * level[q]: 8 groups of 32 values of 4 bits, 6-bit scales (2 high bits apart)."""
    shifts = np.arange(0, 16, 2, dtype=np.uint16)
    high = ((_view(blocks[:, 2:4], np.uint16) >> shifts) & np.uint16(3)).astype(np.uint8) << 4
    low = _planes(blocks[:, 4:8], 4, 1).reshape(-1, 8)
    scale = (_floats(low | high) - 32.0) * _half(blocks, 0)
    q: Floats = _IQ4_LEVELS[_nibbles(blocks[:, 8:].reshape(-1, 8, 16))]
    q *= scale[..., None]
    return q.reshape(-1, 256)


def q8_0(x: NDArray[Any]) -> Bytes:
    """x [n, k], k a multiple of 32 -> uint8 [n, k / 32 * 34] in format Q8_0. Each 32 values become a float16
    scale, their largest magnitude / 127, and 32 signed bytes."""
    blocks = x.astype(np.float32).reshape(len(x), -1, 32)
    scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    steps = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0).round().astype(np.int8)
    data = np.concatenate([scale.astype(np.float16).view(np.uint8), steps.view(np.uint8)], -1)
    return data.reshape(len(x), -1)


BLOCKS: dict[str, BlockFormat] = {
    block.name: block
    for block in (
        BlockFormat("F32", 1, 4, lambda blocks: _view(blocks, np.float32)),
        BlockFormat("F16", 1, 2, lambda blocks: _view(blocks, np.float16).astype(np.float32)),
        BlockFormat("BF16", 1, 2, lambda blocks: from_bfloat16(_view(blocks, np.uint16))),
        BlockFormat("Q4_0", 32, 18, _q4_0),
        BlockFormat("Q4_1", 32, 20, _q4_1),
        BlockFormat("Q5_0", 32, 22, _q5_0),
        BlockFormat("Q5_1", 32, 24, _q5_1),
        BlockFormat("Q8_0", 32, 34, _q8_0),
        BlockFormat("IQ4_NL", 32, 18, _iq4_nl),
        BlockFormat("IQ4_XS", 256, 136, _iq4_xs),
        BlockFormat("MXFP4", 32, 17, _mxfp4),
        BlockFormat("Q2_K", 256, 84, _q2_k),
        BlockFormat("Q3_K", 256, 110, _q3_k),
        BlockFormat("Q4_K", 256, 144, _q4_k),
        BlockFormat("Q5_K", 256, 176, _q5_k),
        BlockFormat("Q6_K", 256, 210, _q6_k),
    )
}
"""Every format that a checkpoint may use, by GGUF name."""
