"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dovetail.checkpoint.architecture import Architecture
from dovetail.checkpoint.fields import Fields, Keys
from dovetail.checkpoint.gguf_config import decoder_config as gguf_config
from dovetail.checkpoint.hf_config import Defaults, decoder_config, decoder_json, layer_windows, windows_json
from dovetail.core.model import ModelConfig
from dovetail.models.decoder import Decoder

DEFAULTS = Defaults(max_positions=32768, kv_heads=32)


def qwen_windows(fields: Fields, layers: int) -> tuple[int | None, ...]:
    """The windows of Qwen's layers. Layers from max_window_layers on have one, if use_sliding_window says so."""
    used = fields.values.get("sliding_window") is not None and fields.flag("use_sliding_window")
    first = fields.integer("max_window_layers", 28) if used else layers
    return layer_windows(fields, [layer >= first for layer in range(layers)])


def qwen_json(config: ModelConfig) -> dict[str, Any]:
    """config.json's object: what all decoders have, and what `qwen_windows` reads."""
    windows = config.sliding_windows
    return {
        **decoder_json(config),
        **windows_json(config),
        "use_sliding_window": bool(windows),
        "max_window_layers": next((i for i, w in enumerate(windows) if w is not None), config.num_layers),
    }


def _from_hf(fields: Fields) -> ModelConfig:
    config = decoder_config(fields, "qwen2", DEFAULTS)
    return replace(config, qkv_bias=True, sliding_windows=qwen_windows(fields, config.num_layers))


def _from_gguf(keys: Keys) -> ModelConfig:
    return replace(gguf_config(keys), qkv_bias=True)


QWEN2 = Architecture("qwen2", "Qwen2ForCausalLM", _from_hf, _from_gguf, qwen_json, program=Decoder)
