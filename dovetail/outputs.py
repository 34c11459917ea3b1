"""What a caller gets back: text and tokens of one request, growing step by step. Shapes are vLLM's."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from dovetail.core.engine import Progress
from dovetail.core.sampling import SamplingParams
from dovetail.core.types import Request, TokenLogprobs
from dovetail.text.detokenizer import Detokenizer
from dovetail.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability (natural), rank (1 = most likely) and text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True)
class Metrics:
    """Seconds. `ttft` is None before the first token; `tokens_per_s` counts tokens after the first."""

    arrival: float
    ttft: float | None
    latency: float | None
    tokens_per_s: float | None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    cumulative_logprob: float | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    num_cached_tokens: int
    metrics: Metrics
    finished: bool
    error: str | None = None


class Stream:
    """One of the n answers: turns tokens into text and watches for stop strings.

    Text that could still become a stop string is held back until it cannot.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        p = request.params
        self.request = request
        self.tokenizer = tokenizer
        self.detokenizer = Detokenizer(
            tokenizer, skip_special_tokens=p.skip_special_tokens, prompt_ids=request.prompt
        )
        self.text = ""
        self.ready = 0  # characters of text that will not change
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._names: list[dict[int, Logprob]] = []
        self._stoppable = 0  # where text that stop strings may be found in begins
        self._margin = max((len(s) for s in p.stops), default=1) - 1

    def push(self, progress: Progress) -> None:
        """Take a step's tokens; sets finish_reason when the answer is complete."""
        reason, tokens = self.request.finish_reason, progress.tokens
        for i, token in enumerate(tokens):
            self.token_ids.append(token)
            if progress.logprobs:
                self.logprobs += progress.logprobs[i : i + 1]
            if not (reason == "stop" and self.request.stop_reason == token and i + 1 == len(tokens)):
                self._add(self.detokenizer.push(token))
            if self.finish_reason is not None:
                return
        if reason is not None:
            self._add(self.detokenizer.finish())
            self.close(self.finish_reason or reason, self.stop_reason or self._token_reason())

    def close(self, reason: str, stop_reason: int | str | None = None) -> None:
        self.finish_reason, self.stop_reason = reason, stop_reason
        self.ready = len(self.text)

    def output(self) -> CompletionOutput:
        logprobs, total = None, None
        if self.request.params.logprobs is not None:
            self._names += [named(entry, self.tokenizer) for entry in self.logprobs[len(self._names) :]]
            logprobs = list(self._names)
            total = sum(entry.logprob for entry in self.logprobs)
        return CompletionOutput(
            self.request.index, self.text[: self.ready], list(self.token_ids), logprobs, total,
            self.finish_reason, self.stop_reason,
        )  # fmt: skip

    def _token_reason(self) -> int | None:
        """The id that ended it, unless that is the model's own end of sequence."""
        reason = self.request.stop_reason
        return reason if isinstance(reason, int) and reason in (self.request.params.stop_token_ids or ()) else None

    def _add(self, piece: str) -> None:
        params = self.request.params
        before = len(self.text)
        self.text += piece
        if not params.stops:
            self.ready = len(self.text)
            return
        if len(self.token_ids) <= params.min_tokens:  # shown already, so it cannot be taken back later
            self._stoppable = self.ready = len(self.text)
            return
        start = max(self._stoppable, before - self._margin)
        found = [(at, s) for s in params.stops if (at := self.text.find(s, start)) >= 0]
        if found:
            at, stop = min(found)
            self.text = self.text[: at + (len(stop) if params.include_stop_str_in_output else 0)]
            self.close("stop", stop)
            return
        self.ready = len(self.text) - self._held()

    def _held(self) -> int:
        """Length of the longest tail that begins a stop string."""
        for n in range(min(self._margin, len(self.text) - self._stoppable), 0, -1):
            if any(s.startswith(self.text[-n:]) for s in self.request.params.stops if len(s) > n):
                return n
        return 0


def named(entry: TokenLogprobs, tokenizer: Tokenizer) -> dict[int, Logprob]:
    """The chosen token first, then the most likely ones, as vLLM has them."""
    out = {
        entry.token: Logprob(entry.logprob, entry.rank, tokenizer.decode([entry.token], skip_special_tokens=False))
    }
    for rank, (token, logprob) in enumerate(entry.top, 1):
        out.setdefault(token, Logprob(logprob, rank, tokenizer.decode([token], skip_special_tokens=False)))
    return out


@dataclass(eq=False)
class Answer:
    """A submitted request with its n streams."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    streams: list[Stream]
    tokenizer: Tokenizer
    score_from: int = 1
    arrival: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    last_token: float | None = None
    prompt_scores: list[TokenLogprobs] = field(default_factory=list)
    prompt_names: list[dict[int, Logprob]] = field(default_factory=list)  # of prompt_scores, as far as shown
    error: str | None = None

    @property
    def finished(self) -> bool:
        return all(s.finish_reason is not None for s in self.streams)

    def push(self, progress: Progress, now: float) -> None:
        """Take what a step brought to one of the streams."""
        if progress.error is not None:
            self.error = progress.error
        if progress.tokens:
            self.last_token = now
            if self.first_token is None:
                self.first_token = now
        if progress.prompt_logprobs and progress.request.index == 0:
            self.prompt_scores += progress.prompt_logprobs
        self.streams[progress.request.index].push(progress)

    def output(self) -> RequestOutput:
        """A snapshot; safe to keep."""
        scores: list[dict[int, Logprob] | None] | None = None
        if self.params.prompt_logprobs is not None:
            new = self.prompt_scores[len(self.prompt_names) :]
            self.prompt_names += [named(entry, self.tokenizer) for entry in new]
            scores = [*[None] * self.score_from, *self.prompt_names]
        return RequestOutput(
            self.request_id, self.prompt, self.prompt_token_ids, [s.output() for s in self.streams], scores,
            max(0, self.streams[0].request.cached_tokens), self.metrics(), self.finished, self.error,
        )  # fmt: skip

    def metrics(self) -> Metrics:
        if self.first_token is None or self.last_token is None:
            return Metrics(self.arrival, None, None, None)
        count = sum(len(s.token_ids) for s in self.streams) - len(self.streams)
        busy = self.last_token - self.first_token
        rate = count / busy if count > 0 and busy > 0 else None
        return Metrics(self.arrival, self.first_token - self.arrival, self.last_token - self.arrival, rate)
