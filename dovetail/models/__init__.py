"""Architectures: one file each, with the record of how files are read, written and run. Imports no technique."""

from __future__ import annotations

import os

from dovetail.checkpoint import Architecture, Checkpoint, read_checkpoint
from dovetail.models.decoder import Decoder, facts, geometry
from dovetail.models.gemma3 import GEMMA3
from dovetail.models.llama import LLAMA
from dovetail.models.mistral import MISTRAL
from dovetail.models.qwen2 import QWEN2
from dovetail.models.qwen3 import QWEN3
from dovetail.models.smollm3 import SMOLLM3

MODELS: dict[str, Architecture] = {
    record.name: record
    for record in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        GEMMA3,
        SMOLLM3,
    )
}


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """`checkpoint.read_checkpoint` of a model of one of these architectures."""
    return read_checkpoint(path, MODELS)


__all__ = ["MODELS", "Decoder", "facts", "geometry", "open_checkpoint"]
