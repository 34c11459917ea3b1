"""Atom: 4-bit weights and activations, with 8 bits for the channels of the largest activations (2310.19102).

Of each input channel the sum of squares over calibration rows is taken (the Hessian's diagonal), in the original
model. Channels are sorted by it, and the last ones are the outliers, which have 8 bits in weights and activations.
The others have 4 bits, in groups of neighbours. A group of a weight spans two neighbouring rows.

Rows of gate and up follow down's order, so down reads its input as it is. Rows of q, k and v, and hidden channels,
stay in place: there the kernel gathers.

GPTQ sees activations as they will be rounded. It fits a group's step when it comes to it, 2 clip max|w| / 15, on
weights that earlier errors have changed. Rounding to nearest has clip max|w| / 7 instead. Outlier columns take
their part of the errors and are then rounded to int8, with a scale for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dovetail.core.errors import ConfigError
from dovetail.host.lazy_torch import torch
from dovetail.ops.grids import num_outliers, to_nibbles
from dovetail.ops.schemes import Scheme, bfloat16
from dovetail.ops.stored import StoredTensor
from dovetail.quantize.calibration import SITES, See
from dovetail.quantize.gptq import Floats, Hessian, compensate, factor, relative_error
from dovetail.quantize.layer import Layer, Made

if TYPE_CHECKING:
    from torch import Tensor

PAIR = 2  # neighbouring rows of a weight that share the scales of their groups


@dataclass(frozen=True)
class Rows:
    """How rows [n, K] are rounded: channels in `order` (int64 [K], None as they are), groups of `group` (0: all
    columns of 4 bits are one), then `outliers`; `clip` multiplies the largest magnitudes of groups."""

    order: Tensor | None
    group: int
    outliers: int
    clip: float

    def __call__(self, x: Tensor) -> Tensor:
        """The values [n, K] that a product sees, in the order of x."""
        sorted_ = x if self.order is None else x[:, self.order]
        split = x.shape[1] - self.outliers
        groups = sorted_[:, :split].unflatten(1, (-1, self.group or split))
        narrow = _nearest(groups, groups.abs().amax(-1, keepdim=True) * (self.clip / 7), -8, 7).flatten(1)
        wide = sorted_[:, split:]
        if self.outliers:
            wide = _nearest(wide, wide.abs().amax(-1, keepdim=True) / 127, -128, 127)
        found = torch.cat([narrow, wide], 1)
        if self.order is None:
            return found
        back = torch.empty_like(found)
        back[:, self.order] = found
        return back


def _nearest(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """Multiples of `step`; ties go to the even one. Zeros where the step is 0."""
    return torch.round(x / torch.where(step > 0, step, 1.0)).clamp_(low, high) * step


class Atom:
    """See `Method`."""

    needs = frozenset({"original", "quantized"})

    def __init__(self, options: Mapping[str, Any]) -> None:
        """options: as `recipe.resolved` gives them."""
        self.options, self.gptq = options, options["method"] == "gptq"
        self.scheme = Scheme("atom", "ATOM", "atom", options["group"])

    def open(self, layer: Layer) -> AtomWork:
        return AtomWork(self, layer)

    def rounding(self, tensors: Mapping[str, StoredTensor], layer: Layer) -> See:
        return {site: self._rows(tensors[f"{layer.linears(site)[0]}.weight"]) for site in SITES}

    def _rows(self, stored: StoredTensor) -> Rows:
        order = torch.from_numpy(stored.shared["order"]) if "order" in stored.shared else None
        return self.rows(stored.shape[1], order, num_outliers(stored))

    def rows(self, width: int, order: Tensor | None, outliers: int | None = None) -> Rows:
        count = self.options["outliers"][str(width)] if outliers is None else outliers
        return Rows(order, self.options["group"], count, self.options["activation_clip"])


@dataclass
class AtomWork:
    """One block."""

    method: Atom
    layer: Layer
    diagonals: dict[str, _Squares] = field(default_factory=dict)
    hessians: dict[str, Hessian] = field(default_factory=dict)

    def original(self) -> See:
        self.diagonals = {site: _Squares(self.layer.width(site)) for site in SITES}
        return self.diagonals

    def quantized(self) -> See:
        found: dict[str, Callable[[Tensor], Tensor]] = {}
        for site in SITES:
            self.hessians[site] = Hessian(self.layer.linears(site)[0], self.layer.width(site))
            found[site] = _Rounded(
                self.method.rows(self.layer.width(site), self._order(site)), self.hessians[site]
            )
        return found

    def _order(self, site: str) -> Tensor:
        return torch.argsort(self.diagonals[site].sum, stable=True)

    def finish(self) -> Made:
        made = Made({}, {}, True)
        for site in SITES:
            order = self._order(site)
            hessian = self.hessians[site].sum[order][:, order]
            upper = factor(hessian, self.method.options["damping"]) if self.method.gptq else None
            shared = {"clip": np.array([self.method.options["activation_clip"]], np.float32)}
            if site != "down":
                shared["order"] = order.numpy().astype(np.int64)
            for name in self.layer.linears(site):
                weight = self._in_place(site, self.layer.weight(name))[:, order]
                stored, values = self._weight(name, weight, upper, shared)
                made.tensors[stored.name] = stored
                made.errors[name] = relative_error(weight, values, hessian)
                self._bias(site, name, made)
        return made

    def _in_place(self, site: str, rows: Tensor) -> Tensor:
        """Rows of gate and up in the order in which down reads them."""
        return rows[self._order("down")] if site == "gate_up" else rows

    def _bias(self, site: str, name: str, made: Made) -> None:
        if site == "gate_up" and self.layer.checkpoint.config.mlp_bias:
            bias = self.layer.checkpoint.tensor(f"{name}.bias")
            made.tensors[bias.name] = bias.permute_rows(self._order("down").numpy())

    def _weight(
        self, name: str, weight: Tensor, upper: Tensor | None, shared: dict[str, NDArray[Any]]
    ) -> tuple[StoredTensor, Tensor]:
        """A weight [N, K] whose columns are sorted; and its new values."""
        n, k = weight.shape
        if n % PAIR:
            raise ConfigError(f"atom: layer {name} has {n} outputs; an even number is needed")
        options = self.method.options
        split = k - options["outliers"][str(k)]
        step = options["weight_clip"] * (1 / 7 if upper is None else 2 / 15)
        grid = _Groups(n, split, options["group"] or split, step)
        moved = compensate(weight, torch.eye(k) if upper is None else upper, grid)
        wide = moved[:, split:].numpy()
        most = np.abs(wide).max(1) / np.float32(127) if wide.size else np.zeros(n, np.float32)
        scale = bfloat16(np.where(most > 0, most, np.float32(1)))
        eight = np.clip(np.rint(wide / scale[:, None]), -128, 127).astype(np.int8)
        moved[:, split:] = torch.from_numpy(eight.astype(np.float32) * scale[:, None])
        data = np.concatenate([to_nibbles(grid.codes), eight.view(np.uint8)], 1)
        parts = {"scale": grid.steps, "outlier_scale": scale}
        return StoredTensor(f"{name}.weight", "ATOM", (n, k), data, parts, shared, "atom"), moved


class _Squares:
    """Sums of squares of channels."""

    def __init__(self, width: int) -> None:
        self.sum = torch.zeros(width, dtype=torch.float64)

    def __call__(self, x: Tensor) -> Tensor:
        self.sum += x.double().square().sum(0)
        return x


class _Rounded:
    """Rows that are rounded before they are measured and multiplied."""

    def __init__(self, rows: Rows, hessian: Hessian) -> None:
        self.rows, self.hessian = rows, hessian

    def __call__(self, x: Tensor) -> Tensor:
        return self.hessian(self.rows(x))


class _Groups:
    """See `Rounder`: 4 bits, and steps that are fitted when the first column of a group is rounded."""

    def __init__(self, n: int, split: int, group: int, clip: float) -> None:
        """clip: the step as a part of a group's largest magnitude."""
        self.columns, self.group, self.clip = split, group, clip
        self.steps = np.ones((n, split // group), np.float32)
        self.codes: NDArray[np.int8] = np.zeros((n, split), np.int8)

    def round(self, column: int, values: Floats) -> Floats:
        at = column // self.group
        if column % self.group == 0:
            most = np.abs(values[: self.group]).max(0).reshape(-1, PAIR).max(1).repeat(PAIR)
            step = bfloat16(most * np.float32(self.clip))
            self.steps[:, at] = np.where(step > 0, step, np.float32(1))
        q: Floats = np.clip(np.rint(values[0] / self.steps[:, at]), -8, 7)
        self.codes[:, column] = q
        return q * self.steps[:, at]
