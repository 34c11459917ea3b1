"""Streaming requests to an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import resource
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import aiohttp

from dovetail.bench.serving.request import Asking, Endpoint, Record
from dovetail.bench.serving.sse import EventStream
from dovetail.bench.serving.vocabulary import Prompt
from dovetail.core.errors import ConfigError

# Shorter than servers keep an idle connection, so that no request meets one that is being closed.
KEEP_ALIVE = 2.0
PROBE_SECONDS = 5.0
MAX_MESSAGE = 300  # characters kept of a server's message
_ACTIVITY = re.compile(r"^dovetail:(\w+)_activity_total(?:\{[^}]*\})? (\S+)$", re.MULTILINE)

UNREACHABLE, LOST = "cannot connect", "connection lost"
INTERRUPTED = "interrupted"
CONNECTION = frozenset({UNREACHABLE, LOST})  # errors after which the server may be gone

Clock = Callable[[], float]


@dataclass(frozen=True)
class Served:
    """A model as a server offers it: its name in requests, its context in tokens, the server's version, and the
    engine's configuration if the server is Dovetail's. None where the server does not say.
    """

    model: str
    context: int | None = None
    version: str | None = None
    config: dict[str, Any] | None = None


class Client:
    """Requests to the server at `url` (without /v1)."""

    def __init__(self, session: aiohttp.ClientSession, url: str, asking: Asking) -> None:
        self.url = url
        self.asking = asking
        self._session = session
        self._headers = {"Content-Type": "application/json"}
        if asking.api_key:
            self._headers["Authorization"] = f"Bearer {asking.api_key}"
        self._path = "chat/completions" if asking.endpoint is Endpoint.CHAT else "completions"

    async def served(self, model: str | None) -> Served:
        """What the server says about `model`, or about the first model that it lists. ConfigError if there is
        none."""
        try:
            listed = _listed(await self._get("/v1/models"))
        except ConfigError:
            if model is None:
                raise
            listed = []
        if model is None and not listed:
            raise ConfigError(f"{self.url}/v1/models lists no model; name one with --model")
        entry: dict[str, Any] = next((m for m in listed if model in (None, m["id"])), {})
        context = entry.get("max_model_len")
        about: dict[str, Any] = {}
        with contextlib.suppress(ConfigError):
            about = await self._get("/version")
        version, config = about.get("version"), about.get("config")
        return Served(
            model or entry["id"],
            context if type(context) is int and context > 0 else None,
            version if isinstance(version, str) else None,
            config if isinstance(config, dict) else None,
        )

    async def activity(self, names: Iterable[str]) -> dict[str, int]:
        """How often each technique of a Dovetail server acted so far. ConfigError if it does not say."""
        text = (await self._read("/metrics")).decode(errors="replace")
        counts = {match[1]: int(float(match[2])) for match in _ACTIVITY.finditer(text)}
        try:
            return {name: counts[name.replace("-", "_")] for name in names}
        except KeyError as missing:
            raise ConfigError(f"{self.url}/metrics says nothing of the technique {missing}") from None

    async def _get(self, path: str) -> dict[str, Any]:
        """The JSON object at `path`. ConfigError says what was there instead."""
        body = await self._read(path)
        with contextlib.suppress(ValueError):
            if isinstance(value := json.loads(body), dict):
                return value
        raise ConfigError(f"{self.url}{path}: the answer is no JSON object; is it an OpenAI-compatible server?")

    async def _read(self, path: str) -> bytes:
        """The bytes at `path`. ConfigError says what came instead."""
        try:
            timeout = aiohttp.ClientTimeout(total=PROBE_SECONDS)
            async with self._session.get(self.url + path, headers=self._headers, timeout=timeout) as response:
                body = await response.read()
        except (aiohttp.ClientError, OSError, ValueError) as error:
            why = str(error) or f"no answer within {PROBE_SECONDS:g} seconds"
            raise ConfigError(f"{self.url}{path}: {why}; is a server running there?") from None
        if response.status != 200:
            hint = "; give its key with --api-key" if response.status in (401, 403) else ""
            raise ConfigError(f"{self.url}{path}: HTTP {response.status}: {_message(body)}{hint}")
        return body

    async def alive(self) -> bool:
        """Whether the server takes connections. A slow answer counts as well."""
        try:
            timeout = aiohttp.ClientTimeout(total=PROBE_SECONDS)
            async with self._session.get(self.url + "/v1/models", headers=self._headers, timeout=timeout):
                return True
        except TimeoutError:
            return True
        except (aiohttp.ClientError, OSError):
            return False

    def body(self, model: str, prompt: Prompt, max_tokens: int) -> bytes:
        """The JSON of a greedy, streaming request."""
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.asking.ignore_eos:
            body["ignore_eos"] = True
        if self.asking.endpoint is Endpoint.CHAT:
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        return json.dumps(body, separators=(",", ":")).encode()

    async def send(self, body: bytes, record: Record, clock: Clock) -> None:
        """Send a request and write down its answer in `record`. If something goes wrong, that is its `error`."""
        record.sent = clock()
        timeout = aiohttp.ClientTimeout(total=self.asking.timeout)
        url = f"{self.url}/v1/{self._path}"
        try:
            async with self._session.post(url, data=body, headers=self._headers, timeout=timeout) as response:
                await _Answer(record, clock).read(response)
        except TimeoutError:
            _fail(record, "timeout", f"no whole answer within {self.asking.timeout:g} seconds")
        except aiohttp.ClientConnectorError as error:
            _fail(record, UNREACHABLE, str(error))
        except (aiohttp.ClientError, OSError) as error:
            _fail(record, LOST, str(error) or type(error).__name__)
        except asyncio.CancelledError:
            _fail(record, INTERRUPTED, "")
            raise


class _Answer:
    """The answer to one request. It goes into the request's record as it comes."""

    def __init__(self, record: Record, clock: Clock) -> None:
        self.record = record
        self.clock = clock
        self.events = 0

    async def read(self, response: aiohttp.ClientResponse) -> None:
        if response.status != 200:
            _fail(self.record, f"HTTP {response.status}", _message(await response.read()))
            return
        events = EventStream()
        async for piece in response.content.iter_any():
            self._take(events.feed(piece))
        self._take(events.close())
        self.record.ended = self.clock()
        if not self.events:
            _fail(self.record, "no stream", f"the answer, {response.content_type}, holds no events")
        elif not self.record.finished:
            _fail(self.record, "cut off", "the stream ended without a finish_reason or [DONE]")

    def _take(self, events: list[str]) -> None:
        now = self.clock()
        self.events += len(events)
        for data in events:
            if data.strip() == "[DONE]":
                self.record.finished = True
                continue
            try:
                value = json.loads(data)
            except (ValueError, RecursionError):
                value = None
            if not isinstance(value, dict):
                _fail(self.record, "bad event", f"no JSON object: {data[:MAX_MESSAGE]}")
            elif value.get("error"):
                _fail(self.record, "error event", _words(value["error"]))
            else:
                self._chunk(value, now)

    def _chunk(self, chunk: dict[str, Any], now: float) -> None:
        self._usage(chunk.get("usage"))
        choices = chunk.get("choices")
        for choice in choices if isinstance(choices, list) else []:
            if not isinstance(choice, dict):
                continue
            if _text(choice):
                self.record.chunks.append(now)
            if choice.get("finish_reason"):
                self.record.finished = True

    def _usage(self, usage: Any) -> None:
        if not isinstance(usage, dict):
            return
        self.record.prompt_tokens = _count(usage, "prompt_tokens")
        self.record.completion_tokens = _count(usage, "completion_tokens")
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict):
            self.record.cached_tokens = _count(details, "cached_tokens")


@contextlib.asynccontextmanager
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """A session with no limit on open connections but the system's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE)
        async with aiohttp.ClientSession(connector=connector) as found:
            yield found
    finally:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def clock_from_now() -> Clock:
    """Seconds since this call, on a monotonic clock."""
    start = time.perf_counter()
    return lambda: time.perf_counter() - start


def _fail(record: Record, kind: str, message: str) -> None:
    # The first failure is the cause of those after it.
    if record.error is None:
        record.error, record.message = kind, message[:MAX_MESSAGE]


def _listed(answer: dict[str, Any]) -> list[dict[str, Any]]:
    models = answer.get("data")
    found = models if isinstance(models, list) else []
    return [m for m in found if isinstance(m, dict) and isinstance(m.get("id"), str)]


def _text(choice: dict[str, Any]) -> bool:
    """Whether a chunk's choice has text of the answer, or of the thinking before it."""
    delta = choice.get("delta")
    parts = delta if isinstance(delta, dict) else {}
    return any((choice.get("text"), *(parts.get(name) for name in ("content", "reasoning_content", "reasoning"))))


def _count(values: dict[str, Any], name: str) -> int | None:
    value = values.get(name)
    return value if type(value) is int and value >= 0 else None


def _message(body: bytes) -> str:
    """The message of an error answer, in OpenAI's form or any other."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(body)
        if isinstance(value, dict):
            return _words(value.get("error") or value.get("detail") or value)
    return body.decode(errors="replace").strip()[:MAX_MESSAGE]


def _words(error: Any) -> str:
    found = error.get("message", error) if isinstance(error, dict) else error
    return (found if isinstance(found, str) else json.dumps(found))[:MAX_MESSAGE]
