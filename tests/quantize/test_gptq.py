"""GPTQ against its definition, and the scales and rows of the formats that it makes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dovetail.core.errors import ModelError
from dovetail.ops.schemes import SCHEMES, bfloat16
from dovetail.quantize.atom import Rows
from dovetail.quantize.gptq import Hessian, compensate, factor, relative_error
from dovetail.quantize.uniform import SHRINK, least_error_scales

N, K = 6, 40


class Integers:
    """A grid of whole numbers of one step, for the first columns."""

    def __init__(self, columns: int, step: float) -> None:
        self.columns, self.step = columns, np.float32(step)

    def round(self, column: int, values: Any) -> Any:
        return np.rint(values[0] / self.step) * self.step


def rows(n: int = 200, dead: int | None = None) -> torch.Tensor:
    x = torch.randn(n, K, generator=torch.Generator().manual_seed(0))
    x[:, 1:] += 0.8 * x[:, :-1]
    if dead is not None:
        x[:, dead] = 0
    return x


def weight() -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(1))


def hessian(x: torch.Tensor) -> torch.Tensor:
    seen = Hessian("layer", K)
    for part in x.split(64):
        assert seen(part) is part
    return seen.sum


@pytest.mark.parametrize("columns", [K, 24])
def test_each_column_is_rounded_and_the_others_move_by_the_optimal_update(columns: int) -> None:
    """Equation 3 of the paper, with the inverse of the remaining Hessian computed anew for every column."""
    h, w = hessian(rows()), weight()
    damped = (h + 0.01 * h.diagonal().mean() * torch.eye(K)).double()
    expected = w.double()
    for j in range(columns):
        inverse = torch.linalg.inv(damped[j:, j:])
        error = expected[:, j] - torch.round(expected[:, j] / 0.25) * 0.25
        expected[:, j:] -= torch.outer(error, inverse[0] / inverse[0, 0])
    found = compensate(w, factor(h, 0.01), Integers(columns, 0.25))
    torch.testing.assert_close(found.double(), expected, atol=2e-4, rtol=1e-4)


def test_it_lowers_the_error_of_outputs_not_of_weights() -> None:
    x, w = rows(), weight()
    h = hessian(x)
    made, nearest = compensate(w, factor(h, 0.01), Integers(K, 0.5)), torch.round(w / 0.5) * 0.5
    assert relative_error(w, made, h) < 0.8 * relative_error(w, nearest, h)
    assert relative_error(w, made, None) > relative_error(w, nearest, None)
    direct = float((x @ (made - w).T).norm() / (x @ w.T).norm())
    assert relative_error(w, made, h) == pytest.approx(direct, rel=1e-3)


def test_the_factor_is_that_of_the_inverse() -> None:
    h = hessian(rows())
    upper = factor(h, 0.0).double()
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper @ h.double(), torch.eye(K).double(), atol=1e-3, rtol=0)


def test_an_input_that_is_always_zero_is_rounded_by_itself() -> None:
    w = weight()
    made = compensate(w, factor(hessian(rows(dead=3)), 0.01), Integers(K, 0.5))
    torch.testing.assert_close(made[:, 3], torch.round(w[:, 3] / 0.5) * 0.5)


def test_fewer_rows_than_inputs_are_damped() -> None:
    made = compensate(weight(), factor(hessian(rows(5)), 0.0), Integers(K, 0.5))
    assert torch.isfinite(made).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_an_error(value: float) -> None:
    x = rows()
    x[3, 4] = value
    with pytest.raises(ModelError, match="layer: calibration met an activation that is not finite"):
        hessian(x)


def test_scales_of_least_error_are_the_best_of_those_tried() -> None:
    scheme = replace(SCHEMES["w4a16"], group=32)
    w = np.random.default_rng(0).standard_t(3, (5, 64)).astype(np.float32)
    found = least_error_scales(scheme, w)
    for row in range(5):
        for group in range(2):
            part = w[row, 32 * group : 32 * group + 32]
            most = np.abs(part).max() / np.float32(7.5)
            tried = [bfloat16(most * np.float32(s)) for s in SHRINK]
            errors = [(np.abs(np.clip(np.rint(part / s), -8, 7) * s - part) ** 2.4).sum() for s in tried]
            at = tried.index(found[row, group])
            assert errors[at] <= min(errors[:6]) * (1 + 1e-5) and errors[at] <= errors[0] * (1 + 1e-5)
    assert (found < bfloat16(scheme.scales(w))).any()


@pytest.mark.parametrize("outliers", [0, 8])
def test_rows_of_atom(outliers: int) -> None:
    """Groups of 4 bits, clipped; then channels of 8 bits; one scale for each group of one row."""
    x = torch.randn(7, 40, generator=torch.Generator().manual_seed(2)) * 3
    x[2, :8] = 0
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    found = Rows(order, 8, outliers, 0.9)(x)
    for r in range(7):
        for at in range(0, 40, 8):
            channels = order[at : at + 8]
            part = x[r, channels]
            wide = at >= 40 - outliers
            step = part.abs().max() / 127 if wide else part.abs().max() * (0.9 / 7)
            low, high = (-128, 127) if wide else (-8, 7)
            expected = torch.round(part / step).clamp(low, high) * step if step > 0 else part * 0
            torch.testing.assert_close(found[r, channels], expected)
    assert torch.equal(Rows(order, 8, outliers, 0.9)(x[2:3]), found[2:3])
