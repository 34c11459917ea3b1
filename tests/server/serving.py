"""A tiny model on disk, and servers on it that a test can stop inside a step."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from dovetail.checkpoint.export import export
from dovetail.core.types import StepPlan, StepResult
from dovetail.llm import LLM
from dovetail.server.http_server import HTTPServer, listen, serve, url
from dovetail.server.service import Service, ServiceOptions
from dovetail.text.byte_tokenizer import ByteTokenizer
from tests.tiny import TinyCheckpoint, tiny_config

NAME = "tiny"
SECONDS = 20.0  # after which a test gives up


class _WithTokenizer(TinyCheckpoint):
    def tokenizer(self) -> ByteTokenizer:
        return ByteTokenizer()


def save_tiny(directory: Path, **changes: Any) -> Path:
    checkpoint = _WithTokenizer(tiny_config(vocab_size=260, **changes))
    checkpoint.generation_config = {"eos_token_id": [257, 259]}
    return export(checkpoint, directory, "float32")


class Throttle:
    """An executor that can be stopped inside a step, and made to fail."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.num_stages = inner.num_stages
        self.open = threading.Event()
        self.open.set()
        self.inside = threading.Event()
        self.plans: list[StepPlan] = []
        self.error: Exception | None = None
        self.hold_when: Callable[[StepPlan], bool] = lambda plan: False

    def run(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        if self.hold_when(plan):
            self.hold_when = lambda plan: False
            self.open.clear()
        if not self.open.is_set():
            self.inside.set()
            assert self.open.wait(SECONDS)
            self.inside.clear()
        if self.error is not None:
            raise self.error
        return self.inner.run(plan)

    @contextmanager
    def held(self, when: Callable[[StepPlan], bool] = lambda plan: True) -> Iterator[None]:
        """The next step for which `when` is true stops, until the block is left."""
        self.hold_when = when
        try:
            yield
        finally:
            self.hold_when = lambda plan: False
            self.open.set()


class Running:
    """A server in a thread of its own."""

    def __init__(
        self, model: Path, options: ServiceOptions | None = None, connections: int | None = None, **engine: Any
    ) -> None:
        self.llm = LLM(
            model, **{"dtype": "float64", "threads": 1, "block_size": 4, "kv_memory": 4 << 20, **engine}
        )
        self.throttle = self.llm.engine.executor = Throttle(self.llm.engine.executor)
        self.service = Service(self.llm, options or ServiceOptions((NAME,)))
        self.server = HTTPServer(self.service, self._ready, connections)
        self.listener = listen("127.0.0.1", 0)
        self.url = url(self.listener)
        self.code: int | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._started.wait(SECONDS)

    def _run(self) -> None:
        async def main() -> int:
            self.loop = asyncio.get_running_loop()
            return await serve(self.server, self.listener)

        self.code = asyncio.run(main())

    def _ready(self) -> None:
        self._started.set()

    def drain(self) -> None:
        self.loop.call_soon_threadsafe(self.server.drain)

    def join(self) -> int | None:
        self._thread.join(SECONDS)
        return self.code

    def stop(self) -> None:
        self.throttle.open.set()
        if self._thread.is_alive():
            self.drain()
        assert self.join() is not None

    def check_empty(self) -> None:
        """Nothing runs or waits, no page leaked, and only the prefix cache holds pages."""
        until(lambda: self.service.gate.requests == 0)

        def look(session: Any) -> None:
            engine = session.engine
            engine.check()
            assert not engine.busy and not session.answers
            held = sum(len(pages) for pages in engine.scheduler.reuse.held)
            assert engine.pool.num_free + held == engine.pool.num_pages

        self.service.engine.call(look).result(SECONDS)
        assert self.service.gate.sequences == 0

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=SECONDS)

    def complete(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        answer = self.post("/v1/completions", prompt=prompt, **{"temperature": 0, **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def text(self, prompt: Any, **fields: Any) -> str:
        return self.complete(prompt, **fields)["choices"][0]["text"]

    def raw(self, body: bytes, path: str = "/v1/completions", promised: int | None = None) -> socket.socket:
        """A connection on which a POST was sent and nothing read. It may have promised a longer body."""
        connection = socket.create_connection(self.listener.getsockname()[:2], timeout=SECONDS)
        connection.sendall(
            b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
            % (path.encode(), len(body) if promised is None else promised)
            + body
        )
        return connection


def until(condition: Callable[[], bool], what: str = "the condition") -> None:
    """Wait for something that another thread brings about."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true"
        time.sleep(0.002)


class Scripted:
    """An executor whose model writes a given text, then ends its turn. Give it a ByteTokenizer."""

    def __init__(self, inner: Any, text: str) -> None:
        self.inner = inner
        self.num_stages = inner.num_stages
        self.text = text
        self.prompt: list[int] = []  # of the latest request

    def run(self, plan: StepPlan) -> StepResult:
        result = self.inner.run(plan)
        script = [*self.text.encode(), 257]
        for span, found in zip(plan.spans, result.spans, strict=True):
            written = len(span.request.tokens) - len(span.request.prompt)
            if span.sample:
                self.prompt = list(span.request.prompt)
                found.tokens = [script[min(written, len(script) - 1)]]
        return result


@contextmanager
def writing(running: Running, text: str) -> Iterator[Scripted]:
    """The model of a server writes `text`."""
    scripted = Scripted(running.throttle.inner, text)
    running.throttle.inner = scripted
    try:
        yield scripted
    finally:
        running.throttle.inner = scripted.inner
