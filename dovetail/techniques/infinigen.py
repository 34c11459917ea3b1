"""InfiniGen (Lee et al., OSDI 2024, arXiv 2406.19707): the pages that a layer reads are guessed one layer earlier,
so that they can be on their way from slow memory while that layer computes.

The input of layer i - 1 stands in for that of layer i: it goes through layer i's norm and query weights, plus the
mean error of such guesses on some text, and is scored against partial keys: a few columns of the rotated keys,
turned so that these say most (`ops.skew`). Each KV head reads the pages whose best token scores within `alpha` of
the best of all; all KV heads of a layer read equally many, the mean of their counts. What is read is what was
guessed.

The paper turns the weights of OPT, which has no rotary positions, and picks tokens; here keys and queries are
turned after their rotation, one turn serves the query heads of a group, and pages are read whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dovetail.core.errors import ConfigError
from dovetail.core.pages import pages_for
from dovetail.core.seams import Seams, Site
from dovetail.core.technique import Technique
from dovetail.core.types import ALL, PageSet
from dovetail.layers.packed import PackedLinear
from dovetail.ops.pages import pick
from dovetail.ops.rope import rotate
from dovetail.ops.skew import PartialKeys, TurnedKeys, counted, kept_columns, skew
from dovetail.progress import counter, note
from dovetail.runtime.calibration import kept, layer_inputs
from dovetail.runtime.recorded import RecordedSelector

NORMS = ("next", "same")
TOKENS = 2048  # of calibration text


@dataclass(frozen=True)
class Rule:
    """alpha: how far below the best score, in logits, a page is still read. budget: pages that a row and KV head
    reads at most, those that are always read included. The other fields are the options of that name."""

    alpha: float
    partial: float
    budget: int
    skip_layers: int
    norm: str
    shift: bool


class Guesser:
    """Queries of a layer from the hidden rows that enter the one before it."""

    def __init__(self, site: Site, rule: Rule) -> None:
        self.blocks = site.model.blocks()
        self.layers = site.geometry.num_layers
        self.norm = rule.norm
        self.shift: Tensor | None = None  # [layers, heads x head_dim]

    def projected(self, index: int, hidden: Tensor) -> Tensor:
        """hidden [rows, width], the input of block `index` - 1 -> [rows, heads x head_dim], not yet rotated."""
        norm = self.blocks[index if self.norm == "next" else index - 1].attention_norm
        return self._queries(index, norm(hidden))

    def true(self, index: int, hidden: Tensor) -> Tensor:
        """The same from the block's own input."""
        return self._queries(index, self.blocks[index].attention_norm(hidden))

    def _queries(self, index: int, x: Tensor) -> Tensor:
        attention = self.blocks[index].attention
        return attention.qkv(x)[:, : attention.sizes[0]]

    def rotated(self, index: int, q: Tensor, positions: Tensor) -> Tensor:
        """q [rows, heads x head_dim] at `positions` [rows] -> [rows, heads, head_dim]."""
        attention = self.blocks[index].attention
        q = q.unflatten(1, (-1, attention.head_dim))
        q = q if attention.q_norm is None else attention.q_norm(q)
        return rotate(q, attention.rope.angles(positions, q.dtype))

    @property
    def width(self) -> int:
        return int(self.blocks[0].attention.sizes[0])

    def linear(self, layer: int) -> PackedLinear:
        """The projection of a guess as native programs record it, the mean error included."""
        qkv = self.blocks[layer].attention.qkv
        shift = [] if self.shift is None else self.shift[layer].tolist()
        bias = [a + b for a, b in zip(qkv.bias[: self.width], shift, strict=True)] if qkv.bias and shift else []
        return PackedLinear(qkv.parts[:1], bias or qkv.bias[: self.width] or shift, qkv.format)

    def __call__(self, layer: int, hidden: Tensor, batch: Any) -> Tensor:
        """Guessed queries [n, heads, head_dim] of the batch's sparse rows, from hidden [rows, width]."""
        rows = batch.sparse_rows
        index = batch.spans[0].stage * self.layers + layer
        q = self.projected(index, hidden[rows])
        if self.shift is not None:
            q = q + self.shift[layer].to(q.dtype)
        return self.rotated(index, q, batch.positions[rows])


def calibrate(site: Site, rule: Rule, tokens: Sequence[int]) -> dict[str, Tensor]:
    """basis: A [layers, KV heads, head_dim, head_dim] of the queries that the model computes for `tokens`; shift
    [layers, heads x head_dim]: what is missing in the guesses of layers after the first, on the average."""
    guesser, shape = Guesser(site, rule), site.geometry
    positions = torch.arange(len(tokens), device=site.device)
    context = site.model.config.max_position_embeddings
    basis, shift, before = [], [], torch.empty(0)
    with counter("calibrating layers", shape.num_layers) as advance:
        for layer, hidden in layer_inputs(site, tokens):
            q = guesser.true(layer, hidden)
            error = q - guesser.projected(layer, before) if layer else torch.zeros_like(q)
            shift.append(error.mean(0))
            placed = [guesser.rotated(layer, q, positions * f) for f in stretches(context // len(tokens))]
            groups = torch.cat(placed).unflatten(1, (shape.num_kv_heads, -1))
            basis.append(skew(groups.transpose(0, 1).flatten(1, 2)))
            before = hidden
            advance(1)
    return {"basis": torch.stack(basis), "shift": torch.stack(shift)}


def stretches(longest: int) -> list[int]:
    """1, 2, 4 and so on, up to `longest`: factors on the positions of a text. Without them, what rotates slowly
    would be judged by positions near the start."""
    return [2**i for i in range(max(1, longest).bit_length())]


class InfiniGenSelector(RecordedSelector):
    """Guesses pages in `ahead`, and answers `select` with the guess."""

    def __init__(self, site: Site, rule: Rule, file: str) -> None:
        self.site = site
        self.rule = rule
        self.file = file
        self.window = site.page_size
        self._dropped = 0
        self._native: TurnedKeys | None = None
        self._guesses: dict[int, tuple[Tensor, PageSet]] = {}  # of a layer: slots of the rows, their pages
        site.ready.append(self.prepare)

    def prepare(self) -> None:
        """Measure the model, or read what an earlier run measured. ConfigError where there is no text for it."""
        source, shape = self.site.calibration, self.site.geometry
        if source is None:
            raise ConfigError(
                "infinigen needs text to measure the model on, and this engine was built without any"
            )
        tokens = list(source.text(self.file))[: min(TOKENS, self.site.model.config.max_position_embeddings)]
        if len(tokens) < shape.head_dim:
            named = f"calibration={self.file}" if self.file else "the calibration text"
            raise ConfigError(f"infinigen: {named} has {len(tokens)} tokens; give at least {shape.head_dim}")
        d, heads = shape.head_dim, shape.num_kv_heads
        shapes = {"basis": (shape.num_layers, heads, d, d), "shift": (shape.num_layers, shape.num_heads * d)}
        text = hashlib.sha256(repr(tokens).encode()).hexdigest()

        def measure() -> dict[str, Tensor]:
            note(f"infinigen measures the model on {len(tokens)} tokens, once")
            return calibrate(self.site, self.rule, tokens)

        found = kept(["skew 1", source.key(), self.rule.norm, text], shapes, measure)
        found = {name: tensor.to(self.site.device) for name, tensor in found.items()}
        columns = found["basis"][..., : kept_columns(d, self.rule.partial)]
        self.keys = PartialKeys(self.site.kv, columns, self.rule.skip_layers)
        self.guess = Guesser(self.site, self.rule)
        self.guess.shift = found["shift"] if self.rule.shift else None

    @property
    def dropped(self) -> int:
        """Pages that rows left unread, for one head, summed over layers."""
        return self._dropped if self._native is None else self._native.program.unread()

    def record(self, layer: int, to: Any) -> bool:
        return layer >= self.rule.skip_layers

    def record_ahead(self, layer: int, to: Any) -> bool:
        if layer < self.rule.skip_layers:
            return False
        if self._native is None:
            self._native = TurnedKeys(to.program, self.keys)
        block, source = self.guess.blocks[layer], to.slot("guess", self.guess.width)
        norm = self.guess.blocks[layer if self.rule.norm == "next" else layer - 1].attention_norm
        to.linear(to.x, source, self.guess.linear(layer), norm=norm)
        turned = to.turn(source, block.attention.rope, block.attention.q_norm, self._native, layer)
        to.pick_partial(layer, turned, self._native, (self.rule.alpha, self.window, self.rule.budget))
        return True

    def seal(self, pages: Tensor, kv: Any) -> None:
        (self._native or self.keys).seal(pages)

    def ahead(self, layer: int, hidden: Tensor, batch: Any) -> PageSet:
        if layer < self.rule.skip_layers:
            return ALL
        rows = batch.sparse_rows
        eligible = batch.eligible[rows]
        margin, count = self.scored(layer, self.guess(layer, hidden, batch), batch)
        self._dropped += int((eligible - count).clamp_min(0).sum())
        found = ALL if bool((count >= eligible).all()) else PageSet(pick(margin, eligible, count))
        self._guesses[layer] = batch.slots[rows], found
        return found

    def scored(self, layer: int, q: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """For queries [n, heads, head_dim] of the batch's sparse rows: the margins of the pages that they may
        leave unread [n, KV heads, pages], and how many of these each KV head reads [n]."""
        rows = batch.sparse_rows
        eligible = batch.eligible[rows]
        pages = batch.tables[batch.span_of_row[rows], : int(eligible.max())]
        margin = self.keys.margins(layer, q, pages, eligible)
        return margin, self.count(margin, batch)

    def count(self, margin: Tensor, batch: Any) -> Tensor:
        """How many pages of such margins each KV head reads [n]."""
        rows = batch.sparse_rows
        always = batch.positions[rows] // batch.page_size + 1 - batch.eligible[rows]
        return counted(margin, self.rule.alpha).minimum(self.rule.budget - always)

    def select(self, layer: int, q: Tensor, batch: Any) -> PageSet:
        slots, found = self._guesses.pop(layer, (None, ALL))
        if slots is None or found.pages is None:
            return ALL
        left = torch.isin(slots, batch.slots[batch.sparse_rows])  # a row may have stopped in between
        return PageSet(found.pages[left])


def infinigen(
    alpha: float = 5.0, partial: float = 0.3, budget: int = 1024, skip_layers: int = 2, norm: str = "next",
    shift: bool = True, calibration: str = "",
) -> Technique:  # fmt: skip
    """Read what scores within `alpha` (logits) of the best, at most `budget` tokens, rounded up to whole pages.

    partial: fraction of the head's dimensions that is scored. skip_layers: the first layers read everything; at
    least 1, because nothing comes before the first. norm: a guess goes through the norm of the `next` layer or of
    the `same` (the published program). shift: add the mean error of guesses. calibration: a file of text, or a
    corpus by name, to measure the model on; by default what every Python ships.
    """
    if norm not in NORMS:
        raise ConfigError(f"infinigen: norm must be {' or '.join(NORMS)}, got '{norm}'")
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
        rule = Rule(alpha, partial, pages_for(budget, size), skip_layers, norm, shift)
        return {"selector": InfiniGenSelector(site, rule, calibration)}

    return Technique(
        name="infinigen",
        fills=("selector",),
        build=build,
        options={
            "alpha": alpha, "partial": partial, "budget": budget, "skip_layers": skip_layers, "norm": norm,
            "shift": shift, "calibration": calibration,
        },
        needs=frozenset({"a slow tier", "rotary positions"}),
        exact_at={"alpha": float("inf"), "budget": 2**30, "skip_layers": 1},
        activity=_activity,
    )  # fmt: skip


def _activity(seams: Seams) -> int:
    return seams.selector.dropped if isinstance(seams.selector, InfiniGenSelector) else 0
