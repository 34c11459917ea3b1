"""Which tensors a model has, under their Hugging Face names, and with which shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dovetail.core.errors import ModelError
from dovetail.core.model import ModelConfig

if TYPE_CHECKING:
    from dovetail.checkpoint.checkpoint import Checkpoint

_IGNORED_SUFFIX = ".rotary_emb.inv_freq"  # saved by old versions of transformers, recomputed from the config


def expected_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
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
        for name, shape in (
            ("gate_proj", (wide, hidden)),
            ("up_proj", (wide, hidden)),
            ("down_proj", (hidden, wide)),
        ):
            yield f"{prefix}mlp.{name}.weight", shape
            if config.mlp_bias:
                yield f"{prefix}mlp.{name}.bias", shape[:1]
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)


def validate(checkpoint: Checkpoint) -> None:
    """Compare the checkpoint's names and shapes with its config.

    ModelError for a tensor that is missing, has another shape than the config says, or has no place in the
    model.
    """
    present = set(checkpoint.names())
    for name, shape in expected_shapes(checkpoint.config):
        if name not in present:
            raise ModelError(f"{checkpoint.path}: tensor {name} is missing (the config asks for {list(shape)})")
        found = checkpoint.shape(name)
        if found != shape:
            raise ModelError(
                f"{checkpoint.path}: tensor {name} is {list(found)}, the config asks for {list(shape)}"
            )
        present.discard(name)
    extra = sorted(name for name in present if not name.endswith(_IGNORED_SUFFIX))
    if checkpoint.config.tie_word_embeddings and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")  # a second copy of the embedding
    if extra:
        listed = ", ".join(extra[:3]) + (f" and {len(extra) - 3} more" if len(extra) > 3 else "")
        raise ModelError(
            f"{checkpoint.path}: unexpected tensors for {checkpoint.config.architecture}: {listed}; "
            "loading the model without them would change its output"
        )
