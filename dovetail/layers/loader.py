"""Layers with their weights, read from a checkpoint."""

from __future__ import annotations

from typing import Any

from dovetail.checkpoint import Checkpoint
from dovetail.checkpoint.packed_cache import PackedCache
from dovetail.core.seams import Format
from dovetail.layers.embedding import Embedding
from dovetail.layers.linear import Linear, Packed, Unrecorded
from dovetail.layers.norm import Norm


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
    ) -> None:
        """dtype: the compute type, one of `ops.memory.ELEMENTS`. device: as torch names it. cache: where packed
        weights may be ready."""
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.format = fmt
        self.dtype = dtype
        self.device = device
        self.cache = cache

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
            return self.format.layer([self._packed(name, self.format) for name in full], biases)
        weights = [read(name) for name in full]
        layer: Any = self.format.linear(weights, biases)
        return layer if hasattr(layer, "record") else Unrecorded(layer, weights)

    def _packed(self, name: str, fmt: Packed) -> Any:
        """A packed weight: from the cache, or packed now and added to it."""
        found = self.cache.get(name, self.checkpoint.shape(name)) if self.cache is not None else None
        if found is None:
            found = fmt.pack(self.checkpoint.tensor(name))
            self.checkpoint.release(name)
            if self.cache is not None:
                self.cache.add(name, found)
        return found
