"""Weights on uniform grids against their definition, in plain loops, and against torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dovetail.ops.grids import e4m3, from_nibbles, num_outliers, to_e4m3, to_nibbles
from dovetail.ops.stored import StoredTensor

N, K, GROUP = 6, 64, 32


def test_the_known_word() -> None:
    codes = np.array([-8, -7, -6, -5, 4, 5, 6, 7])
    assert to_nibbles(codes).view("<u4")[0] == 0xFEDC3210
    np.testing.assert_array_equal(from_nibbles(to_nibbles(codes)), codes)


def test_e4m3_is_torchs() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(e4m3(), codes.view(torch.float8_e4m3fn).float().numpy())
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(0, s, 4000) for s in (1e-3, 0.1, 3, 100)]).astype(np.float32)
    x = np.concatenate(
        [x, np.repeat(e4m3()[:127], 2), np.array([1e30, -1e30, np.nan, -0.0, 464, 2**-10], np.float32)]
    )
    expected = torch.from_numpy(x).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(to_e4m3(x), expected)


def test_halves_between_two_codes_go_to_the_even_one() -> None:
    values = e4m3()[:127]
    found = to_e4m3((values[1:] + values[:-1]) / 2)
    assert np.all(found % 2 == 0)


def parts(rng: np.random.Generator, groups: int) -> dict[str, NDArray[Any]]:
    return {
        "scale": rng.uniform(0.5, 2, (N, groups)).astype(np.float32),
        "zero": rng.integers(-8, 9, (N, groups)).astype(np.int16),
    }


@pytest.mark.parametrize("name", ["I8", "I4"])
@pytest.mark.parametrize("order", [False, True])
def test_integers_with_groups_zero_points_and_order(name: str, order: bool) -> None:
    rng = np.random.default_rng(1)
    q = rng.integers(-8, 8, (N, K)).astype(np.int8)
    data = to_nibbles(q) if name == "I4" else q.view(np.uint8)
    kept = parts(rng, K // GROUP)
    shared = {"order": rng.permutation(K)} if order else {}
    found = StoredTensor("w", name, (N, K), data, kept, shared).values()
    for n in range(N):
        for j in range(K):
            column = shared["order"][j] if order else j
            g = j // GROUP
            assert found[n, column] == np.float32(q[n, j] - kept["zero"][n, g]) * kept["scale"][n, g]


def test_eight_bit_floats_have_a_scale_for_each_group() -> None:
    rng = np.random.default_rng(2)
    data = rng.integers(0, 127, (N, K)).astype(np.uint8)
    scale = rng.uniform(0.5, 2, (N, 2)).astype(np.float32)
    found = StoredTensor("w", "F8", (N, K), data, {"scale": scale}).values()
    np.testing.assert_array_equal(found, e4m3()[data] * np.repeat(scale, K // 2, 1))


def test_atom_has_narrow_columns_and_wide_ones() -> None:
    rng, wide = np.random.default_rng(3), 32
    q = rng.integers(-8, 8, (N, K - wide)).astype(np.int8)
    outliers = rng.integers(-127, 128, (N, wide)).astype(np.int8)
    order = rng.permutation(K)
    data = np.concatenate([to_nibbles(q), outliers.view(np.uint8)], 1)
    scales = {"scale": rng.uniform(1, 2, (N, 1)).astype(np.float32)}
    scales["outlier_scale"] = rng.uniform(1, 2, N).astype(np.float32)
    stored = StoredTensor("w", "ATOM", (N, K), data, scales, {"order": order}, activation="atom")
    assert num_outliers(stored) == wide
    found = stored.values()[:, order]
    np.testing.assert_array_equal(found[:, : K - wide], q * scales["scale"])
    np.testing.assert_array_equal(found[:, K - wide :], outliers * scales["outlier_scale"][:, None])
    some = stored.rows(np.array([4, 1]))
    np.testing.assert_array_equal(some.values(), stored.values()[[4, 1]])
