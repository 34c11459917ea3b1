"""The interface of every checkpoint, whatever its files look like."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, Protocol

from dovetail.checkpoint.architecture import Architecture
from dovetail.core.errors import ModelError
from dovetail.core.model import ModelConfig
from dovetail.ops.stored import StoredTensor
from dovetail.text.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"  # saved by old versions of transformers, recomputed from the config


class Checkpoint(Protocol):
    """Weights, configuration and tokenizer of one model.

    Tensor names and row order are Hugging Face's (`model.layers.0.self_attn.q_proj.weight`), and weights of norms
    are what a row is multiplied by, whatever the file leaves out of them.
    `generation_config` is generation_config.json's object ({} where there is none); `files` are those that hold
    the weights, and `bytes` is their size.
    """

    path: Path
    architecture: Architecture
    config: ModelConfig
    generation_config: dict[str, Any]
    bytes: int
    files: tuple[Path, ...]

    def names(self) -> list[str]:
        """All tensor names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without touching its bytes; ModelError if there is none of that name."""

    def format(self, name: str) -> str:
        """How a tensor is stored (`StoredTensor.format`), without touching its bytes; ModelError if there is
        none."""

    def tensor(self, name: str) -> StoredTensor:
        """A tensor's raw bytes; ModelError if there is none of that name."""

    def release(self, name: str) -> None:
        """Say that a tensor's bytes are not needed for now, so that their memory may be taken back."""

    def tokenizer(self) -> Tokenizer:
        """The tokenizer (built on each call); ModelError if the files are broken or hold none."""


def validate(checkpoint: Checkpoint) -> None:
    """Compare the checkpoint's names and shapes with its config.

    ModelError for a tensor that is missing, that has another shape than the config says, or that is of a layer
    that the config does not know. Any other tensor that the model does not use is a warning.
    """
    present = set(checkpoint.names())
    for name, shape in checkpoint.architecture.tensors(checkpoint.config):
        if name not in present:
            raise ModelError(f"{checkpoint.path}: tensor {name} is missing (the config asks for {list(shape)})")
        found = checkpoint.shape(name)
        if found != shape:
            raise ModelError(
                f"{checkpoint.path}: tensor {name} is {list(found)}, the config asks for {list(shape)}"
            )
        present.discard(name)
    extra = sorted(name for name in present if not name.endswith(_IGNORED_SUFFIX))
    if checkpoint.config.tie_word_embeddings and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")  # a second copy of the embedding
    if not extra:
        return
    listed = ", ".join(extra[:3]) + (f" and {len(extra) - 3} more" if len(extra) > 3 else "")
    layers = [int(match[1]) for name in extra if (match := _LAYER.match(name))]
    if max(layers, default=0) >= checkpoint.config.num_layers:
        raise ModelError(
            f"{checkpoint.path}: unexpected tensors for {checkpoint.config.architecture}: {listed}; "
            f"the config has {checkpoint.config.num_layers} layers, and without the others the output is another"
        )
    _LOG.warning("%s: %s does not use %s", checkpoint.path, checkpoint.config.architecture, listed)
