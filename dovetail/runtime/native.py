"""The Executor of a recorded program: a step is a few calls into the native kernels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dovetail.core.cost import Operation
from dovetail.core.pages import IntArray
from dovetail.core.seams import WALL_CLOCK, Clock, Codec, Residency, Selector
from dovetail.core.types import Span, SpanResult, StepPlan, StepResult, TokenLogprobs
from dovetail.ops import cpu
from dovetail.ops.attention.kernel_variant import kernel_variant
from dovetail.ops.template import TemplateError
from dovetail.runtime.batch import BatchBuilder, kept_rows
from dovetail.runtime.kv import KV
from dovetail.runtime.ledger import recorded
from dovetail.runtime.model import Model, Stage
from dovetail.runtime.native_sampler import choose
from dovetail.runtime.recorder import Recorder
from dovetail.runtime.residency import Tiers
from dovetail.runtime.sampler import by_span, known, prompt_logprobs, rows_of
from dovetail.runtime.target import RecordedCodec, RecordedSelector


def recordable(model: Model, kv: KV) -> bool:
    """Whether a native program can run the model: every layer has native operations, and nothing in Python must
    act between two operations of a layer."""
    seams = kv.seams
    moves = isinstance(seams.residency, Tiers)
    if not (moves or type(seams.residency) is Residency):
        return False
    if not (type(seams.codec) is Codec or (moves and isinstance(seams.codec, RecordedCodec))):
        return False
    if not (type(seams.selector) is Selector or isinstance(seams.selector, RecordedSelector)):
        return False
    if seams.rows.cuts and isinstance(seams.selector, RecordedSelector) and seams.selector.guesses:
        return False  # what was chosen ahead for rows that a cut drops would have to be dropped too
    ledger = recorded(model, kv)
    if not all(operation.native for operation in ledger.operations):
        return False
    try:
        for variant in ledger.variants:
            kernel_variant(variant, model.geometry.num_heads)
    except TemplateError as error:
        warnings.warn(f"attention runs on the slow reference: {error}", stacklevel=2)
        return False
    return True


@dataclass
class _Stage:
    """The operations of one callable: marks divide them into ranges, and cuts are the layers after which rows may
    be dropped."""

    marks: list[int]
    cuts: list[int] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)

    @property
    def range(self) -> tuple[int, int]:
        return self.marks[0], self.marks[-1]


class NativeExecutor:
    """Runs plans on a model's recorded program.

    The stages of the program are recorded once, as one range of operations for each distinct callable. A step
    lists its spans, and one call runs a range on all threads. The cuts of a row filter divide a range, and rows
    are dropped between its parts. cascade: KV that several requests share is read once, which changes the time and
    no bit of the result.
    """

    def __init__(self, model: Model, kv: KV, isa: str, threads: int, *, cascade: bool = True) -> None:
        self.model = model
        self.kv = kv
        self.num_stages = len(model.program)
        self.clock: Clock = WALL_CLOCK
        self.calls = 0
        self.program = program = cpu.native().Program(isa, threads, cascade, True)
        self._width = model.config.hidden_size
        self._to = to = Recorder(program, kv, self._width)
        if isinstance(kv.seams.codec, RecordedCodec):
            kv.seams.codec.record(to)
        model.record_start(to)
        self._start = (0, program.mark())
        self._before = list(to.operations)
        stages: dict[int, _Stage] = {}  # tied stages are the same callable, recorded once
        for stage in model.program:
            if id(stage) not in stages:
                stages[id(stage)] = self._record(stage)
        self._stages = [stages[id(stage)] for stage in model.program]
        first, behind = program.mark(), len(to.operations)
        self.logits: int = model.record_head(to)  # the slot of the sampled rows' logits
        self._head = (first, program.mark())
        self._behind = to.operations[behind:]
        program.tune()
        self._carry: dict[str, NDArray[np.float32]] = {}
        self._builder = BatchBuilder(kv.page_size, kv.seams.selector.window, kv.stage_pages, None)

    @property
    def operations(self) -> list[Operation]:
        """What a step through all stages does, with what techniques add, and what each operation costs."""
        return [*self._before, *(o for stage in self._stages for o in stage.operations), *self._behind]

    def _record(self, stage: Stage) -> _Stage:
        found, first = _Stage([self.program.mark()]), len(self._to.operations)

        def cut(layer: int) -> None:
            found.marks.append(self.program.mark())
            found.cuts.append(layer)

        stage.record(self._to, cut)
        found.marks.append(self.program.mark())
        found.operations = self._to.operations[first:]
        return found

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
            groups.setdefault(self._stages[span.stage].range, []).append(i)
        for members in groups.values():
            self.calls += 1
            for i, result in zip(members, self._stage([spans[i] for i in members]), strict=True):
                results[i] = result
        return StepResult(results)

    def _stage(self, spans: Sequence[Span]) -> list[SpanResult]:
        """Run one stage for spans, and the head for those that end with it."""
        program = self.program
        program.clear()
        offset, last, aliases = self.kv.stage_pages, self.num_stages - 1, self.kv.aliases
        for s in spans:
            r = s.request
            program.add(
                s.start, s.stop, r.tokens, r.drafts, r.table.ids, s.stage * offset, s.sample, r.dense_until,
                _address(aliases(r.id)), rows=[] if s.rows is None else list(s.rows),
            )  # fmt: skip
        program.plan()
        stage = self._stages[spans[0].stage]
        if last == 0 and not stage.cuts:
            program.run(0, self._head[1])  # the whole model in one call
            return self._results(spans, last)
        program.run(*self._start)
        if any(s.stage for s in spans):
            self._enter(spans)
        self._run(stage, spans)
        self._leave(spans, last)
        program.run(*self._head)
        return self._results(spans, last)

    def _run(self, stage: _Stage, spans: Sequence[Span]) -> None:
        """Run the stage's operations. At each cut, rows that the filter drops wait until the end."""
        program, filter_ = self.program, self.kv.seams.rows
        batch = self._builder.build(spans) if stage.cuts else None
        for part, layer in zip(pairwise(stage.marks), [*stage.cuts, None], strict=True):
            program.run(*part)
            if layer is None or batch is None:
                break
            # A copy, because the filter may keep it, and the program's rows change.
            kept = kept_rows(filter_.keep(layer, self._hidden().copy(), batch), program.num_rows())
            if kept is not None:
                program.keep(kept.tolist(), self._to.moving)
                batch = batch.take(kept)
        program.restore()

    def _enter(self, spans: Sequence[Span]) -> None:
        """Restore the rows' hidden state that an earlier stage has left."""
        x, at = self._hidden(), 0
        for s in spans:
            if s.stage:
                x[at : at + s.num_rows] = self._carry.pop(s.request.id)
            at += s.num_rows

    def _leave(self, spans: Sequence[Span], last: int) -> None:
        """Keep the rows' hidden state for the next stage."""
        x, at = self._hidden(), 0
        for s in spans:
            if s.stage < last:
                self._carry[s.request.id] = x[at : at + s.num_rows].copy()
            at += s.num_rows

    def _hidden(self) -> NDArray[np.float32]:
        rows: NDArray[np.float32] = self.program.view(self._to.x, self.program.num_rows())[:, : self._width]
        return rows

    # -- sampling ------------------------------------------------------------------------------------

    def _results(self, spans: Sequence[Span], last: int) -> list[SpanResult]:
        counts = [s.sample for s in spans]
        rows = [row for s in spans if s.sample for row in rows_of(s)]
        results = [SpanResult()] * len(spans)
        if rows:
            if all(r.plain for r in rows):
                tokens = self.program.argmax(self.logits)
                about: list[TokenLogprobs | None] = [None] * len(tokens)
            else:
                tokens = choose(self.program, self.logits, rows)
                about = known(self._view(len(rows)), rows, tokens)
            results = by_span(counts, tokens, about, [t >= 0 for t in tokens])
        at = 0
        for i, s in enumerate(spans):
            if s.request.params.prompt_logprobs is not None and s.stage == last:
                scores = prompt_logprobs(s, partial(self._logits_of, at))
                results[i] = replace(results[i], prompt_logprobs=tuple(scores))
            at += s.num_rows
        return results

    def odds(self, tokens: Sequence[int]) -> list[float]:
        """The probability of each token in the row of logits that it was last chosen from, at temperature 1."""
        logits = self._view(len(tokens))
        return [
            float(1 / np.exp(np.minimum(row - row[t], 80)).sum()) if t >= 0 else 0.0
            for row, t in zip(logits, tokens, strict=True)
        ]

    def _view(self, rows: int) -> NDArray[np.float32]:
        """Logits [rows, vocabulary] of the last head."""
        logits: NDArray[np.float32] = self.program.view(self.logits, rows)[:, : self.model.config.vocab_size]
        return logits

    def _logits_of(self, first: int, rows: list[int]) -> NDArray[np.float32]:
        self.program.sample([first + r for r in rows])
        self.program.run(*self._head)
        return self._view(len(rows))


def _address(numbers: IntArray) -> tuple[int, int]:
    """Where int64 numbers lie, and how many there are."""
    return (numbers.ctypes.data, len(numbers)) if len(numbers) else (0, 0)
