"""One HTTP request's work in the engine, seen from the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from dovetail.outputs import Answer, Delta


class Job:
    """Answers on their way, and one reader.

    Deltas that the reader has not taken are merged, one for each choice, so a slow reader costs no more memory
    than its answers' text. A job ends exactly once: with the last of its choices, or with an error. All methods
    belong to the event loop; `cancelled` is for the engine's thread. arrival: when the request came, by the
    session's clock.
    """

    def __init__(self, answers: Sequence[Answer], streaming: bool, arrival: float) -> None:
        self.answers = list(answers)
        self.streaming = streaming
        self.arrival = arrival
        self.cancelled = False
        self.error: Exception | None = None
        self._accepted = False
        self._open = sum(len(a.streams) for a in self.answers)  # choices that have not ended
        self._pending: dict[int, Delta] = {}
        self._changed = asyncio.Event()

    @property
    def ended(self) -> bool:
        return self.error is not None or not self._open

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
        if delta.finish_reason is not None:
            self._open -= 1
        self._changed.set()

    def fail(self, error: Exception) -> None:
        if not self.ended:
            self.error = error
            self._changed.set()

    async def accepted(self) -> None:
        """Wait until the engine has queued the job. Raises the error with which the engine refused it."""
        while not (self._accepted or self.ended):
            await self._changed.wait()
            self._changed.clear()
        self._changed.set()
        if self.error is not None and not self._accepted:
            raise self.error

    async def deltas(self, patience: float | None = None) -> AsyncIterator[list[Delta]]:
        """Yield what has come since the last time, until the end. Also yield every `patience` seconds, and then
        the list may be empty. Raises the error with which the job ended."""
        waking = Waking(self._changed, patience)  # a timeout for each wait would cost more than the wait
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                batch, self._pending = list(self._pending.values()), {}
                if batch or not self.ended:
                    yield batch
                if self.ended and not self._pending:
                    break
        finally:
            waking.cancel()
        if self.error is not None:
            raise self.error

    async def result(self) -> list[Answer]:
        """The finished answers. Raises the error with which the job ended."""
        async for _ in self.deltas():
            pass
        return self.answers


class Waking:
    """Sets an event every so many seconds, until it is cancelled."""

    def __init__(self, event: asyncio.Event, seconds: float | None) -> None:
        self._event = event
        self._next = (
            None if seconds is None else asyncio.get_running_loop().call_later(seconds, self._wake, seconds)
        )

    def _wake(self, seconds: float) -> None:
        self._event.set()
        self._next = asyncio.get_running_loop().call_later(seconds, self._wake, seconds)

    def cancel(self) -> None:
        if self._next is not None:
            self._next.cancel()
