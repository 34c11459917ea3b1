"""/v1/completions: prompts in, texts or chunks out."""

from __future__ import annotations

import time
import uuid
from typing import Any

from dovetail.outputs import Answer
from dovetail.server import logprobs
from dovetail.server.exchange import Reply, event
from dovetail.server.job import Delta, Job
from dovetail.server.logprobs import CompletionLogprobs, joined
from dovetail.server.params import completion_params, prompts, scores_only
from dovetail.server.protocol import CompletionRequest
from dovetail.server.service import Service, usage


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
        self.scores_only = scores_only(request)
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
        tokens = 0
        choices = []
        for i, answer in enumerate(answers):
            for j, stream in enumerate(answer.streams):
                delta = Delta(
                    i * self.n + j, stream.text, stream.token_ids, stream.logprobs, stream.finish_reason,
                    stream.stop_reason,
                )  # fmt: skip
                choice = self._choice(delta, answer, CompletionLogprobs(self.service.llm.tokenizer), first=True)
                if self.request.prompt_logprobs is not None:
                    scores = logprobs.prompt_logprobs(answer.prompt_scores, self.service.llm.tokenizer)
                    choice["prompt_logprobs"] = scores
                choices.append(choice)
                tokens += 0 if self.scores_only else len(stream.token_ids)
        return {**self.head, "choices": choices, "usage": usage(answers, tokens)}

    async def _stream(self, job: Job, reply: Reply) -> None:
        options = self.request.stream_options
        continuous = bool(options and options.include_usage and options.continuous_usage_stats)
        builders: dict[int, CompletionLogprobs] = {}
        tokens = 0
        await reply.open_stream()
        async for deltas in job.deltas():
            out = []
            for d in deltas:
                first = d.choice not in builders
                builder = builders.setdefault(d.choice, CompletionLogprobs(self.service.llm.tokenizer))
                tokens += 0 if self.scores_only else len(d.token_ids)
                chunk = {
                    **self.head,
                    "choices": [self._choice(d, job.answers[d.choice // self.n], builder, first)],
                }
                out.append(event({**chunk, "usage": usage(job.answers, tokens)} if continuous else chunk))
            await reply.write(b"".join(out))
        if options and options.include_usage:
            await reply.write(event({**self.head, "choices": [], "usage": usage(job.answers, tokens)}))
        await reply.close_stream()

    def _choice(self, delta: Delta, answer: Answer, builder: CompletionLogprobs, first: bool) -> dict[str, Any]:
        """A choice, whole or its next part; `first` brings the echoed prompt."""
        text = "" if self.scores_only else delta.text
        known: dict[str, Any] | None = None
        echo = bool(self.request.echo) and first
        if self.request.logprobs is not None:
            before = builder.take_prompt(answer.prompt_token_ids, answer.prompt_scores) if echo else None
            known = builder.take([] if self.scores_only else delta.logprobs)
            known = known if before is None else joined(before, known)
        if echo:
            text = self._prompt_text(answer) + text
        return {
            "index": delta.choice,
            "text": text,
            "logprobs": known,
            "finish_reason": "length" if delta.finish_reason and self.scores_only else delta.finish_reason,
            "stop_reason": None if self.scores_only else delta.stop_reason,
        }

    def _prompt_text(self, answer: Answer) -> str:
        if answer.prompt is not None:
            return answer.prompt
        return self.service.llm.tokenizer.decode(answer.prompt_token_ids)
