"""Queries of a layer, guessed from what enters the layer before it, and what they need to be measured once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dovetail.core.seams import Site
from dovetail.layers.norm import Norm
from dovetail.layers.packed import PackedLinear
from dovetail.ops.rope import rotate
from dovetail.ops.skew import skew
from dovetail.progress import counter
from dovetail.runtime.calibration import layer_inputs

NORMS = ("next", "same")


class Guesser:
    """Queries of a layer from the hidden rows that enter the one before it, by the norm of the `next` layer or of
    the `same`, and all the rest of the next."""

    def __init__(self, site: Site, norm: str, shift: Tensor | None = None) -> None:
        """shift [layers, heads x head_dim]: added to guesses, before heads are normed and rotated."""
        self.blocks = site.model.blocks()
        self.layers = site.geometry.num_layers
        self.norm = norm
        self.shift = shift

    def projected(self, index: int, hidden: Tensor) -> Tensor:
        """hidden [rows, width], the input of block `index` - 1 -> [rows, heads x head_dim], not yet rotated."""
        return self._queries(index, self.norm_of(index)(hidden))

    def norm_of(self, index: int) -> Norm:
        found: Norm = self.blocks[index if self.norm == "next" else index - 1].attention_norm
        return found

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


def calibrate(site: Site, norm: str, tokens: Sequence[int]) -> dict[str, Tensor]:
    """basis: A [layers, KV heads, head_dim, head_dim] of the queries that the model computes for `tokens`; shift
    [layers, heads x head_dim]: what is missing in the guesses of layers after the first, on the average."""
    guesser, shape = Guesser(site, norm), site.geometry
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
