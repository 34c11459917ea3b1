"""GGUF files with random weights: a model's real shapes and formats, for measuring and for trying things out.

Blocks are drawn as they are stored, so a model of any size takes a piece of it in memory and about as long as
writing its bytes. Scales are such that weights have mean 0 and a standard deviation of about 0.02, which keeps
activations finite at any depth.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.checkpoint.architecture import Architecture
from dovetail.checkpoint.gguf_config import decoder_metadata
from dovetail.checkpoint.gguf_writer import NewTensor, write_gguf
from dovetail.checkpoint.layout import NORM_SUFFIX, TOP_NAMES
from dovetail.checkpoint.random_vocabulary import random_vocabulary
from dovetail.core.errors import ConfigError
from dovetail.core.model import ModelConfig
from dovetail.ops.dequant import BLOCKS

SPREAD = 0.02  # standard deviation of weights
_CHUNK = 1 << 22  # values that are drawn at a time
_BYTE, _NIBBLE, _SIX = 73.9, 4.61, 18.47  # standard deviations of uniform codes of 8, 4 and 6 bits
_TWO, _THREE, _LEVELS = 1.118, 2.345, 67.44  # of 2 bits; of 3 bits and the levels of IQ4, root mean squares
_SIGNED_SIX = 18.48  # of whole numbers from -32 to 31
_LAYER = re.compile(r"model\.layers\.(\d+)\.")

Bytes = NDArray[np.uint8]


class Draws:
    """Random bytes that follow from the seed and a tensor's name, whatever else is drawn."""

    def __init__(self, seed: int, name: str) -> None:
        self._source = np.random.SFC64(np.random.SeedSequence([seed, zlib.crc32(name.encode())]))

    def bytes(self, rows: int, width: int) -> Bytes:
        """uint8 [rows, width]."""
        raw: NDArray[np.uint64] = self._source.random_raw(-(-rows * width // 8))
        return raw.view(np.uint8)[: rows * width].reshape(rows, width)


def _half(values: NDArray[np.float32] | float, rows: int) -> Bytes:
    """float16 scales as bytes, uint8 [rows, 2]."""
    return np.full(rows, values, np.float16).view(np.uint8).reshape(rows, 2)


def _float32(draws: Draws, blocks: int) -> Bytes:
    whole = draws.bytes(blocks, 4).view(np.int32)
    return (whole.astype(np.float32) * np.float32(SPREAD * 3**0.5 / 2**31)).view(np.uint8)


def _float16(draws: Draws, blocks: int) -> Bytes:
    values = draws.bytes(blocks, 2).view(np.int16).astype(np.float32) * np.float32(SPREAD * 3**0.5 / 2**15)
    return values.astype(np.float16).view(np.uint8)


def _bfloat16(draws: Draws, blocks: int) -> Bytes:
    values = draws.bytes(blocks, 2).view(np.int16).astype(np.float32) * np.float32(SPREAD * 3**0.5 / 2**15)
    return ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16).view(np.uint8)


def _q8_0(draws: Draws, blocks: int) -> Bytes:
    out = draws.bytes(blocks, 34)
    out[:, :2] = _half(SPREAD / _BYTE, blocks)
    return out


def _q4_0(draws: Draws, blocks: int) -> Bytes:
    return _nibbles(draws, blocks, _NIBBLE)


def _nibbles(draws: Draws, blocks: int, spread: float) -> Bytes:
    """Codes or levels with this spread. Their mean is not 0 (-1/2 and -6), so the sign of a scale is random."""
    out = draws.bytes(blocks, 18)
    sign = (out[:, 1] & 1).astype(np.float32) * 2 - 1
    out[:, :2] = _half(sign * np.float32(SPREAD / spread), blocks)
    return out


def _q4_k(draws: Draws, blocks: int) -> Bytes:
    """Minima equal scales, and count 7.5 times as much: values are d * scale * (code - 7.5)."""
    out = draws.bytes(blocks, 144)
    scale = 32 | (draws.bytes(blocks, 8) & 31)
    unit = SPREAD / _NIBBLE / math.sqrt(sum(s * s for s in range(32, 64)) / 32)
    out[:, 0:2], out[:, 2:4] = _half(unit, blocks), _half(7.5 * unit, blocks)
    first, last = scale[:, :4], scale[:, 4:]
    out[:, 4:8] = out[:, 8:12] = first | ((last >> 4) << 6)
    out[:, 12:16] = (last & 15) | ((last & 15) << 4)
    return out


def _q6_k(draws: Draws, blocks: int) -> Bytes:
    """Scales have both signs, because codes have the mean -1/2."""
    out = draws.bytes(blocks, 210)
    drawn = out[:, 192:208]
    scale = (8 + (drawn & 7)).astype(np.int8)
    out[:, 192:208] = np.where(drawn & 8, scale, -scale).view(np.uint8)
    out[:, 208:] = _half(SPREAD / _SIX / math.sqrt(sum(s * s for s in range(8, 16)) / 8), blocks)
    return out


def _q2_k(draws: Draws, blocks: int) -> Bytes:
    """Minima equal scales, and count 1.5 times as much: values are d * scale * (code - 1.5)."""
    out = draws.bytes(blocks, 84)
    scale = 8 | (out[:, :16] & 7)
    out[:, :16] = scale | (scale << 4)
    unit = SPREAD / _TWO / math.sqrt(sum(s * s for s in range(8, 16)) / 8)
    out[:, 80:82], out[:, 82:84] = _half(unit, blocks), _half(1.5 * unit, blocks)
    return out


def _q3_k(draws: Draws, blocks: int) -> Bytes:
    """Scales are any of 6 bits, so both signs are as frequent."""
    out = draws.bytes(blocks, 110)
    out[:, 108:] = _half(SPREAD / _THREE / _SIGNED_SIX, blocks)
    return out


def _iq4_nl(draws: Draws, blocks: int) -> Bytes:
    return _nibbles(draws, blocks, _LEVELS)


def _iq4_xs(draws: Draws, blocks: int) -> Bytes:
    out = draws.bytes(blocks, 136)
    out[:, :2] = _half(SPREAD / _LEVELS / _SIGNED_SIX, blocks)
    return out


def _mxfp4(draws: Draws, blocks: int) -> Bytes:
    """Scales are powers of two: two of them, in the proportion that gives the spread."""
    out = draws.bytes(blocks, 17)
    out[:, 0] = np.where((out[:, 0] & 15) < 11, 120, 119)
    return out


DRAWN: dict[str, Callable[[Draws, int], Bytes]] = {
    "F32": _float32, "F16": _float16, "BF16": _bfloat16,
    "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_K": _q4_k, "Q6_K": _q6_k,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4,
}  # fmt: skip
MIXED = {"Q4_K_M": ("Q4_K", "Q6_K")}  # by the name that files have: most tensors' format, and the better one
FORMATS = (*DRAWN, *MIXED)
# Where rows are no multiple of 256 values: formats of about the same size in blocks of 32.
_SMALLER = {"Q4_K": "Q4_0", "Q6_K": "Q8_0", "Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "IQ4_XS": "IQ4_NL"}


@dataclass(frozen=True)
class Written:
    """What was written: how many tensors have which format, all weights, and the file's bytes."""

    formats: dict[str, int]
    parameters: int
    bytes: int


def write_random(record: Architecture, config: ModelConfig, path: Path, *, format: str, seed: int = 0) -> Written:
    """Write a GGUF file of a model of this shape with random weights and a random vocabulary.

    Matrices are in `format`, one of FORMATS. Those whose rows do not divide into its blocks get a format of about
    the same size. Norms are ones, and biases are float32. A tensor's bytes follow from its name, shape, format and
    `seed`. ConfigError for an unknown format, rows that divide into no blocks, and a vocabulary that is too small;
    ModelError if the file cannot be written.
    """
    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}; random weights come in {', '.join(FORMATS)}")
    names = {hf: part for part, hf in record.gguf_names.items()}
    tensors = [
        NewTensor(_gguf_name(name, names), format_of(name, shape, config, format), shape)
        for name, shape in record.tensors(config)
    ]
    metadata: dict[str, Any] = {
        "general.architecture": record.name,
        "general.name": f"random {record.name}",
        "general.quantization_version": 2,
        **decoder_metadata(config),
        **random_vocabulary(config.vocab_size, seed),
    }
    size = write_gguf(path, metadata, tensors, lambda tensor: _blocks(tensor, seed))
    counted = Counter(tensor.format for tensor in tensors)
    return Written(dict(counted), sum(math.prod(tensor.shape) for tensor in tensors), size)


def format_of(name: str, shape: tuple[int, ...], config: ModelConfig, wanted: str) -> str:
    """The format of a tensor, by its Hugging Face name, where matrices shall be in `wanted`."""
    if len(shape) == 1:
        return "F32"
    usual, better = MIXED.get(wanted, (wanted, wanted))
    found = better if _matters(name, config) else usual
    if shape[-1] % BLOCKS[found].values:
        found = _SMALLER.get(found, found)
    return found


def _matters(name: str, config: ModelConfig) -> bool:
    """Whether a tensor gets the better format of a mixture: the head, and values and down projections of the first
    and the last eighth of the layers and of every third layer between."""
    if name == ("model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"):
        return True
    match = _LAYER.match(name)
    if match is None or not name.endswith(("v_proj.weight", "down_proj.weight")):
        return False
    layer, eighth = int(match[1]), config.num_layers // 8
    return layer < eighth or layer >= 7 * config.num_layers // 8 or (layer - eighth) % 3 == 2


def _gguf_name(name: str, parts: dict[str, str]) -> str:
    """The GGUF name of a tensor; `parts` maps the parts of Hugging Face names within a layer."""
    stem, _, kind = name.rpartition(".")
    if match := _LAYER.match(stem):
        return f"blk.{match[1]}.{parts[stem[match.end() :]]}.{kind}"
    return f"{next(own for own, hf in TOP_NAMES.items() if hf == stem)}.{kind}"


def _blocks(tensor: NewTensor, seed: int) -> Iterator[memoryview]:
    """A tensor's bytes, drawn a piece at a time."""
    block, values = BLOCKS[tensor.format], math.prod(tensor.shape)
    if tensor.name.endswith(NORM_SUFFIX):
        yield np.ones(values, np.float32).view(np.uint8).data
        return
    draws, left = Draws(seed, tensor.name), values // block.values
    while left:
        count = min(left, _CHUNK // block.values)
        yield DRAWN[tensor.format](draws, count).reshape(-1).data
        left -= count
