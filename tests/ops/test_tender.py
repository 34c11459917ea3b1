"""Tender's reference: exact invariants of the integers, and groups, scales and means against their definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dovetail.core.errors import ConfigError, ModelError
from dovetail.ops import tender
from dovetail.ops.grids import codes
from dovetail.ops.stored import StoredTensor
from dovetail.ops.tender import Grouping

K, N, ROWS = 48, 5, 7


def samples(rng: np.random.Generator, rows: int = 700, count: int = 3, width: int = K) -> list[tuple[Any, Any]]:
    """Rows whose channels differ a thousandfold, with centers beside 0, and a loud first token."""
    spread, center = np.exp2(rng.uniform(-5, 5, width)), rng.normal(0, 2, width)
    found = []
    for _ in range(count):
        x = rng.normal(0, 1, (rows, width)) * spread + center
        x[0] *= 20
        found.append((np.arange(rows), x.astype(np.float32)))
    return found


def weight_of(rng: np.random.Generator, shared: Any, bits: int, width: int = K) -> StoredTensor:
    return tender.quantize(rng.normal(0, 1, (N, width)).astype(np.float32), shared, bits)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20), st.integers(0, 2**32 - 1), st.sampled_from([4, 8]))
def test_the_running_sum_is_the_explicit_sum_and_one_wide_product(sizes: list[int], seed: int, bits: int) -> None:
    """Also where groups are empty: their doubling is not left out."""
    rng, k, low = np.random.default_rng(seed), sum(sizes), -(1 << bits - 1)
    x, w = (rng.integers(low, -low, (rows, k)).astype(np.int8) for rows in (3, 4))
    explicit, start = np.zeros((3, 4), np.int64), 0
    for g, size in enumerate(sizes, 1):
        part = x[:, start : start + size].astype(np.int64) @ w[:, start : start + size].astype(np.int64).T
        explicit += part << (len(sizes) - g)
        start += size
    shared = {"sizes": np.array(sizes)}
    wide = (x.astype(np.int64) << tender.shifts(shared)) @ w.astype(np.int64).T
    found = tender.running_sum(x, w, shared["sizes"])
    np.testing.assert_array_equal(found, explicit)
    np.testing.assert_array_equal(found, wide)


@pytest.mark.parametrize("bits", [4, 8])
def test_no_sum_exceeds_the_bound_and_one_reaches_it(bits: int) -> None:
    rng = np.random.default_rng(0)
    stored = weight_of(rng, tender.calibrate(samples(rng), Grouping(bits), True), bits)
    bound, q, low = tender.highest_sum(stored), codes(stored), -(1 << bits - 1)
    x = rng.integers(low, -low, (100, K)).astype(np.int8)
    assert np.abs(tender.running_sum(x, q, stored.shared["sizes"])).max() <= bound
    worst = np.where(q > 0, low, -low - 1).astype(np.int8)  # -128 where the weight is positive, 127 elsewhere
    reached = -tender.running_sum(worst, q, stored.shared["sizes"]).min()
    assert bound * (-low - 1) / -low <= reached <= bound


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("down", [False, True])
def test_codes_are_a_partition_into_groups_of_whole_quads(bits: int, down: bool) -> None:
    rng = np.random.default_rng(1)
    shared = tender.calibrate(samples(rng), Grouping(bits, 6, down=down), True)
    assert sorted(shared["order"]) == list(range(K)) and shared["sizes"].sum() == K
    ends = shared["sizes"].cumsum()
    assert all(end % 4 == 0 for end in ends)
    assert not down or shared["sizes"][0] == 0


def test_one_chunk_has_the_papers_groups_and_scales() -> None:
    """Channel c joins group g when TMax / 2^g < CMax <= TMax / 2^(g - 1); the last takes the rest."""
    rng, groups = np.random.default_rng(2), 5
    ((_, x),) = samples(rng, 256, 1)
    x -= (x.max(0) + x.min(0)) / 2
    most = np.abs(x).max(0)[None].astype(np.float64)
    how = Grouping(8, groups)
    found = tender.groups_of(most, how)
    for c in range(K):
        g = int(found[c]) + 1
        assert most[0, c] <= most.max() / 2 ** (g - 1)
        assert g == groups or most.max() / 2**g < most[0, c]
    shared = tender.calibrate([(np.arange(256), x)], how, False)
    assert shared["scales"] == pytest.approx(most.max() / (2 ** (groups - 1) * 127))


def test_what_was_calibrated_is_not_clipped_and_is_rounded_by_half_a_step() -> None:
    rng = np.random.default_rng(3)
    given = samples(rng)
    shared = tender.calibrate(given, Grouping(8, 10), True)
    step = np.exp2(tender.shifts(shared))
    for positions, x in given:
        chunk = tender.chunks(positions, shared)
        scale = shared["scales"][chunk][:, None] * step
        whole = (chunk < 1)[:, None]  # the rest of the last chunk was not seen whole, so another's scale serves it
        back = tender.activate(x, positions, shared, 8) * scale + shared["means"][chunk][:, shared["order"]]
        wrong = np.abs(back - x[:, shared["order"]]) > scale * 0.501
        assert not (wrong & whole).any()


def test_rounding_down_clips_to_half_of_the_range() -> None:
    rng = np.random.default_rng(4)
    given = samples(rng)
    up, down = (tender.calibrate(given, Grouping(8, 6, down=d), True) for d in (False, True))
    np.testing.assert_array_equal(up["scales"], down["scales"])
    assert down["sizes"][1] >= up["sizes"][0]


def test_a_chunk_is_found_by_position_and_the_last_one_serves_what_lies_beyond() -> None:
    rng = np.random.default_rng(5)
    shared = tender.calibrate(samples(rng, 1024), Grouping(8, 8, 256), True)
    assert len(shared["scales"]) == 4
    np.testing.assert_array_equal(tender.chunks(np.array([0, 255, 256, 1023, 9999]), shared), [0, 0, 1, 3, 3])
    x = rng.normal(0, 1, (4, K)).astype(np.float32)
    at = np.array([700, 3, 260, 5000])
    together = tender.activate(x, at, shared, 8)
    for i in range(4):
        np.testing.assert_array_equal(tender.activate(x[i : i + 1], at[i : i + 1], shared, 8)[0], together[i])


def test_means_are_averaged_over_samples_and_extremes_are_not() -> None:
    one, two = (np.array([[low, 0, 0, 0], [high, 0, 0, 0]], np.float32) for low, high in ((1, 3), (5, 11)))
    shared = tender.calibrate([(np.arange(2), one), (np.arange(2), two)], Grouping(8, 1, 2), True)
    assert shared["means"][0, 0] == (2 + 8) / 2
    assert shared["scales"][0] == pytest.approx(6 / 127)  # 11 - 5


@pytest.mark.parametrize("bits", [4, 8])
def test_products_are_near_and_the_means_go_through_the_unquantized_weight(bits: int) -> None:
    rng = np.random.default_rng(6)
    given, weight = samples(rng), rng.normal(0, 1, (N, K)).astype(np.float32)
    shared = tender.calibrate(given, Grouping(bits, 8), True)
    stored = tender.quantize(weight, shared, bits)
    positions, x = given[0]
    rows = slice(256, 512)
    found, exact = tender.product(x[rows], positions[rows], stored), x[rows] @ weight.T
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert error < (0.02 if bits == 8 else 0.25)
    only_means = tender.product(shared["means"][:1], np.array([0]), stored)
    np.testing.assert_allclose(only_means, shared["means"][:1] @ weight.T, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(
        stored.values(), weight, atol=np.abs(weight).max() / (14 if bits == 4 else 254) * 1.01
    )


def test_a_row_that_is_not_finite_is_nan_and_others_are_not() -> None:
    rng = np.random.default_rng(7)
    stored = weight_of(rng, tender.calibrate(samples(rng), Grouping(8), True), 8)
    x = rng.normal(0, 1, (4, K)).astype(np.float32)
    x[1, 3], x[2, 4] = np.nan, np.inf
    found = tender.product(x, np.arange(4), stored)
    np.testing.assert_array_equal(np.isnan(found).all(1), [False, True, True, False])
    assert np.isfinite(found[[0, 3]]).all()


def test_constant_channels_and_rows_of_zeros() -> None:
    x = np.zeros((256, 8), np.float32)
    x[:, 3] = 2
    shared = tender.calibrate([(np.arange(256), x)], Grouping(8), True)
    stored = tender.quantize(np.eye(8, dtype=np.float32), shared, 8)
    np.testing.assert_allclose(tender.product(x[:1], np.array([0]), stored), x[:1])
    nothing = tender.calibrate([(np.arange(256), x * 0)], Grouping(8), False)
    np.testing.assert_array_equal(
        tender.product(x[:1] * 0, np.array([0]), tender.quantize(np.eye(8, dtype=np.float32), nothing, 8)),
        x[:1] * 0,
    )


def _quads(group: NDArray[np.int64], groups: int) -> list[int]:
    return [int((group <= g).sum()) % 4 for g in range(groups)]


@given(st.lists(st.integers(0, 5), min_size=4, max_size=40), st.integers(0, 2**32 - 1))
def test_channels_move_only_to_coarser_groups(before: list[int], seed: int) -> None:
    rng, group = np.random.default_rng(seed), np.array(before[: len(before) // 4 * 4])
    after = tender.whole_quads(group, rng.uniform(0, 100, (2, len(group))), 6)
    assert (after <= group).all() and not any(_quads(after, 6))


def test_bad_input() -> None:
    x = np.ones((4, 8), np.float32)
    with pytest.raises(ConfigError, match="4 or 8 bits"):
        Grouping(5)
    with pytest.raises(ConfigError, match="1 to 20"):
        Grouping(8, 0)
    with pytest.raises(ConfigError, match="got none"):
        tender.calibrate([], Grouping(), True)
    with pytest.raises(ConfigError, match="starts at position 0"):
        tender.calibrate([(np.arange(600, 604), x)], Grouping(), True)
    x[2, 2] = np.nan
    with pytest.raises(ModelError, match="not finite"):
        tender.calibrate([(np.arange(4), x)], Grouping(), True)
    with pytest.raises(ModelError, match="not finite"):
        tender.quantize(x, tender.calibrate([(np.arange(4), np.ones((4, 8), np.float32))], Grouping(), True), 8)
