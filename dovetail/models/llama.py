"""The Llama family: Llama 1 to 3, SmolLM2, Mistral, Qwen2 and Qwen3.

They differ in facts that a checkpoint states (biases, a norm on queries and keys, sliding windows, rope
scaling), so one block serves all of them: norm, attention, residual, norm, gated MLP, residual.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from dovetail.checkpoint import Checkpoint
from dovetail.checkpoint.architecture import Architecture
from dovetail.checkpoint.fields import Fields, Keys
from dovetail.checkpoint.gguf_config import decoder_config as gguf_config
from dovetail.checkpoint.gguf_config import window_in_all_layers
from dovetail.checkpoint.hf_config import Defaults, decoder_config, decoder_json
from dovetail.core.errors import ModelError
from dovetail.core.model import ModelConfig
from dovetail.core.seams import EVERY_ROW, Format, Geometry, RowFilter, SlidingWindow, Variant
from dovetail.layers.embedding import Embedding, StoredEmbedding
from dovetail.layers.linear import Linear, Unrecorded
from dovetail.layers.norm import Norm
from dovetail.ops.rope import Rope, rotate
from dovetail.runtime.batch import Batch
from dovetail.runtime.kv import KV
from dovetail.runtime.target import Fused, Target, Turning

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}


class Stage(Protocol):
    """A callable of the program: hidden rows [rows, width] to hidden rows, and the rows' batch."""

    def __call__(self, hidden: Tensor, batch: Batch, kv: KV) -> Tensor: ...


class Loader:
    """Reads one layer's weights through the Format seam."""

    def __init__(self, checkpoint: Checkpoint, fmt: Format, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.format = fmt
        self.dtype = dtype
        self.device = device

    def tensor(self, name: str) -> Tensor:
        return self.checkpoint.tensor(name).dequantize(self.dtype).to(self.device)

    def embedding(self, name: str) -> Embedding | StoredEmbedding:
        """On a CPU rows are expanded as they are looked up."""
        if self.device.type == "cpu":
            return StoredEmbedding(self.checkpoint.tensor(f"{name}.weight"), self.dtype)
        return Embedding(self.tensor(f"{name}.weight"))

    def norm(self, name: str) -> Norm:
        return Norm(self.tensor(f"{name}.weight"), self.checkpoint.config.rms_norm_eps)

    def linear(self, *names: str, bias: bool = False) -> Linear:
        read = self.checkpoint.tensor
        layer: Any = self.format.linear(
            [read(f"{n}.weight") for n in names], [read(f"{n}.bias") for n in names] if bias else []
        )
        return layer if hasattr(layer, "record") else Unrecorded(layer)


class Attention:
    """Grouped-query attention with rotary positions."""

    def __init__(self, load: Loader, prefix: str, rope: Rope, variant: Variant) -> None:
        c = load.checkpoint.config
        self.sizes = [c.num_heads * c.head_dim, *[c.num_kv_heads * c.head_dim] * 2]
        self.head_dim = c.head_dim
        self.rope = rope
        self.variant = variant
        self.qkv = load.linear(*(f"{prefix}.{n}_proj" for n in "qkv"), bias=c.qkv_bias)
        self.o = load.linear(f"{prefix}.o_proj", bias=c.o_bias)
        self.q_norm = load.norm(f"{prefix}.q_norm") if c.qk_norm else None
        self.k_norm = load.norm(f"{prefix}.k_norm") if c.qk_norm else None

    def __call__(self, x: Tensor, layer: int, batch: Batch, kv: KV) -> Tensor:
        q, k, v = (t.unflatten(1, (-1, self.head_dim)) for t in self.qkv(x).split(self.sizes, dim=-1))
        angles = batch.once(self.rope, lambda: self.rope.angles(batch.positions, x.dtype))
        q, k = rotate(_normed(q, self.q_norm), angles), rotate(_normed(k, self.k_norm), angles)
        kv.write(layer, k, v, batch)
        return self.o(kv.attend(layer, q, batch, self.variant).flatten(1))

    @property
    def turning(self) -> Turning:
        """How queries and keys are prepared."""
        return Turning(self.rope, self.q_norm, self.k_norm, self.head_dim**-0.5)

    def record(self, to: Target, norm: Norm, layer: int) -> None:
        """The same, and the residual, on the program's buffers."""
        qkv = to.slot("qkv", sum(self.sizes))
        self.qkv.record(to, to.x, qkv, Fused(norm=norm))
        to.rope(qkv, layer, self.turning)
        to.attend(layer, self.variant)
        self.o.record(to, to.attended, to.x, Fused(add=True))


def _normed(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else norm(x)


class Block:
    """One layer."""

    def __init__(self, load: Loader, index: int, rope: Rope, variant: Variant) -> None:
        prefix = f"model.layers.{index}"
        c = load.checkpoint.config
        self.attention = Attention(load, f"{prefix}.self_attn", rope, variant)
        self.attention_norm = load.norm(f"{prefix}.input_layernorm")
        self.mlp_norm = load.norm(f"{prefix}.post_attention_layernorm")
        self.gate_up = load.linear(f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj", bias=c.mlp_bias)
        self.down = load.linear(f"{prefix}.mlp.down_proj", bias=c.mlp_bias)
        self.activation = FUNCTIONS[c.hidden_act]
        self.gate, self.width = c.hidden_act, c.intermediate_size

    def __call__(self, x: Tensor, layer: int, batch: Batch, kv: KV) -> Tensor:
        x = x + self.attention(self.attention_norm(x), layer, batch, kv)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(self.activation(gate) * up)

    def record(self, to: Target, layer: int) -> None:
        self.attention.record(to, self.attention_norm, layer)
        gated = to.slot("gated", self.width)
        self.gate_up.record(to, to.x, gated, Fused(norm=self.mlp_norm, gate=self.gate))
        self.down.record(to, gated, to.x, Fused(add=True))


class Blocks:
    """A run of layers: one callable of the program. A row that a filter drops keeps its hidden state."""

    def __init__(self, blocks: list[Block], rows: RowFilter) -> None:
        self.blocks = blocks
        self.rows = rows
        self.cuts = frozenset(rows.cuts).intersection(range(len(blocks) - 1))  # behind the last nothing is saved

    def __call__(self, hidden: Tensor, batch: Batch, kv: KV) -> Tensor:
        last = len(self.blocks) - 1
        done: list[tuple[Tensor, Tensor]] = []
        index = torch.arange(len(hidden), device=hidden.device)
        for i, block in enumerate(self.blocks):
            if i < last:
                kv.ahead(i + 1, hidden, batch)
            hidden = block(hidden, i, batch, kv)
            keep: Any = self.rows.keep(i, hidden, batch) if i in self.cuts else EVERY_ROW
            if keep is not EVERY_ROW:
                done.append((index, hidden))
                index, hidden, batch = index[keep], hidden[keep], batch.take(keep)
        for rows, earlier in reversed(done):
            at = torch.searchsorted(rows, index)
            hidden = earlier.index_copy(0, at, hidden)
            index = rows
        return hidden

    def record(self, to: Target, cut: Callable[[int], None]) -> None:
        """All layers; `cut` is told of each layer after which rows may be dropped."""
        for i, block in enumerate(self.blocks):
            to.layer = i
            block.record(to, i)
            if i in self.cuts:
                cut(i)
        to.layer = -1


class Llama:
    """Embedding, program, head. `program` is a list of callables; tied models repeat one."""

    def __init__(self, load: Loader, rows: RowFilter, variant: Variant) -> None:
        c = load.checkpoint.config
        self.config = c
        self.geometry = geometry(c)
        rope = Rope(c.rope, c.head_dim, load.device)
        windows = [c.window_of(i) for i in range(c.num_layers)]
        variants = [variant if w is None else SlidingWindow(w, variant) for w in windows]
        self.embedding = load.embedding("model.embed_tokens")
        blocks = [Block(load, i, rope, variants[i]) for i in range(c.num_layers)]
        self.program: list[Stage] = [Blocks(blocks, rows)]
        self.norm = load.norm("model.norm")
        self.head = load.linear("model.embed_tokens" if c.tie_word_embeddings else "lm_head")

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
        """What comes before every stage: hidden rows from tokens, and angles."""
        self.embedding.record(to)
        for block in self.blocks():
            to.angles(block.attention.rope)

    def record_head(self, to: Target) -> int:
        """The buffer of logits of the rows to sample from."""
        logits = to.slot("logits", self.config.vocab_size, sampled=True)
        self.head.record(to, to.x, logits, Fused(norm=self.norm, sampled=True))
        return logits


def facts(c: ModelConfig) -> frozenset[str]:
    """What a technique may need, or exclude, of a model."""
    found = {f"{c.architecture} architecture", "rotary positions"}
    if any(w is not None for w in c.sliding_windows):
        found.add("sliding-window layers")
    if c.num_heads > c.num_kv_heads:
        found.add("grouped-query attention")
    if c.qk_norm:
        found.add("normalised queries and keys")
    return frozenset(found)


def geometry(c: ModelConfig) -> Geometry:
    """What core and techniques may know of the model."""
    sliding = tuple(i for i, w in enumerate(c.sliding_windows) if w is not None)
    return Geometry(c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim, c.vocab_size, sliding)


DEFAULTS = Defaults(max_positions=2048)


def _from_hf(fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias")
    config = decoder_config(fields, "llama", DEFAULTS)
    return replace(config, qkv_bias=bias, o_bias=bias, mlp_bias=fields.flag("mlp_bias"))


def _from_gguf(keys: Keys) -> ModelConfig:
    """Files of other models that are Llama but for a window say so by a key."""
    config = gguf_config(keys)
    return replace(config, sliding_windows=window_in_all_layers(keys, config.num_layers))


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    if config.sliding_windows:
        raise ModelError("Llama's config.json has no sliding window, so this model cannot be exported")
    return decoder_json(config) | {"attention_bias": config.o_bias, "mlp_bias": config.mlp_bias}


LLAMA = Architecture("llama", "LlamaForCausalLM", _from_hf, _from_gguf, _to_hf, program=Llama, interleaved=True)
