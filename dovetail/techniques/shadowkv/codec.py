"""ShadowKV (Sun et al., ICML 2025, arXiv 2410.21465): keeps low-rank prompt keys on the device and fetches values
when they are needed. Generated tokens read the pages whose landmarks may matter most.

When a prompt is computed, its keys are factorised without their rotation: per request and layer, over all KV heads
together (section 4). Generated tokens read keys that are rebuilt from the factors and rotated at their positions.
Values, and exact keys, come from the slow tier. Each chunk of keys has a landmark, its mean. A page's score is the
largest softmax weight of its landmarks, over the query heads of a KV head's group. The pages of the prompt that
landmarks describe worst, the outliers, are always read with exact keys. So are the most recent tokens.

Landmarks lose pages that matter. With `score="codes"` pages are ranked by Quest's codes of their keys instead
(`ops.pages`). Codes take the bytes of landmarks of 4 tokens, and their choice needs no outliers.

Three things differ from the paper. Pages of one KV head are chosen and moved, not chunks. The exact local window
moves on with the text; in the paper it stays at the end of the prompt. Pages that are completed later have
landmarks, compete with the others and keep their exact keys, so long answers overflow nothing. A prompt within the
budget keeps its exact keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dovetail.core.errors import ConfigError
from dovetail.core.pages import IntArray, pages_for
from dovetail.core.seams import Geometry, Seams, Site
from dovetail.core.technique import Beside, Technique
from dovetail.core.types import PageSet, Request
from dovetail.host.lazy_torch import torch
from dovetail.ops.cpu import padded
from dovetail.ops.pages import Summaries, landmark_scores, num_vectors, page_scores, pick, summary_bytes
from dovetail.runtime.target import PageChoice, RecordedCodec, RecordedSelector, Target
from dovetail.techniques.shadowkv.prompt_keys import KeyFormat, PromptKeys

if TYPE_CHECKING:
    from torch import Tensor

SCORES = ("landmarks", "codes")
LOCAL = 4  # chunks of recent tokens that every row reads: the paper's number


class ShadowKVCodec(RecordedCodec):
    """Shows rows the keys of prompts, rebuilt from low rank."""

    def __init__(self, prompts: PromptKeys) -> None:
        self.prompts = prompts
        self.capacity = prompts.capacity

    def record(self, to: Target) -> None:
        self.prompts.record(to)

    def seal(self, requests: Sequence[Request], kv: Any) -> Mapping[str, IntArray]:
        return {r.id: self.prompts.add(r) for r in requests}

    def open(self, layer: int, pages: Tensor, kv: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.prompts.open(layer, pages, kv[0]), kv[1]

    def drop(self, ids: Sequence[str]) -> None:
        for request_id in ids:
            self.prompts.remove(request_id)


class ShadowKVSelector(RecordedSelector):
    """Chooses pages by landmarks or codes so that a row and KV head reads `budget` pages. Pages that are always
    read count too."""

    def __init__(self, prompts: PromptKeys, budget: int, kind: str) -> None:
        self.prompts = prompts
        self.budget = budget
        self.kind = kind  # kind of summaries, one of `SCORES`
        self.window = LOCAL * prompts.how.chunk
        self._dropped = 0
        self._counting = prompts.site.geometry.choosing("shadowkv")
        self._summaries: Summaries | None = None

    @property
    def summaries(self) -> Summaries:
        if self._summaries is None:
            chunk = self.prompts.how.chunk if self.kind == "landmarks" else 0
            self._summaries = Summaries(self.prompts.site.kv, self.kind, chunk)
        return self._summaries

    @property
    def dropped(self) -> int:
        """Pages that rows left unread, counted in one layer and for one KV head."""
        program = self.summaries.program
        return self._dropped if program is None else program.unread()

    def choice(self, layer: int, to: Target) -> PageChoice:
        self.summaries.program = to.program
        return PageChoice(self.window, self.budget, by=self.summaries)

    def seal(self, pages: IntArray, kv: Any) -> None:
        self.summaries.seal(pages)

    def select(self, layer: int, q: Tensor, batch: Any) -> PageSet:
        rows = batch.sparse_rows
        spans, eligible = batch.span_of_row[rows], batch.eligible[rows]
        pages = torch.arange(int(eligible.max()), device=q.device)
        droppable = (pages < eligible[:, None])[:, None]
        apart = self.prompts.outliers(layer, batch, len(pages))[spans] & droppable
        found = self.summaries.of(layer, batch.tables[spans, : len(pages)])
        scores = self._scores(q[rows], found, droppable & ~apart).masked_fill(apart, float("inf"))
        count = self.budget - (batch.positions[rows] // batch.page_size + 1 - eligible)
        if layer == self._counting:
            self._dropped += int((eligible - count).clamp_min(0).sum())
        return PageSet(pick(scores, eligible, count))

    def _scores(self, q: Tensor, found: Tensor, competing: Tensor) -> Tensor:
        if self.kind == "landmarks":
            return landmark_scores(q, found, competing)
        return page_scores(q, found, self.kind)


@dataclass(frozen=True)
class Options:
    """As `shadowkv` takes them, in tokens and chunks."""

    rank: int
    energy: float
    budget: int
    chunk: int
    outliers: int
    score: str = "landmarks"

    def outlier_pages(self, page_size: int) -> int:
        return pages_for(self.outliers * self.chunk, page_size)

    def recent_pages(self, page_size: int) -> int:
        """The most pages that the recent tokens of a row lie in."""
        return (LOCAL * self.chunk - 1) // page_size + 2

    def beside(self, shape: Geometry, page_size: int, value: int) -> Beside:
        """What is kept in bytes. For a page: landmarks or codes, coefficients, angles, and marks of outliers. For
        a request: a basis. Marks and bases count twice, because native programs have their own."""
        width, layers = shape.num_kv_heads * shape.head_dim, shape.num_layers - len(shape.sliding_layers)
        rank = min(self.rank or width, width)
        rank += rank % 2
        marks, coefficients = 2 * shape.num_layers * shape.num_kv_heads, layers * page_size * rank * value
        vectors = num_vectors(self.score, page_size, self.chunk, value)
        found = summary_bytes(shape, value, vectors, pad=32 if self.score == "landmarks" else 16)
        angles = pages_for(page_size, 16) * 2 * 4 * padded(shape.head_dim // 2)
        bases = rank * (width + shape.num_kv_heads * padded(shape.head_dim)) * value
        return Beside(found + coefficients + marks + angles, layers * bases)

    def check(self, shape: Geometry, page_size: int) -> None:
        """Raise ConfigError if this does not fit a model or its pages."""
        width = shape.num_kv_heads * shape.head_dim
        if self.rank > width:
            raise ConfigError(
                f"shadowkv: rank={self.rank} is above the width of all {shape.num_kv_heads} KV heads together, "
                f"{width}; give at most that, or 0 for it"
            )
        if page_size % self.chunk:
            raise ConfigError(
                f"shadowkv: chunk={self.chunk} does not divide the KV's block size, {page_size}; "
                f"use a divisor, or another --block-size"
            )
        least = self.outlier_pages(page_size) + self.recent_pages(page_size) + 1
        if pages_for(self.budget, page_size) < least:
            raise ConfigError(
                f"shadowkv: a budget of {self.budget} tokens leaves nothing to choose: {self.outliers} outliers "
                f"and the recent tokens are always read, in up to {least - 1} pages of {page_size}; "
                f"give at least {least * page_size}, or fewer outliers"
            )


def shadowkv(
    rank: int = 160,
    energy: float = 0.0,
    budget: int = 1024,
    chunk: int = 8,
    outliers: int = 48,
    score: str = "landmarks",
) -> Technique:
    """Read `budget` tokens in all, rounded up to whole pages.

    rank: of a prompt's keys, per layer; 0 is the full rank. energy: a smaller rank is taken if it keeps this share
    of the keys' squares; 0 asks for no share. chunk: tokens of a landmark. outliers: how many chunks are always
    read, rounded up to whole pages. score: how pages are ranked, one of `SCORES`. Recent tokens and outliers are
    counted in chunks with either score.
    """
    options = Options(rank, energy, budget, chunk, outliers, score)
    if score not in SCORES:
        raise ConfigError(f"shadowkv: score must be {' or '.join(SCORES)}, got '{score}'")
    if rank < 0 or not 0 <= energy < 1 or budget < 1 or chunk < 1 or outliers < 0:
        raise ConfigError(
            "shadowkv needs rank >= 0, 0 <= energy < 1, budget >= 1, chunk >= 1 and outliers >= 0, "
            f"got {rank}, {energy}, {budget}, {chunk} and {outliers}"
        )

    def build(site: Site) -> dict[str, object]:
        shape, size = site.geometry, site.page_size
        options.check(shape, size)
        pages = pages_for(budget, size)
        how = KeyFormat(
            rank or shape.num_kv_heads * shape.head_dim, energy, chunk, options.outlier_pages(size), pages
        )  # fmt: skip
        prompts = PromptKeys(site, how)
        return {"codec": ShadowKVCodec(prompts), "selector": ShadowKVSelector(prompts, pages, score)}

    return Technique(
        name="shadowkv",
        fills=("codec", "selector"),
        build=build,
        options=vars(options),
        needs=frozenset({"a slow tier", "rotary positions"}),
        exact_at={"rank": 0, "chunk": 1, "budget": 2**30},
        activity=_activity,
        beside=options.beside,
    )


def _activity(seams: Seams) -> int:
    return seams.selector.dropped if isinstance(seams.selector, ShadowKVSelector) else 0
