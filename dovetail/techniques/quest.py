"""Quest (Tang et al., ICML 2024, arXiv 2406.10774): generated tokens read the pages whose keys may matter most.

When a page is complete, a summary of it is kept per layer and KV head: the elementwise maximum M and minimum m of
its rotated keys. For a query q, no key of the page has a larger product with q than sum_i max(q_i M_i, q_i m_i)
(section 3.3). A page's score is the highest of these bounds over the query heads of a KV head's group. Each KV
head reads the pages with the highest scores, and always the current page. Attention over what is read is exact.

The paper's bound is loose, and pages that matter get lost. So the default score is "codes" (`ops.pages`): 2 bits a
value say where each key lies between m and M, for twice the bytes. "mean_std" ranks pages by q . mean plus a
multiple of the deviation. Summaries of chunks smaller than a page make both "mean_std" and "bound" better.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dovetail.core.errors import ConfigError
from dovetail.core.pages import IntArray, pages_for
from dovetail.core.seams import Seams, Site
from dovetail.core.technique import Beside, Technique
from dovetail.core.types import ALL, PageSet
from dovetail.ops.pages import KINDS, Summaries, num_vectors, pick, summary_bytes
from dovetail.runtime.target import PageChoice, PageProgram, RecordedSelector, Target

if TYPE_CHECKING:
    from torch import Tensor


class QuestSelector(RecordedSelector):
    """Chooses pages so that a row and KV head reads `budget` pages. Pages that are always read count too."""

    def __init__(self, site: Site, budget: int, skip_layers: int, kind: tuple[str, int]) -> None:
        self.site = site
        self.budget = budget
        self.skip_layers = skip_layers
        self.kind = kind  # kind of summary, and tokens of a chunk
        self.window = site.page_size
        self._counting = site.geometry.choosing("quest", skip_layers)  # the layer whose choices are counted
        self._dropped = 0
        self._program: PageProgram | None = None
        self._summaries: Summaries | None = None

    @property
    def summaries(self) -> Summaries:
        if self._summaries is None:
            self._summaries = Summaries(self.site.kv, *self.kind, self._program)
        return self._summaries

    @property
    def dropped(self) -> int:
        """Pages that rows left unread, counted in one layer and for one KV head."""
        return self._dropped if self._program is None else int(self._program.unread())

    def choice(self, layer: int, to: Target) -> PageChoice | None:
        if layer < self.skip_layers:
            return None
        self._program = to.program
        return PageChoice(self.window, self.budget, by=self.summaries)

    def seal(self, pages: IntArray, kv: Any) -> None:
        self.summaries.seal(pages)

    def select(self, layer: int, q: Tensor, batch: Any) -> PageSet:
        rows = batch.sparse_rows
        eligible = batch.eligible[rows]
        always = batch.positions[rows] // batch.page_size + 1 - eligible
        count = (self.budget - always).clamp_min(0)
        if layer < self.skip_layers or bool((count >= eligible).all()):
            return ALL
        if layer == self._counting:
            self._dropped += int((eligible - count).clamp_min(0).sum())
        pages = batch.tables[batch.span_of_row[rows], : int(eligible.max())]
        return PageSet(pick(self.summaries.scores(layer, q[rows], pages), eligible, count))


def quest(
    page: int = 0, budget: int = 1024, skip_layers: int = 2, score: str = "codes", chunk: int = 0
) -> Technique:
    """Read `budget` tokens, rounded up to whole pages; a budget of the whole context is exactly the plain engine.

    page: tokens of a page. It must be the KV's block size; 0 takes that size.
    skip_layers: so many first layers read everything (2 in the paper).
    score: how pages are ranked: "codes", "bound" (the paper's) or "mean_std".
    chunk: tokens that share one bound or mean, a divisor of the page. A page counts as its best chunk. 0 means the
    whole page, as in the paper.
    """
    if score not in KINDS:
        raise ConfigError(f"quest: score must be {', '.join(KINDS[:-1])} or {KINDS[-1]}, got '{score}'")
    if chunk and score == "codes":
        raise ConfigError(f"quest: codes are of single tokens; drop chunk={chunk}, or choose another score")
    if page < 0 or skip_layers < 0 or budget < 1 or chunk < 0:
        raise ConfigError(
            "quest needs page >= 0, skip_layers >= 0, budget >= 1 and chunk >= 0, "
            f"got {page}, {skip_layers}, {budget} and {chunk}"
        )

    def build(site: Site) -> dict[str, object]:
        size, layers = site.page_size, site.geometry.num_layers
        if page not in (0, size):
            raise ConfigError(f"quest: page={page} must be the KV's block size, {size}; use --block-size {page}")
        if budget < 3 * size:
            raise ConfigError(
                f"quest: a budget of {budget} tokens leaves nothing to choose: the page of {size} that is being "
                f"filled and the one before it are always read; give at least {3 * size}"
            )
        if size % (chunk or size):
            raise ConfigError(
                f"quest: chunk={chunk} does not divide the KV's block size, {size}; "
                f"use a divisor, or another --block-size"
            )
        if skip_layers >= layers:
            raise ConfigError(f"quest: skip_layers={skip_layers} skips all of the model's {layers} layers")
        return {"selector": QuestSelector(site, pages_for(budget, size), skip_layers, (score, chunk))}

    return Technique(
        name="quest",
        fills=("selector",),
        build=build,
        options={"page": page, "budget": budget, "skip_layers": skip_layers, "score": score, "chunk": chunk},
        exact_at={"budget": 2**30, "skip_layers": 0},
        activity=_activity,
        beside=lambda shape, size, value: Beside(
            summary_bytes(shape, value, num_vectors(score, size, chunk, value))
        ),
    )


def _activity(seams: Seams) -> int:
    return seams.selector.dropped if isinstance(seams.selector, QuestSelector) else 0
