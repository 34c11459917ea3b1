"""One HTTP exchange: a body of limited size in, an answer out. It is given up when the client leaves or the server
ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dovetail.core.errors import RequestError
from dovetail.host.json_file import json_object
from dovetail.server import errors
from dovetail.server.gate import Gate

MAX_BODY = 16 << 20
BODY_SECONDS = 60.0  # for a client to send a whole body
WRITE_SECONDS = 300.0  # for a client to make room for the next piece of a stream
MAX_NAMED = 16  # ignored fields that the header names
IGNORED_HEADER = "x-ignored-fields"

_LOG = logging.getLogger(__name__)
_UNSAFE = re.compile(r"[^\w.-]", re.ASCII)  # what the name of a field could do in a header
_STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]

Work = Callable[[dict[str, Any], "Reply"], Awaitable[None]]


class ClientGone(Exception):
    """The client closed the connection, or does not read."""


class Reply:
    """Sends the answer: either one JSON object, or a stream of events. It ends once, whatever is called later.

    received: bytes of the request's body. ignored: names of its fields that mean nothing here, for a header of the
    answer.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self.streaming = False
        self.ended = False
        self.received = 0
        self.ignored: Sequence[str] = ()

    async def json(self, value: Mapping[str, Any]) -> None:
        self.ended = True
        data = json.dumps(value, ensure_ascii=False).encode()
        headers = {name.decode(): text.decode() for name, text in self._warning()}
        await Response(data, 200, headers, "application/json")(self._scope, self._receive, self._send)

    async def open_stream(self) -> None:
        self.streaming = True
        headers = [*_STREAM_HEADERS, *self._warning()]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def write(self, data: bytes) -> None:
        """Wait while the client is slow to read. ClientGone if it does not read at all."""
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                await self._send({"type": "http.response.body", "body": data, "more_body": True})
        except TimeoutError:
            raise ClientGone from None

    async def close_stream(self, last: bytes = b"") -> None:
        """End the stream after one more piece."""
        self.ended = True
        await self.write(last + b"data: [DONE]\n\n")
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, error: BaseException) -> None:
        if self.ended:
            return
        if not self.streaming:
            self.ended = True
            await errors.response(error)(self._scope, self._receive, self._send)
            return
        await self.close_stream(event(errors.body(errors.request_error(error))))

    def _warning(self) -> list[tuple[bytes, bytes]]:
        names = ", ".join(_UNSAFE.sub("?", name[:64]) for name in self.ignored[:MAX_NAMED])
        return [(IGNORED_HEADER.encode(), names.encode())] if names else []


class Exchange(Response):
    """A response that is computed while the client waits for it.

    `work` gets the request's JSON object and the Reply. It is cancelled when the client leaves, and when `gate`
    cuts off what is open. An exception becomes an error answer, or an error event if the stream is open already.
    """

    def __init__(self, gate: Gate, work: Work) -> None:
        super().__init__()
        self.gate = gate
        self.work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(scope, receive, send)
        try:
            async with self.gate.until_cut():
                data = await read_body(scope, receive)
                reply.received = len(data)
                body = parse(scope, data)
                del data
                await unless_gone(receive, self.work(body, reply))
        except ClientGone:
            _LOG.debug("the client is gone")
        except Exception as error:
            if errors.request_error(error).status >= 500 and not isinstance(error, RequestError):
                _LOG.exception("a request failed")
            with contextlib.suppress(ClientGone):
                await reply.fail(error)


async def unless_gone(receive: Receive, work: Awaitable[None]) -> None:
    """Do `work`; ClientGone, with the work cancelled, if the client leaves first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
    finally:
        gone.cancel()
        task.cancel()  # no effect on a task that is done
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_body(scope: Scope, receive: Receive) -> bytes:
    """The body, within MAX_BODY bytes and BODY_SECONDS."""
    declared = dict(scope["headers"]).get(b"content-length", b"")
    if declared.isdigit() and int(declared) > MAX_BODY:
        raise _too_large()
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > MAX_BODY:
                    raise _too_large()
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise RequestError(f"the body did not arrive within {BODY_SECONDS:g} seconds", status=408) from None


def _too_large() -> RequestError:
    return RequestError(f"the body is larger than {MAX_BODY} bytes", status=413)


def parse(scope: Scope, data: bytes) -> dict[str, Any]:
    """The JSON object of a request. A web page must say that it is JSON, so its browser asks here first; others
    need not: curl says of all data that it is a form."""
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json" and b"origin" in headers:
        raise RequestError("a web page must send the content type application/json", status=415)
    coding = headers.get(b"content-encoding", b"identity").strip().lower()
    if coding not in (b"", b"identity"):
        name = coding[:64].decode("latin-1")
        raise RequestError(f"the content encoding {name} is not supported; send the body as it is", status=415)
    return json_object(data, "body")


def event(value: Mapping[str, Any]) -> bytes:
    """A server-sent event: one line of JSON."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
