"""Block formats of stored weights: bytes -> float32.

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

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockFormat:
    """`values` numbers in `bytes` bytes; `dequantize` maps uint8 [n, bytes] to float32 [n, values]."""

    name: str
    values: int
    bytes: int
    dequantize: Callable[[Tensor], Tensor]


def _half(blocks: Tensor, at: int) -> Tensor:
    """float32 [n, 1] from the float16 at byte `at`."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _plain(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def dequantize(blocks: Tensor) -> Tensor:
        blocks = blocks.contiguous()
        if blocks.storage_offset() % dtype.itemsize:
            blocks = blocks.clone()  # torch reinterprets aligned bytes only
        return blocks.view(dtype).float()

    return dequantize


def _nibbles(bytes_: Tensor) -> Tensor:
    """uint8 [..., 2k]: the low halves of k bytes, then the high halves."""
    return torch.cat((bytes_ & 15, bytes_ >> 4), dim=-1)


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """uint8 [n, 32]: 16 where the bit of the little-endian uint32 at byte `at` is set, else 0."""
    shifts = torch.arange(8, dtype=torch.uint8)
    bits = (blocks[:, at : at + 4].unsqueeze(-1) >> shifts) & 1
    return bits.view(-1, 32) << 4


def _q4_0(blocks: Tensor) -> Tensor:
    """d * (q - 8), 32 values."""
    return (_nibbles(blocks[:, 2:]).float()).sub_(8.0).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    """d * q + m, 32 values."""
    return _nibbles(blocks[:, 4:]).float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: Tensor) -> Tensor:
    """d * (q - 16), 32 values of 5 bits."""
    q = _nibbles(blocks[:, 6:]).bitwise_or_(_fifth_bits(blocks, 2))
    return q.float().sub_(16.0).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    """d * q + m, 32 values of 5 bits."""
    q = _nibbles(blocks[:, 8:]).bitwise_or_(_fifth_bits(blocks, 4))
    return q.float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    """d * q, 32 values of 8 bits with sign."""
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _planes(bytes_: Tensor, step: int, width: int) -> Tensor:
    """uint8 [n, groups, 8/step, width]: the `step`-bit fields of each group of `width` bytes, lowest bits
    first.
    """
    shifts = torch.arange(0, 8, step, dtype=torch.uint8).view(1, 1, -1, 1)
    return (bytes_.reshape(bytes_.shape[0], -1, 1, width) >> shifts) & ((1 << step) - 1)


def _q2_k(blocks: Tensor) -> Tensor:
    """d * sc * q - dmin * mn: 16 groups of 16 values of 2 bits, 4-bit scale and minimum each."""
    scales = blocks[:, :16]
    scale = (scales & 15).float().mul_(_half(blocks, 80))
    minimum = (scales >> 4).float().mul_(_half(blocks, 82))
    q = _planes(blocks[:, 16:80], 2, 32).reshape(-1, 16, 16).float()
    return q.mul_(scale.unsqueeze(-1)).sub_(minimum.unsqueeze(-1)).view(-1, 256)


def _q3_k(blocks: Tensor) -> Tensor:
    """d * (sc - 32) * (q - 4): 16 groups of 16 values of 3 bits (the high bit apart), 6-bit scales."""
    packed = blocks[:, 96:108]
    low = _nibbles(packed[:, :8])
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(1, 4, 1)
    high = ((packed[:, 8:].unsqueeze(1) >> shifts) & 3).reshape(-1, 16) << 4
    scale = (low | high).float().sub_(32.0).mul_(_half(blocks, 108))
    q = _planes(blocks[:, 32:96], 2, 32).reshape(-1, 256)
    q = q | (_planes(blocks[:, :32], 1, 32).reshape(-1, 256) << 2)
    return q.view(-1, 16, 16).float().sub_(4.0).mul_(scale.unsqueeze(-1)).view(-1, 256)


def _six_bit_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima, uint8 [n, 8] each, from 12 bytes: four whole pairs, then four split over two
    places.
    """
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scale = torch.cat((first & 63, (rest & 15) | ((first >> 6) << 4)), dim=1)
    minimum = torch.cat((second & 63, (rest >> 4) | ((second >> 6) << 4)), dim=1)
    return scale, minimum


def _affine_k(blocks: Tensor, q: Tensor) -> Tensor:
    """d * sc * q - dmin * mn for the 8 groups of 32 of Q4_K and Q5_K; q is uint8 [n, 8, 32]."""
    scale, minimum = _six_bit_scales(blocks[:, 4:16])
    scales = scale.float().mul_(_half(blocks, 0)).unsqueeze(-1)
    minima = minimum.float().mul_(_half(blocks, 2)).unsqueeze(-1)
    return q.float().mul_(scales).sub_(minima).view(-1, 256)


def _q4_k(blocks: Tensor) -> Tensor:
    return _affine_k(blocks, _planes(blocks[:, 16:], 4, 32).reshape(-1, 8, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    high = _planes(blocks[:, 16:48], 1, 32).view(-1, 8, 32)
    return _affine_k(blocks, _planes(blocks[:, 48:], 4, 32).reshape(-1, 8, 32) | (high << 4))


def _q6_k(blocks: Tensor) -> Tensor:
    """d * sc * (q - 32): 16 groups of 16 values of 6 bits (4 low, 2 high), 8-bit scales with sign."""
    low = _planes(blocks[:, :128], 4, 64).reshape(-1, 256)
    high = _planes(blocks[:, 128:192], 2, 32).reshape(-1, 256)
    scale = blocks[:, 192:208].view(torch.int8).float().mul_(_half(blocks, 208))
    q = (low | (high << 4)).view(-1, 16, 16).float().sub_(32.0)
    return q.mul_(scale.unsqueeze(-1)).view(-1, 256)


BLOCKS: dict[str, BlockFormat] = {
    block.name: block
    for block in (
        BlockFormat("F32", 1, 4, _plain(torch.float32)),
        BlockFormat("F16", 1, 2, _plain(torch.float16)),
        BlockFormat("BF16", 1, 2, _plain(torch.bfloat16)),
        BlockFormat("Q4_0", 32, 18, _q4_0),
        BlockFormat("Q4_1", 32, 20, _q4_1),
        BlockFormat("Q5_0", 32, 22, _q5_0),
        BlockFormat("Q5_1", 32, 24, _q5_1),
        BlockFormat("Q8_0", 32, 34, _q8_0),
        BlockFormat("Q2_K", 256, 84, _q2_k),
        BlockFormat("Q3_K", 256, 110, _q3_k),
        BlockFormat("Q4_K", 256, 144, _q4_k),
        BlockFormat("Q5_K", 256, 176, _q5_k),
        BlockFormat("Q6_K", 256, 210, _q6_k),
    )
}
"""Every format that a checkpoint may use, by GGUF name."""
