"""The standard formats: weights on uniform grids, by rounding to nearest or by GPTQ.

Recipes as in "Give Me BF16 or Give Me Death?" (Kurtic et al., 2411.02355, section 3): w8a8-fp8 is rounded to
nearest, w8a8-int8 and w4a16 are made by GPTQ, and w4a16's scales are those of the least error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dovetail.host.lazy_torch import torch
from dovetail.ops.schemes import SCHEMES, Scheme, bfloat16
from dovetail.ops.stored import StoredTensor
from dovetail.quantize.calibration import SITES, See
from dovetail.quantize.gptq import Hessian, compensate, factor, relative_error
from dovetail.quantize.layer import Layer, Made
from dovetail.quantize.smooth import Smoothed, smoothed

if TYPE_CHECKING:
    from torch import Tensor

SHRINK = tuple(1 - 0.01 * i for i in range(20))  # of the largest magnitude, by which scales are tried
NORM = 2.4  # exponent of the error that scales minimize
PATIENCE = 5  # steps without any gain after which none is tried any more

Floats = NDArray[np.float32]


class Uniform:
    """See `Method`. Rows that calibrate are not rounded."""

    def __init__(self, form: str, options: Mapping[str, Any]) -> None:
        """options: as `recipe.resolved` gives them."""
        scheme = SCHEMES[form]
        self.scheme = replace(scheme, group=options["group"]) if "group" in options else scheme
        self.options = options
        self.smooth = float(options.get("smoothquant", 0.0))
        self.gptq = options.get("method") == "gptq"
        self.needs = frozenset({"quantized"} if self.gptq or self.smooth else ())

    def open(self, layer: Layer) -> UniformWork:
        return UniformWork(self, layer)

    def rounding(self, tensors: Mapping[str, StoredTensor], layer: Layer) -> See:
        return {}

    def scales(self, weight: Floats) -> Floats:
        """bfloat16 scales [N, groups] of weight [N, K], in float32."""
        if self.options.get("observer") == "mse":
            return least_error_scales(self.scheme, weight)
        return bfloat16(self.scheme.scales(weight))


@dataclass
class UniformWork:
    """One block."""

    method: Uniform
    layer: Layer
    seen: dict[str, Inputs] = field(default_factory=dict)

    def original(self) -> See:
        return {}

    def quantized(self) -> See:
        self.seen = {site: Inputs(self.layer.linears(site)[0], self.layer.width(site)) for site in SITES}
        return self.seen

    def finish(self) -> Made:
        smooth = Smoothed()
        if self.method.smooth:
            smooth = smoothed(self.layer, {s: i.most for s, i in self.seen.items()}, self.method.options)
        made = Made(dict(smooth.tensors), {}, bool(self.seen))
        for site in SITES:
            self._site(site, smooth, made)
        return made

    def _site(self, site: str, smooth: Smoothed, made: Made) -> None:
        """Layers that share their rows are rounded together, because they share the Hessian."""
        weight, hessian = smooth.weight(self.layer, site), None
        if self.seen:
            hessian = self.seen[site].hessian.sum
            if site in smooth.columns:
                hessian = hessian / torch.outer(smooth.columns[site], smooth.columns[site])
        scheme, scales = self.method.scheme, self.method.scales(weight.numpy())
        if self.method.gptq and hessian is not None:
            order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
            grid = _Grid(scheme, scales, order)
            upper = factor(hessian[order][:, order], self.method.options["damping"])
            compensate(weight[:, order], upper, grid)
            codes = grid.codes
        else:
            codes = scheme.codes(weight.numpy(), scales)
        start = 0
        for name in self.layer.linears(site):
            rows = slice(start, start := start + self.layer.checkpoint.shape(f"{name}.weight")[0])
            stored = scheme.stored(f"{name}.weight", np.ascontiguousarray(codes[rows]), scales[rows])
            made.tensors[stored.name] = stored
            made.errors[name] = relative_error(weight[rows], torch.from_numpy(stored.values()), hessian)


class Inputs:
    """What is kept of the rows that enter a site."""

    def __init__(self, name: str, width: int) -> None:
        self.hessian = Hessian(name, width)
        self.most = torch.zeros(width)  # largest magnitudes

    def __call__(self, x: Tensor) -> Tensor:
        self.most = torch.maximum(self.most, x.abs().amax(0))
        return self.hessian(x)


class _Grid:
    """See `Rounder`: scales are fixed, and belong to neighbouring columns, whatever the order of rounding."""

    def __init__(self, scheme: Scheme, scales: Floats, order: Tensor) -> None:
        """order: of the columns, as they are rounded."""
        self.order = order.tolist()
        self.columns = len(self.order)
        self.scales = np.ascontiguousarray(scales.T)
        self.group = self.columns // scales.shape[1]
        self.low, self.high = (-8, 7) if scheme.format == "I4" else (-128, 127)
        self.codes: NDArray[np.int8] = np.zeros((len(scales), self.columns), np.int8)

    def round(self, column: int, values: Floats) -> Floats:
        own = self.order[column]
        scale = self.scales[own // self.group]
        q: Floats = np.clip(np.rint(values[0] / scale), self.low, self.high)
        self.codes[:, own] = q
        return q * scale


def least_error_scales(scheme: Scheme, weight: Floats) -> Floats:
    """Scales whose codes have the least error |w - q s|^2.4 in each group, of 20 that clip up to a fifth."""
    n = len(weight)
    most = scheme.scales(weight)
    best, least, idle = bfloat16(most), np.full(most.shape, np.inf, np.float32), 0
    for part in SHRINK:
        scales = bfloat16(most * np.float32(part))
        q = scheme.codes(weight, scales).astype(np.float32).reshape(n, most.shape[1], -1)
        change = np.abs(q * scales[..., None] - weight.reshape(q.shape))
        error = (change**NORM).sum(-1)
        better = error < least
        idle = 0 if better.any() else idle + 1
        best, least = np.where(better, scales, best), np.where(better, error, least)
        if idle == PATIENCE:
            break
    return best
