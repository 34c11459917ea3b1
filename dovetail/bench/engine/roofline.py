"""The least time of a decode step: the bytes that it reads at the speed at which the machine reads memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dovetail.core.cost import Load, Operation, Speeds, StepTime, total
from dovetail.layers.loader import Recoding
from dovetail.runtime.ledger import DEVICE, recorded

if TYPE_CHECKING:
    from dovetail.llm import LLM

# Whoever fills one of these decides which weights, or how much of the KV, a step reads.
READERS = frozenset(("selector", "codec", "residency", "rows", "format", "executor"))


def uncounted(llm: LLM) -> str | None:
    """Why `step_bytes` does not hold for an engine, or None."""
    if llm.config.device != "cpu":
        return f"the model is in the memory of {llm.config.device}, whose bandwidth is not measured"
    if llm.config.slow_tier:
        return "the slow tier decides what is read, and that is not counted"
    # New codes of weights are packed like those of a file, and counted as they are kept.
    readers = READERS - {"format"} if isinstance(llm.engine.seams.format, Recoding) else READERS
    if names := [t.name for t in llm.techniques if readers & set(t.fills)]:
        return f"{', '.join(names)} decides what is read, and that is not counted"
    return None


def step_bytes(llm: LLM, context: int, streams: int = 1) -> float:
    """Bytes that a decode step of `streams` requests moves, each behind `context` tokens: the program's sum.

    Nearly all are the weights of products, as they are kept (`weights_kept`), and K and V of the context.
    """
    return total(operations(llm), Load(((1, context),) * streams, streams)).all_bytes


def step_seconds(llm: LLM, context: int, bandwidth: float, streams: int = 1) -> float:
    """The least time of that step in seconds, at `bandwidth` in bytes per second."""
    step = StepTime(operations(llm), Speeds(None, {DEVICE: bandwidth}))
    return step(Load(((1, context),) * streams, streams))


def weights_kept(llm: LLM) -> str:
    """How the counted weights lie in memory."""
    return "packed" if all(o.native for o in _products(llm)) else "expanded for the torch reference"


def weight_bytes(llm: LLM) -> int:
    """Bytes of the weights of all products of a step."""
    return int(total(_products(llm), Load(((1, 0),), 1)).all_bytes)


def operations(llm: LLM) -> Sequence[Operation]:
    """What a step of the model does, whichever executor runs it, without what techniques add."""
    executor: Any = llm.engine.executor
    return recorded(executor.model, executor.kv).operations


def _products(llm: LLM) -> list[Operation]:
    return [o for o in operations(llm) if o.name == "linear"]
