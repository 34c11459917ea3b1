"""A GGUF file seen as a checkpoint with Hugging Face names and row order."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.checkpoint.architecture import Architectures, read_gguf_config
from dovetail.checkpoint.gguf_split import open_gguf
from dovetail.checkpoint.gguf_tokenizer import build_tokenizer
from dovetail.checkpoint.layout import BLOCK_NAMES, TOP_NAMES
from dovetail.core.errors import ModelError
from dovetail.ops.stored import StoredTensor
from dovetail.text.tokenizer import Tokenizer

_BLOCK_NAME = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z_]+)\.(weight|bias)")


def hf_name(name: str, block: Mapping[str, str] = BLOCK_NAMES) -> str:
    """The Hugging Face name of a GGUF tensor; a name without a counterpart is returned as it is.

    `block` maps the parts of names within a layer.
    """
    if match := _BLOCK_NAME.fullmatch(name):
        layer, part, kind = match.groups()
        return f"model.layers.{layer}.{block[part]}.{kind}" if part in block else name
    part, _, kind = name.rpartition(".")
    return f"{TOP_NAMES[part]}.{kind}" if part in TOP_NAMES else name


def rotation_order(heads: int, head_dim: int) -> NDArray[np.int64]:
    """int64 [heads * head_dim]: which stored row is row i of the Hugging Face order.

    GGUF's Llama rows pair neighbours (2j, 2j + 1) for rotation; Hugging Face pairs (j, j + head_dim / 2).
    """
    rows = np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2)
    return rows.transpose(0, 2, 1).reshape(-1)


class GGUFCheckpoint:
    """See `Checkpoint`. Quantized rows are moved whole and never requantized."""

    def __init__(self, path: str | os.PathLike[str], known: Architectures) -> None:
        self._file = open_gguf(path)
        self.path = self._file.path
        self.bytes = self._file.bytes
        self.files = self._file.files
        self.architecture, self.config = read_gguf_config(self._file, known)
        self.generation_config: dict[str, Any] = {}
        # rope_freqs is part of config.rope
        names = (name for name in self._file.tensors if name != "rope_freqs.weight")
        self._stored = {hf_name(name, self.architecture.gguf_names): name for name in names}

    def names(self) -> list[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.tensors[self._find(name)].shape

    def format(self, name: str) -> str:
        return self._file.tensors[self._find(name)].format

    def tensor(self, name: str) -> StoredTensor:
        stored = self._file.tensor(self._find(name))
        stored = StoredTensor(name, stored.format, stored.shape, stored.data)
        heads = {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}.get(name.split(".")[-2])
        if heads is not None and self.architecture.interleaved:
            return stored.permute_rows(rotation_order(heads, self.config.head_dim))
        return stored

    def release(self, name: str) -> None:
        self._file.release(self._find(name))

    def tokenizer(self) -> Tokenizer:
        return build_tokenizer(self._file, self.config.vocab_size)

    def _find(self, name: str) -> str:
        if name not in self._stored:
            raise ModelError(f"{self.path}: has no tensor {name!r}")
        return self._stored[name]
