"""Layers with their weights, read from a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dovetail.checkpoint import Checkpoint
from dovetail.core.seams import Format
from dovetail.layers.embedding import Embedding, StoredEmbedding
from dovetail.layers.linear import Linear, Unrecorded
from dovetail.layers.norm import Norm


class Loader:
    """Makes layers by the Hugging Face names of their weights; linear ones through the Format seam."""

    def __init__(self, checkpoint: Checkpoint, fmt: Format, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.format = fmt
        self.dtype = dtype
        self.device = device

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.checkpoint.tensor(name).dequantize(dtype).to(self.device)

    def embedding(self, name: str) -> Embedding | StoredEmbedding:
        """The embedding. On a CPU, rows are expanded as they are looked up."""
        scale = self.config.embedding_scale
        if self.device.type == "cpu":
            return StoredEmbedding(self.checkpoint.tensor(f"{name}.weight"), self.dtype, scale)
        return Embedding(self.tensor(f"{name}.weight", self.dtype), scale)

    def norm(self, name: str) -> Norm:
        wide = torch.promote_types(self.dtype, torch.float32) if self.config.wide_norms else self.dtype
        return Norm(self.tensor(f"{name}.weight", wide), self.config.rms_norm_eps)

    def linear(self, *names: str, bias: bool = False) -> Linear:
        """One layer of several weights that share an input: its rows are theirs, one after the other."""
        read = self.checkpoint.tensor
        weights = [read(f"{n}.weight") for n in names]
        layer: Any = self.format.linear(weights, [read(f"{n}.bias") for n in names] if bias else [])
        return layer if hasattr(layer, "record") else Unrecorded(layer, weights)
