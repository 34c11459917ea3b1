"""Llama 1 to 3, SmolLM2, and other models with the same program."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dovetail.checkpoint.architecture import Architecture
from dovetail.checkpoint.fields import Fields, Keys
from dovetail.checkpoint.gguf_config import decoder_config as gguf_config
from dovetail.checkpoint.gguf_config import window_in_all_layers
from dovetail.checkpoint.hf_config import Defaults, decoder_config, decoder_json
from dovetail.core.errors import ModelError
from dovetail.core.model import ModelConfig
from dovetail.models.decoder import Decoder

DEFAULTS = Defaults(max_positions=2048)


def _from_hf(fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias")
    config = decoder_config(fields, "llama", DEFAULTS)
    return replace(config, qkv_bias=bias, o_bias=bias, mlp_bias=fields.flag("mlp_bias"))


def _from_gguf(keys: Keys) -> ModelConfig:
    """The config of a GGUF file. Files of models that add a window to Llama say so by a key."""
    config = gguf_config(keys)
    return replace(config, sliding_windows=window_in_all_layers(keys, config.num_layers))


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    if config.sliding_windows:
        raise ModelError("Llama's config.json has no sliding window, so this model cannot be exported")
    return decoder_json(config) | {"attention_bias": config.o_bias, "mlp_bias": config.mlp_bias}


LLAMA = Architecture("llama", "LlamaForCausalLM", _from_hf, _from_gguf, _to_hf, program=Decoder, interleaved=True)
