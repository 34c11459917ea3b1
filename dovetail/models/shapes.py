"""Sizes of published models, by a short name: what their config.json says. No weights belong to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from dovetail.checkpoint.architecture import Architecture, read_hf_config
from dovetail.core.errors import ConfigError
from dovetail.core.model import ModelConfig
from dovetail.models import MODELS


class Shape(NamedTuple):
    """Fields of config.json: sizes, and what else differs from the architecture's defaults."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    more: Mapping[str, Any]

    def fields(self) -> dict[str, Any]:
        """config.json's object, as far as it is known."""
        found = self._asdict()
        return {"model_type": MODELS[found.pop("architecture")].model_type, **found.pop("more"), **found}


_TIED = {"tie_word_embeddings": True}
_LLAMA = {"rms_norm_eps": 1e-5}
_SMOLLM2 = {**_LLAMA, **_TIED, "rope_theta": 1e5}
_QWEN = {"rope_theta": 1e6, "rms_norm_eps": 1e-6}
_QWEN3 = {**_QWEN, "head_dim": 128}
_GEMMA3 = {"head_dim": 256, "sliding_window": 512}

SHAPES = {
    "smollm2-135m": Shape("llama", 576, 1536, 30, 9, 3, 49152, 8192, _SMOLLM2),
    "smollm2-360m": Shape("llama", 960, 2560, 32, 15, 5, 49152, 8192, _SMOLLM2),
    "llama-2-7b": Shape("llama", 4096, 11008, 32, 32, 32, 32000, 4096, _LLAMA),
    "llama-3-8b": Shape("llama", 4096, 14336, 32, 32, 8, 128256, 8192, {**_LLAMA, "rope_theta": 5e5}),
    "mistral-7b": Shape("mistral", 4096, 14336, 32, 32, 8, 32768, 32768, {**_LLAMA, "rope_theta": 1e6}),
    "qwen2.5-0.5b": Shape("qwen2", 896, 4864, 24, 14, 2, 151936, 32768, {**_QWEN, **_TIED}),
    "qwen2.5-1.5b": Shape("qwen2", 1536, 8960, 28, 12, 2, 151936, 32768, {**_QWEN, **_TIED}),
    "qwen2.5-7b": Shape("qwen2", 3584, 18944, 28, 28, 4, 152064, 32768, _QWEN),
    "qwen3-0.6b": Shape("qwen3", 1024, 3072, 28, 16, 8, 151936, 40960, {**_QWEN3, **_TIED}),
    "qwen3-8b": Shape("qwen3", 4096, 12288, 36, 32, 8, 151936, 40960, _QWEN3),
    "gemma3-270m": Shape("gemma3", 640, 2048, 18, 4, 1, 262144, 32768, _GEMMA3),
    "gemma3-1b": Shape("gemma3", 1152, 6912, 26, 4, 1, 262144, 32768, _GEMMA3),
    "smollm3-3b": Shape("smollm3", 2048, 11008, 36, 16, 4, 128256, 65536, {"rope_theta": 5e6}),
}  # fmt: skip
SMALL = Shape("", 256, 768, 2, 4, 2, 1024, 2048, {"head_dim": 64})  # of any architecture, for trying things out


def shape(architecture: str, like: str | None, changes: Mapping[str, int]) -> tuple[Architecture, ModelConfig]:
    """The record of an architecture and the config of a model of the size of `like`, or a small one without it.

    `changes` has fields of config.json that replace those. ConfigError for an unknown architecture or shape, and a
    shape of another architecture; ModelError for sizes that contradict each other.
    """
    if architecture not in MODELS:
        raise ConfigError(f"unknown architecture {architecture!r}; known are {', '.join(MODELS)}")
    if like is not None and like not in SHAPES:
        raise ConfigError(f"unknown shape {like!r}; known are {', '.join(SHAPES)}")
    found = SHAPES[like] if like else SMALL._replace(architecture=architecture)
    if found.architecture != architecture:
        raise ConfigError(f"{like} is a {found.architecture} model, not a {architecture} one")
    return read_hf_config({**found.fields(), **changes}, like or architecture, MODELS)
