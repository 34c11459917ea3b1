"""One block of a model that is being quantized, and what a method makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dovetail.checkpoint import Checkpoint
from dovetail.host.lazy_torch import torch
from dovetail.layers.linear import Dense
from dovetail.layers.loader import Loader
from dovetail.models.decoder import Block, one_block
from dovetail.ops.schemes import Scheme
from dovetail.ops.stored import StoredTensor
from dovetail.quantize.calibration import SITES, See

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """Block `index` of a checkpoint."""

    checkpoint: Checkpoint
    index: int

    @property
    def prefix(self) -> str:
        return f"model.layers.{self.index}."

    def linears(self, site: str) -> list[str]:
        """Full names of the linear layers of a site."""
        return [self.prefix + name for name in SITES[site]]

    def width(self, site: str) -> int:
        """Inputs of a site."""
        return self.checkpoint.shape(f"{self.linears(site)[0]}.weight")[1]

    def weight(self, name: str) -> Tensor:
        """The weight [N, K] of a linear layer by its full name, float32, as a copy."""
        return torch.from_numpy(self.checkpoint.tensor(f"{name}.weight").values().astype(np.float32, copy=True))

    def joined(self, site: str) -> Tensor:
        """The weights of a site, one below the other."""
        return torch.cat([self.weight(name) for name in self.linears(site)])

    def tensors(self) -> dict[str, StoredTensor]:
        """All tensors of the block by their full names, as the checkpoint has them."""
        names = [n for n, _ in self.checkpoint.architecture.tensors(self.checkpoint.config)]
        return {name: self.checkpoint.tensor(name) for name in names if name.startswith(self.prefix)}

    def block(self, changed: Mapping[str, StoredTensor] | None = None) -> Block:
        """The block with the engine's reference operations in float32. changed: tensors in the place of others."""
        source: Any = Changed(self.checkpoint, changed or {})
        return one_block(Loader(source, Dense("float32"), "float32"), self.index)


class Changed:
    """A checkpoint with some tensors replaced, as far as a `Loader` asks."""

    def __init__(self, checkpoint: Checkpoint, tensors: Mapping[str, StoredTensor]) -> None:
        self.config, self._checkpoint, self._tensors = checkpoint.config, checkpoint, tensors

    def tensor(self, name: str) -> StoredTensor:
        return self._tensors[name] if name in self._tensors else self._checkpoint.tensor(name)


@dataclass(frozen=True)
class Made:
    """What became of a block: tensors that are new, by full names, and the relative error of each linear layer.

    measured: errors are of outputs on calibration rows; else of weights.
    """

    tensors: dict[str, StoredTensor]
    errors: dict[str, float]
    measured: bool


class Work(Protocol):
    """A method at work on one block. The runner shows it rows, and then asks for the result."""

    def original(self) -> See:
        """Who sees the rows of the original model."""

    def quantized(self) -> See:
        """Who sees the rows that enter the block from the quantized blocks before it. Asked after `original` has
        seen its rows."""

    def finish(self) -> Made: ...


class Method(Protocol):
    """How blocks are quantized. scheme: what their linear layers become. needs: which rows it must see, of
    "original" and "quantized"."""

    scheme: Scheme
    needs: frozenset[str]

    def open(self, layer: Layer) -> Work: ...

    def rounding(self, tensors: Mapping[str, StoredTensor], layer: Layer) -> See:
        """How rows are rounded that enter the quantized block with these tensors; {} for not at all."""
