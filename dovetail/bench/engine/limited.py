"""How fast a batch decodes when memory for KV is limited.

All prompts are submitted at once. Those that fit are computed and then decode together; the others wait, as in a
server. Steps are timed in which all requests that fit do nothing but decode.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dovetail.core.errors import RequestError
from dovetail.core.sampling import SamplingParams

if TYPE_CHECKING:
    from dovetail.llm import LLM

WARM = 3  # tokens that every request has before the first timed step


@dataclass(frozen=True)
class Decoded:
    """Timed steps: `rate` in tokens per second, from the median step; `batch` requests; and the mean bytes of KV
    that came from the slow tier for each token."""

    rate: float
    batch: int
    bytes_in: float


class Batch:
    """Prompts (lists of tokens) that one engine is answering. `close` gives them up."""

    def __init__(self, llm: LLM, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        self.llm = llm
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        session = llm.session
        self.answers = [session.submit(session.prepare(list(prompt), params)) for prompt in prompts]

    @property
    def _running(self) -> list[int]:
        """Tokens that each running request has brought."""
        return [r.num_output for r in self.llm.engine.scheduler.running]

    def settle(self) -> None:
        """Step until everything that fits decodes. RequestError if a request fails or if all requests end."""
        while not self._running or min(self._running) < WARM:
            self._step()

    def decode(self, steps: int) -> Decoded:
        """Time so many steps. RequestError as in `settle`, and if requests start or end meanwhile."""
        self.settle()
        batch, before = len(self._running), self._bytes_in()
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            self._step()
            seconds.append(time.perf_counter() - start)
            if len(self._running) != batch:
                raise RequestError(f"{batch} requests decoded, and {len(self._running)} after a step of theirs")
        moved = self._bytes_in() - before
        return Decoded(batch / statistics.median(seconds), batch, moved / steps / batch)

    def close(self) -> None:
        for answer in self.answers:
            if not answer.finished:
                self.llm.session.abort(answer)
        while self.llm.session.busy:
            self.llm.session.step()

    def _step(self) -> None:
        if not self.llm.session.busy:
            raise RequestError("all requests have ended before they were timed; give them more tokens")
        self.llm.session.step()
        for answer in self.answers:
            if answer.error is not None:
                raise RequestError(f"a request of the batch failed: {answer.error}")

    def _bytes_in(self) -> float:
        return self.llm.slow_tier().get("bytes_in", 0.0)
