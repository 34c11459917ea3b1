"""A GGUF file seen as a checkpoint with Hugging Face names and row order."""

from __future__ import annotations

import os
import re
from typing import Any

import torch

from dovetail.checkpoint.architectures import ARCHITECTURES
from dovetail.checkpoint.gguf import GGUFFile
from dovetail.checkpoint.gguf_config import parse_gguf_config
from dovetail.checkpoint.gguf_tokenizer import build_tokenizer
from dovetail.core.errors import ModelError
from dovetail.ops.stored import StoredTensor
from dovetail.text.tokenizer import Tokenizer

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK_NAME = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z_]+)\.(weight|bias)")


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; a name without a counterpart is returned as it is."""
    if match := _BLOCK_NAME.fullmatch(name):
        layer, part, kind = match.groups()
        return f"model.layers.{layer}.{_BLOCK[part]}.{kind}" if part in _BLOCK else name
    part, _, kind = name.rpartition(".")
    return f"{_TOP[part]}.{kind}" if part in _TOP else name


def rotation_order(heads: int, head_dim: int) -> torch.Tensor:
    """int64 [heads * head_dim]: which stored row is row i of the Hugging Face order.

    GGUF's Llama rows pair neighbours (2j, 2j + 1) for rotation; Hugging Face pairs (j, j + head_dim / 2).
    """
    rows = torch.arange(heads * head_dim).view(heads, head_dim // 2, 2)
    return rows.transpose(1, 2).reshape(-1)


class GGUFCheckpoint:
    """See `Checkpoint`. Quantized rows are moved whole and never requantized."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = GGUFFile(path)
        self.path = self._file.path
        self.bytes = self._file.bytes
        self.config = parse_gguf_config(self._file)
        self.generation_config: dict[str, Any] = {}
        # rope_freqs is part of config.rope
        self._stored = {hf_name(name): name for name in self._file.tensors if name != "rope_freqs.weight"}

    def names(self) -> list[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.tensors[self._find(name)].shape

    def tensor(self, name: str) -> StoredTensor:
        stored = self._file.tensor(self._find(name))
        stored = StoredTensor(name, stored.format, stored.shape, stored.data)
        heads = {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}.get(name.split(".")[-2])
        if heads is not None and ARCHITECTURES[self.config.architecture].interleaved:
            return stored.permute_rows(rotation_order(heads, self.config.head_dim))
        return stored

    def tokenizer(self) -> Tokenizer:
        return build_tokenizer(self._file, self.config.vocab_size)

    def _find(self, name: str) -> str:
        if name not in self._stored:
            raise ModelError(f"{self.path}: has no tensor {name!r}")
        return self._stored[name]
