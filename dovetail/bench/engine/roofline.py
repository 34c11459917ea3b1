"""The least time of a decode step: the bytes that it reads at the speed at which the machine reads memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dovetail.layers.linear import DenseLinear
from dovetail.layers.packed import PackedLinear
from dovetail.runtime.native import NativeExecutor

if TYPE_CHECKING:
    from dovetail.llm import LLM

# Whoever fills one of these decides which weights, or how much of the KV, a step reads.
READERS = frozenset(("selector", "codec", "residency", "rows", "format", "experts", "executor"))


def uncounted(llm: LLM) -> str | None:
    """Why `step_bytes` does not hold for an engine, or None."""
    if llm.config.device != "cpu":
        return f"the model is in the memory of {llm.config.device}, whose bandwidth is not measured"
    if llm.config.slow_tier:
        return "the slow tier decides what is read, and that is not counted"
    if names := [t.name for t in llm.techniques if READERS & set(t.fills)]:
        return f"{', '.join(names)} decides what is read, and that is not counted"
    return None


def step_bytes(llm: LLM, context: float) -> float:
    """Bytes that a decode step of one request with `context` tokens reads.

    All weights of products, as they are kept (`weights_kept`), and K and V of the context.
    """
    config = llm.config
    return weight_bytes(llm) + context * config.kv_memory / (config.num_kv_pages * config.block_size)


def weights_kept(llm: LLM) -> str:
    """How the counted weights lie in memory."""
    packed = all(isinstance(layer, PackedLinear) for layer in _products(_model(llm)))
    return "packed" if packed else "expanded for the torch reference"


def weight_bytes(llm: LLM) -> int:
    """Bytes of the weights of all products of a step."""
    executor: Any = llm.engine.executor
    if isinstance(executor, NativeExecutor):
        return executor.recorder.weight_bytes
    return sum(map(_bytes, _products(_model(llm))))


def _model(llm: LLM) -> Any:
    executor: Any = llm.engine.executor
    return executor.model


def _products(model: Any) -> Iterator[PackedLinear | DenseLinear]:
    for block in model.blocks():
        for layer in (*vars(block).values(), *vars(block.attention).values()):
            if isinstance(layer, (PackedLinear, DenseLinear)):
                yield layer
    yield model.head


def _bytes(layer: PackedLinear | DenseLinear) -> int:
    if isinstance(layer, PackedLinear):
        return sum(part.bytes for part in layer.parts)
    return layer.weight.nbytes
