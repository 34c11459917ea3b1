"""The loop: plan, run, commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dovetail.core.pages import PagePool
from dovetail.core.scheduler import Limits, Scheduler
from dovetail.core.seams import Drafter, Executor, Outcome, Seams
from dovetail.core.types import Request, Span, SpanResult, StepPlan, TokenLogprobs


@dataclass(slots=True)
class Progress:
    """What a step brought to one request. `request.finish_reason` is set when it has ended."""

    request: Request
    tokens: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    error: str | None = None


class Engine:
    """Requests in, tokens out, one step at a time. Not thread-safe: its caller, `Session`, takes turns."""

    def __init__(self, executor: Executor, pool: PagePool, seams: Seams, limits: Limits) -> None:
        self.executor = executor
        self.clock = executor.clock
        self.pool = pool
        self.seams = seams
        self.scheduler = Scheduler(pool, seams, limits, executor.num_stages)
        self.steps = 0
        self.last_plan = StepPlan(())
        self._outcomes: list[Outcome] | None = None if type(seams.drafter) is Drafter else []

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def add(self, request: Request) -> None:
        self.scheduler.add(request)

    def abort(self, request: Request, reason: str = "abort") -> None:
        """End a request now; its pages are free when this returns."""
        if request.finish_reason is None:
            self._end(request, reason)

    def step(self) -> list[Progress]:
        """Plan, run and commit one step."""
        plan = self.last_plan = self.scheduler.schedule()
        if not plan.spans:
            return []
        now = self.clock.now()
        for span in plan.spans:
            if span.request.started is None:
                span.request.started = now
        try:
            result = self.executor.run(plan)
        except BaseException:  # only the work of this step is lost; the caller decides how to go on
            self.scheduler.undo(plan)
            raise
        self.steps += 1
        seconds = self.clock.now() - now
        progress = [self._commit(s, r) for s, r in zip(plan.spans, result.spans, strict=True)]
        if self._outcomes is not None:
            self.scheduler.observe(self._outcomes, plan, seconds)
            self._outcomes = []
        return [p for p in progress if p is not None]

    def check(self) -> None:
        """Raise RuntimeError if a page leaked or is shared wrongly."""
        self.pool.check(self.scheduler.owners())

    def _commit(self, span: Span, result: SpanResult) -> Progress | None:
        request = span.request
        if result.error is not None and not result.tokens:
            return self._fail(request, result.error)
        request.stage = (span.stage + 1) % self.executor.num_stages
        if request.stage:
            return None
        request.scored += len(result.prompt_logprobs)
        if not span.sample:
            self.scheduler.commit(request, span.stop)
            scored = result.prompt_logprobs
            return Progress(request, prompt_logprobs=scored) if scored else None
        # A row that failed counts only if the drafts before it were right, and no token before it was the last.
        error = result.error if request.drafts[: len(result.tokens)] == list(result.tokens) else None
        tokens = self._accept(request, result.tokens)
        if error is not None and request.finish_reason is None:
            return self._fail(request, error, tokens)
        self.scheduler.commit(request, len(request.tokens) - 1)
        if request.finish_reason is not None:
            self._end(request, request.finish_reason)
        return Progress(request, tokens, result.logprobs[: len(tokens)], result.prompt_logprobs)

    def _fail(self, request: Request, error: str, tokens: Sequence[int] = ()) -> Progress:
        request.finish_reason = "error"
        if request.constraint is not None and request.constraint.error is not None:
            error = request.constraint.error
        self.scheduler.distrust(request)
        self.scheduler.leave(request)  # not stored: its KV is not to be trusted
        return Progress(request, tokens, error=error)

    def _end(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        self.scheduler.store(request)
        self.scheduler.leave(request)

    def _accept(self, request: Request, sampled: Sequence[int]) -> Sequence[int]:
        """The one acceptance rule: drafts are accepted up to the first that differs from the chosen token."""
        drafts, n = request.drafts, 0
        while n < len(drafts) and n < len(sampled) and drafts[n] == sampled[n]:
            n += 1
        stats = self.scheduler.stats
        if self._outcomes is not None:
            self._outcomes.append(Outcome(request, () if request.forced else tuple(drafts), n))
        if request.forced:
            stats.forced += n
        elif drafts or self._outcomes is not None:
            stats.count(len(drafts), n)
        if drafts:
            request.drafts, request.forced = [], False
        tokens = sampled[: n + 1]
        for i, token in enumerate(tokens):
            request.tokens.append(token)
            if token in request.stop_ids and request.num_output > request.params.min_tokens:
                request.finish_reason, request.stop_reason = "stop", token
            elif request.constraint is not None and request.constraint.commit(token):
                request.finish_reason = "stop"
            elif len(request.tokens) >= request.max_total:
                request.finish_reason = "length"
            if request.finish_reason is not None:
                return tokens[: i + 1]
        return tokens
