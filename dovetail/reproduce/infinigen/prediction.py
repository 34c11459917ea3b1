"""How good guesses from the layer before are. Measured are the likeness of neighbouring layers' inputs, and how
much of what a layer's own queries would choose was guessed.

Everything is read meanwhile, so all rules are judged on the same rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dovetail.core.pages import IntArray
from dovetail.core.seams import Selector, Site
from dovetail.core.technique import Technique
from dovetail.core.types import ALL, PageSet
from dovetail.host.lazy_torch import torch
from dovetail.ops.pages import pick
from dovetail.ops.skew import margins
from dovetail.show.table import table
from dovetail.techniques import technique
from dovetail.techniques.infinigen.calibration import as_array, layer_inputs

if TYPE_CHECKING:
    from torch import Tensor


def likeness(site: Site, tokens: Sequence[int]) -> list[float]:
    """The mean cosine, over rows, of the inputs of layers i - 1 and i, for i = 1 and on."""
    inputs = [as_array(hidden) for _, hidden in layer_inputs(site, [tokens])]
    return [_cosine(a, b) for a, b in itertools.pairwise(inputs)]


def _cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(((a * b).sum(-1) / lengths).mean())


@dataclass
class Tally:
    """Sums over rows and KV heads. Of the pages that a row may leave unread, `chosen` counts those that its own
    query chooses by the same partial keys, and `found` how many of these the guess has. `best` and `best_found`
    are the same by whole keys. `weight` is the attention that the best pages get, `weight_found` that of the
    guessed ones among them. `pages` counts all pages before a row, `read` those that are read, with those that are
    always read."""

    chosen: int = 0
    found: int = 0
    best: int = 0
    best_found: int = 0
    weight: float = 0.0
    weight_found: float = 0.0
    read: int = 0
    pages: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass
class Prediction:
    """What was tallied of one rule: `layers` [layer]."""

    rule: str
    layers: dict[int, Tally] = field(default_factory=dict)

    @property
    def total(self) -> Tally:
        return sum(self.layers.values(), Tally())

    def to_dict(self) -> dict[str, Any]:
        """Fractions of 1: in all, and `by_layer`, how much of what is chosen was guessed."""
        all_of = self.total
        return {
            "rule": self.rule,
            "read": all_of.read / all_of.pages,
            "found": all_of.found / all_of.chosen,
            "found_of_best": all_of.best_found / all_of.best,
            "weight_found": all_of.weight_found / all_of.weight,
            "by_layer": {layer: t.found / t.chosen for layer, t in sorted(self.layers.items())},
        }


class Watch(Selector):
    """Reads everything, and tallies what each of `selectors` guesses and would have chosen."""

    def __init__(self, site: Site, rules: Sequence[str]) -> None:
        self.site = site
        self.window = site.page_size
        self.selectors = [technique(rule).build(site)["selector"] for rule in rules]
        self.predictions = [Prediction(rule) for rule in rules]
        self._guesses: dict[int, list[Tensor]] = {}

    def seal(self, pages: IntArray, kv: Any) -> None:
        for selector in self.selectors:
            selector.seal(pages, kv)

    def ahead(self, layer: int, hidden: Tensor, batch: Any) -> PageSet:
        self._guesses[layer] = [s.guess(layer, hidden, batch) for s in self.selectors]
        return ALL

    def select(self, layer: int, q: Tensor, batch: Any) -> PageSet:
        rows = batch.sparse_rows
        if guesses := self._guesses.pop(layer, []):
            truth = _Truth(self.site, layer, q[rows], batch)
            for s, guess, prediction in zip(self.selectors, guesses, self.predictions, strict=True):
                if layer >= s.rule.skip_layers:
                    tally = truth.tally(s, guess, q[rows])
                    prediction.layers[layer] = prediction.layers.get(layer, Tally()) + tally
        return ALL


class _Truth:
    """The scores of whole keys by queries q [n, heads, head_dim] of the batch's sparse rows."""

    def __init__(self, site: Site, layer: int, q: Tensor, batch: Any) -> None:
        rows = batch.sparse_rows
        self.layer, self.batch = layer, batch
        self.eligible = batch.eligible[rows]
        self.before = batch.positions[rows] // batch.page_size + 1
        pages = batch.tables[batch.span_of_row[rows], : int(self.eligible.max())]
        keys = site.kv.keys(layer, pages).transpose(2, 3)
        scaled = q.unflatten(1, (keys.shape[2], -1)) * q.shape[-1] ** -0.5
        readable = torch.arange(pages.shape[1]) < self.eligible[:, None]
        self.margin = margins(scaled, keys, readable[:, None].expand(-1, keys.shape[2], -1))
        scores = torch.einsum("rhgd,rphtd->rhgpt", scaled.float(), keys.float())
        weights = scores.masked_fill(~readable[:, None, None, :, None], float("-inf")).flatten(3).softmax(-1)
        self.weight = weights.unflatten(3, scores.shape[3:]).sum(-1).mean(2)  # [n, KV heads, pages]

    def tally(self, selector: Any, guess: Tensor, q: Tensor) -> Tally:
        always = self.before - self.eligible
        guessed, count = self._chosen(selector, *selector.scored(self.layer, guess, self.batch))
        chosen, _ = self._chosen(selector, *selector.scored(self.layer, q, self.batch))
        best, _ = self._chosen(selector, self.margin, selector.count(self.margin, self.batch))
        heads = guessed.shape[1]
        return Tally(
            int(chosen.sum()), int((chosen & guessed).sum()), int(best.sum()), int((best & guessed).sum()),
            float(self.weight[best].sum()), float(self.weight[best & guessed].sum()),
            int((count.minimum(self.eligible) + always).sum()) * heads, int(self.before.sum()) * heads,
        )  # fmt: skip

    def _chosen(self, selector: Any, margin: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Which pages are picked, bool [n, KV heads, pages], and how many."""
        picked = pick(margin, self.eligible, count)
        found = torch.zeros(*margin.shape[:2], margin.shape[2] + 1, dtype=torch.bool)
        found.scatter_(2, torch.where(picked < 0, margin.shape[2], picked), True)
        return found[..., :-1], count


def watching(rules: Sequence[str]) -> Technique:
    """A technique that reads everything. Its selector's `predictions` are those of `rules`, which are specs of the
    technique."""

    def build(site: Site) -> dict[str, object]:
        return {"selector": Watch(site, rules)}

    needs = frozenset({"rotary positions"})
    return Technique("watch", ("selector",), build, {"rules": len(rules)}, needs=needs, lossless=True)


def report(predictions: Sequence[Prediction]) -> str:
    """A table in percent, a line per rule."""
    rows = []
    for f in [p.to_dict() for p in predictions]:
        shares = [f["read"], f["found"], f["found_of_best"], f["weight_found"], min(f["by_layer"].values())]
        rows.append((f["rule"], *(f"{100 * x:.1f}" for x in shares)))
    return table(("rule", "read %", "found %", "of whole keys %", "by weight %", "worst layer %"), rows)
