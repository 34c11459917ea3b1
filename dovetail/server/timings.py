"""How long a request's parts took, in llama.cpp's shapes: `timings` of a reply, `prompt_progress` of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dovetail.outputs import Answer


def timings(answers: Sequence[Answer]) -> dict[str, Any]:
    """Tokens and milliseconds of the prompts and of the answers. Answers that ran together count by the wall.

    The prompts take until the first token, the answers from there to the last one. Waiting in the queue is not
    counted.
    """
    streams = [s for a in answers for s in a.streams]
    prompt = sum(len(a.prompt_token_ids) for a in answers)
    cached = sum(max(0, a.streams[0].request.cached_tokens) for a in answers)
    predicted = sum(len(s.token_ids) for s in streams)
    began = min((s.request.started for s in streams if s.request.started is not None), default=0.0)
    first = min((s.first_token for s in streams if s.first_token is not None), default=began)
    last = max((s.last_token for s in streams if s.last_token is not None), default=first)
    return {
        "cache_n": cached,
        **_rate("prompt", prompt - cached, 1000 * (first - began)),
        **_rate("predicted", predicted, 1000 * (last - first)),
    }


def _rate(what: str, count: int, ms: float) -> dict[str, Any]:
    return {
        f"{what}_n": count,
        f"{what}_ms": round(ms, 3),
        f"{what}_per_token_ms": round(ms / count, 3) if count else 0.0,
        f"{what}_per_second": round(1000 * count / ms, 3) if ms > 0 else 0.0,
    }


class PromptProgress:
    """How many tokens of the prompts are computed. The engine's thread counts on meanwhile.

    arrival: when the request came, by the session's clock.
    """

    def __init__(self, answers: Sequence[Answer], arrival: float) -> None:
        self._requests = [a.streams[0].request for a in answers]
        self._total = sum(len(r.prompt) for r in self._requests)
        self._arrival = arrival
        self._processed = -1

    def news(self, now: float) -> dict[str, Any] | None:
        """The state at `now`; None if it has not changed."""
        processed = sum(min(r.computed, len(r.prompt)) for r in self._requests)
        if processed <= self._processed:  # a request that starts over computes again what it had
            return None
        self._processed = processed
        cached = sum(max(0, r.cached_tokens) for r in self._requests)
        spent = round(1000 * (now - self._arrival))
        return {"total": self._total, "cache": cached, "processed": processed, "time_ms": spent}
