"""Block formats against the gguf package, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from dovetail.core.errors import ModelError
from dovetail.ops.dequant import BLOCKS
from dovetail.ops.stored import StoredTensor


def random_blocks(name: str, count: int, seed: int) -> np.ndarray:
    """Random bytes, redrawn until every value is finite."""
    rng = np.random.default_rng(seed)
    block = BLOCKS[name]
    found: list[np.ndarray] = []
    while len(found) < count:
        raw = rng.integers(0, 256, (4 * count, block.bytes), dtype=np.uint8)
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
        found += list(raw[np.isfinite(values.reshape(len(raw), -1)).all(axis=1)])
    return np.stack(found[:count])


@pytest.mark.parametrize("name", BLOCKS)
def test_equals_gguf(name: str) -> None:
    block = BLOCKS[name]
    raw = random_blocks(name, 200, seed=len(name))
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name]).reshape(200, block.values)
    found = block.dequantize(raw)
    assert found.dtype == np.float32
    assert found.shape == (200, block.values)
    assert np.array_equal(found.view(np.uint32), np.ascontiguousarray(expected, np.float32).view(np.uint32))


@pytest.mark.parametrize("name", BLOCKS)
def test_sizes_are_ggmls(name: str) -> None:
    assert (BLOCKS[name].values, BLOCKS[name].bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]


@pytest.mark.parametrize("name", BLOCKS)
def test_stored_tensor(name: str) -> None:
    block = BLOCKS[name]
    rows, width = 6, 2 * block.values
    raw = random_blocks(name, rows * 2, seed=1).reshape(rows, -1)
    tensor = StoredTensor("t", name, (2, 3, width), raw)
    values = tensor.dequantize()
    assert values.shape == (2, 3, width)
    assert torch.equal(tensor.dequantize(torch.bfloat16), values.to(torch.bfloat16))
    index = np.array([5, 0, 4, 1, 3, 2])
    assert torch.equal(tensor.permute_rows(index).dequantize().view(rows, -1), values.view(rows, -1)[index])
    with pytest.raises(ModelError, match="row numbers"):
        tensor.permute_rows(index[:5])


def test_many_blocks_are_decoded_in_chunks() -> None:
    raw = np.random.default_rng(0).integers(0, 100, (20000, 34), np.uint8)
    tensor = StoredTensor("t", "Q8_0", (200, 3200), raw.reshape(200, -1))
    assert np.array_equal(tensor.values().reshape(-1, 32), BLOCKS["Q8_0"].dequantize(raw))


def test_vectors_are_permuted_by_value() -> None:
    vector = StoredTensor.of("b", np.arange(4, dtype=np.float32))
    assert vector.permute_rows(np.array([3, 1, 0, 2])).values().tolist() == [3.0, 1.0, 0.0, 2.0]
    blocks = StoredTensor("b", "Q8_0", (32,), np.zeros((1, 34), np.uint8))
    with pytest.raises(ModelError, match="cannot be reordered"):
        blocks.permute_rows(np.arange(32))


def test_unaligned_bytes() -> None:
    data = np.zeros(17, np.uint8)
    data[1:] = np.arange(4, dtype=np.float32).view(np.uint8)
    assert StoredTensor("t", "F32", (4,), data[1:].reshape(1, 16)).values().tolist() == [0.0, 1.0, 2.0, 3.0]


def test_non_finite_scales_are_loaded_as_they_are() -> None:
    raw = np.full((1, 34), 1, np.uint8)
    raw[0, :2] = np.array([np.nan], np.float16).view(np.uint8)
    assert np.isnan(BLOCKS["Q8_0"].dequantize(raw)).all()
