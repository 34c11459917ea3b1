"""The thread that owns the engine. Commands come in through a queue, results go to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from dovetail.core.errors import CapacityError, RequestError
from dovetail.outputs import Answer, Delta
from dovetail.server.errors import Failure, Unavailable
from dovetail.server.job import Job
from dovetail.server.metrics import Metrics
from dovetail.session import Session

T = TypeVar("T")

FIRST_STALL_SECONDS = 120.0  # far longer than any first step
STALL_SECONDS = 10.0
STALL_FACTOR = 2.0  # times the longest step that the last ones lead to expect
RECENT_STEPS = 64
STOP_SECONDS = 2.0  # for the thread to leave its loop
MAX_EMPTY_STEPS = 1000

_LOG = logging.getLogger(__name__)


Event = Callable[[], None]


@dataclass(frozen=True)
class _Command:
    """Either `run` is called between two steps, or `refuse` is called with the reason why it will not run."""

    run: Callable[[], None]
    refuse: Callable[[Exception], None] = lambda error: None


class EngineThread:
    """Runs a Session until `stop`, sleeping while there is nothing to do.

    Each submitted job ends exactly once: with its answers, with an error, or with the reason for which it was
    aborted. If the loop itself fails, every open job ends with an error, `failure` is set, and `on_failure` is
    called in the event loop.
    """

    def __init__(self, session: Session, metrics: Metrics) -> None:
        self.session = session
        self.metrics = metrics
        self.failure: BaseException | None = None
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._jobs: dict[Answer, Job] = {}  # the job of each running answer
        self._beat = time.monotonic()
        self._pace: deque[float] = deque(maxlen=RECENT_STEPS)  # seconds per token of recent steps
        self._empty_steps = 0
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="dovetail-engine", daemon=True)

    # -- any thread ----------------------------------------------------------------------------------

    def start(self, loop: asyncio.AbstractEventLoop, on_failure: Event) -> None:
        self._loop = loop
        self._on_failure = on_failure
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job of the event loop. It is accepted, or it ends with the reason why not."""
        self._send(_Command(partial(self._submit, job), lambda error: self._post([partial(job.fail, error)])))

    def abort(self, job: Job, reason: Exception | None = None) -> None:
        """End a job in whatever state it is. Its pages are free when the current step is done, or before."""
        job.cancelled = True
        if not job.ended:
            self._send(_Command(partial(self._abort, [job], reason or Unavailable("the request was aborted"))))

    def abort_all(self, reason: Exception) -> None:
        self._send(_Command(lambda: self._abort(self._open_jobs(), reason)))

    def call(self, function: Callable[[Session], T]) -> Future[T]:
        """Run `function` between two steps, when the session may be used."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function(self.session))
            except Exception as error:
                future.set_exception(error)

        self._send(_Command(run, future.set_exception))
        return future

    def stop(self) -> None:
        """End every open job, leave the loop and join the thread. It may be `stuck` in a step."""
        self.abort_all(Unavailable("the server is shutting down"))
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join(STOP_SECONDS)

    @property
    def stuck(self) -> bool:
        """Whether the thread runs, though it was told to stop."""
        return self._thread.is_alive()

    @property
    def pending(self) -> int:
        """Commands that the engine's thread has not begun to carry out."""
        return self._commands.qsize()

    @property
    def healthy(self) -> bool:
        """False if the loop has failed, or takes much longer for a step than any should take."""
        stalled = self.session.busy and time.monotonic() - self._beat > self.patience
        return self.failure is None and self._thread.is_alive() and not stalled

    @property
    def patience(self) -> float:
        """Seconds after which a step counts as stalled. The longest has as many tokens as a step may have."""
        recent = list(self._pace)
        if not recent:
            return FIRST_STALL_SECONDS
        return max(STALL_SECONDS, STALL_FACTOR * max(recent) * self.session.config.max_num_batched_tokens)

    def _send(self, command: _Command) -> None:
        with self._lock:
            if not self._closed:
                self._commands.put(command)
                return
        command.refuse(self._refusal())

    def _refusal(self) -> Exception:
        return Failure("the engine has failed") if self.failure else Unavailable("the server is shutting down")

    def _post(self, events: Sequence[Event]) -> None:
        """Wake the event loop once for all of `events`."""
        if events:
            with contextlib.suppress(RuntimeError):  # the event loop is closed and nobody listens
                self._loop.call_soon_threadsafe(_each, events)

    # -- the engine's thread -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._obey():
                self._step()
        except BaseException as error:
            _LOG.critical("the engine has failed", exc_info=error)
            self.failure = error
        self._close()

    def _obey(self) -> bool:
        """Carry out commands, and wait for one if there is nothing else to do. False means: stop."""
        while True:
            try:
                command = self._commands.get(block=not self.session.busy)
            except queue.Empty:
                return True
            self._beat = time.monotonic()
            if command is None:
                return False
            try:
                command.run()
            except BaseException:
                command.refuse(Failure("the engine has failed"))
                raise

    def _step(self) -> None:
        began = time.monotonic()
        gained = self.session.step()
        self._beat = time.monotonic()
        tokens = self.session.engine.last_plan.num_tokens
        if tokens:
            self._pace.append((self._beat - began) / tokens)
        self._empty_steps = 0 if tokens else self._empty_steps + 1
        if self._empty_steps > MAX_EMPTY_STEPS:
            raise RuntimeError("the scheduler has requests but plans nothing")
        self.metrics.stepped(tokens)
        self._post([event for delta in gained for event in self._gained(delta)])

    def _gained(self, delta: Delta) -> list[Event]:
        """Give the reader of a job a delta, or the error with which its answer ended."""
        self._measure(delta)
        answer = delta.answer
        job = self._jobs.get(answer)
        if job is None:  # another answer of its job has failed in this step
            return []
        if answer.error is not None:
            return [self._end(job, Failure(answer.error))]
        if delta.last:
            del self._jobs[answer]
        # A reader that waits for the whole answer is woken only by its end.
        return [partial(job.put, delta)] if job.streaming or delta.finish_reason is not None else []

    def _measure(self, delta: Delta) -> None:
        new, total = len(delta.token_ids), len(delta.stream.token_ids)
        if new:
            if new == total:
                self.metrics.first_token(delta)
            else:
                self.metrics.next_token(delta.waited)
            self.metrics.generated(new)
        if delta.finish_reason is not None:
            self.metrics.finished(delta)

    def _submit(self, job: Job) -> None:
        if job.cancelled:
            return
        for answer in job.answers:
            try:
                self.session.submit(answer, job.arrival)
            except (RequestError, CapacityError) as error:
                self._post([self._end(job, error)])
                return
            self._jobs[answer] = job
        self._post([job.accept])

    def _abort(self, jobs: Sequence[Job], reason: Exception) -> None:
        self._post([self._end(job, reason) for job in jobs])

    def _end(self, job: Job, error: Exception) -> Event:
        """Stop what still runs of a job. Returns the event that ends it."""
        for answer in job.answers:
            if self._jobs.pop(answer, None) is not None:
                for delta in self.session.abort(answer):
                    self._measure(delta)
        return partial(job.fail, error)

    def _open_jobs(self) -> list[Job]:
        return list(dict.fromkeys(self._jobs.values()))

    def _close(self) -> None:
        """Refuse all commands from now on, and those that are waiting. End every open job."""
        with self._lock:
            self._closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._commands.get(block=False)
                if command is not None:
                    command.refuse(self._refusal())
        self._post([partial(job.fail, self._refusal()) for job in self._open_jobs()])
        self._jobs.clear()
        if self.failure is not None:
            self._post([self._on_failure])


def _each(events: Sequence[Event]) -> None:
    for event in events:
        event()
