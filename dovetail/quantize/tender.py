"""Tender's checkpoints: what `ops.tender` calibrates on the original model's rows, and weights to nearest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dovetail.core.errors import ModelError
from dovetail.host.lazy_torch import torch
from dovetail.ops.schemes import Scheme
from dovetail.ops.stored import StoredTensor
from dovetail.ops.tender import Grouping, Statistics, describe, quantize
from dovetail.quantize.calibration import SITES, See
from dovetail.quantize.gptq import relative_error
from dovetail.quantize.layer import Layer, Made

if TYPE_CHECKING:
    from torch import Tensor

BIASED = ("qkv", "gate_up")  # sites that a norm's rows enter


class Tender:
    """See `Method`."""

    needs = frozenset({"original"})

    def __init__(self, options: Mapping[str, Any]) -> None:
        """options: as `recipe.resolved` gives them."""
        bits = options["bits"]
        self.how = Grouping(bits, options["groups"], options["chunk"], options["rounding"] == "down")
        self.scheme = Scheme("tender", f"TENDER{bits}", "tender")

    def open(self, layer: Layer) -> TenderWork:
        return TenderWork(self, layer)

    def rounding(self, tensors: Mapping[str, StoredTensor], layer: Layer) -> See:
        return {}


@dataclass
class TenderWork:
    """One block."""

    method: Tender
    layer: Layer
    seen: dict[str, Extremes] = field(default_factory=dict)

    def original(self) -> See:
        chunk = self.method.how.chunk
        self.seen = {site: Extremes(self.layer.linears(site)[0], chunk) for site in SITES}
        return self.seen

    def quantized(self) -> See:
        return {}

    def finish(self) -> Made:
        made = Made({}, {}, False)
        for site in SITES:
            shared = describe(self.seen[site].statistics, self.method.how, site in BIASED)
            for name in self.layer.linears(site):
                weight = self.layer.weight(name)
                stored = replace(quantize(weight.numpy(), shared, self.method.how.bits), name=f"{name}.weight")
                made.tensors[stored.name] = stored
                made.errors[name] = relative_error(weight, torch.from_numpy(stored.values()), None)
        return made


class Extremes:
    """Statistics of one site. A sample's rows begin at position 0."""

    def __init__(self, name: str, chunk: int) -> None:
        self.name, self.statistics = name, Statistics(chunk)

    def __call__(self, x: Tensor) -> Tensor:
        try:
            self.statistics.add(np.arange(len(x)), x.numpy())
        except ModelError as error:
            raise ModelError(f"{self.name}: {error}") from error
        return x
