"""What every checkpoint offers, whatever its files look like."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from dovetail.core.model import ModelConfig
from dovetail.ops.stored import StoredTensor
from dovetail.text.tokenizer import Tokenizer


class Checkpoint(Protocol):
    """Weights, configuration and tokenizer of one model.

    Tensor names and row order are Hugging Face's (`model.layers.0.self_attn.q_proj.weight`).
    `generation_config` is generation_config.json's object ({} where there is none); `bytes` the size of the
    weights on disk.
    """

    path: Path
    config: ModelConfig
    generation_config: dict[str, Any]
    bytes: int

    def names(self) -> list[str]:
        """All tensor names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without touching its bytes; ModelError if there is none of that name."""

    def tensor(self, name: str) -> StoredTensor:
        """A tensor's raw bytes; ModelError if there is none of that name."""

    def tokenizer(self) -> Tokenizer:
        """The tokenizer (built on each call); ModelError if the files are broken or hold none."""
