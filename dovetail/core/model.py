"""What a checkpoint says about its model, in one vocabulary for every file format."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding. `kind`: default, linear, dynamic, llama3 or yarn, as in HF `rope_scaling`.

    `parameters` holds the scaling's own numbers under their HF names (factor, low_freq_factor, ...).
    `kind` "factors" (GGUF's rope_freqs tensor): inverse frequency i is theta^(-2i / head_dim) / `factors[i]`,
    head_dim / 2 of them; `factors` is empty for every other kind.
    """

    theta: float = 10000.0
    kind: str = "default"
    parameters: dict[str, float] = field(default_factory=dict)
    factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """Geometry and constants of a decoder-only transformer. Names follow HF config.json."""

    architecture: str  # llama | mistral | qwen2 | qwen3
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
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    hidden_act: str = "silu"
    sliding_windows: tuple[int | None, ...] = ()  # one per layer; None reads everything; () means all None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
