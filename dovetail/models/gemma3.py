"""Gemma 3, its text models: local and global layers, norms before and behind attention and MLP, scaled embeddings.

Local layers read a window and have their own rotary base; every sixth layer is global. In Hugging Face files the
weights of norms are stored minus 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dovetail.checkpoint.architecture import Architecture
from dovetail.checkpoint.fields import Fields, Keys
from dovetail.checkpoint.gguf_config import decoder_config as gguf_config
from dovetail.checkpoint.gguf_config import sliding_layers
from dovetail.checkpoint.hf_config import (
    FULL,
    SLIDING,
    Defaults,
    decoder_config,
    decoder_json,
    layer_windows,
    read_rope,
    rope_json,
    windows_json,
)
from dovetail.checkpoint.layout import BLOCK_NAMES
from dovetail.core.errors import ModelError
from dovetail.core.model import ModelConfig, RopeConfig
from dovetail.models.decoder import Decoder

DEFAULTS = Defaults(max_positions=131072, kv_heads=4, head_dim=256, theta=1e6, tied=True)
THETAS = {FULL: ("rope_theta", 1e6), SLIDING: ("rope_local_base_freq", 1e4)}  # fields of old files, defaults
PERIOD = 6  # layers from one global layer to the next
WINDOW = 4096  # if config.json has none
ACTIVATION = "gelu_pytorch_tanh"
LARGEST = 62  # layers of the one published model whose queries are not scaled by the size of a head


def _gemma(config: ModelConfig, local: RopeConfig, windows: Sequence[int | None]) -> ModelConfig:
    """Add what no file says, and each layer's rotation, which follows from its window."""
    some = any(window is not None for window in windows)
    return replace(
        config,
        qk_norm=True,
        post_norms=True,
        wide_norms=True,
        embedding_scale=config.hidden_size**0.5,
        sliding_windows=tuple(windows) if some else (),
        layer_ropes=tuple(config.rope if window is None else local for window in windows) if some else (),
    )


def _query_scale(scalar: float, head_dim: int, source: str) -> float | None:
    """scalar^-0.5, or None if queries are scaled by that anyway."""
    if scalar <= 0:
        raise ModelError(f"{source}: query_pre_attn_scalar is {scalar}, not a positive number")
    return None if scalar == head_dim else scalar**-0.5


def _from_hf(fields: Fields) -> ModelConfig:
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if fields.values.get(name):
            raise ModelError(f"{fields.source}: {name} is not supported")
    plain = Fields({k: v for k, v in fields.values.items() if not k.startswith("rope_")}, fields.source)
    config, bias = decoder_config(plain, "gemma3", DEFAULTS), fields.flag("attention_bias")
    period = fields.integer("sliding_window_pattern", PERIOD)
    if period == 0:
        raise fields.wrong("sliding_window_pattern", period, "at least 1")
    sliding = [(layer + 1) % period != 0 for layer in range(config.num_layers)]
    scalar = fields.number("query_pre_attn_scalar", 256.0)
    config = replace(
        config,
        rope=_rope(fields, FULL),
        qkv_bias=bias,
        o_bias=bias,
        hidden_act=fields.text("hidden_activation", ACTIVATION),
        query_scale=_query_scale(scalar, config.head_dim, fields.source),
    )
    windows = layer_windows(fields, sliding, WINDOW) or (None,) * config.num_layers
    return _gemma(config, _rope(fields, SLIDING), windows)


def _rope(fields: Fields, kind: str) -> RopeConfig:
    """Of layers of one kind: in `rope_parameters` by kind (new), or in rope_theta and rope_scaling, which are of
    global layers, and rope_local_base_freq (old)."""
    by_kind = fields.object("rope_parameters") or Fields({}, fields.source)
    if others := set(by_kind.values) - set(THETAS):
        raise ModelError(f"{by_kind.source} must be by {' and '.join(THETAS)}, it has {min(others)[:64]!r}")
    given, scaling = by_kind.object(kind), fields.object("rope_scaling")
    values = dict(given.values) if given else {}
    if kind == FULL and scaling:
        values |= scaling.values
    name, default = THETAS[kind]
    values.setdefault("rope_theta", fields.number(name, default))
    return read_rope(fields, Fields(values, f"{fields.source}: rope_parameters"), DEFAULTS)


def _from_gguf(keys: Keys) -> ModelConfig:
    """The config of a GGUF file. Some files lack the pattern of the layers and mean the published one."""
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if keys.number(name, 0.0):
            raise ModelError(f"{keys.file.path}: {keys.prefix}.{name} is not supported")
    config = gguf_config(keys)
    scalar = config.hidden_size / config.num_heads if config.num_layers == LARGEST else config.head_dim
    scale = _query_scale(scalar, config.head_dim, str(keys.file.path))
    config = replace(config, hidden_act=ACTIVATION, query_scale=scale)
    window = keys.integer("attention.sliding_window", 0) or None
    sliding = sliding_layers(keys, config.num_layers, PERIOD)
    local = RopeConfig(keys.number("rope.freq_base_swa", THETAS[SLIDING][1]))
    return _gemma(config, local, [window if slides else None for slides in sliding])


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    slides = [i for i in range(config.num_layers) if config.window_of(i) is not None]
    local = config.rope_of(slides[0]) if slides else RopeConfig(THETAS[SLIDING][1])
    scalar = config.head_dim if config.query_scale is None else round(config.query_scale**-2, 6)
    return {
        **decoder_json(config),
        **windows_json(config),
        "rope_parameters": {FULL: rope_json(config.rope, config), SLIDING: rope_json(local, config)},
        "rope_local_base_freq": local.theta,
        "hidden_activation": config.hidden_act,
        "attention_bias": config.o_bias,
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
    }


GEMMA3 = Architecture(
    "gemma3",
    "Gemma3ForCausalLM",
    _from_hf,
    _from_gguf,
    _to_hf,
    program=Decoder,
    hf_type="gemma3_text",
    gguf_names=BLOCK_NAMES
    | {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    norm_offset=1.0,
)
