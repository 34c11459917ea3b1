"""From logits to tokens. A token is a pure function of (seed, position, logits) and the request's options.

There is no random generator with a state, so drafts, batch-mates and preemption cannot change an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dovetail.core.types import Request, Span, SpanResult, TokenLogprobs
from dovetail.host.lazy_torch import torch
from dovetail.runtime.odds import odds

if TYPE_CHECKING:
    from torch import Tensor

Logits = NDArray[Any]  # float32, or float64 of a float64 model
_MASK = 2**64 - 1
LOGIT_ROWS = 256  # rows of [rows, vocabulary] at a time when a whole prompt is scored
UNSOUND = (
    "no token can be chosen: the logits are NaN or infinite, as after a read or write of a slow tier that failed, "
    "or every token is forbidden"
)


class Row(NamedTuple):
    """A sampled row. The token that is chosen from it follows `request.tokens + request.drafts[:ahead]`.

    mask: the tokens that the form of the answer allows here, as in `Constraint.masks`. None allows all.
    """

    request: Request
    ahead: int
    mask: NDArray[np.uint32] | None = None

    @property
    def plain(self) -> bool:
        """Whether the token is the largest logit, and nothing else is asked for."""
        p = self.request.params
        return p.greedy and not (p.logprobs is not None or self.changed)

    @property
    def changed(self) -> bool:
        """Whether the logits are changed before the token is chosen."""
        p = self.request.params
        return self.mask is not None or p.penalised or bool(p.logit_bias) or self.too_early

    @property
    def too_early(self) -> bool:
        least = self.request.params.min_tokens
        return least > 0 and self.request.num_output + self.ahead < least

    @property
    def position(self) -> int:
        return len(self.request.tokens) + self.ahead


def rows_of(span: Span) -> list[Row]:
    """The sampled rows of a span."""
    request, count = span.request, span.sample
    if request.constraint is None or not count:
        return [Row(request, i) for i in range(count)]
    masks = request.constraint.masks(request.drafts[: count - 1])
    return [Row(request, i, mask) for i, mask in enumerate(masks)]


def sample(logits: Tensor, rows: Sequence[Row]) -> tuple[list[int], list[TokenLogprobs | None], list[bool]]:
    """For logits [rows, vocabulary]: the tokens, what is known about each, and whether each row was sound.

    This defines what csrc/sample.cpp does, token for token.
    """
    best, index = logits.max(dim=-1)
    sound: list[bool] = torch.isfinite(best).tolist()
    if all(r.plain for r in rows):
        return index.tolist(), [None] * len(rows), sound
    shaped = shape_logits(logits, rows)
    highest, tokens = shaped.max(dim=-1)
    sound = [s and h for s, h in zip(sound, torch.isfinite(highest).tolist(), strict=True)]
    random = [i for i, r in enumerate(rows) if not r.request.params.greedy and sound[i]]
    if random:
        at = torch.tensor(random, device=logits.device)
        tokens[at] = _draw(shaped[at], [rows[i] for i in random])
    chosen = tokens.tolist()
    return chosen, known(logits.cpu().numpy(), rows, chosen), sound


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1): splitmix64 of the pair."""
    x = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + 0x8CB92BA72F3D8DD7) & _MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = ((x ^ (x >> shift)) * factor) & _MASK
    return (x >> 11) / 2**53


# -- shaping the logits ---------------------------------------------------------------------------------


def shape_logits(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """The logits with penalties, bias, and what is forbidden, as a new tensor."""
    out = logits.clone()
    for i, row in enumerate(rows):
        p = row.request.params
        if p.penalised:
            _penalise(out[i], row)
        if p.logit_bias:
            ids = torch.tensor(list(p.logit_bias), device=out.device)
            out[i, ids] += torch.tensor(list(p.logit_bias.values()), dtype=out.dtype, device=out.device)
        if row.mask is not None:
            allowed = np.unpackbits(row.mask.view(np.uint8), count=out.shape[1], bitorder="little")
            out[i, torch.from_numpy(np.flatnonzero(allowed == 0)).to(out.device)] += float("-inf")
        if row.too_early and row.request.stop_ids:
            out[i, torch.tensor(sorted(row.request.stop_ids), device=out.device)] = float("-inf")
    return out


def _penalise(logits: Tensor, row: Row) -> None:
    """Penalise repetition over prompt and output (CTRL, section 4.1), and presence and frequency over the output
    (OpenAI)."""
    request, p = row.request, row.request.params
    written = np.asarray(request.output + request.drafts[: row.ahead], dtype=np.int64)
    if p.repetition_penalty != 1:
        seen = torch.from_numpy(np.unique(np.concatenate([request.prompt, written]).astype(np.int64)))
        seen = seen.to(logits.device)
        old = logits[seen]
        logits[seen] = torch.where(old > 0, old / p.repetition_penalty, old * p.repetition_penalty)
    if len(written) and (p.presence_penalty or p.frequency_penalty):
        ids, counts = np.unique(written, return_counts=True)
        loss = p.presence_penalty + p.frequency_penalty * torch.from_numpy(counts).to(logits)
        logits[torch.from_numpy(ids).to(logits.device)] -= loss


# -- drawing --------------------------------------------------------------------------------------------


def _draw(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Sample by inverse transform. Whether a row is sorted depends on its own options only."""
    params = [r.request.params for r in rows]
    vocabulary = logits.shape[1]
    column = lambda values: torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]  # noqa: E731
    likely = odds(logits, column([p.temperature for p in params])[:, 0])
    likely = torch.where(likely < column([p.min_p for p in params]).float(), 0, likely)
    noise = column([uniform(r.request.seed, r.position) for r in rows])
    out = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    top_k = [p.top_k if 0 < p.top_k < vocabulary else vocabulary for p in params]
    cut = torch.tensor([k < vocabulary or p.top_p < 1 for k, p in zip(top_k, params, strict=True)])
    cut = cut.to(logits.device)
    if not cut.all():
        out[~cut] = _invert(likely[~cut], noise[~cut])
    if cut.any():
        order = logits[cut].argsort(dim=-1, descending=True, stable=True)
        ordered = likely[cut].gather(1, order)
        kept = _cut(ordered, column(top_k)[cut], column([p.top_p for p in params])[cut])
        out[cut] = order.gather(1, _invert(kept, noise[cut])[:, None]).squeeze(1)
    return out


def _cut(ordered: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Set to zero what is outside the k likeliest, and then what is outside the smallest set with `top_p` of their
    sum."""
    rank = torch.arange(ordered.shape[1], device=ordered.device)
    ordered = torch.where(rank < top_k, ordered, 0)
    before = ordered.cumsum(-1) - ordered
    return torch.where(before < top_p * ordered.sum(-1, keepdim=True), ordered, 0)


def _invert(odds: Tensor, noise: Tensor) -> Tensor:
    """The first index at which the running sum exceeds noise * total. It exists, because noise is below 1."""
    total = odds.cumsum(-1)
    return torch.searchsorted(total, noise * total[:, -1:], right=True).squeeze(1)


# -- log-probabilities ----------------------------------------------------------------------------------


def known(logits: Logits, rows: Sequence[Row], tokens: Sequence[int]) -> list[TokenLogprobs | None]:
    """Log-probabilities of the chosen tokens (-1: none) by logits [rows, vocabulary], for rows that ask for
    them."""
    asked = [i for i, r in enumerate(rows) if r.request.params.logprobs is not None and tokens[i] >= 0]
    out: list[TokenLogprobs | None] = [None] * len(rows)
    if asked:
        counts = [rows[i].request.params.logprobs or 0 for i in asked]
        for i, about in zip(asked, describe(logits[asked], [tokens[i] for i in asked], counts), strict=True):
            out[i] = about
    return out


def describe(logits: Logits, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """Log-probability and rank of one token for each row of logits [n, vocabulary], and of its `counts` likeliest
    ones. Of equal ones the first come first."""
    own = logits[np.arange(len(tokens)), tokens]
    below = log_sum(logits)
    ranks = (np.count_nonzero(logits > own[:, None], axis=1) + 1).tolist()
    out = []
    for row, token, log_sum_, logprob, rank, count in zip(
        logits, tokens, below, (own - below).tolist(), ranks, counts, strict=True
    ):
        best = likeliest(row, count)
        values = (row[best] - log_sum_).tolist()
        out.append(TokenLogprobs(token, logprob, rank, tuple(zip(best.tolist(), values, strict=True))))
    return out


def log_sum(logits: Logits) -> Logits:
    """log(sum(exp(logits))) of each row of [n, vocabulary], in their type."""
    most = logits.max(-1, keepdims=True)
    found: Logits = np.log(np.exp(logits - most).sum(-1)) + most[:, 0]
    return found


def likeliest(row: Logits, count: int) -> NDArray[np.int64]:
    """The tokens with the `count` largest logits of a row [vocabulary], the largest first, and equal ones by their
    number. NaN counts as the least."""
    row = np.where(np.isnan(row), -np.inf, row)
    count = min(count, len(row))
    if count == 0:
        return np.zeros(0, np.int64)
    least = np.partition(row, len(row) - count)[len(row) - count]
    some = np.flatnonzero(row >= least)
    return some[np.argsort(-row[some], kind="stable")[:count]]


def prompt_logprobs(span: Span, logits: Callable[[list[int]], Logits]) -> list[TokenLogprobs]:
    """Log-probabilities of prompt tokens [max(start, scored) + 1, stop], each from the row before it.

    logits: returns the logits [rows, vocabulary] of rows of the span, counted from its first row. It is called for
    a few rows at a time.
    """
    request = span.request
    if span.rows is not None:
        raise ValueError("a span that lists its rows scores no prompt: the rows between them are not computed")
    first, stop = max(span.start, request.scored), min(span.stop, len(request.prompt) - 1)
    out: list[TokenLogprobs] = []
    for at in range(first, stop, LOGIT_ROWS):
        end = min(at + LOGIT_ROWS, stop)
        counts = [request.params.prompt_logprobs or 0] * (end - at)
        rows = logits(list(range(at - span.start, end - span.start)))
        if request.observe is not None:
            request.observe(at, rows)
        out += describe(rows, request.prompt[at + 1 : end + 1], counts)
    return out


def by_span(
    counts: Sequence[int], tokens: Sequence[int], known: Sequence[TokenLogprobs | None], sound: Sequence[bool]
) -> list[SpanResult]:
    """Cut the sampled rows into one result per span with `counts` rows, up to its first unsound row."""
    out, at = [], 0
    for n in counts:
        good = next((i for i in range(n) if not sound[at + i]), n)
        rows = slice(at, at + good)
        at += n
        logprobs = [k for k in known[rows] if k is not None]
        out.append(SpanResult(tuple(tokens[rows]), tuple(logprobs), error=None if good == n else UNSOUND))
    return out
