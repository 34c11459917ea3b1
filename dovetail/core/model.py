"""What a checkpoint says about its model, in one vocabulary for every file format and architecture."""

from __future__ import annotations

from dataclasses import dataclass, field

# Stored formats without blocks, and the types of their values.
PLAIN_FORMATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")  # of gated MLPs


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding. `kind`: default, linear, dynamic, llama3 or yarn, as in HF `rope_scaling`.

    `parameters` holds the scaling's own numbers under their HF names (factor, low_freq_factor, ...).
    `kind` "factors" (GGUF's rope_freqs tensor): inverse frequency i is theta^(-2i / head_dim) / `factors[i]`,
    head_dim / 2 of them; `factors` is empty for every other kind. `kind` "none": nothing is rotated.
    """

    theta: float = 10000.0
    kind: str = "default"
    parameters: dict[str, float] = field(default_factory=dict)
    factors: tuple[float, ...] = ()


NO_ROPE = RopeConfig(kind="none")


@dataclass(frozen=True)
class ModelConfig:
    """Geometry and constants of a decoder-only transformer. Names follow HF config.json.

    What may differ by layer is a tuple with one entry per layer, or () where all are alike: ask `rope_of` and
    `window_of`.

    query_scale: what scores q . k are multiplied by; None means head_dim^-0.5. embedding_scale: what a row of the
    embedding is multiplied by, after it was rounded to the model's type. post_norms: there is also a norm behind
    attention and behind the MLP, before their results are added. wide_norms: a norm is rounded once, behind the
    product with its weight; else the row is rounded before it.
    """

    architecture: str  # the name of its record in `models.MODELS`
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    layer_ropes: tuple[RopeConfig, ...] = ()  # () means `rope` in all
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    wide_norms: bool = False
    query_scale: float | None = None
    embedding_scale: float = 1.0
    hidden_act: str = "silu"  # of `ACTIVATIONS`
    sliding_windows: tuple[int | None, ...] = ()  # None reads everything; () means all None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def rope_of(self, layer: int) -> RopeConfig:
        """How queries and keys of `layer` are rotated; kind "none" where they are not."""
        return self.layer_ropes[layer] if self.layer_ropes else self.rope

    def window_of(self, layer: int) -> int | None:
        """How many tokens a row of `layer` reads, its own included; None for all."""
        return self.sliding_windows[layer] if self.sliding_windows else None
