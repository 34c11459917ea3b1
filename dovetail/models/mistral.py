"""Mistral: Llama whose rows read a window of the last tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dovetail.checkpoint.architecture import Architecture
from dovetail.checkpoint.fields import Fields, Keys
from dovetail.checkpoint.gguf_config import decoder_config as gguf_config
from dovetail.checkpoint.gguf_config import window_in_all_layers
from dovetail.checkpoint.hf_config import Defaults, decoder_config, decoder_json, layer_windows, windows_json
from dovetail.core.model import ModelConfig
from dovetail.models.decoder import Decoder

DEFAULTS = Defaults(max_positions=131072, kv_heads=8)


def _from_hf(fields: Fields) -> ModelConfig:
    config = decoder_config(fields, "mistral", DEFAULTS)
    windowed = fields.values.get("sliding_window") is not None
    return replace(config, sliding_windows=layer_windows(fields, [windowed] * config.num_layers))


def _from_gguf(keys: Keys) -> ModelConfig:
    config = gguf_config(keys)
    return replace(config, sliding_windows=window_in_all_layers(keys, config.num_layers))


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    return decoder_json(config) | windows_json(config)


MISTRAL = Architecture(
    "mistral", "MistralForCausalLM", _from_hf, _from_gguf, _to_hf, program=Decoder, interleaved=True
)
