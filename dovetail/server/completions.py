"""/v1/completions: prompts in, texts or chunks out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dovetail.outputs import Answer, Delta
from dovetail.server.bodies import completion_body, shown_tokens, text_choice
from dovetail.server.generation import Generation
from dovetail.server.logprobs import CompletionLogprobs
from dovetail.server.protocol import CompletionRequest
from dovetail.server.service import Service


class Completion(Generation[CompletionRequest]):
    """One completions request."""

    fields = CompletionRequest
    prefix = "cmpl"
    chunk = "text_completion"
    nothing = {"index": 0, "text": "", "logprobs": None, "finish_reason": None}  # noqa: RUF012

    def __init__(self, service: Service) -> None:
        super().__init__(service)
        self._builders: dict[int, CompletionLogprobs] = {}  # of each choice

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        return completion_body(self.request, answers, self.tokenizer)

    def count(self, delta: Delta) -> int:
        return shown_tokens(self.request, delta)

    def parts(self, delta: Delta) -> list[dict[str, Any]]:
        builder = self._builders.get(delta.choice)
        if builder is None:
            skipped = delta.stream.detokenizer.skipped
            builder = self._builders[delta.choice] = CompletionLogprobs(self.tokenizer, skipped)
        return [text_choice(self.request, delta, builder)]
