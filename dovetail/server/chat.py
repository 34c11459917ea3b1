"""/v1/chat/completions: a conversation in, messages or chunks out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dovetail.outputs import Answer, Delta
from dovetail.server.bodies import chat_body
from dovetail.server.generation import Generation
from dovetail.server.logprobs import chat_logprobs
from dovetail.server.protocol import ChatRequest
from dovetail.server.service import Service


class Chat(Generation[ChatRequest]):
    """One chat request. The first event of a choice says its role."""

    fields = ChatRequest
    prefix = "chatcmpl"
    chunk = "chat.completion.chunk"

    def __init__(self, service: Service) -> None:
        super().__init__(service)
        self._begun: set[int] = set()

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        return chat_body(self.request, answers, self.tokenizer)

    def count(self, delta: Delta) -> int:
        return len(delta.token_ids)

    def parts(self, delta: Delta) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        if delta.choice not in self._begun:
            self._begun.add(delta.choice)
            role = {"role": "assistant", "content": ""}
            found.append({"index": delta.choice, "delta": role, "logprobs": None, "finish_reason": None})
        part = {
            "index": delta.choice,
            "delta": {"content": delta.text},
            "logprobs": chat_logprobs(delta.logprobs, self.tokenizer) if self.request.logprobs else None,
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            part["stop_reason"] = delta.stop_reason
        return [*found, part]
