"""What is fitted to the errors of guesses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dovetail.techniques.infinigen.guess import RIDGE, fit


@given(st.integers(0, 2**31), st.integers(3, 40))
def test_a_fit_is_the_minimum_of_its_sum(seed: int, n: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=draw, dtype=torch.float64) + 1
    y = torch.randn(n, 3, generator=draw, dtype=torch.float64)

    def total(e: torch.Tensor, b: torch.Tensor) -> float:
        ridge = RIDGE * n * x.square().mean()
        return float((y - x @ e.T - b).square().sum() + ridge * e.square().sum())

    e, b = (torch.from_numpy(part) for part in fit(x.numpy(), y.numpy(), "linear"))
    least = total(e, b)
    for _ in range(8):
        step = 1e-3 * torch.randn(3, 6, generator=draw, dtype=torch.float64)
        assert total(e + step[:, :5], b + step[:, 5]) > least


def test_a_mean_is_the_mean() -> None:
    y = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    e, b = fit(np.ones((2, 3)), y.numpy(), "mean")
    assert b.tolist() == [2.0, 4.0] and e.shape == (2, 3) and not e.any()


@pytest.mark.parametrize("n", [1, 7])
def test_inputs_of_nothing_give_finite_fits(n: int) -> None:
    e, b = fit(np.zeros((n, 4)), np.ones((n, 2)), "linear")
    assert not e.any() and b.tolist() == [1.0, 1.0]
