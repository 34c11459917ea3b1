"""One row of a batch: from a request's body to answers, and from answers to a response's body."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from dovetail.batch.rows import Row
from dovetail.core.errors import RequestError
from dovetail.server.bodies import chat_body, completion_body
from dovetail.server.intake import Intake
from dovetail.server.params import check_common
from dovetail.server.protocol import ChatRequest, CompletionRequest, sort_extra


class Call:
    """A row's answers, checked and tokenized but not queued.

    defaults: sampling settings for what the body does not say. unknown: fields that have no meaning here. open:
    how many answers have not ended. Raises RequestError, CapacityError or pydantic's ValidationError.
    """

    def __init__(self, intake: Intake, row: Row, defaults: Mapping[str, Any]) -> None:
        self.llm = intake.llm
        self.row = row
        body = {name: value for name, value in (row.body or {}).items() if value is not None}
        chat = row.url == "/v1/chat/completions"
        merged = _with_defaults(body, defaults, chat)
        self.request = (ChatRequest if chat else CompletionRequest).model_validate(merged)
        if self.request.stream:
            raise RequestError("an answer in a batch cannot be streamed", param="stream")
        check_common(self.request)
        self.unknown = tuple(sort_extra(self.request))
        # A row has its own seed, so its answer does not depend on which rows ran before it.
        self.answers = intake.answers(intake.read(self.request), row.key, seed=int(row.key[:15], 16))
        self.open = len(self.answers)

    @property
    def error(self) -> str | None:
        """Why the engine ended the row with an error, if it did."""
        return next((a.error for a in self.answers if a.error is not None), None)

    @property
    def tokens(self) -> int:
        """Tokens written so far."""
        return sum(len(s.token_ids) for a in self.answers for s in a.streams)

    def body(self) -> dict[str, Any]:
        """The response's body, once all answers are finished."""
        head = {"created": int(time.time()), "model": self.llm.config.model}
        if isinstance(self.request, ChatRequest):
            body = chat_body(self.request, self.answers, self.llm.tokenizer)
            return {"id": f"chatcmpl-{self.row.key}", **head, **body}
        return {
            "id": f"cmpl-{self.row.key}",
            **head,
            **completion_body(self.request, self.answers, self.llm.tokenizer),
        }


def _with_defaults(body: dict[str, Any], defaults: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    """The body, with `defaults` for what it leaves out, under the names that this kind of request uses."""
    more = dict(defaults)
    if chat and "logprobs" in more:
        more |= {"logprobs": True, "top_logprobs": more["logprobs"]}
    if "max_completion_tokens" in body:
        more.pop("max_tokens", None)
    return {**more, **body}
