"""A draft model: a smaller model with the same vocabulary guesses, and the target checks several tokens at once.

Speculative decoding (Leviathan et al., arXiv 2211.17192) with this engine's one acceptance rule: a token is a
function of (seed, position, logits), and a guess is right if it equals the target's. The draft chooses by the same
function, with the same seed and position. So guesses for sampled requests agree as often as the two models do.

KV of the draft lies under the page numbers of the target's requests, in pages of its own memory that
`--kv-memory` counts. What is valid is known for each page: how many of its tokens have KV of the draft, in which
life of the page. So preemption, shared prefixes, copies of pages and rejected guesses need nothing more.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from dovetail.checkpoint import Checkpoint
from dovetail.core.errors import ConfigError
from dovetail.core.pages import IntArray, PagePool
from dovetail.core.sampling import SamplingParams
from dovetail.core.seams import NO_GUESS, Companion, Drafter, Geometry, Guess, Outcome, Room, Seams, Site
from dovetail.core.technique import Beside, Technique
from dovetail.core.types import Request, Span, StepPlan
from dovetail.hub import resolve
from dovetail.models import geometry, open_checkpoint
from dovetail.runtime.kv import bytes_per_token
from dovetail.runtime.store import fits_tiles

MOST = 32  # guesses a step
CATCH_UP = 128  # rows a step for what the draft has not computed yet, so that no step waits long


class Filled:
    """How many tokens of each page have KV of the draft, from the page's start."""

    def __init__(self, pool: PagePool) -> None:
        self.pool, self.size = pool, pool.page_size
        self.counts = np.zeros(pool.num_pages, np.int64)
        self.lives = np.full(pool.num_pages, -1, np.int64)  # the life of the page in which they were written

    def until(self, request: Request) -> int:
        """How many of a request's first tokens have KV."""
        pages = request.table.pages
        held = np.where(self.lives[pages] == self.pool.lives[pages], self.counts[pages], 0)
        short = np.flatnonzero(held < self.size)
        return int(short[0] * self.size + held[short[0]]) if len(short) else len(pages) * self.size

    def extend(self, request: Request, start: int, stop: int) -> None:
        """Tokens [start, stop) have KV now, too; those before have it already."""
        if stop <= start:
            return
        size = self.size
        first, last = start // size, (stop - 1) // size
        pages = request.table.pages[first : last + 1]
        self.counts[pages] = np.minimum(stop - size * np.arange(first, last + 1), size)
        self.lives[pages] = self.pool.lives[pages]


@dataclass
class Shadow:
    """A request as the draft sees it: with its guesses as tokens, and without what only answers need."""

    original: Request
    limit: int
    start: int  # tokens that the draft has computed
    greedy: bool = False  # guess the likeliest token, whatever the request asks for
    request: Request = field(init=False)
    guess: list[int] = field(default_factory=list)
    odds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.request = r = copy.copy(self.original)
        r.tokens, r.drafts, r.constraint, r.observe = list(self.original.tokens), [], None, None
        if self.greedy:
            r.params = SamplingParams(temperature=0)
        elif r.params.logprobs is not None or r.params.prompt_logprobs is not None:
            r.params = replace(r.params, logprobs=None, prompt_logprobs=None)

    def take(self, token: int, odds: float | None) -> None:
        self.guess.append(token)
        self.request.tokens.append(token)
        if odds is not None:
            self.odds.append(odds)


class ModelDrafter(Drafter):
    """Guesses of up to `tokens` tokens from a companion of the model.

    own: whether the companion has KV of its own. If not, it reads and writes the target's.
    """

    writes = True

    def __init__(self, site: Site, tokens: int, own: bool) -> None:
        self.tokens = tokens
        self.proposed = 0
        self.companion: Companion | None = None  # from when the model is there
        self.ids: IntArray | None = None  # the tokens of its logits, if they are not all
        self.filled = Filled(site.pool) if own else None
        self._guessed: dict[str, tuple[int, list[int]]] = {}  # by request: tokens before the guess, and the guess
        self._known: set[str] = set()  # requests that the companion has heard of
        self._gone: list[str] = []

    def behind(self, request: Request) -> int:
        """Rows that the draft computes before its first guess for a request."""
        done = request.computed if self.filled is None else self.filled.until(request)
        return max(1, len(request.tokens) - done)

    def propose(self, requests: Sequence[Request], limits: Sequence[int], room: Room) -> Sequence[Guess]:
        out = [NO_GUESS] * len(requests)
        if self.companion is None:
            return out
        limits = [min(n, self.tokens, max(0, self.companion.length - len(r.tokens)))
                  for r, n in zip(requests, limits, strict=True)]  # fmt: skip
        shadows = {i: s for i, s in enumerate(self._catch_up(requests, limits, room.tokens)) if s is not None}
        while ready := [s for s in shadows.values() if len(s.guess) < s.limit]:
            self._run([Span(s.request, len(s.request.tokens) - 1, len(s.request.tokens), sample=1) for s in ready],
                      ready)  # fmt: skip
        for i, s in shadows.items():
            out[i] = Guess(s.guess, s.odds)
            self._guessed[s.original.id] = len(s.original.tokens), s.guess
        return out

    def _catch_up(self, requests: Sequence[Request], limits: Sequence[int], total: int) -> list[Shadow | None]:
        """Compute what the draft has not seen, and the first guesses. None for requests without one.

        Those that are least behind come first, so that a long prompt does not hold up the others.
        """
        assert self.companion is not None
        found: list[Shadow | None] = [None] * len(requests)
        spans, ready, left = [], [], CATCH_UP
        behind = sorted((self.behind(r), i) for i, (r, n) in enumerate(zip(requests, limits, strict=True)) if n)
        for rows, i in behind:
            r, limit = requests[i], min(limits[i], total)
            if limit <= 0 or not left:
                continue
            start = len(r.tokens) - rows
            stop = start + min(rows, left)
            if max(r.tokens[start:stop]) >= self.companion.vocab_size:  # it has no embedding for that
                continue
            s = Shadow(r, limit, start, self.ids is not None)
            left -= stop - s.start
            whole = stop == len(r.tokens)
            spans.append(Span(s.request, s.start, stop, sample=int(whole)))
            ready.append(s)
            if whole:
                found[i], total = s, total - limit
        if spans:
            self._run(spans, ready)
            if self.filled is not None:
                for span, s in zip(spans, ready, strict=True):
                    self.filled.extend(s.original, span.start, span.stop)
        return found

    def _run(self, spans: Sequence[Span], shadows: Sequence[Shadow]) -> None:
        assert self.companion is not None
        gone, self._gone = self._gone, []
        self._known.update(s.original.id for s in shadows)
        result, odds = self.companion.run(StepPlan(tuple(spans), released=tuple(gone)))
        at = 0
        for span, s, r in zip(spans, shadows, result.spans, strict=True):
            if span.sample:
                token = r.tokens[0] if len(r.tokens) and r.error is None else -1
                token = token if self.ids is None or token < 0 else int(self.ids[token])
                s.take(token, odds[at] if odds else None)
                if token < 0 or token in s.request.stop_ids:  # nothing follows
                    s.limit = len(s.guess)
                at += 1

    def observe(self, outcomes: Sequence[Outcome], plan: StepPlan, seconds: float) -> None:
        for outcome in outcomes:
            r = outcome.request
            self.proposed += len(outcome.drafts)
            n, guess = self._guessed.pop(r.id, (0, []))
            if self.filled is None or not guess or r.finish_reason is not None:
                continue
            right = 0  # guesses with KV (all but the last) that the answer has now
            while right < min(len(guess) - 1, len(r.tokens) - n) and guess[right] == r.tokens[n + right]:
                right += 1
            self.filled.extend(r, n, n + right)

    def forget(self, request: Request) -> None:
        self._guessed.pop(request.id, None)
        if request.id in self._known:
            self._known.remove(request.id)
            self._gone.append(request.id)


@dataclass(frozen=True)
class Source:
    """Where the draft model is. It is opened once, when something must be known of it."""

    model: str | Checkpoint

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(resolve(self.model)) if isinstance(self.model, str) else self.model

    def beside(self, shape: Geometry, page_size: int, value: int) -> Beside:
        """Bytes of the draft's KV."""
        kind = {2: "bf16", 4: "float32", 8: "float64"}[value]
        native = page_size if fits_tiles(kind, page_size) else 0  # whose rows are padded
        return Beside(page=page_size * bytes_per_token(geometry(self.checkpoint.config), kind, native))


def frequent(site: Site, checkpoint: Checkpoint, count: int) -> IntArray:
    """`count` tokens, int64, ascending: those that end an answer, then the most frequent ones of the calibration
    text, then those with the lowest ids, which byte-pair merges give to frequent ones."""
    text = site.calibration.text("") if site.calibration is not None else ()
    common = [token for token, _ in sorted(Counter(text).items(), key=lambda pair: (-pair[1], pair[0]))]
    ends = getattr(checkpoint.tokenizer(), "eos_ids", ())
    size = checkpoint.config.vocab_size
    order = dict.fromkeys(t for t in (*ends, *common, *range(size)) if t < size)
    return np.array(sorted(list(order)[:count]), np.int64)


def draft(model: str, tokens: int = 4, head: int = 0) -> Technique:
    """Guess with a smaller model. model: as `dovetail run` takes it; its vocabulary must be the target's. tokens:
    of a guess, at most. head: guess only the `head` most frequent tokens, and always the likeliest; 0: all."""
    return of(Source(model), model, tokens, head)


def of(source: Source, name: str, tokens: int, head: int = 0) -> Technique:
    _check_tokens("draft", tokens)
    if head < 0:
        raise ConfigError(f"draft: head must be 0 (all tokens) or a number of tokens, got {head}")

    def build(site: Site) -> Mapping[str, Any]:
        if head and head > (most := source.checkpoint.config.vocab_size):
            raise ConfigError(f"draft: head={head} is more than the draft model's {most} tokens; lower it")
        drafter = ModelDrafter(site, tokens, own=True)

        def load() -> None:
            if site.companions is not None:
                drafter.ids = frequent(site, source.checkpoint, head) if head else None
                drafter.companion = site.companions.model(source.checkpoint, drafter.ids)

        site.ready.append(load)
        return {"drafter": drafter}

    return Technique(
        "draft", ("drafter",), build, {"model": name, "tokens": tokens, "head": head}, lossless=True,
        activity=_activity, beside=source.beside,
    )  # fmt: skip


def self_draft(layers: int, tokens: int = 4) -> Technique:
    """Guess with the model's own first `layers` layers and its head. It needs no second checkpoint and no KV of
    its own: those layers' KV is the target's, and checking a guess writes the same values again."""
    _check_tokens("self-draft", tokens)
    if layers < 1:
        raise ConfigError(f"self-draft: layers must be at least 1, got {layers}")

    def build(site: Site) -> Mapping[str, Any]:
        if layers >= site.geometry.num_layers:
            raise ConfigError(
                f"self-draft: layers must be below the model's {site.geometry.num_layers}, got {layers}"
            )
        drafter = ModelDrafter(site, tokens, own=False)

        def load() -> None:
            if site.companions is not None:
                drafter.companion = site.companions.first(layers)

        site.ready.append(load)
        return {"drafter": drafter}

    options = {"layers": layers, "tokens": tokens}
    return Technique("self-draft", ("drafter",), build, options, lossless=True, activity=_activity)


def _check_tokens(name: str, tokens: int) -> None:
    if not 1 <= tokens <= MOST:
        raise ConfigError(f"{name}: tokens must be between 1 and {MOST}, got {tokens}")


def _activity(seams: Seams) -> int:
    return seams.drafter.proposed if isinstance(seams.drafter, ModelDrafter) else 0
