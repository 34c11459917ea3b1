"""What Hugging Face's config.json says the same way for most decoders: reading it, and writing it back.

An architecture's record composes these functions and adds what is its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dovetail.checkpoint.fields import Fields
from dovetail.core.errors import ModelError
from dovetail.core.model import ModelConfig, RopeConfig

FULL, SLIDING = "full_attention", "sliding_attention"  # in layer_types
_OWN_KINDS = ("factors", "none")  # of RopeConfig, unknown to Hugging Face
_ROPE_NAMES = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}


@dataclass(frozen=True)
class Defaults:
    """What an architecture's configuration class assumes for fields that config.json leaves out.

    kv_heads None: as many as heads. head_dim None: hidden size / heads.
    """

    max_positions: int
    kv_heads: int | None = None
    head_dim: int | None = None
    theta: float = 10000.0
    tied: bool = False


def decoder_config(fields: Fields, architecture: str, defaults: Defaults) -> ModelConfig:
    """What the fields that decoders share say, without biases, and with windows only where layer_types says so.

    ModelError naming the file and the field for a missing or wrongly typed one, or for heads that do not fit.
    """
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if heads == 0:
        raise ModelError(f"{fields.source}: num_attention_heads is 0")
    head_dim = fields.integer("head_dim", defaults.head_dim or hidden // heads)
    if fields.values.get("head_dim") is None and defaults.head_dim is None and hidden % heads:
        raise ModelError(f"{fields.source}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    layers = fields.integer("num_hidden_layers")
    if layers > 65536:
        raise ModelError(f"{fields.source}: num_hidden_layers is {layers}, more than any model has")
    bos = fields.token_ids("bos_token_id")
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", defaults.kv_heads or heads),
        head_dim=head_dim,
        max_position_embeddings=fields.integer("max_position_embeddings", defaults.max_positions),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=decoder_rope(fields, defaults),
        tie_word_embeddings=fields.flag("tie_word_embeddings", defaults.tied),
        hidden_act=fields.text("hidden_act", "silu"),
        sliding_windows=layer_windows(fields, [False] * layers),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=fields.token_ids("eos_token_id"),
    )


def decoder_rope(fields: Fields, defaults: Defaults) -> RopeConfig:
    """`rope_parameters` (new) or `rope_scaling` + `rope_theta` (old), which transformers lets win if both
    exist.
    """
    raw = fields.values.get("rope_scaling") or fields.values.get("rope_parameters") or {}
    if not isinstance(raw, dict):
        raise fields.wrong("rope_parameters", raw, "an object")
    if any(isinstance(value, dict) for value in raw.values()):
        raise ModelError(f"{fields.source}: rope_parameters that differ by layer type are not supported")
    return read_rope(fields, Fields(raw, f"{fields.source}: rope_parameters"), defaults)


def read_rope(fields: Fields, inner: Fields, defaults: Defaults) -> RopeConfig:
    """One object of rope parameters, `inner`; what it leaves out is in the config's `fields`."""
    kind = inner.text("rope_type", inner.text("type", "default"))
    if kind in _OWN_KINDS:
        raise ModelError(f"{inner.source}: rope type {kind!r} is not known")
    theta = inner.number("rope_theta", fields.number("rope_theta", defaults.theta))
    partial = inner.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ModelError(f"{fields.source}: partial_rotary_factor {partial} is not supported, only 1")
    parameters = {}
    for name, value in inner.values.items():
        if name not in _ROPE_NAMES and value is not None:
            parameters[name] = float(value) if type(value) is bool else inner.number(name, 0.0)
    if kind in ("llama3", "yarn"):
        positions = fields.integer("max_position_embeddings", defaults.max_positions)
        original = fields.integer("original_max_position_embeddings", positions)
        parameters.setdefault("original_max_position_embeddings", float(original))
    return RopeConfig(theta, kind, parameters if kind != "default" else {})


def layer_windows(fields: Fields, sliding: Sequence[bool], default: int | None = None) -> tuple[int | None, ...]:
    """`sliding_window` for the layers that layer_types names, or without it for those that `sliding` marks.

    One entry per layer, () where no layer has a window. ModelError if a layer slides and no window is given.
    """
    window = default if fields.values.get("sliding_window") is None else fields.integer("sliding_window")
    types = fields.values.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != len(sliding):
            raise fields.wrong("layer_types", types, f"a list of {len(sliding)} names (num_hidden_layers)")
        for kind in types:
            if kind not in (FULL, SLIDING):
                raise fields.wrong("layer_types", kind, f"{FULL} or {SLIDING}")
        sliding = [kind == SLIDING for kind in types]
    if not any(sliding):
        return ()
    if window is None:
        raise ModelError(f"{fields.source}: layer_types names {SLIDING} but sliding_window is missing")
    return tuple(window if slides else None for slides in sliding)


def decoder_json(config: ModelConfig) -> dict[str, Any]:
    """What `decoder_config` reads, without windows; readable by transformers 4 (rope_theta, rope_scaling) and 5.

    ModelError for rope factors that have no Hugging Face counterpart.
    """
    eos = list(config.eos_token_ids)
    rope = rope_json(config.rope, config)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": scaling_json(rope),
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": config.hidden_act,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    }


def rope_json(rope: RopeConfig, config: ModelConfig) -> dict[str, Any]:
    """The object of rope parameters that `read_rope` reads."""
    if rope.kind == "factors":
        rope = _as_llama3(rope, config)
    integers = {"original_max_position_embeddings"}
    parameters: dict[str, Any] = {k: int(v) if k in integers else v for k, v in rope.parameters.items()}
    if "truncate" in parameters:
        parameters["truncate"] = bool(parameters["truncate"])
    return {"rope_type": rope.kind, "rope_theta": rope.theta, **parameters}


def scaling_json(rope: dict[str, Any]) -> dict[str, Any] | None:
    """The same as transformers 4 reads it: without theta, and nothing where there is no scaling."""
    if rope["rope_type"] == "default":
        return None
    return {name: value for name, value in rope.items() if name != "rope_theta"}


def windows_json(config: ModelConfig) -> dict[str, Any]:
    """What `layer_windows` reads."""
    windows = config.sliding_windows or (None,) * config.num_layers
    return {
        "sliding_window": next((window for window in windows if window is not None), None),
        "layer_types": [FULL if window is None else SLIDING for window in windows],
    }


def llama3_factors(rope: RopeConfig, head_dim: int) -> list[float]:
    """What a "llama3" rope divides each inverse frequency by, head_dim / 2 values.

    Wavelengths up to original / high are kept, those from original / low on are divided by `factor`, and
    between them the inverse frequency is interpolated.
    """
    p = rope.parameters
    low, high, original = p["low_freq_factor"], p["high_freq_factor"], p["original_max_position_embeddings"]
    factors = []
    for index in range(head_dim // 2):
        turns = original * rope.theta ** (-2 * index / head_dim) / (2 * math.pi)
        kept = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1.0 / ((1.0 - kept) / p["factor"] + kept))
    return factors


def _as_llama3(rope: RopeConfig, config: ModelConfig) -> RopeConfig:
    """The "llama3" parameters behind a list of factors; ModelError if there are none."""
    for original in (8192.0, float(config.max_position_embeddings)):
        parameters = {
            "factor": max(rope.factors),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        candidate = RopeConfig(rope.theta, "llama3", parameters)
        pairs = zip(llama3_factors(candidate, config.head_dim), rope.factors, strict=True)
        if all(abs(a - b) <= 1e-3 * b for a, b in pairs):
            return candidate
    raise ModelError("the rope factors (rope_freqs.weight) do not follow Llama 3's rule and cannot be exported")
