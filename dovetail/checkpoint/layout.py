"""Which tensors a decoder has, under their Hugging Face names, with which shapes, and what GGUF calls them."""

from __future__ import annotations

from collections.abc import Iterator

from dovetail.core.model import ModelConfig

TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK_NAMES = {  # GGUF -> Hugging Face, of one layer
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORM_SUFFIX = "norm.weight"  # of the weights of all norms


def decoder_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor, embedding first, in the order a forward pass needs them."""
    hidden, wide = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            yield f"{prefix}self_attn.{name}.weight", (rows, hidden)
            if config.qkv_bias:
                yield f"{prefix}self_attn.{name}.bias", (rows,)
        if config.qk_norm:
            yield prefix + "self_attn.q_norm.weight", (config.head_dim,)
            yield prefix + "self_attn.k_norm.weight", (config.head_dim,)
        yield prefix + "self_attn.o_proj.weight", (hidden, queries)
        if config.o_bias:
            yield prefix + "self_attn.o_proj.bias", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        if config.post_norms:
            yield prefix + "pre_feedforward_layernorm.weight", (hidden,)
        for name, shape in (
            ("gate_proj", (wide, hidden)),
            ("up_proj", (wide, hidden)),
            ("down_proj", (hidden, wide)),
        ):
            yield f"{prefix}mlp.{name}.weight", shape
            if config.mlp_bias:
                yield f"{prefix}mlp.{name}.bias", shape[:1]
        if config.post_norms:
            yield prefix + "post_feedforward_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)
