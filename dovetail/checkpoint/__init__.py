"""Checkpoints on disk: Hugging Face directories and GGUF files. Imports core, host, text and ops only."""

from __future__ import annotations

import os
from pathlib import Path

from dovetail.checkpoint.checkpoint import Checkpoint
from dovetail.checkpoint.gguf_checkpoint import GGUFCheckpoint
from dovetail.checkpoint.hf import HFCheckpoint
from dovetail.checkpoint.layout import validate
from dovetail.core.errors import ModelError
from dovetail.core.model import ModelConfig, RopeConfig
from dovetail.ops.stored import StoredTensor

__all__ = ["Checkpoint", "ModelConfig", "RopeConfig", "StoredTensor", "open_checkpoint", "validate"]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open and validate a GGUF file, a directory with one, or a Hugging Face directory.

    ModelError if the path does not exist, is of no known kind, or its contents are corrupt or contradictory.
    """
    path = Path(path)
    checkpoint: Checkpoint
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if (path / "config.json").exists() or not ggufs:
            checkpoint = HFCheckpoint(path)
        elif len(ggufs) > 1:
            raise ModelError(f"{path}: holds {len(ggufs)} GGUF files; name one of them")
        else:
            checkpoint = GGUFCheckpoint(ggufs[0])
    elif path.is_file():
        if path.suffix.lower() in _PICKLES:
            raise ModelError(f"{path}: pickle checkpoints can run code when loaded; convert it to safetensors")
        if path.suffix.lower() == ".safetensors":
            raise ModelError(f"{path}: give the directory that holds it and its config.json")
        checkpoint = GGUFCheckpoint(path)
    else:
        raise ModelError(f"{path}: no such file or directory")
    validate(checkpoint)
    return checkpoint
