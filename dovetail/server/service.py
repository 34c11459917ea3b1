"""What the routes share: the model, the way in, the engine's thread, the gate."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from dovetail.llm import LLM
from dovetail.outputs import Answer
from dovetail.server.engine_thread import EngineThread
from dovetail.server.errors import NotFound
from dovetail.server.gate import Gate
from dovetail.server.intake import Asked, Intake
from dovetail.server.job import Job
from dovetail.server.metrics import Metrics
from dovetail.server.params import check_common
from dovetail.server.protocol import GenerationRequest, sort_extra
from dovetail.structured.compiler import AT_ONCE
from dovetail.structured.grammar import Grammar

_LOG = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class ServiceOptions:
    """How a model is offered. Clients may use any of `names`; replies use the first."""

    names: tuple[str, ...]
    api_key: str | None = None
    max_queue: int = 1024
    shutdown_timeout: float = 30.0


class Service:
    """Serves one model; `close` ends everything it started. RequestError if the model's own sampling
    defaults are impossible."""

    def __init__(self, llm: LLM, options: ServiceOptions) -> None:
        self.llm = llm
        self.options = options
        llm.default_params()
        self.created = int(time.time())
        self.metrics = Metrics(options.names[0], llm.config.max_model_len)
        self.metrics.watch(llm)
        self.gate = Gate(llm.config.max_num_seqs + options.max_queue)
        self.engine = EngineThread(llm.session, self.metrics)
        self.pool = ThreadPoolExecutor(2, thread_name_prefix="dovetail-text")
        self.compilers = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="dovetail-form")  # they only wait
        self.intake = Intake(llm)

    def close(self) -> None:
        self.engine.stop()
        for pool in (self.pool, self.compilers):
            pool.shutdown(wait=False, cancel_futures=True)
        self.llm.session.grammars.close()

    async def aside(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run `function` in another thread, so that it does not block the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, function, *arguments)

    async def compiled(self, asked: Asked) -> Grammar | None:
        """`Intake.compile` in a thread of its own kind, so that a form that takes long delays no other request."""
        if asked.params.structured_outputs is None:
            return None
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.compilers, self.intake.compile, asked)

    def name(self, request: GenerationRequest) -> str:
        """Check the fields that every route has. Returns the model name that the request used."""
        if request.model is not None and request.model not in self.options.names:
            raise NotFound(f"the model '{request.model}' is not served here", param="model")
        check_common(request)
        for name in sort_extra(request):
            if self.metrics.unknown_field(name[:64]):
                _LOG.warning("request field %r means nothing here and is ignored", name[:64])
        return request.model or self.options.names[0]

    @contextlib.asynccontextmanager
    async def running(self, answers: Sequence[Answer], streaming: bool, arrival: float) -> AsyncIterator[Job]:
        """The answers as a job that the engine has accepted. On leaving the block, what still runs is aborted."""
        job = Job(answers, streaming, arrival)
        self.engine.submit(job)
        try:
            await job.accepted()
            yield job
        finally:
            self.engine.abort(job)
