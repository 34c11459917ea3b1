"""One HTTP request's work in the engine, seen from the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from dovetail.core.types import TokenLogprobs
from dovetail.outputs import Answer


@dataclass
class Delta:
    """What a choice gained since the reader last looked."""

    choice: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, later: Delta) -> None:
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason


@dataclass
class Track:
    """How much of a stream was handed over, and when it last gained tokens. The engine's thread owns it."""

    text: int = 0
    tokens: int = 0
    last: float = 0.0
    ended: bool = False


class Job:
    """Answers on their way, and one reader.

    Deltas that the reader has not taken are merged, one per choice: a slow reader holds no more than its
    answers' text. It ends exactly once, with an error or without. All methods belong to the event loop;
    `cancelled` and `tracks` are for the engine's thread.
    """

    def __init__(self, answers: Sequence[Answer], streaming: bool, arrival: float | None = None) -> None:
        self.answers = list(answers)
        self.streaming = streaming
        self.arrival = time.monotonic() if arrival is None else arrival
        self.tracks = [[Track(last=self.arrival) for _ in a.streams] for a in self.answers]
        self.cancelled = False
        self.ended = False
        self.error: Exception | None = None
        self._accepted = False
        self._pending: dict[int, Delta] = {}
        self._changed = asyncio.Event()
        for answer in self.answers:
            answer.arrival = self.arrival

    def accept(self) -> None:
        self._accepted = True
        self._changed.set()

    def put(self, delta: Delta) -> None:
        if self.ended:
            return
        earlier = self._pending.get(delta.choice)
        if earlier is None:
            self._pending[delta.choice] = delta
        else:
            earlier.add(delta)
        self._changed.set()

    def end(self, error: Exception | None = None) -> None:
        if not self.ended:
            self.ended, self.error = True, error
            self._changed.set()

    async def accepted(self) -> None:
        """Returns when the engine has queued it; raises what the engine refused it with."""
        while not (self._accepted or self.ended):
            await self._changed.wait()
            self._changed.clear()
        self._changed.set()
        if self.error is not None and not self._accepted:
            raise self.error

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """What has come since the last time, until the end; raises the error that it ended with."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            batch, self._pending = list(self._pending.values()), {}
            if batch:
                yield batch
            if self.ended and not self._pending:
                break
        if self.error is not None:
            raise self.error

    async def result(self) -> list[Answer]:
        """The finished answers; raises the error that it ended with."""
        async for _ in self.deltas():
            pass
        return self.answers
