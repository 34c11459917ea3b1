"""The Executor of a recorded program: a step is a few calls into the native kernels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dovetail.core.pages import IntArray
from dovetail.core.seams import WALL_CLOCK, Clock, Codec, Residency, RowFilter, Seams, Selector
from dovetail.core.types import Span, SpanResult, StepPlan, StepResult, TokenLogprobs
from dovetail.ops import cpu
from dovetail.ops.attention.kernel_variant import kernel_variant
from dovetail.ops.template import TemplateError
from dovetail.runtime.kv import KV
from dovetail.runtime.native_sampler import choose
from dovetail.runtime.recorded import RecordedCodec, RecordedSelector
from dovetail.runtime.recorder import Recorder, connect
from dovetail.runtime.residency import Tiers
from dovetail.runtime.sampler import Row, by_span, known, prompt_logprobs


def recordable(model: Any, seams: Seams) -> bool:
    """Whether nothing in Python must act between two operations of a layer."""
    moves = isinstance(seams.residency, Tiers)
    if type(seams.rows) is not RowFilter or not (moves or type(seams.residency) is Residency):
        return False
    if not (type(seams.codec) is Codec or (moves and isinstance(seams.codec, RecordedCodec))):
        return False
    if not (type(seams.selector) is Selector or isinstance(seams.selector, RecordedSelector)):
        return False
    try:
        variants = {id(v): v for v in (block.attention.variant for block in model.blocks())}
        for variant in variants.values():
            kernel_variant(variant, model.geometry.num_heads)
    except TemplateError as error:
        warnings.warn(f"attention runs on the slow reference: {error}", stacklevel=2)
        return False
    return True


class NativeExecutor:
    """Runs plans on a model's recorded program.

    The stages of the program are recorded once, one range of operations for each distinct callable; a step
    lists its spans, and each range runs by one call on all threads. cascade: KV that several requests share is
    read once, which changes the time and not one bit of the result.
    """

    def __init__(self, model: Any, kv: KV, isa: str, threads: int, *, cascade: bool = True) -> None:
        self.model = model
        self.kv = kv
        self.num_stages = len(model.program)
        self.clock: Clock = WALL_CLOCK
        self.calls = 0
        shape = model.geometry
        heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
        self.program = program = cpu.native().Program(isa, threads, heads, cascade, True)
        connect(program, kv)
        to = Recorder(program, kv, model.config.hidden_size)
        self.recorder = to
        if isinstance(kv.seams.codec, RecordedCodec):
            kv.seams.codec.record(to)
        self._x, self._width = to.x, model.config.hidden_size
        model.record_embed(to)
        self._embed = (0, program.mark())
        recorded: dict[int, tuple[int, int]] = {}  # tied stages are the same callable, recorded once
        for stage in model.program:
            if id(stage) not in recorded:
                first = program.mark()
                stage.record(to)
                recorded[id(stage)] = (first, program.mark())
        self._ranges = [recorded[id(stage)] for stage in model.program]
        first = program.mark()
        self._logits = model.record_head(to)
        self._head = (first, program.mark())
        program.tune()
        self._carry: dict[str, Tensor] = {}

    def run(self, plan: StepPlan) -> StepResult:
        self.kv.begin(plan)
        for request_id in plan.released:
            self._carry.pop(request_id, None)
        spans = plan.spans
        if self.num_stages == 1:
            self.calls += 1
            return StepResult(self._stage(spans))
        results = [SpanResult()] * len(spans)
        groups: dict[tuple[int, int], list[int]] = {}
        for i, span in enumerate(spans):
            groups.setdefault(self._ranges[span.stage], []).append(i)
        for members in groups.values():
            self.calls += 1
            for i, result in zip(members, self._stage([spans[i] for i in members]), strict=True):
                results[i] = result
        return StepResult(results)

    def _stage(self, spans: Sequence[Span]) -> list[SpanResult]:
        """One range of the program for spans, and the head for those that end with it."""
        program = self.program
        program.clear()
        offset, last, aliases = self.kv.stage_pages, self.num_stages - 1, self.kv.aliases
        for s in spans:
            r = s.request
            program.add(
                s.start, s.stop, r.tokens, r.drafts, r.table.ids, s.stage * offset, s.sample, r.dense_until,
                _address(aliases(r.id)),
            )  # fmt: skip
        program.plan()
        first, end = self._ranges[spans[0].stage]
        if all(s.stage == 0 for s in spans):
            if last == 0 and first == self._embed[1] and end == self._head[0]:
                program.run(0, self._head[1])  # the whole model in one call
            else:
                program.run(*self._embed)
                program.run(first, end)
                self._finish_stage(spans, last)
        else:
            self._enter(spans)
            program.run(first, end)
            self._finish_stage(spans, last)
        return self._results(spans, last)

    def _enter(self, spans: Sequence[Span]) -> None:
        """The rows' hidden state: the embedding, or what the stage before left."""
        self.program.run(*self._embed)
        x, at = self._hidden(), 0
        for s in spans:
            n = s.stop - s.start
            if s.stage:
                x[at : at + n] = self._carry.pop(s.request.id)
            at += n

    def _finish_stage(self, spans: Sequence[Span], last: int) -> None:
        x, at = self._hidden(), 0
        for s in spans:
            n = s.stop - s.start
            if s.stage < last:
                self._carry[s.request.id] = x[at : at + n].clone()
            at += n
        self.program.run(*self._head)

    def _hidden(self) -> Tensor:
        return torch.from_numpy(self.program.view(self._x, self.program.num_rows()))[:, : self._width]

    # -- sampling ------------------------------------------------------------------------------------

    def _results(self, spans: Sequence[Span], last: int) -> list[SpanResult]:
        counts = [s.sample for s in spans]
        rows = [Row(s.request, j) for s in spans if s.sample for j in range(s.sample)]
        results = [SpanResult()] * len(spans)
        if rows:
            if all(r.plain for r in rows):
                tokens = self.program.argmax(self._logits)
                about: list[TokenLogprobs | None] = [None] * len(tokens)
            else:
                tokens = choose(self.program, self._logits, rows)
                about = known(self._view(len(rows)), rows, tokens)
            results = by_span(counts, tokens, about, [t >= 0 for t in tokens])
        at = 0
        for i, s in enumerate(spans):
            if s.request.params.prompt_logprobs is not None and s.stage == last:
                scores = prompt_logprobs(s, partial(self._logits_of, at))
                results[i] = replace(results[i], prompt_logprobs=tuple(scores))
            at += s.stop - s.start
        return results

    def _view(self, rows: int) -> Tensor:
        """Logits [rows, vocabulary] of the last head."""
        view = torch.from_numpy(self.program.view(self._logits, rows))
        return view[:, : self.model.config.vocab_size]

    def _logits_of(self, first: int, rows: list[int]) -> Tensor:
        self.program.sample([first + r for r in rows])
        self.program.run(*self._head)
        return self._view(len(rows))


def _address(numbers: IntArray) -> tuple[int, int]:
    """Where int64 numbers lie, and how many there are."""
    return (numbers.ctypes.data, len(numbers)) if len(numbers) else (0, 0)
