"""Queries of a layer, guessed from the input of the layer before it. A correction is measured once per model.

    guess_i(x) = W_i norm(x)                            x: a row that enters layer i - 1; W_i: query weights
               + E_i norm(x) + b_i                      the correction

The correction is fitted on some text (`FITS`). "linear" fits E_i and b_i by least squares with a ridge, so that
little data leaves W_i as it is. "mean" fits b_i alone. "none" adds nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dovetail.core.errors import ConfigError
from dovetail.core.seams import Geometry, Site
from dovetail.layers.linear import Dense, DenseLinear, Linear, PackedLinear, Unrecorded
from dovetail.layers.norm import Norm
from dovetail.ops.quant import q8_0
from dovetail.ops.skew import skew
from dovetail.ops.stored import StoredTensor
from dovetail.show.progress import counter
from dovetail.techniques.infinigen.calibration import layer_inputs

NORMS = ("next", "same")
FITS = ("linear", "mean", "none")
RIDGE = 0.03  # as a share of the mean square of the inputs


@dataclass(frozen=True)
class How:
    """norm: a guess goes through the norm of the `next` layer, or of the `same` layer as its input. fit: of
    `FITS`."""

    norm: str
    fit: str


class Guesser:
    """Guesses the queries of a layer from the hidden rows that enter the layer before it."""

    def __init__(self, site: Site, how: How, fitted: dict[str, Tensor] | None = None) -> None:
        """fitted: what `calibrate` returned. Without it nothing is added to guesses."""
        self.blocks = site.model.blocks()
        for qkv in (block.attention.qkv for block in self.blocks):
            if not isinstance(qkv, (PackedLinear, DenseLinear, Unrecorded)):
                raise ConfigError(
                    f"infinigen guesses by a part of each projection, and layers of this weight format "
                    f"({type(qkv).__name__}) cannot be divided; leave infinigen or the format out"
                )
        self.layers = site.geometry.num_layers
        self.how = how
        self._linear = [self._corrected(i, fitted) if fitted else self._plain(i) for i in range(self.layers)]

    def projected(self, index: int, hidden: Tensor) -> Tensor:
        """hidden [rows, width] is the input of block `index` - 1. Returns [rows, heads x head_dim], not
        rotated."""
        return self._linear[index % self.layers](self.norm_of(index)(hidden))[:, : self.width]

    def norm_of(self, index: int) -> Norm:
        found: Norm = self.blocks[index if self.how.norm == "next" else index - 1].attention_norm
        return found

    def true(self, index: int, hidden: Tensor) -> Tensor:
        """The true queries of block `index` from its own input, in the same shape, not rotated."""
        block = self.blocks[index]
        found: Tensor = block.attention.qkv(block.attention_norm(hidden))
        return found[:, : self.width]

    def rotated(self, index: int, q: Tensor, positions: Tensor) -> Tensor:
        """q [rows, heads x head_dim] at `positions` [rows] -> [rows, heads, head_dim]."""
        attention = self.blocks[index].attention
        angles = attention.rope.angles(positions, q.dtype)
        found: Tensor = attention.queries(q.unflatten(1, (-1, attention.head_dim)), angles)
        return found

    @property
    def width(self) -> int:
        return int(self.blocks[0].attention.sizes[0])

    def linear(self, layer: int) -> Linear:
        """The projection of a guess, as native programs record it."""
        return self._linear[layer]

    def __call__(self, layer: int, hidden: Tensor, batch: Any) -> Tensor:
        """Guessed queries [n, heads, head_dim] of the batch's sparse rows, from hidden [rows, width]."""
        rows = batch.sparse_rows
        index = batch.spans[0].stage * self.layers + layer
        return self.rotated(index, self.projected(index, hidden[rows]), batch.positions[rows])

    def _plain(self, layer: int) -> Linear:
        qkv = self.blocks[layer].attention.qkv
        if isinstance(qkv, PackedLinear):
            return PackedLinear(qkv.weights.packed[:1], qkv.weights.bias[: self.width], qkv.format)
        found: Linear = qkv
        return found

    def _corrected(self, layer: int, fitted: dict[str, Tensor]) -> Linear:
        qkv = self.blocks[layer].attention.qkv
        bias = fitted["bias"][layer]
        if "weight" not in fitted and isinstance(qkv, PackedLinear):
            own = qkv.weights.bias[: self.width] or [0.0] * self.width
            both = [a + b for a, b in zip(own, bias.tolist(), strict=True)]
            return PackedLinear(qkv.weights.packed[:1], both, qkv.format)
        weight, own_bias = _matrix(qkv, self.width, self._inputs)
        weight = weight + fitted["weight"][layer] if "weight" in fitted else weight
        dense = qkv.weight if isinstance(qkv, DenseLinear) else weight
        form = qkv.format if isinstance(qkv, PackedLinear) else Dense(dense.dtype, dense.device)
        name = f"guesses of layer {layer}"
        stored = _stored(name, weight)
        if isinstance(qkv, PackedLinear) and qkv.weights.activation == "int8" and weight.shape[1] % 32 == 0:
            stored = StoredTensor(name, "Q8_0", tuple(weight.shape), q8_0(weight))
        found: Linear = form.linear([stored], [_stored(name, own_bias + bias)])
        return found

    @property
    def _inputs(self) -> int:
        return int(self.blocks[0].attention_norm.weight.shape[0])


def _matrix(linear: Any, width: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Weights [width, inputs] and bias [width] of the first `width` outputs of a linear layer, in float32, however
    they are stored."""
    dtype = getattr(getattr(linear, "weight", None), "dtype", torch.float32)
    bias = linear(torch.zeros(1, inputs, dtype=dtype))[0, :width].float()
    return (linear(torch.eye(inputs, dtype=dtype))[:, :width].float() - bias).T, bias


def _stored(name: str, values: Tensor) -> StoredTensor:
    data = values.float().contiguous().view(torch.uint8).view(values.shape[0], -1)
    return StoredTensor(name, "F32", tuple(values.shape), data)


def shapes(shape: Geometry, hidden: int, fit: str) -> dict[str, tuple[int, ...]]:
    """The shapes of what `calibrate` returns, by name."""
    layers, d, width = shape.num_layers, shape.head_dim, shape.num_heads * shape.head_dim
    found: dict[str, tuple[int, ...]] = {"basis": (layers, shape.num_kv_heads, d, d)}
    if fit != "none":
        found["bias"] = (layers, width)
    if fit == "linear":
        found["weight"] = (layers, width, hidden)
    return found


def calibrate(site: Site, how: How, texts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Measure the model on texts of one length.

    basis: A of `ops.skew` for the queries of these texts, [layers, KV heads, head_dim, head_dim]. bias [layers,
    heads x head_dim] and weight [layers, heads x head_dim, width]: b and E, as far as `how.fit` asks for them.
    """
    guesser, shape = Guesser(site, how), site.geometry
    n = len(texts[0])
    positions = torch.arange(n, device=site.device).repeat(len(texts))
    context = site.model.config.max_position_embeddings
    found: dict[str, list[Tensor]] = {"basis": [], "bias": [], "weight": []}
    before = None
    with counter("calibrating layers", shape.num_layers) as advance:
        for layer, hidden in _inputs(site, texts):
            q = guesser.true(layer, hidden)
            inputs = guesser.norm_of(layer)(hidden if before is None else before)
            error = q - guesser.projected(layer, before) if before is not None else torch.zeros_like(q)
            for name, part in zip(("weight", "bias"), fit(inputs, error, how.fit), strict=True):
                found[name].append(part.float())
            placed = [guesser.rotated(layer, q, positions * f) for f in stretches(context // n)]
            groups = torch.cat(placed).unflatten(1, (shape.num_kv_heads, -1))
            found["basis"].append(skew(groups.transpose(0, 1).flatten(1, 2)))
            before = hidden
            advance(1)
    kept = shapes(shape, before.shape[1] if before is not None else 0, how.fit)
    return {name: torch.stack(found[name]) for name in kept}


def _inputs(site: Site, texts: Sequence[Sequence[int]]) -> Iterator[tuple[int, Tensor]]:
    """For each layer, the hidden rows of all texts that enter it."""
    for parts in zip(*(layer_inputs(site, text) for text in texts), strict=True):
        yield parts[0][0], torch.cat([hidden for _, hidden in parts])


def fit(inputs: Tensor, error: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """E [m, width] and b [m] that explain error [n, m] by inputs [n, width], in float64.

    They minimise the sum of squares of error - E x - b, plus that of E times n times `RIDGE` of the mean square of
    the inputs. With "mean", E is 0.
    """
    x, y = inputs.double(), error.double()
    if how != "linear":
        return torch.zeros(y.shape[1], x.shape[1]), y.mean(0)
    middle, rest = x.mean(0), y.mean(0)
    x, y = x - middle, y - rest
    ridge = RIDGE * len(x) * inputs.double().square().mean()
    gram = x.T @ x
    gram.diagonal().add_(ridge.clamp_min(torch.finfo(torch.float64).tiny))
    found = torch.linalg.solve(gram, x.T @ y).T
    return found, rest - found @ middle


def stretches(longest: int) -> list[int]:
    """1, 2, 4 and so on, up to `longest`: factors on the positions of a text. Without them, dimensions that rotate
    slowly would be judged by positions near the start alone."""
    return [2**i for i in range(max(1, longest).bit_length())]
