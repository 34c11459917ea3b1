"""GPTQ: rounds a weight column by column, and later columns make up for the error (Frantar et al., 2210.17323).

The error of a layer's output over calibration rows X is tr(D H D^T), where D is the change of the weight, and
H = X^T X. When a column is rounded, the later ones change by its error times a row of the upper Cholesky factor of
H^-1 (algorithm 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from dovetail.core.errors import ModelError
from dovetail.host.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 128  # columns whose changes reach the columns behind them in one product


class Hessian:
    """H = X^T X over all rows that were seen, float32 [K, K]."""

    def __init__(self, name: str, width: int) -> None:
        """name: of a layer that the rows enter, for errors."""
        self.name = name
        self.sum = torch.zeros(width, width)

    def __call__(self, x: Tensor) -> Tensor:
        """See rows x [rows, K]; they are returned as they are. ModelError if a value is not finite."""
        if not bool(torch.isfinite(x).all()):
            raise ModelError(
                f"{self.name}: calibration met an activation that is not finite; the checkpoint is broken, or its "
                "values leave the range of float32"
            )
        self.sum.addmm_(x.T, x)
        return x


class Rounder(Protocol):
    """A grid that columns are rounded to. The codes are kept by it."""

    def round(self, column: int, values: Tensor) -> Tensor:
        """Column `column` [N, the first of `values`] on the grid, [N].

        values: this column and all behind it, in the order in which they are rounded, as errors have changed them.
        """


def compensate(
    weight: Tensor, hessian: Tensor, rounder: Rounder, damping: float, columns: Sequence[int]
) -> Tensor:
    """Round columns of weight [N, K], each once, in the order of their numbers in `columns`.

    Returns the weight as it is then: columns that are not named have only taken their part of the errors.
    """
    n, k = weight.shape
    order = torch.tensor([*columns, *sorted(set(range(k)) - set(columns))])
    moved = weight[:, order].clone()
    upper = factor(hessian[order][:, order], damping)
    for start in range(0, len(columns), BLOCK):
        stop = min(start + BLOCK, len(columns))
        errors = torch.empty(n, stop - start)
        for j in range(start, stop):
            values = rounder.round(columns[j], moved[:, j:])
            error = (moved[:, j] - values) / upper[j, j]
            moved[:, j:stop] -= torch.outer(error, upper[j, j:stop])
            moved[:, j] = values
            errors[:, j - start] = error
        moved[:, stop:] -= errors @ upper[start:stop, stop:]
    back = torch.empty_like(moved)
    back[:, order] = moved
    return back


def factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse, after `damping` times the mean was added to the diagonal.

    An input that was always 0 is rounded by itself. ModelError if no damping up to 1 makes H positive definite.
    """
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean()) or 1.0
    while True:
        damped = hessian.clone()
        damped.diagonal().copy_(torch.where(diagonal == 0, torch.tensor(mean), diagonal) + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return upper
        damping = max(10 * damping, 1e-4)
        if damping > 1:
            raise ModelError("calibration rows give no positive definite matrix; give more text (--samples)")


def relative_error(weight: Tensor, made: Tensor, hessian: Tensor | None) -> float:
    """|X (made - weight)^T| / |X weight^T| over the rows that H saw; without H, of the weights themselves."""
    change = made - weight
    if hessian is None:
        return float(change.norm() / weight.norm().clamp_min(1e-30))
    of = ((change @ hessian) * change).sum().clamp_min(0)
    return float((of / ((weight @ hessian) * weight).sum().clamp_min(1e-30)).sqrt())
