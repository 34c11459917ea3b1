"""Hugging Face config.json -> ModelConfig."""

from __future__ import annotations

import math
from typing import Any

from dovetail.checkpoint.architectures import Architecture, find_architecture
from dovetail.checkpoint.geometry import LIMIT, check_geometry
from dovetail.core.errors import ModelError
from dovetail.core.model import ModelConfig, RopeConfig


class Fields:
    """Typed access to a JSON object; a wrong type is a ModelError naming the file and the field."""

    def __init__(self, values: dict[str, Any], source: str) -> None:
        self.values, self.source = values, source

    def wrong(self, name: str, value: Any, wanted: str) -> ModelError:
        return ModelError(f"{self.source}: {name} must be {wanted}, it is {str(value)[:64]!r}")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            raise ModelError(f"{self.source}: {name} is missing")
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not 0 <= value < LIMIT:
            raise self.wrong(name, value, "an integer from 0 to 2^31 - 1")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.values.get(name)
        value = default if value is None else value
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.wrong(name, value, "a finite number")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.values.get(name)
        value = default if value is None else value
        if type(value) is not bool:
            raise self.wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: str) -> str:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, str):
            raise self.wrong(name, value, "a string")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One id, a list, or null; -1 has been used for "none"."""
        value = self.values.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token in ids:
            if type(token) is not int or not -1 <= token < LIMIT:
                raise self.wrong(name, value, "a token id or a list of them")
        return tuple(token for token in ids if token >= 0)


def _rope(fields: Fields, max_positions: int) -> RopeConfig:
    """`rope_parameters` (new) or `rope_scaling` + `rope_theta` (old), which transformers lets win if both
    exist.
    """
    raw = fields.values.get("rope_scaling") or fields.values.get("rope_parameters") or {}
    if not isinstance(raw, dict):
        raise fields.wrong("rope_parameters", raw, "an object")
    if any(isinstance(value, dict) for value in raw.values()):
        raise ModelError(f"{fields.source}: rope_parameters that differ by layer type are not supported")
    inner = Fields(raw, f"{fields.source}: rope_parameters")
    kind = inner.text("rope_type", inner.text("type", "default"))
    theta = inner.number("rope_theta", fields.number("rope_theta", 10000.0))
    partial = inner.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ModelError(f"{fields.source}: partial_rotary_factor {partial} is not supported, only 1")
    named = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}
    parameters = {}
    for name, value in raw.items():
        if name not in named and value is not None:
            parameters[name] = float(value) if type(value) is bool else inner.number(name, 0.0)
    if kind in ("llama3", "yarn"):
        original = fields.integer("original_max_position_embeddings", max_positions)
        parameters.setdefault("original_max_position_embeddings", float(original))
    return RopeConfig(theta, kind, parameters if kind != "default" else {})


def _windows(fields: Fields, architecture: Architecture, layers: int) -> tuple[int | None, ...]:
    """One sliding window per layer, () where no layer has one."""
    window: int | None = None
    if fields.values.get("sliding_window") is not None:
        window = fields.integer("sliding_window")
    types = fields.values.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != layers:
            raise fields.wrong("layer_types", types, f"a list of {layers} names (num_hidden_layers)")
        for kind in types:
            if kind not in ("full_attention", "sliding_attention"):
                raise fields.wrong("layer_types", kind, "full_attention or sliding_attention")
        if "sliding_attention" not in types:
            return ()
        if window is None:
            raise ModelError(f"{fields.source}: layer_types names sliding_attention but sliding_window is missing")
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    if architecture.name == "mistral":
        return () if window is None else (window,) * layers
    if architecture.name in ("qwen2", "qwen3") and window is not None and fields.flag("use_sliding_window"):
        first = fields.integer("max_window_layers", 28)
        return tuple(window if layer >= first else None for layer in range(layers)) if first < layers else ()
    return ()


def parse_hf_config(values: dict[str, Any], source: str, eos_token_ids: tuple[int, ...] = ()) -> ModelConfig:
    """Read config.json's object. `eos_token_ids` (from generation_config.json) are added to the config's own.

    ModelError naming `source` and the field for an unknown architecture, a missing or wrongly typed field, or
    numbers that contradict each other.
    """
    fields = Fields(values, source)
    if values.get("quantization_config") is not None:
        raise ModelError(f"{source}: quantization_config: quantized Hugging Face checkpoints are not supported")
    architecture = find_architecture(values.get("model_type"), f"{source}: model_type")
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if heads == 0:
        raise ModelError(f"{source}: num_attention_heads is 0")
    head_dim = fields.integer("head_dim", architecture.head_dim or hidden // heads)
    if values.get("head_dim") is None and architecture.head_dim is None and hidden % heads:
        raise ModelError(f"{source}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    layers = fields.integer("num_hidden_layers")
    positions = fields.integer("max_position_embeddings", architecture.max_positions)
    bias = architecture.name in ("llama", "qwen3") and fields.flag("attention_bias")
    bos = fields.token_ids("bos_token_id")
    if layers > 65536:
        raise ModelError(f"{source}: num_hidden_layers is {layers}, more than any model has")
    config = ModelConfig(
        architecture=architecture.name,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", architecture.kv_heads or heads),
        head_dim=head_dim,
        max_position_embeddings=positions,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=_rope(fields, positions),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=architecture.qkv_bias or bias,
        o_bias=bias,
        mlp_bias=architecture.name == "llama" and fields.flag("mlp_bias"),
        qk_norm=architecture.qk_norm,
        hidden_act=fields.text("hidden_act", "silu"),
        sliding_windows=_windows(fields, architecture, layers),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=tuple(dict.fromkeys(fields.token_ids("eos_token_id") + eos_token_ids)),
    )
    return check_geometry(config, source)
