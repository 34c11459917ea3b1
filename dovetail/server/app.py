"""The routes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import dovetail
from dovetail.core.errors import RequestError
from dovetail.server import errors
from dovetail.server.chat import Chat
from dovetail.server.completions import Completion
from dovetail.server.exchange import Exchange
from dovetail.server.guard import Guard
from dovetail.server.protocol import ChatRequest, CompletionRequest
from dovetail.server.service import Service

_LOG = logging.getLogger(__name__)


def create_app(service: Service, on_failure: Callable[[], None] = lambda: None) -> FastAPI:
    """The ASGI application. Its lifespan starts the engine's thread and closes the service."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start(asyncio.get_running_loop(), on_failure)
        yield
        await asyncio.get_running_loop().run_in_executor(None, service.close)

    app = FastAPI(title="Dovetail", version=dovetail.__version__, lifespan=lifespan, redirect_slashes=False)
    app.add_middleware(Guard, service=service)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unforeseen)
    _generation(app, service)
    _information(app, service)
    return app


def _generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", openapi_extra=_body(ChatRequest))
    async def chat() -> Response:
        """Answer a conversation."""
        return Exchange(Chat(service).answer)

    @app.post("/v1/completions", openapi_extra=_body(CompletionRequest))
    async def completions() -> Response:
        """Complete prompts."""
        return Exchange(Completion(service).answer)


def _information(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The names that the model is served under."""
        return {"object": "list", "data": [_model(service, name) for name in service.options.names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name not in service.options.names:
            raise HTTPException(404, f"the model '{name}' is not served here")
        return _model(service, name)

    @app.get("/health")
    async def health() -> Response:
        """200 while requests are taken and the engine makes progress, 503 otherwise."""
        return Response(status_code=200 if service.engine.healthy and not service.gate.draining else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus text."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version")
    async def version() -> dict[str, Any]:
        """The program's version, and the resolved configuration of the engine."""
        config = service.llm.config
        return {"version": dovetail.__version__, "config": config.to_dict() | {"use": list(config.use)}}


def _model(service: Service, name: str) -> dict[str, Any]:
    config = service.llm.config
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "dovetail",
        "root": config.model,
        "max_model_len": config.max_model_len,
    }


def _body(model: type[BaseModel]) -> dict[str, Any]:
    """The request's fields for the OpenAPI document. Exchange reads the body itself."""
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}
    }


async def _http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        return await _unforeseen(request, error)
    kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
    known = RequestError(str(error.detail), status=error.status_code, type=kind)
    return JSONResponse(errors.body(known), error.status_code, error.headers)


async def _unforeseen(request: Request, error: Exception) -> Response:
    return errors.response(error)
