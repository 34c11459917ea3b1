"""Several answers to one prompt through the whole engine. The prompt's KV is read once for all, or once for
each."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from dovetail.core.errors import ConfigError
from dovetail.core.sampling import SamplingParams
from dovetail.core.types import StepPlan
from dovetail.llm import LLM
from dovetail.runtime.native import NativeExecutor

CHUNK = 128  # tokens that attention shares at a time


@dataclass
class Steps:
    """One run: seconds until every answer had its first token, and seconds of each later step that advances all of
    them. Then tokens of KV that the later steps read, would read without sharing, and must read."""

    first: float = 0.0
    each: list[float] = field(default_factory=list)
    read: int = 0
    unshared: int = 0
    expected: int = 0


class ParallelGeneration:
    """One engine with two executors over the same weights and KV: one reads shared KV once, one does not."""

    def __init__(self, model: str, prompt_tokens: int) -> None:
        self.llm = llm = LLM(model, enable_prefix_caching=False)
        llm.keep_packed()
        executor, config = llm.engine.executor, llm.config
        if not isinstance(executor, NativeExecutor):
            raise ConfigError("parallel generation is measured on the native kernels, which cannot be used here")
        apart = NativeExecutor(executor.model, executor.kv, config.kernels, config.threads, cascade=False)
        self.executors = {True: executor, False: apart}
        vocabulary = llm.session.vocab_size
        self.prompt = [(i * i + 7) % vocabulary for i in range(prompt_tokens)]

    def run(self, n: int, new_tokens: int, *, cascade: bool) -> Steps:
        """`n` sampled answers of `new_tokens` tokens each."""
        engine, session = self.llm.engine, self.llm.session
        engine.executor = executor = self.executors[cascade]
        params = SamplingParams(n=n, max_tokens=new_tokens, ignore_eos=True, seed=0)
        answer = session.submit(session.prepare(self.prompt, params))
        steps, start = Steps(), time.perf_counter()
        while not answer.finished:
            began = time.perf_counter()
            session.step()
            now = time.perf_counter()
            if steps.first and len(engine.last_plan.spans) == n:
                steps.each.append(now - began)
                stats = executor.program.attention_stats()
                steps.read += stats["tokens_read"]
                steps.unshared += stats["tokens_without_sharing"]
                steps.expected += self._expected(engine.last_plan, cascade and n > 1)
            if not steps.first and all(s.token_ids for s in answer.streams):
                steps.first = now - start
        return steps

    def _expected(self, plan: StepPlan, shared: bool) -> int:
        """Tokens to read: whole chunks of the shared pages once, everything else for each answer."""
        page = self.llm.config.block_size
        together = (len(self.prompt) - 1) // page * page // CHUNK * CHUNK if shared else 0
        return together + sum(span.stop - together for span in plan.spans)
