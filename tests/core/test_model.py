"""A model's config: what it says where a checkpoint says nothing, and what may differ by layer."""

from __future__ import annotations

import dataclasses

from dovetail.core.model import ACTIVATIONS, NO_ROPE, PLAIN_FORMATS, ModelConfig, RopeConfig


def config(**more: object) -> ModelConfig:
    return ModelConfig("llama", 100, 32, 64, 2, 4, 2, 8, 512, **more)  # type: ignore[arg-type]


def test_what_a_checkpoint_need_not_say() -> None:
    """HF's defaults of a llama, and none of what it does not have."""
    absent = ("tie_word_embeddings", "qkv_bias", "o_bias", "mlp_bias", "qk_norm", "post_norms", "wide_norms")
    told = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "embedding_scale": 1.0, **dict.fromkeys(absent, False)}
    rope = {"theta": 10000.0, "kind": "default", "parameters": {}, "factors": ()}
    found = dataclasses.asdict(config())
    assert found | told | {"rope": rope} == found
    assert PLAIN_FORMATS == {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # of safetensors
    assert {"silu", "gelu", "gelu_pytorch_tanh", "relu"} <= set(ACTIVATIONS)  # HF's names


def test_what_may_differ_by_layer() -> None:
    local = RopeConfig(theta=500.0)
    plain, mixed = config(), config(layer_ropes=(local, NO_ROPE), sliding_windows=(16, None))
    assert [plain.rope_of(i) for i in (0, 1)] == [plain.rope] * 2
    assert [plain.window_of(i) for i in (0, 1)] == [None, None]
    assert [mixed.rope_of(i) for i in (0, 1)] == [local, NO_ROPE] and NO_ROPE.kind == "none"
    assert [mixed.window_of(i) for i in (0, 1)] == [16, None]
