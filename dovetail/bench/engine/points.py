"""The fixed points at which an engine is timed, and one timed run.

A point is `streams` requests of `prompt` tokens at once, each answered greedily with exactly `tokens` tokens.
Prompts are new random token ids every time. So no prefix cache helps, and the context is really computed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dovetail.core.errors import RequestError
from dovetail.core.pages import pages_for
from dovetail.core.sampling import SamplingParams

if TYPE_CHECKING:
    from dovetail.config import Config
    from dovetail.llm import LLM

PREFILL, DECODE, STREAMS = "prefill_tokens_per_s", "decode_tokens_per_s", "streams_tokens_per_s"
STREAM_CONTEXT = 105  # tokens of a stream's context, on average over its answer


@dataclass(frozen=True)
class Point:
    """figure: what is measured at this point. size: the number that tells points of one figure apart."""

    figure: str
    size: int
    prompt: int
    tokens: int
    streams: int = 1

    @property
    def path(self) -> tuple[str, str]:
        """Its place in a result."""
        return self.figure, str(self.size)


def points(quick: bool) -> list[Point]:
    """All points: prompts of several lengths, one request at several contexts, several requests at once."""
    alone, together = (16, 32) if quick else (64, 64)
    return [
        *(Point(PREFILL, n, n, 1) for n in (128, 512, 2048)),
        *(Point(DECODE, c, c, alone) for c in (16, 1024, 4096)),
        *(Point(STREAMS, n, STREAM_CONTEXT - together // 2, together, n) for n in (8, 32)),
    ]


def obstacle(at: Point, config: Config) -> str | None:
    """Why the point cannot be measured on an engine, or None."""
    total = at.prompt + at.tokens
    if total > config.max_model_len:
        return f"takes {total} tokens of context, and max_model_len is {config.max_model_len}"
    if at.streams > config.max_num_seqs:
        return f"takes {at.streams} requests at once, and max_num_seqs is {config.max_num_seqs}"
    # The last request is admitted only if one more page is free for each of the others.
    pages = at.streams * pages_for(total, config.block_size) + at.streams - 1
    if pages > config.num_kv_pages:
        return f"takes {pages} pages of KV, and kv_memory holds {config.num_kv_pages}"
    return None


class Prompts:
    """New random token ids, the same ones in every run of the program."""

    def __init__(self, vocab_size: int) -> None:
        self._random = random.Random(0)
        # special tokens lie at both ends of a vocabulary
        self._low, self._high = min(1000, vocab_size // 4), vocab_size * 9 // 10

    def take(self, tokens: int, streams: int = 1) -> list[list[int]]:
        """`streams` prompts of `tokens` tokens."""
        return [[self._random.randrange(self._low, self._high) for _ in range(tokens)] for _ in range(streams)]


@dataclass(frozen=True)
class Timing:
    """One run. first: seconds until every request had its first token.

    The other fields are about the time from then until the first request had its last token, in which all of them
    run. waits: seconds of each token of a single request, which is a step's time divided among the tokens that it
    brought. `step` is 0 if there is no such time: one token each, or a request that ended before another began.
    """

    first: float
    rate: float = 0.0  # tokens per second, of all requests
    step: float = 0.0  # seconds
    tokens_per_step: float = 0.0  # of one request
    waits: tuple[float, ...] = ()


def measure(llm: LLM, prompts: Sequence[Sequence[int]], tokens: int) -> Timing:
    """Answer prompts at once with `tokens` tokens each. RequestError if a request fails."""
    session, params = llm.session, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    start = time.perf_counter()
    answers = [session.submit(session.prepare(prompt, params)) for prompt in prompts]
    events: list[tuple[float, list[int]]] = []
    while session.busy:
        session.step()
        events.append((time.perf_counter(), [len(a.streams[0].token_ids) for a in answers]))
    for answer in answers:
        if answer.error is not None:
            raise RequestError(f"a prompt of random tokens could not be answered: {answer.error}")
    began = next(i for i, (_, counts) in enumerate(events) if all(counts))
    ended = next(i for i, (_, counts) in enumerate(events) if max(counts) == tokens)
    first = events[began][0] - start
    if ended <= began:
        return Timing(first)
    seconds = events[ended][0] - events[began][0]
    count = sum(events[ended][1]) - sum(events[began][1])
    steps = ended - began
    waits = _waits(events[began : ended + 1]) if len(prompts) == 1 else ()
    return Timing(first, count / seconds, seconds / steps, count / steps / len(prompts), waits)


def _waits(events: Sequence[tuple[float, list[int]]]) -> tuple[float, ...]:
    waits: list[float] = []
    since, before = events[0][0], events[0][1][0]
    for now, (count,) in events[1:]:
        if more := count - before:
            waits += [(now - since) / more] * more
            since, before = now, count
    return tuple(waits)


def exercise(llm: LLM) -> None:
    """Run a prompt of 512 tokens and a short answer, or as much of them as the context holds."""
    tokens = min(16, llm.config.max_model_len // 2)
    prompt = min(512, llm.config.max_model_len - tokens)
    measure(llm, Prompts(llm.session.vocab_size).take(prompt), tokens)
