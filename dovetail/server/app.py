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
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

import dovetail
from dovetail.core.errors import RequestError
from dovetail.server import errors
from dovetail.server.chat import Chat
from dovetail.server.completions import Completion
from dovetail.server.exchange import IGNORED_HEADER, Exchange
from dovetail.server.guard import ID_HEADER, Guard
from dovetail.server.protocol import ChatRequest, CompletionRequest
from dovetail.server.reference import HEADERS, page
from dovetail.server.service import Service
from dovetail.server.tokens import DetokenizeRequest, TokenizeRequest, Tokens

_LOG = logging.getLogger(__name__)


def create_app(service: Service, on_failure: Callable[[], None] = lambda: None) -> FastAPI:
    """The ASGI application. Its lifespan starts the engine's thread and closes the service."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start(asyncio.get_running_loop(), on_failure)
        yield
        await asyncio.get_running_loop().run_in_executor(None, service.close)

    app = FastAPI(
        title="Dovetail", version=dovetail.__version__, lifespan=lifespan, redirect_slashes=False, docs_url=None,
        redoc_url=None,
    )  # fmt: skip
    app.add_middleware(Guard, service=service)
    if service.options.allowed_origins:  # around the guard: a browser asks first, and sends no key then
        app.add_middleware(
            CORSMiddleware, allow_origins=service.options.allowed_origins, allow_methods=["GET", "POST"],
            allow_headers=["*"], expose_headers=[ID_HEADER, IGNORED_HEADER, "retry-after"], max_age=600,
        )  # fmt: skip
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unforeseen)
    _generation(app, service)
    _tokens(app, service)
    _models(app, service)
    _state(app, service)
    return app


def _generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", openapi_extra=_body(ChatRequest))
    async def chat() -> Response:
        """Answer a conversation."""
        return Exchange(service.gate, Chat(service).answer)

    @app.post("/v1/completions", openapi_extra=_body(CompletionRequest))
    async def completions() -> Response:
        """Complete prompts."""
        return Exchange(service.gate, Completion(service).answer)


def _tokens(app: FastAPI, service: Service) -> None:
    tokens = Tokens(service)

    @app.post("/tokenize", openapi_extra=_body(TokenizeRequest))
    async def tokenize() -> Response:
        """The tokens of a prompt or a conversation."""
        return Exchange(service.gate, tokens.tokenize)

    @app.post("/detokenize", openapi_extra=_body(DetokenizeRequest))
    async def detokenize() -> Response:
        """The text of tokens."""
        return Exchange(service.gate, tokens.detokenize)

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """The tokenizer's special tokens and chat template, as tokenizer_config.json has them."""
        return tokens.info()


def _models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The names that the model is served under."""
        return {"object": "list", "data": [await _model(service, name) for name in service.options.names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name not in service.options.names:
            raise HTTPException(404, f"the model '{name}' is not served here")
        return await _model(service, name)


def _state(app: FastAPI, service: Service) -> None:
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

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(page(app.openapi()), headers=HEADERS)


async def _model(service: Service, name: str) -> dict[str, Any]:
    config = service.llm.config
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "dovetail",
        "root": await service.aside(service.root),
        "parent": None,
        "max_model_len": config.max_model_len,
        "permission": [],
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
    known = RequestError(_detail(request, error), status=error.status_code, type=kind)
    return JSONResponse(errors.body(known), error.status_code, error.headers)


def _detail(request: Request, error: HTTPException) -> str:
    """What is wrong. The router says no more of a path or method that it does not know than its status."""
    asked = f"{request.method} {request.url.path[:200]}"
    if error.status_code == 404 and error.detail == "Not Found":
        return f"there is no {asked}; the API is under /v1, and /docs lists every route"
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return f"{asked} is not possible; this route takes {allowed}"
    return str(error.detail)


async def _unforeseen(request: Request, error: Exception) -> Response:
    return errors.response(error)
