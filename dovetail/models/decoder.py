"""The program of decoders: norm, attention, residual, norm, gated MLP, residual.

Decoders differ in facts that a checkpoint states (`core.model.ModelConfig`): biases, norms of queries and keys,
norms behind attention and MLP, the rotation and window of each layer, scales. So one block serves all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from dovetail.core.errors import ConfigError
from dovetail.core.model import ModelConfig
from dovetail.core.seams import Geometry, RowFilter, SlidingWindow, Variant
from dovetail.host.lazy_torch import torch
from dovetail.layers.attention import Attention
from dovetail.layers.linear import Linear
from dovetail.layers.loader import Loader
from dovetail.layers.mlp import MLP
from dovetail.layers.norm import normed
from dovetail.ops.rope import Rope
from dovetail.runtime.batch import Batch, kept_rows
from dovetail.runtime.kv import KV
from dovetail.runtime.target import Fused, Target

if TYPE_CHECKING:
    from torch import Tensor


class Stage(Protocol):
    """A callable of the program: hidden rows [rows, width] to hidden rows, and the rows' batch."""

    def __call__(self, hidden: Tensor, batch: Batch, kv: KV) -> Tensor: ...


class Block:
    """One layer."""

    def __init__(self, load: Loader, index: int, rope: Rope, variant: Variant) -> None:
        prefix, post = f"model.layers.{index}", load.config.post_norms
        self.attention = Attention(load, f"{prefix}.self_attn", rope, variant)
        self.attention_norm = load.norm(f"{prefix}.input_layernorm")
        self.attention_post = load.norm(f"{prefix}.post_attention_layernorm") if post else None
        before = "pre_feedforward_layernorm" if post else "post_attention_layernorm"
        self.mlp = MLP(load, f"{prefix}.mlp")
        self.mlp_norm = load.norm(f"{prefix}.{before}")
        self.mlp_post = load.norm(f"{prefix}.post_feedforward_layernorm") if post else None

    def __call__(self, x: Tensor, layer: int, batch: Batch, kv: KV) -> Tensor:
        x = x + normed(self.attention(self.attention_norm(x), layer, batch, kv), self.attention_post)
        return x + normed(self.mlp(self.mlp_norm(x)), self.mlp_post)

    def record(self, to: Target, layer: int) -> None:
        self.attention.record(to, layer, self.attention_norm, self.attention_post)
        self.mlp.record(to, self.mlp_norm, self.mlp_post)


def one_block(load: Loader, index: int) -> Block:
    """Layer `index` by itself."""
    c = load.config
    window = c.window_of(index)
    return Block(
        load, index, Rope(c.rope_of(index), c.head_dim), Variant() if window is None else SlidingWindow(window)
    )


class Blocks:
    """A run of layers: one callable of the program. A row that a filter drops keeps its hidden state."""

    def __init__(self, blocks: list[Block], rows: RowFilter) -> None:
        self.blocks = blocks
        self.rows = rows
        # A cut behind the last layer would save nothing.
        if wrong := [cut for cut in rows.cuts if not 0 <= cut < len(blocks)]:
            raise ConfigError(f"there is no layer {wrong[0]} to cut behind: the layers are 0 to {len(blocks) - 1}")
        self.cuts = frozenset(rows.cuts) - {len(blocks) - 1}  # behind the last nothing is saved

    def __call__(self, hidden: Tensor, batch: Batch, kv: KV) -> Tensor:
        last = len(self.blocks) - 1
        done: list[tuple[Tensor, Tensor]] = []
        index = torch.arange(len(hidden), device=hidden.device)
        for i, block in enumerate(self.blocks):
            if i < last:
                kv.ahead(i + 1, hidden, batch)
            hidden = block(hidden, i, batch, kv)
            kept = kept_rows(self.rows.keep(i, hidden, batch), len(hidden)) if i in self.cuts else None
            if kept is not None:
                keep = torch.from_numpy(kept).to(hidden.device)
                done.append((index, hidden))
                index, hidden, batch = index[keep], hidden[keep], batch.take(keep)
        for rows, earlier in reversed(done):
            at = torch.searchsorted(rows, index)
            hidden = earlier.index_copy(0, at, hidden)
            index = rows
        return hidden

    def record(self, to: Target, cut: Callable[[int], None]) -> None:
        """Record all layers. `cut` is called with each layer after which rows may be dropped."""
        for i, block in enumerate(self.blocks):
            to.layer = i
            block.record(to, i)
            if i in self.cuts:
                cut(i)
        to.layer = -1


class Decoder:
    """Embedding, program, head. `program` is a list of callables; tied models repeat one."""

    def __init__(self, load: Loader, rows: RowFilter, variant: Variant) -> None:
        c = load.config
        self.config = c
        self.geometry = geometry(c)
        ropes, variants = _ropes(c), _variants(c, variant)
        self.embedding = load.embedding("model.embed_tokens")
        blocks = [Block(load, i, ropes[i], variants[i]) for i in range(c.num_layers)]
        self.program: list[Stage] = [Blocks(blocks, rows)]
        self.norm = load.norm("model.norm")
        self.head = load.linear("model.embed_tokens" if c.tie_word_embeddings else "lm_head")

    def trim_head(self, head: Linear, count: int) -> None:
        """From now on compute logits of `count` tokens only, by a head that has their rows."""
        self.head, self.config = head, replace(self.config, vocab_size=count)

    def blocks(self) -> list[Block]:
        """Every layer of every stage, in order."""
        return [b for stage in self.program if isinstance(stage, Blocks) for b in stage.blocks]

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [rows] -> [rows, width]."""
        return self.embedding(tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, width] -> [rows, vocabulary] in float32, or float64 for a float64 model."""
        out = self.head(self.norm(hidden))
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def record_start(self, to: Target) -> None:
        """Record what comes before every stage: hidden rows from tokens, and angles."""
        self.embedding.record(to)
        for rope in (block.attention.rope for block in self.blocks()):
            if rope.rotates:
                to.angles(rope)

    def record_head(self, to: Target) -> int:
        """Record the head. Returns the slot of logits of the rows to sample from."""
        logits = to.slot("logits", self.config.vocab_size, sampled=True)
        self.head.record(to, to.x, logits, Fused(norm=self.norm, sampled=True))
        return logits


def _ropes(c: ModelConfig) -> list[Rope]:
    """Of each layer. Layers that rotate alike share one, and so the angles of a batch."""
    made: dict[str, Rope] = {}
    found = []
    for layer in range(c.num_layers):
        rope = c.rope_of(layer)
        if repr(rope) not in made:
            made[repr(rope)] = Rope(rope, c.head_dim)
        found.append(made[repr(rope)])
    return found


def _variants(c: ModelConfig, variant: Variant) -> list[Variant]:
    """Of each layer: its window over what the engine's variant allows."""
    windows = [c.window_of(layer) for layer in range(c.num_layers)]
    made = {w: variant if w is None else SlidingWindow(w, variant) for w in windows}
    return [made[w] for w in windows]


def facts(c: ModelConfig) -> frozenset[str]:
    """The facts that this model offers to techniques."""
    found = {f"{c.architecture} architecture"}
    if any(c.rope_of(layer).kind != "none" for layer in range(c.num_layers)):
        found.add("rotary positions")
    if any(w is not None for w in c.sliding_windows):
        found.add("sliding-window layers")
    if c.num_heads > c.num_kv_heads:
        found.add("grouped-query attention")
    if c.qk_norm:
        found.add("normalised queries and keys")
    return frozenset(found)


def geometry(c: ModelConfig) -> Geometry:
    """The shape of the model, as far as core and techniques may know it."""
    sliding = tuple(i for i, w in enumerate(c.sliding_windows) if w is not None)
    return Geometry(c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim, c.vocab_size, sliding)
