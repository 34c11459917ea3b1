"""GPTQ: rounds a weight column by column, and later columns make up for the error (Frantar et al., 2210.17323).

The error of a layer's output over calibration rows X is tr(D H D^T), where D is the change of the weight, and
H = X^T X. When a column is rounded, the later ones change by its error times a row of the upper Cholesky factor of
H^-1 (algorithm 1).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from dovetail.core.errors import ModelError
from dovetail.host.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float32]
BLOCK = 128  # columns whose changes reach the columns behind them in one product


class Hessian:
    """H = X^T X over all rows that were seen, float32 [K, K]."""

    def __init__(self, name: str, width: int) -> None:
        """name: of a layer that the rows enter, for errors."""
        self.name = name
        self.sum = torch.zeros(width, width)

    def __call__(self, x: Tensor) -> Tensor:
        """See rows x [rows, K]; they are returned as they are. ModelError if a value is not finite."""
        if not math.isfinite(float(x.sum())):
            raise ModelError(
                f"{self.name}: calibration met an activation that is not finite; the checkpoint is broken, or its "
                "values leave the range of float32"
            )
        self.sum.addmm_(x.T, x)
        return x


class Rounder(Protocol):
    """A grid that `columns` columns are rounded to. The codes are kept by it."""

    columns: int

    def round(self, column: int, values: Floats) -> Floats:
        """A column on the grid, [N]. values [K - column, N]: it and all behind it, as errors have changed them."""


def compensate(weight: Tensor, upper: Tensor, rounder: Rounder) -> Tensor:
    """Round the first columns of weight [N, K], from the first on, as many as the rounder has.

    upper: `factor` of the Hessian. Returns the weight as it is then: the columns behind have only taken their part
    of the errors.
    """
    moved = np.ascontiguousarray(weight.numpy().T)  # [K, N]: a column's values are neighbours
    factors = upper.numpy()
    for start in range(0, rounder.columns, BLOCK):
        stop = min(start + BLOCK, rounder.columns)
        errors = np.empty((stop - start, len(weight)), np.float32)
        for j in range(start, stop):
            values = rounder.round(j, moved[j:])
            error = (moved[j] - values) / factors[j, j]
            moved[j:stop] -= factors[j, j:stop, None] * error
            moved[j] = values
            errors[j - start] = error
        moved[stop:] -= factors[start:stop, stop:].T @ errors
    return torch.from_numpy(moved).T


def factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper U with U^T U = H^-1, after `damping` times the mean was added to the diagonal.

    An input that was always 0 is rounded by itself. ModelError if no damping up to 1 makes H positive definite.
    """
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean()) or 1.0
    while damping <= 1:
        damped = hessian.clone()
        damped.diagonal().copy_(torch.where(diagonal == 0, torch.tensor(mean), diagonal) + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed):  # H = V V^T with the upper V = lower.flip(0, 1), and U = V^-1
            return torch.linalg.solve_triangular(lower.flip(0, 1), torch.eye(len(hessian)), upper=True)
        damping = max(10 * damping, 1e-4)
    raise ModelError("calibration rows give no positive definite matrix; give more text (--samples)")


def relative_error(weight: Tensor, made: Tensor, hessian: Tensor | None) -> float:
    """|X (made - weight)^T| / |X weight^T| over the rows that H saw; without H, of the weights themselves."""
    change = made - weight
    if hessian is None:
        return float(change.norm() / weight.norm().clamp_min(1e-30))
    of = ((change @ hessian) * change).sum().clamp_min(0)
    return float((of / ((weight @ hessian) * weight).sum().clamp_min(1e-30)).sqrt())
