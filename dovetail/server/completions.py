"""/v1/completions: prompts in, texts or chunks out."""

from __future__ import annotations

import time
import uuid
from typing import Any

from dovetail.outputs import Answer
from dovetail.server.bodies import completion_body, text_choice, usage
from dovetail.server.exchange import Reply, event
from dovetail.server.job import Job
from dovetail.server.logprobs import CompletionLogprobs
from dovetail.server.params import completion_params, prompts, scores_only
from dovetail.server.protocol import CompletionRequest
from dovetail.server.service import Service


class Completion:
    """One completions request: `answer` runs it from its body to its reply.

    Choices are numbered prompt by prompt: choice i belongs to prompt i // n.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self.arrival = time.monotonic()

    async def answer(self, body: dict[str, Any], reply: Reply) -> None:
        service = self.service
        self.request = request = CompletionRequest.model_validate(body)
        self.model = service.name(request)
        params = completion_params(request, service.llm.default_params)
        given = prompts(request.prompt)
        self.n = params.n
        with service.gate.room_for(len(given) * params.n):
            answers = await service.aside(service.prepare, given, params, request)
            async with service.running(answers, bool(request.stream), self.arrival) as job:
                self.head = {
                    "id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()),
                    "model": self.model,
                }  # fmt: skip
                if request.stream:
                    await self._stream(job, reply)
                else:
                    await job.result()
                    await reply.json(await service.aside(self._whole, answers))

    def _whole(self, answers: list[Answer]) -> dict[str, Any]:
        return {**self.head, **completion_body(self.request, answers, self.service.llm.tokenizer)}

    async def _stream(self, job: Job, reply: Reply) -> None:
        options = self.request.stream_options
        continuous = bool(options and options.include_usage and options.continuous_usage_stats)
        builders: dict[int, CompletionLogprobs] = {}
        tokens = 0
        await reply.open_stream()
        async for deltas in job.deltas():
            out = []
            for d in deltas:
                builder = builders.setdefault(d.choice, CompletionLogprobs(self.service.llm.tokenizer))
                tokens += 0 if scores_only(self.request) else len(d.token_ids)
                choice = text_choice(self.request, d, job.answers[d.choice // self.n], builder)
                chunk = {**self.head, "choices": [choice]}
                out.append(event({**chunk, "usage": usage(job.answers, tokens)} if continuous else chunk))
            await reply.write(b"".join(out))
        if options and options.include_usage:
            await reply.write(event({**self.head, "choices": [], "usage": usage(job.answers, tokens)}))
        await reply.close_stream()
