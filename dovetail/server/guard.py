"""The checks that every request passes first: the key, the number of headers, and the gate if it does work."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from dovetail.core.errors import RequestError
from dovetail.server import errors
from dovetail.server.service import Service

MAX_HEADERS = 100
MAX_HEADER_BYTES = 16 << 10
OPEN_PATHS = frozenset({"/health"})  # need no key; everything else does


class Guard:
    """ASGI middleware; denies by default."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check(scope)
            if scope["method"] != "POST":
                await self.app(scope, receive, send)
                return
            with self.service.gate.request():
                await self.app(scope, receive, send)
        except RequestError as error:
            headers = {"www-authenticate": "Bearer"} if error.status == 401 else {}
            await errors.response(error, headers)(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = scope["headers"]
        if len(headers) > MAX_HEADERS or sum(len(k) + len(v) for k, v in headers) > MAX_HEADER_BYTES:
            raise RequestError(f"more than {MAX_HEADERS} headers or {MAX_HEADER_BYTES} bytes of them", status=431)
        key = self.service.options.api_key
        if key is None or scope["path"] in OPEN_PATHS:
            return
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), key.encode()):
            raise RequestError("a valid API key is needed", status=401, type="authentication_error")
