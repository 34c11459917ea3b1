"""Greedy answers to prompts, as a server would give them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dovetail.core.errors import RequestError
from dovetail.core.sampling import SamplingParams

if TYPE_CHECKING:
    from dovetail.llm import LLM
    from dovetail.outputs import CompletionOutput


@dataclass(frozen=True)
class Answers:
    """Answers in the order of their prompts, and the seconds that all of them took together."""

    outputs: list[CompletionOutput]
    seconds: float

    @property
    def facts(self) -> dict[str, Any]:
        """What a result says about the answers. `unfinished` counts those that the token limit cut off."""
        tokens = sum(len(o.token_ids) for o in self.outputs)
        return {
            "unfinished": sum(o.finish_reason == "length" for o in self.outputs),
            "tokens": tokens,
            "seconds": self.seconds,
            "tokens_per_s": tokens / self.seconds,
        }


def answer(llm: LLM, prompts: Sequence[list[int]], tokens: int, stop: Sequence[str] = ()) -> Answers:
    """Answer all prompts at once, each with at most `tokens` tokens. RequestError where one fails."""
    params = SamplingParams(temperature=0, max_tokens=tokens, stop=stop)
    start = time.perf_counter()
    outputs = llm.generate(list(prompts), params)
    seconds = time.perf_counter() - start
    for output in outputs:
        if output.error:
            raise RequestError(f"a prompt could not be answered: {output.error}")
    return Answers([o.outputs[0] for o in outputs], seconds)


def fitting(llm: LLM, prompt: list[int], tokens: int) -> list[int]:
    """`prompt` itself. RequestError if `tokens` more do not fit the context."""
    limit = llm.config.max_model_len
    if not prompt:
        raise RequestError("the prompt has no token")
    if len(prompt) + tokens > limit:
        raise RequestError(f"{len(prompt)} tokens of prompt and {tokens} of answer, but the context holds {limit}")
    return prompt
