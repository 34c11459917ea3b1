"""Exceptions as HTTP answers: {"error": {"message", "type", "param", "code"}} and a status."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import Response

from dovetail.core.errors import CapacityError, RequestError

MAX_MESSAGE = 1000  # characters, because a message may quote values from the request


class NotFound(RequestError):
    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param=param, status=404, type="not_found_error")


class Unavailable(RequestError):
    """The server cannot take or finish this now. It may `retry_after` seconds later."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message, status=503, type="unavailable_error")
        self.retry_after = retry_after


class Failure(RequestError):
    """The server failed; the request is not to blame."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=500, type="server_error")


def request_error(error: BaseException) -> RequestError:
    """Any exception as one with an HTTP status. Unexpected exceptions reveal nothing about the inside."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, CapacityError):
        return RequestError(str(error))
    if isinstance(error, ValidationError):
        return _validation(error)
    return Failure("internal error")


def body(error: RequestError) -> dict[str, Any]:
    message = str(error)
    if len(message) > MAX_MESSAGE:
        message = message[:MAX_MESSAGE] + "..."
    return {"error": {"message": message, "type": error.type, "param": error.param, "code": error.status}}


def response(error: BaseException, headers: Mapping[str, str] | None = None) -> Response:
    known = request_error(error)
    more = dict(headers or {})
    if isinstance(known, Unavailable):
        more["retry-after"] = str(known.retry_after)
    return Response(json.dumps(body(known)), known.status, more, "application/json")


def _validation(error: ValidationError) -> RequestError:
    """The first thing that is wrong, named as the client wrote it."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = ".".join(str(part) for part in first["loc"])
    return RequestError(f"{path}: {first['msg']}" if path else first["msg"], param=path or None)
