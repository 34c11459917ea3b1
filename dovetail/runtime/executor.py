"""The default Executor: the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from dovetail.core.seams import WALL_CLOCK, Clock
from dovetail.core.types import Span, SpanResult, StepPlan, StepResult
from dovetail.host.lazy_torch import torch
from dovetail.runtime.batch import BatchBuilder
from dovetail.runtime.kv import KV
from dovetail.runtime.model import Model
from dovetail.runtime.sampler import Logits, by_span, prompt_logprobs, rows_of, sample

if TYPE_CHECKING:
    from torch import Tensor


class ModelExecutor:
    """Runs a plan on a model: page moves, then one call for each distinct callable of the program, then sampling.

    Spans are grouped by callable, not by stage, so requests at different depths of a tied program share a call.
    """

    def __init__(self, model: Model, kv: KV, builder: BatchBuilder) -> None:
        self.model = model
        self.kv = kv
        self.builder = builder
        self.num_stages = len(model.program)
        self.clock: Clock = WALL_CLOCK
        self.calls = 0
        self._carry: dict[str, Tensor] = {}

    def run(self, plan: StepPlan) -> StepResult:
        with torch.inference_mode():
            return self._run(plan)

    def _run(self, plan: StepPlan) -> StepResult:
        self.kv.begin(plan)
        for request_id in plan.released:
            self._carry.pop(request_id, None)
        hidden: dict[int, Tensor] = {}
        for members in self._by_callable(plan.spans):
            hidden.update(self._call(members, [plan.spans[i] for i in members]))
        return StepResult(self._finish(plan.spans, hidden))

    def _by_callable(self, spans: Sequence[Span]) -> list[list[int]]:
        groups: dict[int, list[int]] = {}
        for i, span in enumerate(spans):
            groups.setdefault(id(self.model.program[span.stage]), []).append(i)
        return list(groups.values())

    def _call(self, members: Sequence[int], spans: Sequence[Span]) -> dict[int, Tensor]:
        """Run one stage for spans. Returns the hidden rows of those whose program is done."""
        batch = self.builder.build(spans)
        if all(s.stage == 0 for s in spans):
            hidden = self.model.embed(batch.tokens)
        else:
            embedded = self.model.embed(batch.tokens).split([s.num_rows for s in spans])
            hidden = torch.cat(
                [self._carry.pop(s.request.id) if s.stage else e for s, e in zip(spans, embedded, strict=True)]
            )
        hidden = self.model.program[spans[0].stage](hidden, batch, self.kv)
        self.calls += 1
        done = {}
        pieces = hidden.split([s.num_rows for s in spans])
        for i, span, piece in zip(members, spans, pieces, strict=True):
            if span.stage + 1 < self.num_stages:
                self._carry[span.request.id] = piece
            else:
                done[i] = piece
        return done

    def _finish(self, spans: Sequence[Span], hidden: dict[int, Tensor]) -> list[SpanResult]:
        """Sample where the plan says so, and score prompts where a request asks for it."""
        sampled = [i for i, s in enumerate(spans) if s.sample]
        results = [SpanResult()] * len(spans)
        if sampled:
            counts = [spans[i].sample for i in sampled]
            last = torch.cat([hidden[i][-n:] for i, n in zip(sampled, counts, strict=True)])
            rows = [row for i in sampled for row in rows_of(spans[i])]
            chosen = sample(self.model.logits(last), rows)
            for i, result in zip(sampled, by_span(counts, *chosen), strict=True):
                results[i] = result
        for i, span in enumerate(spans):
            if span.request.params.prompt_logprobs is not None and i in hidden:
                scores = prompt_logprobs(span, partial(self._logits_of, hidden[i]))
                results[i] = replace(results[i], prompt_logprobs=tuple(scores))
        return results

    def _logits_of(self, hidden: Tensor, rows: list[int]) -> Logits:
        logits: Logits = self.model.logits(hidden[rows]).cpu().numpy()
        return logits
