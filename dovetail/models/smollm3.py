"""SmolLM3: Llama in which every fourth layer does not rotate queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dovetail.checkpoint.architecture import Architecture
from dovetail.checkpoint.fields import Fields, Keys
from dovetail.checkpoint.gguf_config import decoder_config as gguf_config
from dovetail.checkpoint.hf_config import Defaults, decoder_config, decoder_json, layer_windows, windows_json
from dovetail.core.model import NO_ROPE, ModelConfig
from dovetail.models.decoder import Decoder

DEFAULTS = Defaults(max_positions=32768, kv_heads=4, theta=2e6, tied=True)
INTERVAL = 4


def _with_ropes(config: ModelConfig, rotates: Sequence[object]) -> ModelConfig:
    """The config with a rotation only for layers whose entry in `rotates` is true."""
    ropes = tuple(config.rope if r else NO_ROPE for r in rotates)
    return config if NO_ROPE not in ropes else replace(config, layer_ropes=ropes)


def _rotates(layers: int, interval: int) -> list[int]:
    return [int((layer + 1) % interval != 0) for layer in range(layers)]


def _from_hf(fields: Fields) -> ModelConfig:
    config, bias = decoder_config(fields, "smollm3", DEFAULTS), fields.flag("attention_bias")
    interval = fields.integer("no_rope_layer_interval", INTERVAL)
    if interval == 0:
        raise fields.wrong("no_rope_layer_interval", interval, "at least 1")
    rotates = fields.values.get("no_rope_layers")
    if rotates is None:
        rotates = _rotates(config.num_layers, interval)
    if not isinstance(rotates, list) or len(rotates) < config.num_layers or not set(rotates) <= {0, 1}:
        raise fields.wrong("no_rope_layers", rotates, f"a list of 0 or 1 for each of {config.num_layers} layers")
    rotates = rotates[: config.num_layers]
    windowed = fields.flag("use_sliding_window") and fields.values.get("sliding_window") is not None
    windows = layer_windows(fields, [windowed and not r for r in rotates])
    config = replace(config, qkv_bias=bias, o_bias=bias, mlp_bias=fields.flag("mlp_bias"), sliding_windows=windows)
    return _with_ropes(config, rotates)


def _from_gguf(keys: Keys) -> ModelConfig:
    config = gguf_config(keys)
    return _with_ropes(config, _rotates(config.num_layers, INTERVAL))


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        **decoder_json(config),
        **windows_json(config),
        "use_sliding_window": bool(config.sliding_windows),
        "no_rope_layers": [int(config.rope_of(layer) != NO_ROPE) for layer in range(config.num_layers)],
        "attention_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        "pad_token_id": None,  # the default is an id that a small vocabulary does not have
    }


SMOLLM3 = Architecture(
    "smollm3", "SmolLM3ForCausalLM", _from_hf, _from_gguf, _to_hf, program=Decoder, interleaved=True
)
