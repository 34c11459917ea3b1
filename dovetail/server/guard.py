"""What every request passes first: the size of its headers, a key, and the gate if it does work."""

from __future__ import annotations

import hmac
import re
import uuid
from collections.abc import Mapping

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dovetail.core.errors import RequestError
from dovetail.server import errors
from dovetail.server.service import Service

MAX_HEADERS = 100
MAX_HEADER_BYTES = 16 << 10
OPEN_PATHS = frozenset({"/health"})  # need no key; everything else does
ID_HEADER = "x-request-id"
_ID = re.compile(rb"[!-~]{1,128}")


class Guard:
    """ASGI middleware; denies by default. Every answer has the id that the request came with, or a new one."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(ID_HEADER.encode(), b"")
        name = given.decode() if _ID.fullmatch(given) else uuid.uuid4().hex

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[ID_HEADER] = name
            await send(message)

        try:
            self._check(scope, headers)
            if scope["method"] == "POST":
                with self.service.gate.request():
                    await self.app(scope, receive, named)
            else:  # the server below leaves the body out where HEAD was asked for
                head = scope["method"] == "HEAD"
                await self.app({**scope, "method": "GET"} if head else scope, receive, named)
        except RequestError as error:
            more = {"www-authenticate": "Bearer"} if error.status == 401 else {}
            await errors.response(error, more)(scope, receive, named)

    def _check(self, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        given = scope["headers"]
        if len(given) > MAX_HEADERS or sum(len(k) + len(v) for k, v in given) > MAX_HEADER_BYTES:
            raise RequestError(f"more than {MAX_HEADERS} headers or {MAX_HEADER_BYTES} bytes of them", status=431)
        keys = self.service.options.api_keys
        if not keys or scope["path"] in OPEN_PATHS:
            return
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        asked = [headers.get(b"x-api-key", b"").strip(), token.strip() if scheme.lower() == b"bearer" else b""]
        # All are compared, so the time says nothing.
        if not sum(hmac.compare_digest(a, key.encode()) for a in asked for key in keys):
            raise RequestError("a valid API key is needed", status=401, type="authentication_error")
