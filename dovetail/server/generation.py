"""What the routes that write text share: from a request's body to its reply, whole or as a stream."""

from __future__ import annotations

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

R = TypeVar("R", ChatRequest, CompletionRequest)


class Generation(ABC, Generic[R]):
    """One request for text: `answer` runs it from its body to its reply.

    prefix: the beginning of the reply's id. chunk: the type of object in a stream's events.
    """

    fields: type[R]
    prefix: ClassVar[str]
    chunk: ClassVar[str]

    def __init__(self, service: Service) -> None:
        self.service = service
        self.tokenizer = service.llm.tokenizer
        self.arrival = service.llm.session.clock.now()

    async def answer(self, body: dict[str, Any], reply: Reply) -> None:
        service = self.service
        self.request: R = self.fields.model_validate(body)
        model = service.name(self.request)
        asked = service.intake.read(self.request)
        with service.gate.room_for(asked.choices):
            form = await service.compiled(asked)  # held until the answers have it
            answers = await service.aside(service.intake.answers, asked, uuid.uuid4().hex)
            del form
            async with service.running(answers, bool(self.request.stream), self.arrival) as job:
                name = f"{self.prefix}-{uuid.uuid4().hex}"
                self.head = {"id": name, "created": int(time.time()), "model": model}
                if self.request.stream:
                    await self._stream(job, reply)
                else:
                    await job.result()
                    await reply.json(self.head | await service.aside(self.whole, answers))

    @abstractmethod
    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The body of finished answers, without id, created and model."""

    @abstractmethod
    def parts(self, delta: Delta) -> list[dict[str, Any]]:
        """A delta as choices, one for each event."""

    @abstractmethod
    def count(self, delta: Delta) -> int:
        """How many tokens of a delta the client sees."""

    async def _stream(self, job: Job, reply: Reply) -> None:
        options = self.request.stream_options
        asked = bool(options and options.include_usage)
        continuous = asked and bool(options and options.continuous_usage_stats)
        tokens = 0
        await reply.open_stream()
        async for deltas in job.deltas():
            events = []
            for delta in deltas:
                tokens += self.count(delta)
                spent = {"usage": usage(job.answers, tokens)} if continuous else {}
                events += [self._event([part], spent) for part in self.parts(delta)]
            await reply.write(b"".join(events))
        if asked:
            await reply.write(self._event([], {"usage": usage(job.answers, tokens)}))
        await reply.close_stream()

    def _event(self, choices: list[dict[str, Any]], spent: dict[str, Any]) -> bytes:
        return event({**self.head, "object": self.chunk, "choices": choices, **spent})
