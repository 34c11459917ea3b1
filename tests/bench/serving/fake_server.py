"""An OpenAI-compatible server that does what a test says, in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from aiohttp import web

SECONDS = 20.0


def event(value: Any) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def chunk(text: str = "", **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": None, **more}], "usage": None}


def usage(prompt: int, completion: int, **more: Any) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion, **more}}


def prompt_tokens(body: dict[str, Any]) -> int:
    prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
    return len(prompt.split()) if isinstance(prompt, str) else len(prompt)


def whole(body: dict[str, Any]) -> list[bytes]:
    """The events of an ordinary answer."""
    n = body["max_tokens"]
    if "messages" in body:
        texts = [{"choices": [{"index": 0, "delta": {"role": "assistant"}}]}]
        texts += [{"choices": [{"index": 0, "delta": {"content": f" {i}"}}]} for i in range(n)]
    else:
        texts = [chunk(f" {i}") for i in range(n)]
    end = [chunk(finish_reason="length"), usage(prompt_tokens(body), n)]
    return [*map(event, texts), *map(event, end), event(b"[DONE]")]


class FakeServer:
    """`answer(server, number, request, body)` answers the `number`th request; `bodies` has what was asked."""

    def __init__(
        self, answer: Callable[..., Awaitable[web.StreamResponse]] | None = None, context: int = 0
    ) -> None:
        self.answer = answer or ordinary
        self.context = context
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.arrived = threading.Condition()
        self.dead = False
        self._open: set[Any] = set()

    def __enter__(self) -> FakeServer:
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(started)), daemon=True)
        self._thread.start()
        assert started.wait(SECONDS)
        return self

    def __exit__(self, *reason: object) -> None:
        self.loop.call_soon_threadsafe(self._end.set)
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()

    async def _run(self, started: threading.Event) -> None:
        self.loop, self._end, self.gate = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        app = web.Application(client_max_size=1 << 26)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._generate)
        app.router.add_post("/v1/chat/completions", self._generate)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        self.site = web.TCPSite(runner, "127.0.0.1", 0)
        await self.site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        started.set()
        await self._end.wait()
        await runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        if self.dead:
            request.transport.abort()
        entry = {"id": "fake", "object": "model"} | ({"max_model_len": self.context} if self.context else {})
        return web.json_response({"object": "list", "data": [entry]})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if self.dead:
            request.transport.abort()
            return web.Response()
        transport = request.transport  # gone from the request once the connection is
        self._open.add(transport)
        with self.arrived:
            self.bodies.append(body)
            self.headers.append(dict(request.headers))
            self.arrived.notify_all()
        try:
            return await self.answer(self, len(self.bodies) - 1, request, body)
        finally:
            self._open.discard(transport)

    def wait_for(self, count: int) -> None:
        """Until `count` requests have arrived."""
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.bodies) >= count, SECONDS)

    async def die(self) -> None:
        """Break every connection and take no more."""
        self.dead = True
        await self.site.stop()
        for transport in list(self._open):
            transport.abort()


async def stream(request: web.Request, pieces: Iterable[bytes]) -> web.StreamResponse:
    """Send `pieces` as they are, each on its own."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for piece in pieces:
        await response.write(piece)
        await asyncio.sleep(0)
    await response.write_eof()
    return response


async def ordinary(server: FakeServer, number: int, request: web.Request, body: Any) -> web.StreamResponse:
    return await stream(request, whole(body))
