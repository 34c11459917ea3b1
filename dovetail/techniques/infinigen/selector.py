"""InfiniGen (Lee et al., OSDI 2024, arXiv 2406.19707): the pages that a layer reads are guessed one layer earlier,
so that they are on their way from slow memory while that layer computes.

The input of layer i - 1 is taken for that of layer i. It goes through layer i's norm and query weights, with a
correction that is fitted on some text (`fit`). The result is scored against partial keys: a few columns of the
rotated keys, turned so that these columns say most (`ops.skew`). A page counts if its best token scores within
`alpha` of the best of all. All KV heads of a layer read equally many pages, the mean of their counts. What is read
is what was guessed.

The paper turns the weights of OPT, which has no rotary positions, and picks single tokens. Here keys and queries
are turned after their rotation, one turn serves the query heads of a group, and whole pages are read.

With a `pool`, each KV head keeps so many of the tokens that it may leave unread, and gives up the others for good
(`eviction`). Such an engine runs operation by operation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from dovetail.core.errors import ConfigError
from dovetail.core.pages import IntArray, pages_for
from dovetail.core.seams import Seams, Selector, Site
from dovetail.core.technique import Beside, Technique
from dovetail.core.types import ALL, PageSet, Request
from dovetail.host.lazy_torch import torch
from dovetail.ops.pages import pick
from dovetail.ops.skew import PartialKeys, TurnedKeys, counted, kept_columns, partial_bytes
from dovetail.runtime.target import Fused, PageChoice, RecordedSelector, Target, TurnedQueries
from dovetail.show.progress import note
from dovetail.techniques.infinigen.calibration import kept
from dovetail.techniques.infinigen.eviction import POLICIES, Evictions
from dovetail.techniques.infinigen.guess import FITS, NORMS, Guesser, How, calibrate, shapes

if TYPE_CHECKING:
    from torch import Tensor

TOKENS, TEXTS = 1024, 8  # tokens of a calibration text, and how many texts


@dataclass(frozen=True)
class Rule:
    """alpha: how far below the best score, in logits, a page is still read. budget: the most pages that a row and
    KV head reads, with those that are always read. The other fields are the options of the same name."""

    alpha: float
    partial: float
    budget: int
    skip_layers: int
    norm: str
    fit: str
    calibration: str


class Speculation(Selector):
    """Guesses pages in `ahead`, and answers `select` with the guess."""

    def __init__(self, site: Site, rule: Rule) -> None:
        self.site = site
        self.rule = rule
        self.window = site.page_size
        self.skipped = 0
        self._guesses: dict[int, tuple[Tensor, PageSet]] = {}  # by layer: slots of the rows, and their pages
        site.ready.append(self.prepare)

    @property
    def dropped(self) -> int:
        """Pages that rows left unread, for one KV head, summed over layers."""
        return self.skipped

    def prepare(self) -> None:
        """Measure the model, or read what an earlier run measured. ConfigError where there is no text for it."""
        source, shape = self.site.calibration, self.site.geometry
        if source is None:
            raise ConfigError(
                "infinigen needs text to measure the model on, and this engine was built without any"
            )
        named, d = self.rule.calibration, shape.head_dim
        texts = _texts(source.text(named), min(TOKENS, self.site.model.config.max_position_embeddings))
        if len(texts[0]) < d:
            what = f"calibration={named}" if named else "the calibration text"
            raise ConfigError(f"infinigen: {what} has {len(texts[0])} tokens; give at least {d}")

        def measure() -> dict[str, NDArray[np.float32]]:
            note(f"infinigen measures the model on {sum(map(len, texts))} tokens, once")
            return calibrate(self.site, how, texts)

        how = How(self.rule.norm, self.rule.fit)
        text = hashlib.sha256(repr(texts).encode()).hexdigest()
        wanted = shapes(shape, self.site.model.config.hidden_size, how.fit)
        found = kept(["skew 3", source.key(), how.norm, how.fit, text], wanted, measure)
        basis = found.pop("basis")
        self.keys = PartialKeys(
            self.site.kv, basis[..., : kept_columns(d, self.rule.partial)], self.rule.skip_layers
        )
        self.guess = Guesser(self.site, how, found)

    def seal(self, pages: IntArray, kv: Any) -> None:
        self.keys.seal(pages)

    def ahead(self, layer: int, hidden: Tensor, batch: Any) -> PageSet:
        if layer < self.rule.skip_layers:
            return ALL
        rows = batch.sparse_rows
        margin, count = self.scored(layer, self.guess(layer, hidden, batch), batch)
        self.skipped += int((batch.eligible[rows] - count).clamp_min(0).sum())
        found = self.chosen(margin, count, batch)
        self._guesses[layer] = batch.slots[rows], found
        return found

    def scored(self, layer: int, q: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """For queries [n, heads, head_dim] of the batch's sparse rows: the margins [n, KV heads, pages] of the
        pages that they may leave unread, and how many of these each KV head reads [n]."""
        readable = self.readable(layer, batch)
        pages = batch.tables[batch.span_of_row[batch.sparse_rows], : readable.shape[-1]]
        margin = self.keys.margins(layer, q, pages, readable)
        return margin, self.count(margin, batch)

    def readable(self, layer: int, batch: Any) -> Tensor:
        """Which of the pages that they may leave unread the batch's sparse rows can read: [n, KV heads, pages]."""
        eligible = batch.eligible[batch.sparse_rows]
        pages = torch.arange(int(eligible.max()), device=eligible.device)
        return (pages < eligible[:, None, None]).expand(-1, self.site.geometry.num_kv_heads, -1)

    def count(self, margin: Tensor, batch: Any) -> Tensor:
        """How many pages each KV head reads [n], from the margins of `scored`."""
        rows = batch.sparse_rows
        always = batch.positions[rows] // batch.page_size + 1 - batch.eligible[rows]
        return counted(margin, self.rule.alpha).minimum(self.rule.budget - always)

    def chosen(self, margin: Tensor, count: Tensor, batch: Any) -> PageSet:
        eligible = batch.eligible[batch.sparse_rows]
        return ALL if bool((count >= eligible).all()) else PageSet(pick(margin, eligible, count))

    def select(self, layer: int, q: Tensor, batch: Any) -> PageSet:
        slots, found = self._guesses.pop(layer, (None, ALL))
        if slots is None or found.pages is None:
            return ALL
        left = torch.isin(slots, batch.slots[batch.sparse_rows])  # a row may have been dropped in between
        return PageSet(found.pages[left])


class RecordedSpeculation(Speculation, RecordedSelector):
    """The same as operations of a native program."""

    guesses = True

    def __init__(self, site: Site, rule: Rule) -> None:
        super().__init__(site, rule)
        self._native: TurnedKeys | None = None

    @property
    def dropped(self) -> int:
        return self.skipped if self._native is None else self._native.program.unread()

    def choice(self, layer: int, to: Target) -> PageChoice | None:
        return None  # what was not guessed is read in full

    def choice_ahead(self, layer: int, to: Target) -> PageChoice | None:
        if layer < self.rule.skip_layers:
            return None
        if self._native is None:
            self._native = TurnedKeys(to.program, self.keys)
        source = to.slot("guess", self.guess.width)
        self.guess.linear(layer).record(to, to.x, source, Fused(norm=self.guess.norm_of(layer)))
        turned = to.turn(source, layer, self.guess.blocks[layer].attention.turning, self._native)
        by = TurnedQueries(turned, self._native, self.rule.alpha)
        return PageChoice(self.window, self.rule.budget, by=by)

    def seal(self, pages: IntArray, kv: Any) -> None:
        (self._native or self.keys).seal(pages)


def _texts(tokens: Sequence[int], longest: int) -> list[list[int]]:
    """At most `TEXTS` parts of equal length, spread over the tokens. The length is at most `longest`."""
    n = min(longest, len(tokens))
    count = max(1, min(TEXTS, len(tokens) // max(1, n)))
    step = len(tokens) // count
    return [list(tokens[i * step : i * step + n]) for i in range(count)]


class PooledSpeculation(Speculation):
    """`Speculation` that keeps at most `limit` of the pages that a KV head of a request may leave unread."""

    def __init__(self, site: Site, rule: Rule, limit: int, policy: str) -> None:
        super().__init__(site, rule)
        self.limit = limit
        self.policy = policy
        # for each request, by stage and layer
        self.pools: WeakKeyDictionary[Request, dict[tuple[int, int], Evictions]] = WeakKeyDictionary()

    def _pools(self, layer: int, batch: Any) -> list[Evictions]:
        """The pool of each sparse row."""
        found = []
        for row in batch.sparse_rows.tolist():
            span = batch.spans[batch.row_spans[row]]
            pools = self.pools.setdefault(span.request, {})
            if (span.stage, layer) not in pools:
                heads = self.site.geometry.num_kv_heads
                pools[span.stage, layer] = Evictions(heads, self.window, self.limit, self.policy)
            found.append(pools[span.stage, layer])
        return found

    def readable(self, layer: int, batch: Any) -> Tensor:
        found = super().readable(layer, batch).clone()
        eligible = batch.eligible[batch.sparse_rows].tolist()
        for row, pool, pages in zip(found, self._pools(layer, batch), eligible, strict=True):
            row[:, :pages] &= torch.from_numpy(~pool.given_up(pages)).to(found.device)
        return found

    def chosen(self, margin: Tensor, count: Tensor, batch: Any) -> PageSet:
        pages = pick(margin, batch.eligible[batch.sparse_rows], count)
        there = margin.gather(2, pages.clamp_min(0)) > float("-inf")  # a head may have fewer than count
        return PageSet(torch.where(there, pages, -1))

    def ahead(self, layer: int, hidden: Tensor, batch: Any) -> PageSet:
        found = super().ahead(layer, hidden, batch)
        if found.pages is not None:
            positions = batch.positions[batch.sparse_rows].tolist()
            for pool, position, pages in zip(
                self._pools(layer, batch), positions, found.pages.cpu().numpy(), strict=True
            ):
                pool.chose(position, pages)
        return found


def infinigen(
    alpha: float = 5.0, partial: float = 0.5, budget: int = 1024, skip_layers: int = 2, norm: str = "next",
    fit: str = "linear", calibration: str = "", pool: int = 0, eviction: str = "counter",
) -> Technique:  # fmt: skip
    """Read what scores within `alpha` (logits) of the best, at most `budget` tokens, rounded up to whole pages.

    partial: fraction of a head's dimensions that is scored (0.3 in the paper). skip_layers: so many first layers
    read everything, at least 1, because no layer comes before the first. norm: a guess goes through the norm of
    the `next` layer, or of the `same` layer as its input (the published program). fit: the correction of guesses,
    measured on the calibration text: `linear` in their input, the `mean` error, or `none` (the paper).
    calibration: a file of text or a named corpus to measure the model on; by default a text that every Python
    ships. pool: how many of the tokens that it may leave unread each layer and KV head of a request keeps, 0 for
    all. The limit holds once a page of generated tokens is full. eviction: which page is given up, one of
    `POLICIES`.
    """
    for name, given, known in (("norm", norm, NORMS), ("fit", fit, FITS), ("eviction", eviction, POLICIES)):
        if given not in known:
            raise ConfigError(f"infinigen: {name} must be {', '.join(known[:-1])} or {known[-1]}, got '{given}'")
    if eviction != POLICIES[0] and not pool:
        raise ConfigError(f"infinigen: eviction={eviction} means nothing without a pool; give pool=TOKENS")
    if pool and pool < budget:
        raise ConfigError(
            f"infinigen: a pool of {pool} tokens is less than the budget of {budget} that a row may read; "
            f"give at least that, or 0 for no limit"
        )
    if not (alpha > 0 and 0 < partial <= 1 and budget >= 1 and skip_layers >= 1):
        raise ConfigError(
            "infinigen needs alpha > 0, 0 < partial <= 1, budget >= 1 and skip_layers >= 1, "
            f"got {alpha}, {partial}, {budget} and {skip_layers}"
        )

    def build(site: Site) -> dict[str, object]:
        size, layers = site.page_size, site.geometry.num_layers
        if budget < 3 * size:
            raise ConfigError(
                f"infinigen: a budget of {budget} tokens leaves nothing to choose: the page of {size} that is "
                f"being filled and the one before it are always read; give at least {3 * size}"
            )
        if skip_layers >= layers:
            raise ConfigError(f"infinigen: skip_layers={skip_layers} skips all of the model's {layers} layers")
        site.geometry.choosing("infinigen", skip_layers)
        rule = Rule(alpha, partial, pages_for(budget, size), skip_layers, norm, fit, calibration)
        if pool:
            return {"selector": PooledSpeculation(site, rule, pages_for(pool, size), eviction)}
        return {"selector": RecordedSpeculation(site, rule)}

    return Technique(
        name="infinigen",
        fills=("selector",),
        build=build,
        options={
            "alpha": alpha, "partial": partial, "budget": budget, "skip_layers": skip_layers, "norm": norm,
            "fit": fit, "calibration": calibration, "pool": pool, "eviction": eviction,
        },
        needs=frozenset({"a slow tier", "rotary positions"}),
        exact_at={"alpha": float("inf"), "budget": 2**30, "skip_layers": 1},
        activity=_activity,
        beside=lambda shape, size, value: Beside(partial_bytes(shape, size, value, partial)),
    )  # fmt: skip


def _activity(seams: Seams) -> int:
    return seams.selector.dropped if isinstance(seams.selector, Speculation) else 0
