"""Requests of users on one engine, from prompts and parameters to answers. Threads take turns."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from dovetail.config import Config
from dovetail.core.engine import Engine
from dovetail.core.errors import RequestError
from dovetail.core.pages import PageTable
from dovetail.core.sampling import SamplingParams
from dovetail.core.structured import StructuredOutputs
from dovetail.core.types import Probe, Request
from dovetail.host.interrupts import uninterrupted
from dovetail.host.turns import Turns
from dovetail.outputs import Answer, Delta, Stream
from dovetail.structured.cache import Grammars
from dovetail.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dovetail.structured.compiler import Compiler

T = TypeVar("T")

_MASK = 2**64 - 1
SERVING = Probe()  # nothing is measured


class Session:
    """Submits, steps and aborts. Every submitted answer ends with a finish reason exactly once.

    Several threads may use it: each of these calls is a turn of its own, and a step advances all answers. Code
    that reads an answer while another thread may step must hold `turns`. ForkError in a forked child. Times are
    read from `clock`, which belongs to the executor.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, config: Config, vocab_size: int) -> None:
        self.engine = engine
        self.clock = engine.clock
        self.tokenizer = tokenizer
        self.config = config
        self.vocab_size = vocab_size
        self.eos_ids = frozenset(tokenizer.eos_ids)
        self.grammars = Grammars(lambda: _compiler(tokenizer, vocab_size))
        self.answers: dict[str, Answer] = {}  # running answers by id
        self._owners: dict[Request, Answer] = {}  # the answer to which a running request belongs
        self.turns = Turns()
        self._late: list[tuple[Answer, str]] = []  # to be ended before the next step
        self._count = itertools.count()
        self.begun: Callable[[], None] | None = None  # called once, when the first answer has begun

    @property
    def busy(self) -> bool:
        return self.engine.busy

    def prepare(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        request_id: str = "",
        probe: Probe = SERVING,
    ) -> Answer:
        """Check a prompt and its parameters, and build the answer. Nothing is queued yet.

        A string is tokenized with the model's special tokens. A form of the answer that is not known yet is
        compiled, which may take seconds. Raises RequestError, which names the field. Safe to call from any thread.
        """
        text = prompt if isinstance(prompt, str) else None
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else token_ids(prompt)
        self._check(ids, params)
        _check_probe(probe, ids, params)
        number = next(self._count)
        request_id = request_id or f"request-{number}"
        seed = params.seed if params.seed is not None else mix(self.config.seed, number)
        requests = [
            self._request(f"{request_id}/{i}", ids, params, mix(seed, i) if i else seed) for i in range(params.n)
        ]
        for i, r in enumerate(requests):
            r.index = i
            r.fork_of = requests[0] if i else None
            if probe.dense_until >= 0:
                r.dense_until = probe.dense_until
            r.scored, r.observe = probe.score_from - 1, probe.observe
        if params.structured_outputs is not None:
            self._constrain(requests, params.structured_outputs)
        streams = [Stream(r, self.tokenizer) for r in requests]
        return Answer(
            request_id, text, ids, params, streams, self.tokenizer, self.clock.now(), score_from=probe.score_from
        )

    def submit(self, answer: Answer, arrival: float | None = None) -> Answer:
        """Queue the answer. If it can never run, raises RequestError or CapacityError and queues nothing.

        arrival: when it was asked for, by the session's clock; None is now.
        """
        with self.turns:
            return self._submit(answer, arrival)

    def step(self) -> list[Delta]:
        """Run one step of the engine. Returns what each choice gained."""
        with self.turns:
            gained = []
            while self._late:
                gained += self._abort(*self._late.pop())
            return gained + self._step()

    def abort(self, answer: Answer, reason: str = "abort") -> list[Delta]:
        """End an answer now, and return the ends of its choices. Its pages are free when this returns.

        If the garbage collector calls this during a step, the answer ends with the next step.
        """
        if answer.finished:
            return []
        if self.turns.mine:
            self._late.append((answer, reason))
            return []
        with self.turns:
            return self._abort(answer, reason)

    def follow(self, answer: Answer, show: Callable[[list[Delta]], T]) -> Generator[T]:
        """Submit an answer and step until it has ended. After each step, yield `show` of what it gained.

        Steps of other threads serve it too, so a choice may gain several tokens at once or none. `show` is called
        while nothing changes. If the reader stops, the answer is aborted.
        """
        answer.unread = []
        self.submit(answer)
        ended = False
        try:
            while not ended:
                if not answer.finished:  # another thread's step or an abort may have ended it
                    with uninterrupted():
                        self.step()
                with self.turns:
                    ended, gained, answer.unread = answer.finished, answer.unread or [], []
                    shown = show(gained)
                yield shown
        finally:
            self.abort(answer)

    def _submit(self, answer: Answer, arrival: float | None) -> Answer:
        if answer.request_id in self.answers:
            raise RequestError(f"a request with id '{answer.request_id}' is already running", param="request_id")
        requests = [s.request for s in answer.streams]
        for i, request in enumerate(requests):
            try:
                self.engine.add(request)
            except Exception:
                for earlier in requests[:i]:
                    self.engine.abort(earlier)
                raise
        answer.arrival = self.clock.now() if arrival is None else arrival
        self.answers[answer.request_id] = answer
        self._owners.update(dict.fromkeys(requests, answer))
        return answer

    def _step(self) -> list[Delta]:
        gained = []
        progress = self.engine.step()
        now = self.clock.now()
        for p in progress:
            answer = self._owners[p.request]
            delta = answer.push(p, now)
            if delta is None:
                continue
            gained.append(delta)
            if delta.finish_reason is not None:
                self.engine.abort(p.request, delta.finish_reason)  # a stop string is the stream's to find
                del self._owners[p.request]
            if delta.last:
                del self.answers[answer.request_id]
        if gained and self.begun is not None:
            begun, self.begun = self.begun, None
            begun()
        return gained

    def _abort(self, answer: Answer, reason: str) -> list[Delta]:
        for stream in answer.streams:
            self.engine.abort(stream.request, reason)
            self._owners.pop(stream.request, None)
        if self.answers.get(answer.request_id) is answer:
            del self.answers[answer.request_id]
        return answer.close(reason, self.clock.now())

    def _request(self, request_id: str, ids: list[int], params: SamplingParams, seed: int) -> Request:
        limit = self.config.max_model_len
        total = limit if params.max_tokens is None else len(ids) + params.max_tokens
        stops = frozenset(params.stop_token_ids or ()) | (frozenset() if params.ignore_eos else self.eos_ids)
        known = frozenset(t for t in stops if t < self.vocab_size)  # a tokenizer may know more than the model
        return Request(
            request_id, ids, params, PageTable(self.engine.pool), max_total=total, seed=seed, stop_ids=known
        )

    def _constrain(self, requests: Sequence[Request], form: StructuredOutputs) -> None:
        """Let requests say only what the form allows. Where it is complete, a special token may end the answer."""
        grammar = self.grammars.compile(form)
        for r in requests:
            r.constraint = grammar.matcher(r.stop_ids & (self.eos_ids | self.tokenizer.special_ids))

    def _check(self, ids: Sequence[int], params: SamplingParams) -> None:
        size = self.vocab_size
        for name, values in (
            ("prompt", ids),
            ("logit_bias", params.logit_bias or ()),
            ("stop_token_ids", params.stop_token_ids or ()),
        ):
            for t in values:
                if isinstance(t, bool) or not isinstance(t, int) or not 0 <= t < size:
                    raise RequestError(f"{name}: token id {t!r} is not in the vocabulary of {size}", param=name)


def _compiler(tokenizer: Tokenizer, size: int) -> Compiler:
    from dovetail.structured.compiler import Compiler  # most sessions need none
    from dovetail.structured.vocabulary import Vocabulary

    return Compiler(Vocabulary.of(tokenizer, size))


def _check_probe(probe: Probe, ids: Sequence[int], params: SamplingParams) -> None:
    if probe.dense_until < -1:
        raise RequestError(f"dense_until must be a position or -1, got {probe.dense_until}", param="dense_until")
    if not 1 <= probe.score_from <= max(1, len(ids)):
        raise RequestError(
            f"score_from must be between 1 and the prompt's {len(ids)} tokens, got {probe.score_from}",
            param="score_from",
        )
    if probe.observe is not None and params.prompt_logprobs is None:
        raise RequestError("observe is shown what prompt_logprobs score; set prompt_logprobs=0", param="observe")


def token_ids(values: Iterable[Any]) -> list[int]:
    """Token ids from any sequence of whole numbers (numpy's and torch's too). RequestError names anything else."""
    if isinstance(values, (bytes, Mapping)):
        raise RequestError(f"a prompt is a string or token ids, got {type(values).__name__}", param="prompt")
    try:
        items = list(values)
    except TypeError:
        raise RequestError(f"a prompt is a string or token ids, got {values!r}", param="prompt") from None
    out = []
    for item in items:
        try:
            if isinstance(item, bool):
                raise TypeError
            out.append(operator.index(item))
        except TypeError:
            raise RequestError(f"prompt: {item!r} is no token id", param="prompt") from None
    return out


def mix(seed: int, number: int) -> int:
    """A seed for request `number` of several that share `seed`."""
    x = ((seed & _MASK) * 0x9E3779B97F4A7C15 + (number + 1) * 0xBF58476D1CE4E5B9) & _MASK
    x ^= x >> 31
    return (x * 0x94D049BB133111EB) & _MASK
