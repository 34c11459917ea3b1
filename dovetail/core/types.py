"""The nouns that cross between host and device: Request, Span, StepPlan, PageSet, StepResult."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from dovetail.core.pages import PageTable
from dovetail.core.sampling import SamplingParams
from dovetail.core.structured import Constraint

Array = Any  # a tensor or an array; core never looks inside
UNLIMITED = 2**31


@dataclass(frozen=True)
class Probe:
    """What a measurement asks of a prompt, besides its answer.

    dense_until: rows before this position read everything; -1 is the end of the prompt, as in serving. score_from:
    the first token that `prompt_logprobs` score, at least 1. Earlier tokens may come from the prefix cache.
    observe: called in each step that scores tokens, with the position of the step's first row and the logits of
    its rows [rows, vocabulary]. The row at position p predicts token p + 1. The logits are valid during the call
    only. Needs `prompt_logprobs`.
    """

    dense_until: int = -1
    score_from: int = 1
    observe: Callable[[int, Array], None] | None = None


@dataclass(eq=False)
class Request:
    """One sequence. There is no prefill or decode: `computed` catches up with `tokens + drafts`."""

    id: str
    prompt: list[int]
    params: SamplingParams
    table: PageTable
    max_total: int  # tokens at which it ends: prompt + max_tokens, within the context
    seed: int
    stop_ids: frozenset[int] = frozenset()  # end-of-sequence and stop token ids
    salt: str = ""  # only requests with the same salt share stored KV
    index: int = 0  # which of the n answers
    constraint: Constraint | None = None  # what the answer may be; it follows `tokens`
    fork_of: Request | None = None  # whose prompt pages it shares, until it has started
    tokens: list[int] = field(default_factory=list)  # prompt + accepted output
    drafts: list[int] = field(default_factory=list)  # unverified tail
    forced: bool = False  # whether the form of the answer left no other choice than `drafts`
    computed: int = 0  # tokens whose KV is committed
    dense_until: int = -1  # rows before this position read everything; -1: the end of the prompt
    stage: int = 0  # the next stage of the program
    flying: int = 0  # tokens in the span that is between two stages
    expected: int = -1  # tokens found stored while it waited; -1: nobody has looked
    cached_tokens: int = -1  # prompt tokens found stored at first admission; -1: not admitted yet
    scored: int = 0  # prompt rows whose logprobs were delivered, or not asked for
    observe: Callable[[int, Array], None] | None = None  # see Probe
    preemptions: int = 0
    started: float | None = None  # when its first step began, by the engine's clock
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        if self.dense_until < 0:
            self.dense_until = len(self.prompt)

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.prompt)


# Records built for every request in every step are not frozen: freezing makes building them four times as slow.


def _ascend(rows: Sequence[int], start: int, stop: int) -> bool:
    return len(rows) > 0 and rows[0] >= start and rows[-1] < stop and all(a < b for a, b in pairwise(rows))


@dataclass(slots=True)
class Span:
    """Advance tokens [start, stop) of a request by one stage of the program.

    The last `sample` rows yield a token each: the one after the accepted text and one after each draft. rows: the
    positions that are computed, ascending and within [start, stop); the others have KV already. None is all of
    them.
    """

    request: Request
    start: int
    stop: int
    stage: int = 0
    sample: int = 0
    rows: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.rows is not None and not _ascend(self.rows, self.start, self.stop):
            raise ValueError(
                f"the rows of a span must ascend and lie in [{self.start}, {self.stop}), and there must be one at "
                f"least; got {list(self.rows)}"
            )

    @property
    def num_rows(self) -> int:
        return self.stop - self.start if self.rows is None else len(self.rows)

    @property
    def positions(self) -> Sequence[int]:
        """The positions of its rows."""
        return range(self.start, self.stop) if self.rows is None else self.rows


class Stored(NamedTuple):
    """What is stored of a request: its first pages, each with a reference for the request, and how many of their
    tokens need not be computed."""

    pages: list[int]
    computed: int


class Sealed(NamedTuple):
    """Pages of one request that commit has completed. They are its pages `first`, `first` + 1 and so on."""

    request: str
    first: int
    pages: tuple[int, ...]


@dataclass(slots=True)
class StepPlan:
    """Everything that crosses from host to device in a step. The device acts on the fields in this order:

    sealed: pages that the last commit completed. reopened: pages handed out since the last plan; what was
    remembered about them is void. copies: (source, target) pages to copy, never sealed ones. released: ids of
    requests whose state on the device may be dropped. spans: the rows to compute.
    """

    spans: tuple[Span, ...]
    copies: tuple[tuple[int, int], ...] = ()
    sealed: tuple[Sealed, ...] = ()
    reopened: tuple[int, ...] = ()
    released: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(s.num_rows for s in self.spans)

    def describe(self) -> dict[str, Any]:
        """The plan as plain data, for logs."""
        spans = [
            {
                "request": s.request.id,
                "start": s.start,
                "stop": s.stop,
                "stage": s.stage,
                "sample": s.sample,
                **({} if s.rows is None else {"rows": list(s.rows)}),
            }
            for s in self.spans
        ]
        moves = {"sealed": self.sealed, "reopened": self.reopened, "copies": self.copies}
        return {"spans": spans, **moves, "released": self.released}


@dataclass(frozen=True, slots=True)
class PageSet:
    """Which of the pages that it may leave unread each (row, KV head) reads. A row's other pages are always read.

    pages: [rows, KV heads, k] page numbers within the row's sequence, each at most once; -1 where there are fewer
    than k. `ALL` (pages is None) reads everything and costs nothing.
    """

    pages: Array | None = None


ALL = PageSet()


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability and rank (1 is the likeliest) of the chosen token, and the likeliest tokens."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()  # (token, logprob), best first


@dataclass(slots=True)
class SpanResult:
    """What a span produced: a token for each sampled row, and the log-probabilities that were asked for.

    With an error, `tokens` are those of the rows before the one that failed. A failure behind a wrong draft does
    not count.
    """

    tokens: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    prompt_logprobs: Sequence[TokenLogprobs] = ()  # of tokens start+1 .. stop of the prompt
    error: str | None = None


@dataclass(slots=True)
class StepResult:
    """One SpanResult per span of the plan, in its order."""

    spans: Sequence[SpanResult]
