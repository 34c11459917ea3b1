"""Quest (Tang et al., ICML 2024, arXiv 2406.10774): generated tokens read the pages whose keys may matter most.

When a page seals, the elementwise maximum M and minimum m of its rotated keys are kept per layer and KV head. For
a query q, no key of the page has a larger product with it than sum_i max(q_i M_i, q_i m_i) (section 3.3). Each KV
head reads the pages with the highest bounds, over the query heads of its group, and always the current one;
attention over what is read is exact. `score="mean_std"` ranks by q . mean + |q| . std instead: the bound is loose
where keys have outliers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dovetail.core.errors import ConfigError
from dovetail.core.pages import pages_for
from dovetail.core.seams import Seams, Selector, Site
from dovetail.core.technique import Technique
from dovetail.core.types import ALL, PageSet

SCORES = ("bound", "mean_std")


class QuestSelector(Selector):
    """Chooses `budget` pages per row and KV head, those that are always read included."""

    def __init__(self, site: Site, budget: int, skip_layers: int, score: str) -> None:
        self.site = site
        self.budget = budget
        self.skip_layers = skip_layers
        self.score = score
        self.window = site.page_size
        self.dropped = 0
        self._summaries: Tensor | None = None

    def seal(self, pages: Tensor, kv: Any) -> None:
        if self._summaries is None:
            self._summaries = self._room(kv)
        for layer in range(self.site.geometry.num_layers):
            found = summary(kv.keys(layer, pages), self.score)
            self._summaries[layer * kv.pages_per_layer + pages] = found.to(self._summaries.dtype)

    def select(self, layer: int, q: Tensor, batch: Any) -> PageSet:
        rows = batch.sparse_rows
        eligible = batch.eligible[rows]
        count = self._count(batch)
        if layer < self.skip_layers or self._summaries is None or bool((count >= eligible).all()):
            return ALL
        if layer == self.skip_layers:
            self.dropped += int((eligible - count).clamp_min(0).sum())
        most = int(eligible.max())
        pages = batch.tables[batch.span_of_row[rows], :most] + layer * self.site.kv.pages_per_layer
        scores = page_scores(q[rows], self._summaries[pages], self.score)
        absent = torch.arange(most, device=q.device) >= eligible[:, None]
        return PageSet(best(scores.masked_fill(absent[:, None], float("-inf")), count))

    def _count(self, batch: Any) -> Tensor:
        """How many droppable pages each sparse row may read: what the budget leaves beside the others."""
        rows = batch.sparse_rows
        always = batch.positions[rows] // batch.page_size + 1 - batch.eligible[rows]
        return (self.budget - always).clamp_min(0)

    def _room(self, kv: Any) -> Tensor:
        """Summaries [pages of all layers and stages, 2, KV heads, head_dim] in the type of the keys."""
        geometry = self.site.geometry
        keys = kv.keys(0, torch.zeros(1, dtype=torch.int64, device=kv.device))
        shape = (kv.stage_pages * kv.num_stages, 2, geometry.num_kv_heads, geometry.head_dim)
        return torch.zeros(shape, dtype=keys.dtype, device=kv.device)


def summary(keys: Tensor, score: str) -> Tensor:
    """keys [pages, tokens, KV heads, head_dim] -> [pages, 2, KV heads, head_dim]: maximum and minimum, or mean and
    standard deviation (of the tokens as they are, not an estimate)."""
    if score == "bound":
        return torch.stack([keys.amax(1), keys.amin(1)], 1)
    keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
    return torch.stack([keys.mean(1), keys.std(1, correction=0)], 1)


def page_scores(q: Tensor, summaries: Tensor, score: str) -> Tensor:
    """q [rows, heads, head_dim], summaries [rows, pages, 2, KV heads, head_dim] -> [rows, KV heads, pages]: the
    highest score over the query heads of each KV head's group."""
    kind = torch.promote_types(q.dtype, torch.float32)
    q = q.unflatten(1, (summaries.shape[3], -1)).to(kind)
    first, second = summaries.to(kind).unbind(2)
    pair = (q.clamp_min(0), q.clamp_max(0)) if score == "bound" else (q, q.abs())
    products = [torch.einsum("rhgd,rphd->rhgp", a, x) for a, x in zip(pair, (first, second), strict=True)]
    return (products[0] + products[1]).amax(2)


def best(scores: Tensor, count: Tensor) -> Tensor:
    """The `count` [rows] highest of scores [rows, KV heads, pages], the earlier of equals, in ascending order;
    -1 where there are fewer. -infinity is never chosen."""
    most = min(int(count.max()), scores.shape[-1])
    values, pages = scores.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(most, device=scores.device)
    wanted = (rank < count[:, None, None]) & (values[..., :most] > float("-inf"))
    absent = scores.shape[-1]
    chosen = torch.where(wanted, pages[..., :most], absent).sort(-1).values
    return torch.where(chosen == absent, -1, chosen)


def quest(page: int = 0, budget: int = 1024, skip_layers: int = 2, score: str = "bound") -> Technique:
    """Read `budget` tokens, rounded up to whole pages; a budget of the whole context is exactly the plain engine.

    page: tokens, which must be the KV's block size; 0 takes that. skip_layers: the first layers read everything
    (the paper's default is 2).
    """
    if score not in SCORES:
        raise ConfigError(f"quest: score must be {' or '.join(SCORES)}, got '{score}'")
    if page < 0 or skip_layers < 0 or budget < 1:
        raise ConfigError(
            f"quest needs page >= 0, skip_layers >= 0 and budget >= 1, got {page}, {skip_layers} and {budget}"
        )

    def build(site: Site) -> dict[str, object]:
        size, layers = site.page_size, site.geometry.num_layers
        if page not in (0, size):
            raise ConfigError(f"quest: page={page} must be the KV's block size, {size}; use --block-size {page}")
        if budget < 2 * size:
            raise ConfigError(
                f"quest: a budget of {budget} tokens leaves nothing to choose: the page of {size} that is being "
                f"filled and the one before it are always read; give at least {2 * size}"
            )
        if skip_layers >= layers:
            raise ConfigError(f"quest: skip_layers={skip_layers} skips all of the model's {layers} layers")
        return {"selector": QuestSelector(site, pages_for(budget, size), skip_layers, score)}

    return Technique(
        name="quest",
        fills=("selector",),
        build=build,
        options={"page": page, "budget": budget, "skip_layers": skip_layers, "score": score},
        exact_at={"budget": 2**30, "skip_layers": 0},
        activity=_activity,
    )


def _activity(seams: Seams) -> int:
    return seams.selector.dropped if isinstance(seams.selector, QuestSelector) else 0
