"""A Hugging Face model directory: config.json, safetensors (one file or shards), tokenizer.

Only data is read: nothing in the directory is imported or executed, and pickle files are refused.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dovetail.checkpoint.architecture import Architectures, read_hf_config
from dovetail.checkpoint.fields import Fields
from dovetail.checkpoint.layout import NORM_SUFFIX
from dovetail.checkpoint.quantized import quantized_weights
from dovetail.checkpoint.quantized_weight import QuantizedWeight
from dovetail.checkpoint.safetensors_folder import SafetensorsFolder
from dovetail.core.errors import ModelError
from dovetail.core.model import PLAIN_FORMATS
from dovetail.host.json_file import read_json_object
from dovetail.ops.stored import StoredTensor
from dovetail.text.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class HFCheckpoint:
    """See `Checkpoint`. Several tensors of a quantized weight are one, under the name that it has without them."""

    def __init__(self, path: str | os.PathLike[str], known: Architectures) -> None:
        self.path = Path(path)
        if not (self.path / "config.json").exists():
            raise ModelError(f"{self.path}: no config.json (and no GGUF file)")
        source, values = str(self.path / "config.json"), read_json_object(self.path / "config.json")
        self.generation_config: dict[str, Any] = {}
        generation = self.path / "generation_config.json"
        if generation.exists():
            self.generation_config = read_json_object(generation)
        ends = Fields(self.generation_config, str(generation))
        self.architecture, self.config = read_hf_config(values, source, known, ends)
        self.quantization = Fields(values, source).object("quantization_config")
        self._folder = SafetensorsFolder(self.path)
        self._quantized: dict[str, QuantizedWeight] = {}
        if self.quantization is not None:
            self._quantized = quantized_weights(self.quantization, self._folder)
        self._hidden = {name for weight in self._quantized.values() for name in weight.sources}
        self.bytes, self.files = self._folder.bytes, self._folder.files
        if self.config.tie_word_embeddings and not self._tied():
            _LOG.warning(
                "%s: config.json says tie_word_embeddings, but %s holds other values than %s; they are used",
                self.path, _HEAD, _EMBEDDING,
            )  # fmt: skip
            self.config = replace(self.config, tie_word_embeddings=False)

    def _tied(self) -> bool:
        """Whether the files have no head of their own, or one that is the embedding."""
        names = self.names()
        if _HEAD not in names or _EMBEDDING not in names:
            return True
        head, embedding = self.tensor(_HEAD), self.tensor(_EMBEDDING)
        if (head.format, head.shape) != (embedding.format, embedding.shape):
            return False
        rows = 4096  # at a time, so that a difference is found early
        return all(
            np.array_equal(head.data[at : at + rows], embedding.data[at : at + rows])
            for at in range(0, len(head.data), rows)
        )

    def names(self) -> list[str]:
        return [name for name in self._folder.names() if name not in self._hidden] + list(self._quantized)

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._quantized:
            return self._quantized[name].shape
        return self._folder.find(name).shape

    def format(self, name: str) -> str:
        if name in self._quantized:
            return self._quantized[name].format
        return "F32" if self._offset(name) else self._folder.find(name).dtype

    def tensor(self, name: str) -> StoredTensor:
        if name in self._quantized:
            return self._quantized[name].read()
        found = self._folder.find(name)
        if found.dtype not in PLAIN_FORMATS:
            known = ", ".join(PLAIN_FORMATS)
            raise ModelError(
                f"{self._folder.file(name)}: tensor {name} is {found.dtype}; supported are {known}, and others "
                "where config.json has a quantization_config"
            )
        data = self._folder.data(name)
        count = math.prod(found.shape)
        rows = count // found.shape[-1] if found.shape and found.shape[-1] else 1
        stored = StoredTensor(name, found.dtype, found.shape, data.reshape(rows, -1))
        if offset := self._offset(name):
            return StoredTensor.of(name, stored.values() + np.float32(offset))
        return stored

    def release(self, name: str) -> None:
        sources = self._quantized[name].sources if name in self._quantized else (name,)
        for source in sources:
            self._folder.release(source)

    def tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_directory(self.path, self.config.eos_token_ids)
        for token in tokenizer.encode(""):
            if token >= self.config.vocab_size:
                raise ModelError(
                    f"{self.path / 'tokenizer.json'}: puts token {token} into every text, and the model has "
                    f"{self.config.vocab_size} tokens"
                )
        return tokenizer

    def _offset(self, name: str) -> float:
        """What the file leaves out of a tensor's values."""
        return self.architecture.norm_offset if name.endswith(NORM_SUFFIX) else 0.0
