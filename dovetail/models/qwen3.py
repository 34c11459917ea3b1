"""Qwen3: the size of heads is a setting of its own, and queries and keys have norms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dovetail.checkpoint.architecture import Architecture
from dovetail.checkpoint.fields import Fields, Keys
from dovetail.checkpoint.gguf_config import decoder_config as gguf_config
from dovetail.checkpoint.hf_config import Defaults, decoder_config
from dovetail.core.model import ModelConfig
from dovetail.models.decoder import Decoder
from dovetail.models.qwen2 import qwen_json, qwen_windows

DEFAULTS = Defaults(max_positions=32768, kv_heads=32, head_dim=128)


def _from_hf(fields: Fields) -> ModelConfig:
    config, bias = decoder_config(fields, "qwen3", DEFAULTS), fields.flag("attention_bias")
    windows = qwen_windows(fields, config.num_layers)
    return replace(config, qkv_bias=bias, o_bias=bias, qk_norm=True, sliding_windows=windows)


def _from_gguf(keys: Keys) -> ModelConfig:
    return replace(gguf_config(keys), qk_norm=True)


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    return qwen_json(config) | {"attention_bias": config.o_bias}


QWEN3 = Architecture("qwen3", "Qwen3ForCausalLM", _from_hf, _from_gguf, _to_hf, program=Decoder)
