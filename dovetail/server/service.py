"""What the routes share: the model, the way in, the engine's thread, the gate."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dovetail.checkpoint.export import export_tokenizer
from dovetail.core.errors import ModelError
from dovetail.host.files import home
from dovetail.llm import LLM
from dovetail.outputs import Answer
from dovetail.server.engine_thread import EngineThread
from dovetail.server.errors import NotFound
from dovetail.server.gate import Gate
from dovetail.server.intake import Asked, Intake
from dovetail.server.job import Job
from dovetail.server.metrics import Metrics
from dovetail.server.params import check_common
from dovetail.server.protocol import ChatRequest, CompletionRequest, GenerationRequest, sort_extra
from dovetail.structured.compiler import AT_ONCE, WAITING
from dovetail.structured.grammar import Grammar

_LOG = logging.getLogger(__name__)
LARGE_BODY = 256 << 10  # bytes, which take some tenths of a second to tokenize
T = TypeVar("T")


@dataclass(frozen=True)
class ServiceOptions:
    """How a model is offered. Clients may use any of `names`; replies use the first. If there are `api_keys`,
    clients must send one. Web pages of `allowed_origins` may call; "*" is every page."""

    names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
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
        self._root: str | None = None
        self.metrics = Metrics(options.names[0], llm.config.max_model_len)
        self.metrics.watch(llm)
        self.gate = Gate(llm.config.max_num_seqs + options.max_queue)
        self.engine = EngineThread(llm.session, self.metrics)
        self.pool = ThreadPoolExecutor(2, thread_name_prefix="dovetail-text")
        self.bulk = ThreadPoolExecutor(1, thread_name_prefix="dovetail-bulk")
        self.compilers = ThreadPoolExecutor(AT_ONCE + 2 * WAITING, thread_name_prefix="dovetail-form")
        self.intake = Intake(llm)

    def close(self) -> None:
        self.engine.stop()
        for pool in (self.pool, self.bulk, self.compilers):
            pool.shutdown(wait=False, cancel_futures=True)
        self.llm.session.grammars.close()

    async def aside(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run `function` in another thread, so that it does not block the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, function, *arguments)

    async def read(self, request: ChatRequest | CompletionRequest, size: int) -> Asked:
        """`Intake.read` for a body of `size` bytes. Schemas of a large one take seconds to check."""
        if size <= LARGE_BODY:
            return self.intake.read(request)
        return await self.tokenizing(size, self.intake.read, request)

    async def tokenizing(self, size: int, function: Callable[..., T], *arguments: Any) -> T:
        """The same for a body of `size` bytes. Large ones wait for each other, small ones for no large one."""
        pool = self.pool if size <= LARGE_BODY else self.bulk
        return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)

    async def compiled(self, asked: Asked) -> Grammar | None:
        """`Intake.compile` in a thread of its own kind, so that a form that takes long delays no other request."""
        if asked.params.structured_outputs is None:
            return None
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.compilers, self.intake.compile, asked)

    def check(self, request: GenerationRequest) -> list[str]:
        """Check the fields that every route has. Returns the names of those that mean nothing here."""
        self.check_model(request.model)
        check_common(request)
        ignored = list(sort_extra(request))
        for name in ignored:
            if self.metrics.unknown_field(name[:64]):
                _LOG.warning("request field %r means nothing here and is ignored", name[:64])
        return ignored

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self.options.names:
            served = ", ".join(self.options.names)
            raise NotFound(f"the model '{name}' is not served here; the names are {served}", param="model")

    def root(self) -> str:
        """From where clients can load the model's tokenizer: a folder, or a Hugging Face id."""
        if self._root is None:
            self._root = self._find_root()
        return self._root

    def _find_root(self) -> str:
        name, path = self.llm.config.model, self.llm.checkpoint.path
        if path.is_dir():
            return str(path.resolve()) if Path(name).expanduser().is_dir() else name
        try:
            where = export_tokenizer(self.llm.tokenizer, self.llm.checkpoint.config, home() / "tokenizers")
            return str(where.resolve())
        except ModelError as error:
            _LOG.warning("%s; clients must be told where the tokenizer is", error)
            return name

    def seed(self) -> int | None:
        """A seed for a request that has none. None if the engine's own seed was chosen: then the order of requests
        decides."""
        return secrets.randbits(63) if self.llm.config.seed == 0 else None

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
