"""What a caller gets back: what each step brings to an answer, and the answer so far in vLLM's shapes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from dovetail.core.engine import Progress
from dovetail.core.sampling import SamplingParams
from dovetail.core.types import Request, TokenLogprobs
from dovetail.text.detokenizer import Detokenizer
from dovetail.text.tokenizer import Tokenizer
from dovetail.tools.use import ToolUse


@dataclass(frozen=True)
class Logprob:
    """A token's natural log-probability, its rank (1 is the likeliest) and its name (`Tokenizer.token_name`)."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True)
class Metrics:
    """Seconds, by the session's clock. `ttft` is None before the first token; `tokens_per_s` counts tokens after
    the first."""

    arrival: float
    ttft: float | None
    latency: float | None
    tokens_per_s: float | None


@dataclass
class CompletionOutput:
    """One of the n answers. message: in a chat, the assistant's message with its tool calls, ready for the next
    request. `text` is what the model wrote."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    cumulative_logprob: float | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    message: dict[str, Any] | None = None


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

    Text that could still become a stop string is held back until it cannot. A stop string may spell control
    tokens: they count where it is looked for, whether the text shows them or not.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        p = request.params
        self.request = request
        self.tokenizer = tokenizer
        self.detokenizer = Detokenizer(tokenizer, p.skip_special_tokens, request.prompt, p.shown_token_ids)
        spelled = tokenizer.control_tokens_in(p.stops).items()
        self._unshown = {token: text for token, text in spelled if token in self.detokenizer.skipped}
        self.text = ""
        self.ready = 0  # characters of text that will not change
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.unheard = False  # whether the last token stopped the answer and is not part of the text
        self.first_token: float | None = None  # when it first gained tokens
        self.last_token: float | None = None
        self._names: list[dict[int, Logprob]] = []
        self._read = ""  # where stop strings are looked for: the text, with the control tokens that they spell
        self._gaps: list[tuple[int, int]] = []  # where those are in it
        self._stoppable = 0  # stop strings may be found from this character on
        self._margin = max((len(s) for s in p.stops), default=1) - 1
        self._sorted = sorted(p.stops)

    def push(self, progress: Progress) -> None:
        """Take the tokens of a step. Sets finish_reason when the answer is complete."""
        reason, tokens = self.request.finish_reason, progress.tokens
        for i, token in enumerate(tokens):
            self.token_ids.append(token)
            if progress.logprobs:
                self.logprobs += progress.logprobs[i : i + 1]
            if reason == "stop" and self.request.stop_reason == token and i + 1 == len(tokens):
                self.unheard = True
            else:
                self._add(self._unshown.get(token) or self.detokenizer.push(token), token in self._unshown)
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
        """The id that ended the answer, unless it is the model's own end of sequence."""
        reason = self.request.stop_reason
        return reason if isinstance(reason, int) and reason in (self.request.params.stop_token_ids or ()) else None

    def _add(self, piece: str, unshown: bool = False) -> None:
        params = self.request.params
        self.text += "" if unshown else piece
        if not params.stops:
            self.ready = len(self.text)
            return
        before = len(self._read)
        self._read += piece
        if unshown:
            self._gaps.append((before, len(self._read)))
        if len(self.token_ids) <= params.min_tokens:  # this text was shown and cannot be taken back
            self._stoppable, self.ready = len(self._read), len(self.text)
            return
        start = max(self._stoppable, before - self._margin)
        found = [(at, s) for s in params.stops if (at := self._read.find(s, start)) >= 0]
        if found:
            at, stop = min(found)
            self.text = self.text[: self._shown(at)] + (stop if params.include_stop_str_in_output else "")
            self.close("stop", stop)
            return
        self.ready = self._shown(len(self._read) - self._held())

    def _shown(self, at: int) -> int:
        """How many characters of the text come before character `at` of what is read."""
        return at - sum(min(at, end) - begin for begin, end in self._gaps if begin < at)

    def _held(self) -> int:
        """Length of the longest tail that begins a stop string."""
        for n in range(min(self._margin, len(self._read) - self._stoppable), 0, -1):
            tail = self._read[-n:]
            # Stops that begin with the tail follow it in this order; the tail itself is no stop, or it were found.
            after = bisect_left(self._sorted, tail)
            if after < len(self._sorted) and self._sorted[after].startswith(tail):
                return n
        return 0


def named(entry: TokenLogprobs, tokenizer: Tokenizer) -> dict[int, Logprob]:
    """The chosen token first, then the likeliest ones, in vLLM's form."""
    out = {entry.token: Logprob(entry.logprob, entry.rank, tokenizer.token_name(entry.token))}
    for rank, (token, logprob) in enumerate(entry.top, 1):
        out.setdefault(token, Logprob(logprob, rank, tokenizer.token_name(token)))
    return out


@dataclass(slots=True)
class Delta:
    """What a choice gained: in one step, in several, or in all of them.

    index: the choice's number in the answer. time: when it came, by the session's clock. waited: seconds since the
    choice's last tokens, or since the request's arrival. last: the whole answer has ended with this delta.
    """

    answer: Answer
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]  # one per token, or none at all
    finish_reason: str | None
    stop_reason: int | str | None
    time: float
    waited: float = 0.0
    last: bool = False

    @property
    def choice(self) -> int:
        """The choice's number in a body that asks for several answers."""
        return self.answer.first_choice + self.index

    @property
    def stream(self) -> Stream:
        return self.answer.streams[self.index]

    def add(self, later: Delta) -> None:
        """Add what the same choice gained later."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason
        self.time, self.last = later.time, later.last


def text_of(deltas: Iterable[Delta]) -> str:
    """The text that one choice gained."""
    return "".join([d.text for d in deltas])


@dataclass(eq=False)
class Answer:
    """A request of a user with its n choices, a stream each. Times are those of the session's clock."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    streams: list[Stream]
    tokenizer: Tokenizer
    arrival: float
    score_from: int = 1
    first_choice: int = 0  # the number of its first choice in a body that asks for several answers
    first_token: float | None = None
    last_token: float | None = None
    prompt_scores: list[TokenLogprobs] = field(default_factory=list)
    prompt_names: list[dict[int, Logprob]] = field(default_factory=list)  # of prompt_scores, as far as shown
    unread: list[Delta] | None = None  # for `Session.follow`, which other threads' steps serve too
    error: str | None = None
    tools: ToolUse | None = None  # of a chat

    @property
    def finished(self) -> bool:
        return all(s.finish_reason is not None for s in self.streams)

    def push(self, progress: Progress, now: float) -> Delta | None:
        """Take what a step brought to one of the streams. None if nothing of it can be shown yet."""
        if progress.error is not None:
            self.error = progress.error
        if progress.prompt_logprobs and progress.request.index == 0:
            self.prompt_scores += progress.prompt_logprobs
        stream = self.streams[progress.request.index]
        ready, count = stream.ready, len(stream.token_ids)
        stream.push(progress)
        if stream.finish_reason is None and (stream.ready, len(stream.token_ids)) == (ready, count):
            return None
        return self._gained(stream, ready, count, now)

    def close(self, reason: str, now: float) -> list[Delta]:
        """End the streams that still run, and show the text that they held back."""
        gained = []
        for stream in self.streams:
            if stream.finish_reason is None:
                ready = stream.ready
                stream.close(reason)
                gained.append(self._gained(stream, ready, len(stream.token_ids), now))
        return gained

    def whole(self) -> list[Delta]:
        """All that each choice has gained so far."""
        return [
            Delta(
                self, s.request.index, s.text[: s.ready], list(s.token_ids), list(s.logprobs), s.finish_reason,
                s.stop_reason, self.arrival if s.last_token is None else s.last_token,
            )
            for s in self.streams
        ]  # fmt: skip

    def output(self) -> RequestOutput:
        """The answer so far, as a copy that does not change."""
        scores: list[dict[int, Logprob] | None] | None = None
        if self.params.prompt_logprobs is not None:
            new = self.prompt_scores[len(self.prompt_names) :]
            self.prompt_names += [named(entry, self.tokenizer) for entry in new]
            scores = [*[None] * self.score_from, *self.prompt_names]
        outputs = [s.output() for s in self.streams]
        for output in outputs:
            output.message = None if self.tools is None else self.tools.message(output.text)
        return RequestOutput(
            self.request_id, self.prompt, self.prompt_token_ids, outputs, scores,
            max(0, self.streams[0].request.cached_tokens), self.metrics(), self.finished, self.error,
        )  # fmt: skip

    def metrics(self) -> Metrics:
        if self.first_token is None or self.last_token is None:
            return Metrics(self.arrival, None, None, None)
        count = sum(len(s.token_ids) for s in self.streams) - len(self.streams)
        busy = self.last_token - self.first_token
        rate = count / busy if count > 0 and busy > 0 else None
        return Metrics(self.arrival, self.first_token - self.arrival, self.last_token - self.arrival, rate)

    def _gained(self, stream: Stream, ready: int, count: int, now: float) -> Delta:
        """What a stream gained since it had `ready` characters and `count` tokens."""
        tokens, ended = stream.token_ids[count:], stream.finish_reason is not None
        since = self.arrival if stream.last_token is None else stream.last_token
        if tokens:
            stream.last_token = self.last_token = now
            if stream.first_token is None:
                stream.first_token = now
            if self.first_token is None:
                self.first_token = now
        delta = Delta(
            self, stream.request.index, stream.text[ready : stream.ready], tokens, stream.logprobs[count:],
            stream.finish_reason, stream.stop_reason, now, now - since, ended and self.finished,
        )  # fmt: skip
        if self.unread is not None:
            self.unread.append(delta)
        return delta
