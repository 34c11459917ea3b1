"""Limits the work that is let in: so many sequences at most, and none while the server drains. Cuts off what is
open."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

from dovetail.core.errors import RequestError
from dovetail.server.errors import Unavailable

RETRY_WHEN_FULL = 1
RETRY_WHEN_DRAINING = 5


class Gate:
    """Counts open requests and their sequences. Belongs to the event loop."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.requests = 0
        self.sequences = 0
        self.draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._open: set[asyncio.Timeout] = set()

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Count a request as open while the body runs. Refused while draining."""
        if self.draining:
            raise Unavailable("the server is shutting down", RETRY_WHEN_DRAINING)
        self.requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.requests -= 1
            if self.requests == 0:
                self._idle.set()

    @contextlib.contextmanager
    def room_for(self, count: int) -> Iterator[None]:
        """Reserve room for `count` sequences, running or queued."""
        if count > self.limit:
            raise RequestError(
                f"the request asks for {count} answers; this server holds {self.limit} at a time", param="n"
            )
        if self.sequences + count > self.limit:
            raise Unavailable(
                f"the queue is full: {self.sequences} of {self.limit} places are taken", RETRY_WHEN_FULL
            )
        self.sequences += count
        try:
            yield
        finally:
            self.sequences -= count

    @contextlib.asynccontextmanager
    async def until_cut(self) -> AsyncIterator[None]:
        """Run the body to its end, or until `cut`, which cancels it. Then this raises Unavailable."""
        try:
            async with asyncio.timeout(None) as limit:
                self._open.add(limit)
                try:
                    yield
                finally:
                    self._open.discard(limit)
        except TimeoutError:
            if limit.expired():
                raise Unavailable("the server is shutting down", RETRY_WHEN_DRAINING) from None
            raise

    def cut(self) -> None:
        """Cancel all that is open, whatever it waits for."""
        for limit in list(self._open):
            limit.reschedule(asyncio.get_running_loop().time())

    async def idle(self) -> None:
        """Returns when no request is open."""
        await self._idle.wait()
