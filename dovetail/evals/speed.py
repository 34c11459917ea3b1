"""How fast the engine that was measured decodes: quality and speed of one engine, side by side."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from dovetail.bench.engine.points import Prompts, measure

if TYPE_CHECKING:
    from dovetail.llm import LLM

TOKENS, PARTS = 16, 4  # of an answer, in parts that are timed apart


def decode_speed(llm: LLM, context: int) -> dict[str, Any]:
    """Decoding of one request behind `context` random tokens, or as many as the engine holds: the median, the
    lowest and the highest rate of its parts. Nothing where the context leaves no room."""
    tokens = TOKENS * PARTS + 1
    context = min(context, llm.config.max_model_len - tokens)
    if context < 1:
        return {}
    prompts = Prompts(llm.checkpoint.config.vocab_size).take(context)
    measure(llm, [prompts[0][: min(context, 64)]], 8)  # first calls allocate
    waits = measure(llm, prompts, tokens).waits
    rates = [TOKENS / sum(waits[i * TOKENS : (i + 1) * TOKENS]) for i in range(PARTS)]
    return {
        "decode_tokens_per_s": statistics.median(rates),
        "decode_spread": [min(rates), max(rates)],
        "decode_context": context,
    }
