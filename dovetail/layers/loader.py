"""Layers with their weights, read from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dovetail.checkpoint import Checkpoint
from dovetail.checkpoint.packed_cache import PackedCache
from dovetail.core.seams import Format
from dovetail.layers.embedding import Embedding
from dovetail.layers.linear import Linear, Packed, Unrecorded, agree
from dovetail.layers.norm import Norm
from dovetail.ops.stored import StoredTensor

Recode = Callable[[StoredTensor], StoredTensor]


class Recoding:
    """What fills the Format seam to keep weights in other codes; the engine's own Format then multiplies them.

    layers: makes new codes of a linear layer's weight in the blocks. head: the same for the output head, or None
    to leave it as it is. count: how many weights were recoded. steps: how many steps have run with them.
    """

    def __init__(self, layers: Recode, head: Recode | None = None) -> None:
        self.layers, self.head = layers, head
        self.count = 0
        self.steps: Callable[[], int] = lambda: 0

    @property
    def products(self) -> int:
        """How often a recoded weight was multiplied."""
        return self.count * self.steps()

    def __call__(self, stored: StoredTensor) -> StoredTensor:
        recode = self.layers if stored.name.startswith("model.layers.") else self.head
        if recode is None:
            return stored
        self.count += 1
        return recode(stored)


class Loader:
    """Makes layers by the Hugging Face names of their weights; linear ones through the Format seam."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        fmt: Format,
        dtype: str,
        device: str = "cpu",
        *,
        cache: PackedCache | None = None,
        recoding: Recoding | None = None,
    ) -> None:
        """dtype: the compute type, one of `ops.memory.ELEMENTS`. device: as torch names it. cache: where packed
        weights may be ready. recoding: of linear layers, before the Format gets them."""
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.format = fmt
        self.dtype = dtype
        self.device = device
        self.cache = cache
        self.recoding = recoding

    def embedding(self, name: str) -> Embedding:
        stored = self.checkpoint.tensor(f"{name}.weight")
        return Embedding(stored, self.dtype, self.config.embedding_scale, self.device)

    def norm(self, name: str) -> Norm:
        wide = self.dtype if self.dtype == "float64" or not self.config.wide_norms else "float32"
        return Norm(self.checkpoint.tensor(f"{name}.weight"), wide, self.config.rms_norm_eps, self.device)

    def linear(self, *names: str, bias: bool = False) -> Linear:
        """One layer of several weights that share an input: its rows are theirs, one after the other."""
        read, full = self.checkpoint.tensor, [f"{n}.weight" for n in names]
        biases = [read(f"{n}.bias") for n in names] if bias else []
        if isinstance(self.format, Packed):
            parts = [self._packed(name, self.format) for name in full]
            agree(full, [p.row_rule for p in parts])
            return self.format.layer(parts, biases)
        weights = [self._weight(name) for name in full]
        layer: Any = self.format.linear(weights, biases)
        return layer if hasattr(layer, "record") else Unrecorded(layer, weights)

    def of(self, weight: StoredTensor) -> Linear:
        """A layer of a weight that the checkpoint does not have as it is."""
        layer: Any = self.format.linear([weight], [])
        return layer

    def _packed(self, name: str, fmt: Packed) -> Any:
        """A packed weight: from the cache, or packed now and added to it."""
        found = self.cache.get(name, self.checkpoint.shape(name)) if self.cache is not None else None
        if found is None:
            found = fmt.pack(self._weight(name))
            self.checkpoint.release(name)
            if self.cache is not None:
                self.cache.add(name, found)
        return found

    def _weight(self, name: str) -> StoredTensor:
        stored = self.checkpoint.tensor(name)
        return stored if self.recoding is None else self.recoding(stored)
