"""Plain rounding: each value goes to the nearest code of its row or group."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dovetail.core.errors import ConfigError
from dovetail.ops.grids import e4m3
from dovetail.ops.schemes import LARGEST, SCHEMES, Scheme, bfloat16
from dovetail.ops.stored import StoredTensor

SMALL = [replace(s, group=32) if s.group else s for s in SCHEMES.values()]


def weight(n: int = 5, k: int = 96) -> StoredTensor:
    values = np.random.default_rng(0).normal(0, 0.05, (n, k)).astype(np.float32)
    values[2, 32:64] = 0
    return StoredTensor.of("w", values)


@pytest.mark.parametrize("scheme", SMALL, ids=lambda s: s.name)
def test_every_value_goes_to_the_nearest_code(scheme: Scheme) -> None:
    stored = weight()
    found = scheme.nearest(stored)
    assert found.activation == scheme.activation
    grid = (
        e4m3()[np.isfinite(e4m3())]
        if scheme.format == "F8"
        else np.arange(*{"I4": (-8, 8), "I8": (-128, 128)}[scheme.format])
    )
    values, rounded, scale = stored.values(), found.values(), found.parts["scale"]
    scales = np.repeat(scale, values.shape[1] // scale.shape[1], 1)
    distance = np.abs(values[..., None] / scales[..., None] - grid).min(-1)
    np.testing.assert_allclose(np.abs(values - rounded) / scales, distance, atol=1e-4 * LARGEST[scheme.format])
    assert np.all(rounded[2, 32:64] == 0)


def test_the_largest_value_of_a_group_has_the_largest_code() -> None:
    found = SMALL[2].nearest(weight()).values()
    groups = np.abs(found).reshape(5, 3, 32).max(-1)
    np.testing.assert_allclose(groups, np.abs(weight().values()).reshape(5, 3, 32).max(-1), rtol=0.08)


def test_scales_are_bfloat16() -> None:
    x = np.random.default_rng(1).normal(0, 1, 1000).astype(np.float32)
    np.testing.assert_array_equal(bfloat16(x), torch.from_numpy(x).bfloat16().float().numpy())


def test_a_group_that_does_not_divide_the_columns_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="96 input columns, which groups of 128 do not divide; use a group of 32"
    ):
        SCHEMES["w4a16"].nearest(weight())
