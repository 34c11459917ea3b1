"""/v1/chat/completions: a conversation in, messages or chunks out."""

from __future__ import annotations

import time
import uuid
from typing import Any

from dovetail.outputs import Answer
from dovetail.server import logprobs
from dovetail.server.bodies import chat_body, usage
from dovetail.server.exchange import Reply, event
from dovetail.server.job import Delta, Job
from dovetail.server.params import chat_params, messages, template_variables
from dovetail.server.protocol import ChatRequest
from dovetail.server.service import Service


class Chat:
    """One chat request: `answer` runs it from its body to its reply."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.arrival = time.monotonic()

    async def answer(self, body: dict[str, Any], reply: Reply) -> None:
        service = self.service
        self.request = request = ChatRequest.model_validate(body)
        self.model = service.name(request)
        params = chat_params(request, service.llm.default_params)
        with service.gate.room_for(params.n):
            answers = await service.aside(self._prepare, params)
            async with service.running(answers, bool(request.stream), self.arrival) as job:
                self.head = {
                    "id": f"chatcmpl-{uuid.uuid4().hex}",
                    "created": int(time.time()),
                    "model": self.model,
                }
                if request.stream:
                    await self._stream(job, reply)
                else:
                    await job.result()
                    await reply.json(await service.aside(self._whole, answers[0]))

    def _prepare(self, params: Any) -> list[Answer]:
        request = self.request
        variables = template_variables(request)
        generation = request.add_generation_prompt is not False
        ids = self.service.llm.chat_tokens(
            messages(request.messages), add_generation_prompt=generation, **variables
        )
        return self.service.prepare([ids], params, request)

    def _whole(self, answer: Answer) -> dict[str, Any]:
        return {**self.head, **chat_body(self.request, [answer], self.service.llm.tokenizer)}

    async def _stream(self, job: Job, reply: Reply) -> None:
        options = self.request.stream_options
        self.continuous = bool(options and options.include_usage and options.continuous_usage_stats)
        self.begun: set[int] = set()
        self.tokens = 0
        await reply.open_stream()
        async for deltas in job.deltas():
            await reply.write(b"".join(part for d in deltas for part in self._events(d, job)))
        if options and options.include_usage:
            await reply.write(event(self._chunk([], usage(job.answers, self.tokens))))
        await reply.close_stream()

    def _events(self, delta: Delta, job: Job) -> list[bytes]:
        """A delta as events; the first of a choice is preceded by its role."""
        self.tokens += len(delta.token_ids)
        spent = usage(job.answers, self.tokens) if self.continuous else None
        out = []
        if delta.choice not in self.begun:
            self.begun.add(delta.choice)
            role = {"role": "assistant", "content": ""}
            out.append({"index": delta.choice, "delta": role, "logprobs": None, "finish_reason": None})
        known = None
        if self.request.logprobs:
            known = logprobs.chat_logprobs(delta.logprobs, self.service.llm.tokenizer)
        choice = {
            "index": delta.choice,
            "delta": {"content": delta.text},
            "logprobs": known,
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        return [event(self._chunk([c], spent)) for c in (*out, choice)]

    def _chunk(self, choices: list[dict[str, Any]], spent: dict[str, Any] | None) -> dict[str, Any]:
        chunk = {**self.head, "object": "chat.completion.chunk", "choices": choices}
        return chunk if spent is None else {**chunk, "usage": spent}
