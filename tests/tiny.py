"""Tiny random models in memory, and engines on them: no files, no tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dovetail.build import build_engine
from dovetail.config import Config
from dovetail.core.engine import Engine
from dovetail.core.model import ModelConfig
from dovetail.core.pages import PageTable
from dovetail.core.sampling import SamplingParams
from dovetail.core.technique import Technique, compose
from dovetail.core.types import Request
from dovetail.layers.embedding import Embedding
from dovetail.models import MODELS, facts
from dovetail.ops.stored import StoredTensor
from dovetail.techniques import technique

VOCAB = 61
# Techniques with options that have no default, by name.
NEEDED = {"draft": "draft:model=x", "self-draft": "self-draft:layers=1"}
FACTS = frozenset({"a slow tier", "rotary positions"})  # what is read does not depend on where it lies


def tiny_config(**changes: Any) -> ModelConfig:
    base: dict[str, Any] = dict(
        architecture="llama", vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=8, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    return ModelConfig(**(base | changes))


class TinyCheckpoint:
    """Random float32 weights, large enough that attention matters to the next token."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self.config = config
        self.architecture = MODELS[config.architecture]
        self.path = Path("tiny")
        self.generation_config: dict[str, Any] = {}
        self.bytes = 0
        self.files: tuple[Path, ...] = ()
        generator = torch.Generator().manual_seed(seed)
        c, q, kv = config, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        shapes = {"model.embed_tokens": (c.vocab_size, c.hidden_size), "model.norm": (c.hidden_size,)}
        for i in range(c.num_layers):
            p = f"model.layers.{i}"
            shapes |= {
                f"{p}.input_layernorm": (c.hidden_size,),
                f"{p}.post_attention_layernorm": (c.hidden_size,),
                f"{p}.self_attn.q_proj": (q, c.hidden_size),
                f"{p}.self_attn.k_proj": (kv, c.hidden_size),
                f"{p}.self_attn.v_proj": (kv, c.hidden_size),
                f"{p}.self_attn.o_proj": (c.hidden_size, q),
                f"{p}.mlp.gate_proj": (c.intermediate_size, c.hidden_size),
                f"{p}.mlp.up_proj": (c.intermediate_size, c.hidden_size),
                f"{p}.mlp.down_proj": (c.hidden_size, c.intermediate_size),
            }
        for name, shape in self.architecture.tensors(config):  # norms that some models have beside those
            shapes.setdefault(name.removesuffix(".weight"), shape)
        self._tensors = {}
        for name, shape in shapes.items():
            noise = torch.randn(shape, generator=generator)
            value = 1 + 0.1 * noise if len(shape) == 1 else noise * (2.0 / shape[-1] ** 0.5)
            self._tensors[f"{name}.weight"] = StoredTensor.of(f"{name}.weight", value.numpy())

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def format(self, name: str) -> str:
        return self._tensors[name].format

    def tensor(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def tokenizer(self) -> Any:
        """Just enough to compare vocabularies."""
        return SimpleNamespace(backend=SimpleNamespace(id_to_token=str))

    def release(self, name: str) -> None:
        """The tensors lie in memory of their own."""

    def put(self, tensor: StoredTensor) -> None:
        """Add a tensor, or take it in the place of the one with its name."""
        self._tensors[tensor.name] = tensor


CHECKPOINT = TinyCheckpoint(tiny_config())
OFFERED = frozenset(
    {"a slow tier", "weights that are not quantized"}
)  # what techniques may need besides the model; their definitions need none of it


def tiny_engine(
    *use: str | Technique,
    checkpoint: TinyCheckpoint = CHECKPOINT,
    pages: int = 64,
    page_size: int = 4,
    **changes: Any,
) -> Engine:
    """An engine in float64 on the reference ops, unless `changes` say otherwise."""
    parts = [technique(u) if isinstance(u, str) else u for u in use]
    composition = compose(*parts, facts=facts(checkpoint.config) | OFFERED)
    base: dict[str, Any] = dict(
        model="tiny", architecture="llama", use=(), dtype="float64", device="cpu", threads=1,
        kernels="torch", activations="exact", kv_cache_dtype="float64", kv_memory=0, block_size=page_size,
        num_kv_pages=pages,
        max_model_len=pages * page_size, max_num_batched_tokens=64, max_num_seqs=8, enable_prefix_caching=True,
        seed=0,
    )  # fmt: skip
    engine = build_engine(checkpoint, Config(**(base | changes)), composition, calibration)
    torch.set_num_threads(1)  # `threads` are the kernels'; on a busy machine two of torch wait for each other
    return engine


def calibration(file: str) -> list[int]:
    """Tokens for techniques that measure the model."""
    return [i * i * 7 % 41 for i in range(96)]


def break_token(engine: Engine, token: int) -> None:
    """Make a token's embedding NaN. The head keeps its own copy of the weights."""
    model = engine.executor.model  # type: ignore[attr-defined]
    weight = model.embedding.stored.values().copy()
    weight[token] = float("nan")
    model.embedding = Embedding(StoredTensor.of("broken", weight), model.embedding.kind)


def make_request(engine: Engine, name: str, prompt: Sequence[int], params: SamplingParams, **more: Any) -> Request:
    total = len(prompt) + (params.max_tokens or 16)
    return Request(
        name, list(prompt), params, PageTable(engine.pool), max_total=total, seed=params.seed or 0,
        stop_ids=frozenset(params.stop_token_ids or ()), **more,
    )  # fmt: skip


def run_all(engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[int]]:
    """Outputs of prompts submitted together, with the pool checked after every step."""
    requests = [make_request(engine, f"r{i}", p, params) for i, p in enumerate(prompts)]
    for r in requests:
        engine.add(r)
    finish(engine)
    return [r.output for r in requests]


def run_staggered(engine: Engine, requests: Sequence[Request], arrivals: Sequence[int]) -> None:
    """Each request joins at its step, or when the engine has nothing else to do; the pool is checked each step."""
    waiting = sorted(zip(arrivals, range(len(requests)), strict=False))
    for step in range(5000):
        while waiting and (waiting[0][0] <= step or not engine.busy):
            engine.add(requests[waiting.pop(0)[1]])
        if not engine.busy:
            return
        engine.step()
        engine.check()
    raise AssertionError("not finished after 5000 steps")


def finish(engine: Engine, limit: int = 5000) -> None:
    for _ in range(limit):
        if not engine.busy:
            break
        engine.step()
        engine.check()
    else:
        raise AssertionError(f"not finished after {limit} steps")
