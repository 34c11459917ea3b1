"""What the routes that write text share: from a request's body to its reply, whole or as a stream."""

from __future__ import annotations

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

from dovetail.outputs import Answer, Delta
from dovetail.server.bodies import usage
from dovetail.server.exchange import Reply, event
from dovetail.server.job import Job
from dovetail.server.protocol import ChatRequest, CompletionRequest
from dovetail.server.service import Service
from dovetail.server.timings import PromptProgress, timings

QUIET_SECONDS = 15.0  # after which a comment shows that a stream is alive; proxies often give up after 60
PROGRESS_SECONDS = 0.25  # between two reports of how far a prompt is computed
KEEP_ALIVE = b": keep-alive\n\n"

R = TypeVar("R", ChatRequest, CompletionRequest)


class Generation(ABC, Generic[R]):
    """One request for text: `answer` runs it from its body to its reply.

    prefix: the beginning of the reply's id. chunk: the type of object in a stream's events. nothing: a choice that
    says nothing.
    """

    fields: type[R]
    prefix: ClassVar[str]
    chunk: ClassVar[str]
    nothing: ClassVar[dict[str, Any]]

    def __init__(self, service: Service) -> None:
        self.service = service
        self.tokenizer = service.llm.tokenizer
        self.arrival = service.llm.session.clock.now()

    async def answer(self, body: dict[str, Any], reply: Reply) -> None:
        service = self.service
        self.request: R = self.fields.model_validate(body)
        reply.ignored = service.check(self.request)
        asked = await service.read(self.request, reply.received)
        with service.gate.room_for(asked.choices):
            form = await service.compiled(asked)  # held until the answers have it
            name, seed = uuid.uuid4().hex, service.seed()
            answers = await service.tokenizing(reply.received, service.intake.answers, asked, name, seed)
            del form
            async with service.running(answers, bool(self.request.stream), self.arrival) as job:
                self.head = {
                    "id": f"{self.prefix}-{name}",
                    "created": int(time.time()),
                    "model": self.request.model or service.options.names[0],
                }
                if self.request.stream:
                    await self.stream(job, reply)
                else:
                    await job.result()
                    body = self.head | await service.aside(self.whole, answers)
                    await reply.json(body | {"timings": timings(answers)})

    @abstractmethod
    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The body of finished answers, without id, created and model."""

    @abstractmethod
    def parts(self, delta: Delta) -> list[dict[str, Any]]:
        """A delta as choices, one for each event."""

    @abstractmethod
    def count(self, delta: Delta) -> int:
        """How many tokens of a delta the client sees."""

    async def stream(self, job: Job, reply: Reply) -> None:
        """Send what the job gains as events, to its end. Raises the error with which it ended."""
        options = self.request.stream_options
        asked = bool(options and options.include_usage)
        continuous = asked and bool(options and options.continuous_usage_stats)
        progress = PromptProgress(job.answers, self.arrival) if self.request.return_progress else None
        tokens, now = 0, asyncio.get_running_loop().time
        written = now()
        patience = PROGRESS_SECONDS if progress else QUIET_SECONDS / 2
        await reply.open_stream()
        async for deltas in job.deltas(patience):
            ended, events = job.ended, []
            if progress and (state := progress.news(self.service.llm.session.clock.now())):
                events.append(self._event([self.nothing], {"prompt_progress": state}))
            for delta in deltas:
                tokens += self.count(delta)
                spent = {"usage": usage(job.answers, tokens)} if continuous else {}
                events += [self._event([part], spent) for part in self.parts(delta)]
            if ended and events and not asked:
                events[-1]["timings"] = timings(job.answers)
            if events or now() - written >= QUIET_SECONDS:
                await reply.write(b"".join(map(event, events)) or KEEP_ALIVE)
                written = now()
        last = {"usage": usage(job.answers, tokens), "timings": timings(job.answers)}
        await reply.close_stream(event(self._event([], last)) if asked else b"")

    def _event(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> dict[str, Any]:
        return {**self.head, "object": self.chunk, "choices": choices, **more}
