"""What the routes share: the model, the engine's thread, the gate, and the way from a prompt to a job."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from dovetail.core.errors import RequestError
from dovetail.core.sampling import SamplingParams
from dovetail.llm import LLM
from dovetail.outputs import Answer
from dovetail.server.engine_thread import EngineThread
from dovetail.server.errors import NotFound
from dovetail.server.gate import Gate
from dovetail.server.job import Job
from dovetail.server.metrics import Metrics
from dovetail.server.params import check_common
from dovetail.server.protocol import GenerationRequest, sort_extra

_LOG = logging.getLogger(__name__)
T = TypeVar("T")

Prompt = str | list[int]


@dataclass(frozen=True)
class ServiceOptions:
    """How a model is offered. `names` are what clients may call it; the first is what it calls itself."""

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
        pieces = llm.tokenizer.backend.get_vocab(with_added_tokens=True)
        self._longest_piece = max(map(len, pieces), default=1)

    def close(self) -> None:
        self.engine.stop()
        self.pool.shutdown(wait=False, cancel_futures=True)

    async def aside(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run `function` where it does not hold up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, function, *arguments)

    def name(self, request: GenerationRequest) -> str:
        """Check the fields that every route has; the name the model was asked for by."""
        if request.model is not None and request.model not in self.options.names:
            raise NotFound(f"the model '{request.model}' is not served here", param="model")
        check_common(request)
        for name in sort_extra(request):
            if self.metrics.unknown_field(name[:64]):
                _LOG.warning("request field %r means nothing here and is ignored", name[:64])
        return request.model or self.options.names[0]

    def prepare(
        self, prompts: Sequence[Prompt], params: SamplingParams, request: GenerationRequest
    ) -> list[Answer]:
        """Tokenized and checked answers, one per prompt. Takes a while for long prompts."""
        identity = uuid.uuid4().hex
        answers = []
        for i, prompt in enumerate(prompts):
            self._check_length(prompt)
            text, ids = prompt, prompt
            if isinstance(prompt, str) and request.add_special_tokens is False:
                ids = self.llm.tokenizer.encode(prompt, add_special_tokens=False)
            answer = self.llm.session.prepare(ids, params, f"{identity}-{i}")
            answer.prompt = text if isinstance(text, str) else None
            for stream in answer.streams:
                stream.request.salt = request.cache_salt or ""
            answers.append(answer)
        return answers

    @contextlib.asynccontextmanager
    async def running(self, answers: Sequence[Answer], streaming: bool, arrival: float) -> AsyncIterator[Job]:
        """The answers as a job that the engine has accepted; on leaving, whatever still runs of it is aborted."""
        job = Job(answers, streaming, arrival)
        self.engine.submit(job)
        try:
            await job.accepted()
            yield job
        finally:
            self.engine.abort(job)

    def _check_length(self, prompt: Prompt) -> None:
        """Refuse what cannot fit before the work of tokenizing or copying it."""
        limit = self.llm.config.max_model_len
        unit, least = ("characters", self._longest_piece) if isinstance(prompt, str) else ("tokens", 1)
        if len(prompt) > limit * least:
            raise RequestError(
                f"the prompt has {len(prompt)} {unit}, but the context holds {limit} tokens", param="prompt"
            )
