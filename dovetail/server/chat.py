"""/v1/chat/completions: a conversation in, messages or chunks out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dovetail.outputs import Answer, Delta
from dovetail.server.bodies import chat_body, chat_finish, chat_parser
from dovetail.server.generation import Generation
from dovetail.server.logprobs import chat_logprobs
from dovetail.server.protocol import ChatRequest
from dovetail.server.service import Service
from dovetail.tools.message import delta
from dovetail.tools.parser import Parser


class Chat(Generation[ChatRequest]):
    """One chat request. The first event of a choice says its role."""

    fields = ChatRequest
    prefix = "chatcmpl"
    chunk = "chat.completion.chunk"
    nothing = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": None}  # noqa: RUF012

    def __init__(self, service: Service) -> None:
        super().__init__(service)
        self._parsers: dict[int, Parser] = {}  # of each choice that has begun

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        return chat_body(self.request, answers, self.tokenizer)

    def count(self, delta: Delta) -> int:
        return len(delta.token_ids)

    def parts(self, gained: Delta) -> list[dict[str, Any]]:
        choice, ended = gained.choice, gained.finish_reason is not None
        found: list[dict[str, Any]] = []
        if choice not in self._parsers:
            self._parsers[choice] = chat_parser(gained)
            found.append(_part(choice, {"role": "assistant", "content": ""}))
        parser = self._parsers[choice]
        parts = [_part(choice, delta(p)) for p in parser.push(gained.text) + (parser.finish() if ended else [])]
        if not parts and (ended or self.request.logprobs or not self.request.tools):
            parts = [_part(choice, {} if parser.calls else {"content": ""})]
        if parts and self.request.logprobs:
            parts[0]["logprobs"] = chat_logprobs(gained, self.tokenizer)
        if ended:
            parts[-1]["finish_reason"] = chat_finish(gained.finish_reason, parser)
            parts[-1]["stop_reason"] = gained.stop_reason
        return found + parts


def _part(choice: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}
