"""Tender's kernels give the bits of the reference on every instruction set."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dovetail.core.errors import ModelError
from dovetail.ops import cpu, tender
from dovetail.ops.grids import codes, to_nibbles
from dovetail.ops.stored import StoredTensor

native = pytest.importorskip("dovetail._native")

ISAS = native.isas() + native.emulated()
CHUNK = 16


def stored(
    rng: np.random.Generator, shape: tuple[int, int], sizes: list[int], bits: int, bias: bool
) -> StoredTensor:
    """Random codes and scales, with groups of these sizes and three chunks of rows."""
    n, k = shape
    low = -(1 << bits - 1)
    q = rng.integers(low, -low, shape).astype(np.int8)
    shared: dict[str, NDArray[Any]] = {
        "order": rng.permutation(k),
        "sizes": np.array(sizes),
        "scales": rng.uniform(0.01, 0.02, 3).astype(np.float32),
        "chunk": np.array([CHUNK]),
    }
    parts = {"scale": rng.uniform(0.5, 2, n).astype(np.float32)}
    if bias:
        shared["means"] = rng.normal(0, 1, (3, k)).astype(np.float32)
        parts["bias"] = rng.normal(0, 1, (n, 3)).astype(np.float32)
    data = to_nibbles(q) if bits == 4 else q.view(np.uint8)
    return StoredTensor("w", f"TENDER{bits}", shape, data, parts, shared, "tender")


class Layer:
    """Rows at given positions times weights."""

    def __init__(self, weights: list[StoredTensor], isa: str, activation: str = "tender", **options: Any) -> None:
        packed = [cpu.pack(w, "float32", 2) for w in weights]
        self.k, self.n = weights[0].shape[1], sum(w.shape[0] for w in weights)
        self.n = weights[0].shape[0] if options.get("gate") else self.n
        self.program = native.Program(isa, 2, False, False)
        self.slots = self.program.slot(self.k, False), self.program.slot(self.n, False)
        self.program.linear(
            *self.slots, packed, activation, norm=[], eps=0.0, bias=options.get("bias", []),
            add=options.get("add", False), gate=options.get("gate", ""), sampled=False,
        )  # fmt: skip

    def __call__(self, x: NDArray[np.float32], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        program = self.program
        program.clear()
        for at in positions.tolist():
            program.add(at, at + 1, [0] * (at + 1), [], [0] * (at + 1), 0, 0)
        program.run(0, 0)
        program.view(self.slots[0], len(x))[:, : self.k] = x
        program.run(0, 1)
        return program.view(self.slots[1], len(x))[:, : self.n].copy()


def rows_for(rng: np.random.Generator, k: int, rows: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Some values lie far beyond what the scales hold."""
    x = rng.normal(0, 1, (rows, k)) * np.exp2(rng.uniform(-4, 8, k))
    x[rng.random(x.shape) < 0.01] *= 1e9
    return x.astype(np.float32), rng.integers(0, 5 * CHUNK, rows)


# Group ends in every place of a block, empty groups in front, inside and behind, and widths that fill no block.
SIZES = [
    [4, 8, 0, 20, 64], [0, 4, 28, 36, 0, 12, 16], [96], [0, 0, 64, 0], [12, 40, 48, 60, 200, 216],
    [4, 4, 4, 4, 4, 4, 4, 548], [8, 92, 0], [4, 9], [0, 0, 5, 0, 0], [3], [0, 4, 6, 0],
]  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [4, 8])
def test_products_have_the_bits_of_the_reference(isa: str, bits: int) -> None:
    for seed, sizes in enumerate(SIZES):
        if bits == 4 and sum(sizes) % 2:
            continue
        k = sum(sizes)
        rng = np.random.default_rng(seed)
        for n, rows, bias in ((16, 1, True), (40, 3, False), (100, 8, True), (52, 19, True), (16, 33, False)):
            weight = stored(rng, (n, k), sizes, bits, bias)
            x, positions = rows_for(rng, k, rows)
            found = Layer([weight], isa)(x, positions)
            np.testing.assert_array_equal(
                found, tender.product(x, positions, weight), err_msg=str((sizes, n, rows))
            )


@pytest.mark.parametrize("isa", ISAS)
def test_sums_that_32_bits_cannot_hold(isa: str) -> None:
    rng = np.random.default_rng(0)
    weight = stored(rng, (40, 64), [16, 0, 8, *[0] * 11, 4, 36], 8, True)
    weight.data[:8] = 127
    x, positions = np.full((9, 64), 1e9, np.float32), np.arange(9) * 7
    x[1] *= -1
    x[2:] = rng.normal(0, 100, (7, 64))
    q = tender.activate(x, positions, weight.shared, 8)
    sums = tender.running_sum(q, codes(weight), weight.shared["sizes"])
    assert sums.max() > 1 << 31 and sums.min() < -(1 << 31) and tender.highest_sum(weight) > 1 << 31
    found = Layer([weight], isa)(x, positions)
    np.testing.assert_array_equal(found, tender.product(x, positions, weight))
    one_row = Layer([weight], isa)(x[:1], positions[:1])
    np.testing.assert_array_equal(one_row, found[:1])


def test_sums_up_to_the_last_bit_of_32() -> None:
    """With the largest codes: 128 * 127 * 2^12 times 32 channels lies below 2^31, and times 36 beyond."""
    for first in (32, 36):
        weight = stored(np.random.default_rng(1), (16, 96), [first, *[0] * 11, 96 - first], 8, False)
        weight.data.view(np.int8)[:] = 127
        x, positions = np.full((4, 96), -1e9, np.float32), np.arange(4)
        assert (tender.highest_sum(weight) < 1 << 31) == (first == 32)
        np.testing.assert_array_equal(Layer([weight], ISAS[0])(x, positions), tender.product(x, positions, weight))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_depends_on_no_other(isa: str, bits: int) -> None:
    rng = np.random.default_rng(2)
    weights = [stored(rng, (n, 160), [4, 24, 0, 132], bits, True) for n in (48, 20)]
    weights[1] = replace(weights[1], shared=weights[0].shared)
    x, positions = rows_for(rng, 160, 40)
    layer = Layer(weights, isa)
    together = layer(x, positions)
    for count in (1, 2, 3, 7, 8, 9, 24):
        np.testing.assert_array_equal(layer(x[5 : 5 + count], positions[5 : 5 + count]), together[5 : 5 + count])
    for row in (0, 13):
        np.testing.assert_array_equal(layer(x[row : row + 1], positions[row : row + 1])[0], together[row])


def test_what_is_fused_with_a_product() -> None:
    rng = np.random.default_rng(3)
    weights = [stored(rng, (48, 96), [4, 24, 0, 68], 8, True) for _ in range(2)]
    weights[1] = replace(weights[1], shared=weights[0].shared)
    x, positions = rows_for(rng, 96, 11)
    x = np.clip(x, -3, 3)
    gate, up = (tender.product(x, positions, w) for w in weights)
    found = Layer(weights, ISAS[0], gate="relu")(x, positions)
    np.testing.assert_array_equal(found, np.maximum(gate, 0) * up)
    bias = rng.normal(0, 1, 48).astype(np.float32)
    found = Layer(weights[:1], ISAS[0], bias=bias.tolist())(x, positions)
    np.testing.assert_array_equal(found, gate + bias)


@pytest.mark.parametrize("isa", ISAS)
def test_a_row_that_is_not_finite_is_nan_alone(isa: str) -> None:
    rng = np.random.default_rng(4)
    weight = stored(rng, (20, 72), [4, 68], 8, True)
    x, positions = rows_for(rng, 72, 5)
    x[1, 70], x[3, 0] = np.inf, np.nan
    found = Layer([weight], isa)(x, positions)
    np.testing.assert_array_equal(np.isnan(found), np.repeat([[False], [True], [False], [True], [False]], 20, 1))


@pytest.mark.parametrize("isa", ISAS)
def test_explicit_requantization_computes_the_same_up_to_rounding(isa: str) -> None:
    rng = np.random.default_rng(5)
    weight = stored(rng, (36, 128), [8, 0, 28, 92], 8, True)
    x, positions = rows_for(rng, 128, 13)
    implicit, explicit = (Layer([weight], isa, a)(x, positions) for a in ("tender", "tender-explicit"))
    np.testing.assert_allclose(explicit, implicit, rtol=1e-4, atol=1e-3)


def test_what_is_kept_is_what_is_packed() -> None:
    """Besides the codes: a scale and the biases of each column, and what all rows have in common."""
    weight = stored(np.random.default_rng(6), (64, 4096), [4, 12, 4080], 8, True)
    size = cpu.pack(weight, "float32", 1).bytes
    biases, means, order = 64 * 3 * 4, 3 * 4096 * 4, 4096 * 4
    assert size - (64 * 4096 + 64 * 4 + biases + means + order) < 512


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sizes", [3, 61]), ("sizes", [4, 64]), ("sizes", [68, -4]), ("sizes", [0] * 20 + [64]),
        ("scales", [1.0, 0.0, 1.0]), ("scales", [1.0, np.nan, 1.0]), ("chunk", [0]),
        ("order", [64, *range(1, 64)]), ("means", np.ones((2, 64), np.float32)),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_together_are_refused(name: str, value: Any) -> None:
    weight = stored(np.random.default_rng(7), (16, 64), [4, 60], 8, True)
    wrong = replace(weight, shared={**weight.shared, name: np.asarray(value)})
    with pytest.raises(ModelError):
        cpu.pack(wrong, "float32", 1)
