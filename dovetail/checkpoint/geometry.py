"""Checks that the numbers of a ModelConfig agree with each other, whatever file they came from."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

from dovetail.core.errors import ModelError
from dovetail.core.model import ACTIVATIONS, ModelConfig, RopeConfig

_LOG = logging.getLogger(__name__)
LIMIT = 1 << 31  # kernels index rows with 32 bits; no model's size comes near
ROPE_KINDS = {
    "default": (),
    "none": (),
    "factors": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}


def check_geometry(config: ModelConfig, source: str) -> ModelConfig:
    """Return `config` if its numbers agree with each other; ModelError naming `source` and the field
    otherwise. Token ids outside the vocabulary are left out, with a warning.
    """
    sizes = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "max_position_embeddings",
    )
    for name in sizes:
        value = getattr(config, name)
        if not 0 < value < LIMIT:
            raise ModelError(f"{source}: {name} is {value}, not between 1 and 2^31 - 1")
    if config.num_layers > 65536:
        raise ModelError(f"{source}: num_layers is {config.num_layers}, more than any model has")
    if config.num_heads % config.num_kv_heads:
        raise ModelError(
            f"{source}: num_heads {config.num_heads} is not a multiple of num_kv_heads {config.num_kv_heads}"
        )
    if config.head_dim % 2:
        raise ModelError(f"{source}: head_dim {config.head_dim} is odd, rotary embedding needs pairs")
    if not (math.isfinite(config.rms_norm_eps) and 0 <= config.rms_norm_eps < 1):
        raise ModelError(f"{source}: rms_norm_eps is {config.rms_norm_eps}, not in [0, 1)")
    if config.hidden_act not in ACTIVATIONS:
        raise ModelError(f"{source}: hidden_act {config.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}")
    if config.sliding_windows and len(config.sliding_windows) != config.num_layers:
        raise ModelError(f"{source}: {len(config.sliding_windows)} layer types for {config.num_layers} layers")
    for window in config.sliding_windows:
        if window is not None and not 0 < window < LIMIT:
            raise ModelError(f"{source}: sliding_window is {window}, not between 1 and 2^31 - 1")
    if config.layer_ropes and len(config.layer_ropes) != config.num_layers:
        raise ModelError(f"{source}: {len(config.layer_ropes)} rotations for {config.num_layers} layers")
    for rope in (config.rope, *config.layer_ropes):
        _check_rope(rope, config.head_dim, source)
    for name in ("query_scale", "embedding_scale"):
        scale = getattr(config, name)
        if scale is not None and not (math.isfinite(scale) and scale > 0):
            raise ModelError(f"{source}: {name} is {scale}, not a positive number")
    bos = () if config.bos_token_id is None else (config.bos_token_id,)
    begins = known_ids(bos, "bos_token_id", source, config.vocab_size)
    ends = known_ids(config.eos_token_ids, "eos_token_id", source, config.vocab_size)
    return replace(config, bos_token_id=begins[0] if begins else None, eos_token_ids=ends)


def known_ids(ids: Sequence[int], name: str, source: str, vocab_size: int) -> tuple[int, ...]:
    """The ids that the model has; the others are named in a warning."""
    for token in ids:
        if token >= vocab_size:
            _LOG.warning("%s: %s %d is not used, the model has %d tokens", source, name, token, vocab_size)
    return tuple(token for token in ids if token < vocab_size)


def extended(config: ModelConfig) -> ModelConfig:
    """`config` with the context that YaRN extends: what the model was trained on, times the factor.

    Model cards ask for the factor without the new length. Files that give the new length keep theirs.
    """
    if config.rope.kind != "yarn":
        return config
    length = config.rope.parameters["original_max_position_embeddings"] * config.rope.parameters["factor"]
    longest = max(config.max_position_embeddings, min(int(length), LIMIT - 1))
    return replace(config, max_position_embeddings=longest)


def _check_rope(rope: RopeConfig, head_dim: int, source: str) -> None:
    if not (math.isfinite(rope.theta) and rope.theta > 0):
        raise ModelError(f"{source}: rope_theta is {rope.theta}, not a positive number")
    if rope.kind not in ROPE_KINDS:
        raise ModelError(f"{source}: rope type {rope.kind[:64]!r} is not one of {', '.join(ROPE_KINDS)}")
    for name in ROPE_KINDS[rope.kind]:
        if name not in rope.parameters:
            raise ModelError(f"{source}: rope type {rope.kind} needs {name}")
    for name, value in rope.parameters.items():
        signed = name in ("mscale", "mscale_all_dim", "attention_factor", "truncate")
        if not math.isfinite(value) or value < 0 or (value == 0 and not signed):
            raise ModelError(f"{source}: rope parameter {name} is {value}, not a positive number")
    low, high = rope.parameters.get("low_freq_factor"), rope.parameters.get("high_freq_factor")
    if low is not None and high is not None and low >= high:
        raise ModelError(f"{source}: rope low_freq_factor {low} is not below high_freq_factor {high}")
    if rope.kind == "factors":
        if len(rope.factors) != head_dim // 2:
            raise ModelError(f"{source}: {len(rope.factors)} rope factors for head_dim {head_dim}")
        if not all(math.isfinite(f) and f > 0 for f in rope.factors):
            raise ModelError(f"{source}: a rope factor is not a positive number")
