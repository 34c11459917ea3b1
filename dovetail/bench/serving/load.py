"""An open-loop load: every request is sent when it is due, whatever is outstanding."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dovetail.bench.serving.client import CONNECTION, INTERRUPTED, Client, clock_from_now
from dovetail.bench.serving.request import Record
from dovetail.bench.serving.workload import LoadRequest

GONE_AFTER = 3  # after so many failed connections in a row, the server is asked whether it is there

NOT_SENT = "not sent"


class Stop:
    """Ends loads early. Nothing more is sent; after an interrupt, open requests are given up."""

    def __init__(self) -> None:
        self.gone = False
        self._ended = asyncio.Event()
        self._interrupted = asyncio.Event()

    def interrupt(self) -> None:
        """The user wants to stop."""
        self._interrupted.set()
        self._ended.set()

    def server_is_gone(self) -> None:
        self.gone = True
        self._ended.set()

    @property
    def reason(self) -> str | None:
        """Why the loads ended early; None if they did not."""
        return "interrupted" if self.interrupted else "server gone" if self.gone else None

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    @property
    def interrupted(self) -> bool:
        return self._interrupted.is_set()

    async def within(self, seconds: float) -> bool:
        """Wait so long, and return True as soon as the load shall end."""
        if seconds <= 0:
            await asyncio.sleep(0)  # let other tasks run
        else:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), seconds)
        return self.ended

    async def wait_for_interrupt(self) -> None:
        await self._interrupted.wait()


@dataclass
class Run:
    """The outcome of a load: a record for each request in the order of arrival, and the most that were open at
    once."""

    records: list[Record] = field(default_factory=list)
    peak_concurrency: int = 0

    def ended(self) -> Run:
        """The run without requests that were not sent or were given up. Of an interrupted run, only these
        count."""
        records = [r for r in self.records if r.sent is not None and r.error != INTERRUPTED]
        return Run(records, self.peak_concurrency)


class Load:
    """Sends requests to one server. `done` is called with 1 for each that is over.

    `max_concurrency` holds requests back while so many are open. Then the loop is no longer open.
    """

    def __init__(self, client: Client, model: str, stop: Stop, max_concurrency: int | None = None) -> None:
        self.client = client
        self.model = model
        self.stop = stop
        self._slots = asyncio.Semaphore(max_concurrency) if max_concurrency else None
        self._open = 0
        self._failed = 0
        self._asking: asyncio.Task[None] | None = None

    async def run(self, requests: Sequence[LoadRequest], done: Callable[[int], None] = lambda more: None) -> Run:
        """Send `requests`, which are in the order of arrival, and wait for the end of the last answer.

        After `stop` nothing more is sent. After an interrupt open requests are given up. If the server is gone,
        they end by themselves, because a server that drains still answers them.
        """
        run = Run([Record(r.arrival, r.input_tokens, r.max_tokens) for r in requests])
        # Before the clock starts: encoding long prompts takes milliseconds each.
        bodies = [self.client.body(self.model, r.prompt, r.max_tokens) for r in requests]
        clock = clock_from_now()

        async def send(record: Record, body: bytes) -> None:
            async with self._slots or contextlib.nullcontext():
                if self.stop.ended:
                    return
                self._open += 1
                run.peak_concurrency = max(run.peak_concurrency, self._open)
                try:
                    await self.client.send(body, record, clock)
                finally:
                    self._open -= 1
                    done(1)
            self._judge(record)

        tasks: list[asyncio.Task[None]] = []
        for record, body in zip(run.records, bodies, strict=True):
            if await self.stop.within(record.arrival - clock()):
                break
            tasks.append(asyncio.create_task(send(record, body)))
        await self._finish(tasks)
        for record in run.records:
            if record.sent is None:
                record.error = NOT_SENT
        return run

    async def _finish(self, tasks: list[asyncio.Task[None]]) -> None:
        """Wait for the open requests, or give them up when the run is interrupted."""
        interrupt = asyncio.create_task(self.stop.wait_for_interrupt())
        everything = asyncio.gather(*tasks, return_exceptions=True)
        both: set[asyncio.Future[Any]] = {interrupt, everything}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        interrupt.cancel()
        for task in tasks:
            task.cancel()  # no effect on tasks that are over
        for result in await everything:
            if isinstance(result, Exception):
                raise result
        if self._asking is not None:
            await self._asking
        if self._failed and not self.stop.ended:
            await self._ask()

    def _judge(self, record: Record) -> None:
        """After several broken connections in a row, find out whether the server is there."""
        self._failed = self._failed + 1 if record.error in CONNECTION else 0
        if self._failed >= GONE_AFTER and (self._asking is None or self._asking.done()):
            self._asking = asyncio.create_task(self._ask())

    async def _ask(self) -> None:
        if not await self.client.alive():
            self.stop.server_is_gone()
