"""Checkpoints on disk: Hugging Face directories and GGUF files. Imports core, host, text and ops only.

Readers know no architecture: `models.open_checkpoint` gives them the records of those that can run.
"""

from __future__ import annotations

import os
from pathlib import Path

from dovetail.checkpoint.architecture import Architecture, Architectures
from dovetail.checkpoint.checkpoint import Checkpoint, validate
from dovetail.checkpoint.gguf_checkpoint import GGUFCheckpoint
from dovetail.checkpoint.hf import HFCheckpoint
from dovetail.core.errors import ModelError
from dovetail.core.model import ModelConfig, RopeConfig
from dovetail.host.files import file_part
from dovetail.ops.stored import StoredTensor

__all__ = [
    "Architecture",
    "Checkpoint",
    "ModelConfig",
    "RopeConfig",
    "StoredTensor",
    "read_checkpoint",
    "validate",
]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def read_checkpoint(path: str | os.PathLike[str], known: Architectures) -> Checkpoint:
    """Open and validate a GGUF file (the first of its parts), a directory with one, or a Hugging Face directory.

    ModelError if the path does not exist, is of no known kind, or its contents are corrupt or contradictory.
    """
    path = Path(path)
    checkpoint: Checkpoint
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        parts = file_part(ggufs[0].name) if ggufs else None
        if (path / "config.json").exists() or not ggufs:
            checkpoint = HFCheckpoint(path, known)
        elif len(ggufs) > 1 and (parts is None or not {p.name for p in ggufs} <= set(parts.names())):
            raise ModelError(f"{path}: holds {len(ggufs)} GGUF files; name one of them")
        else:
            checkpoint = GGUFCheckpoint(ggufs[0], known)
    elif path.is_file():
        if path.suffix.lower() in _PICKLES:
            raise ModelError(f"{path}: pickle checkpoints can run code when loaded; convert it to safetensors")
        if path.suffix.lower() == ".safetensors":
            raise ModelError(f"{path}: give the directory that holds it and its config.json")
        checkpoint = GGUFCheckpoint(path, known)
    else:
        raise ModelError(f"{path}: no such file or directory")
    validate(checkpoint)
    return checkpoint
