"""Queries of a layer, guessed from the input of the layer before it. A correction is measured once per model.

    guess_i(x) = W_i norm(x)                            x: a row that enters layer i - 1; W_i: query weights
               + E_i norm(x) + b_i                      the correction

The correction is fitted on some text (`FITS`). "linear" fits E_i and b_i by least squares with a ridge, so that
little data leaves W_i as it is. "mean" fits b_i alone. "none" adds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dovetail.core.errors import ConfigError
from dovetail.core.seams import Geometry, Site
from dovetail.host.lazy_torch import torch
from dovetail.layers.linear import Dense, DenseLinear, Linear, Packed, PackedLinear, Unrecorded
from dovetail.layers.norm import Norm
from dovetail.ops.dequant import q8_0
from dovetail.ops.skew import skew
from dovetail.ops.stored import StoredTensor
from dovetail.show.progress import counter
from dovetail.techniques.infinigen.calibration import as_array, layer_inputs

if TYPE_CHECKING:
    from torch import Tensor

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

    def __init__(self, site: Site, how: How, fitted: dict[str, NDArray[Any]] | None = None) -> None:
        """fitted: what `calibrate` returned. Without it nothing is added to guesses."""
        self.blocks = site.model.blocks()
        for qkv in (block.attention.qkv for block in self.blocks):
            if not isinstance(qkv, (PackedLinear, DenseLinear, Unrecorded)):
                raise ConfigError(
                    f"infinigen guesses by a part of each projection, and layers of this weight format "
                    f"({type(qkv).__name__}) cannot be divided; leave infinigen or the format out"
                )
        self.layers = site.geometry.num_layers
        self.device: str = site.device
        self.how = how
        self._linear = [self._corrected(i, fitted) if fitted else self._plain(i) for i in range(self.layers)]

    def projected(self, index: int, hidden: Any) -> Any:
        """hidden [rows, width], tensor or array, is the input of block `index` - 1. Returns [rows, heads x
        head_dim], not rotated."""
        return self._linear[index % self.layers](self.norm_of(index)(hidden))[:, : self.width]

    def norm_of(self, index: int) -> Norm:
        found: Norm = self.blocks[index if self.how.norm == "next" else index - 1].attention_norm
        return found

    def true(self, index: int, hidden: Any) -> Any:
        """The true queries of block `index` from its own input, in the same shape, not rotated."""
        block = self.blocks[index]
        return block.attention.qkv(block.attention_norm(hidden))[:, : self.width]

    def rotated(self, index: int, q: Any, positions: Any) -> Any:
        """q [rows, heads x head_dim] at `positions` [rows] -> [rows, heads, head_dim]."""
        attention = self.blocks[index].attention
        angles = attention.rope.angles(positions, q.dtype)
        return attention.queries(q.reshape(len(q), -1, attention.head_dim), angles)

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

    def _corrected(self, layer: int, fitted: dict[str, NDArray[Any]]) -> Linear:
        qkv = self.blocks[layer].attention.qkv
        bias = fitted["bias"][layer]
        if "weight" not in fitted and isinstance(qkv, PackedLinear):
            own = qkv.weights.bias[: self.width] or [0.0] * self.width
            both = [a + b for a, b in zip(own, bias.tolist(), strict=True)]
            return PackedLinear(qkv.weights.packed[:1], both, qkv.format)
        weight, own_bias = _matrix(qkv, self.width, self._inputs)
        weight = weight + fitted["weight"][layer] if "weight" in fitted else weight
        name = f"guesses of layer {layer}"
        stored = StoredTensor.of(name, weight)
        if isinstance(qkv, PackedLinear) and qkv.weights.activation == "int8" and weight.shape[1] % 32 == 0:
            stored = StoredTensor(name, "Q8_0", tuple(weight.shape), q8_0(weight))
        found: Linear = self._format(qkv).linear([stored], [StoredTensor.of(name, own_bias + bias)])
        return found

    def _format(self, qkv: Linear) -> Packed | Dense:
        if isinstance(qkv, PackedLinear):
            return qkv.format
        kind = str(qkv.weight.dtype).removeprefix("torch.") if isinstance(qkv, DenseLinear) else "float32"
        return Dense(kind, self.device)

    @property
    def _inputs(self) -> int:
        return len(self.blocks[0].attention_norm.values)


def _matrix(linear: Any, width: int, inputs: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Weights [width, inputs] and bias [width] of the first `width` outputs of a linear layer, in float32, however
    they are stored."""

    def product(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        if isinstance(linear, PackedLinear):
            return linear(rows)[:, :width]
        like = getattr(linear, "weight", torch.empty(0))
        found: NDArray[np.float32] = linear(torch.from_numpy(rows).to(like))[:, :width].float().cpu().numpy()
        return found

    bias = product(np.zeros((1, inputs), np.float32))[0]
    return (product(np.eye(inputs, dtype=np.float32)) - bias).T, bias


def shapes(shape: Geometry, hidden: int, fit: str) -> dict[str, tuple[int, ...]]:
    """The shapes of what `calibrate` returns, by name."""
    layers, d, width = shape.num_layers, shape.head_dim, shape.num_heads * shape.head_dim
    found: dict[str, tuple[int, ...]] = {"basis": (layers, shape.num_kv_heads, d, d)}
    if fit != "none":
        found["bias"] = (layers, width)
    if fit == "linear":
        found["weight"] = (layers, width, hidden)
    return found


def calibrate(site: Site, how: How, texts: Sequence[Sequence[int]]) -> dict[str, NDArray[np.float32]]:
    """Measure the model on texts of one length.

    basis: A of `ops.skew` for the queries of these texts, [layers, KV heads, head_dim, head_dim]. bias [layers,
    heads x head_dim] and weight [layers, heads x head_dim, width]: b and E, as far as `how.fit` asks for them.
    """
    guesser, shape = Guesser(site, how), site.geometry
    n, group = len(texts[0]), shape.num_heads // shape.num_kv_heads
    positions = np.tile(np.arange(n), len(texts))
    context = site.model.config.max_position_embeddings
    found: dict[str, list[NDArray[np.float32]]] = {"basis": [], "bias": [], "weight": []}
    before = None
    with counter("calibrating layers", shape.num_layers) as advance:
        for layer, hidden in layer_inputs(site, texts):
            q = as_array(guesser.true(layer, hidden))
            inputs = as_array(guesser.norm_of(layer)(hidden if before is None else before))
            error = q - as_array(guesser.projected(layer, before)) if before is not None else np.zeros_like(q)
            for name, part in zip(("weight", "bias"), fit(inputs, error, how.fit), strict=True):
                found[name].append(part.astype(np.float32))
            placed = [guesser.rotated(layer, q, positions * f) for f in stretches(context // n)]
            groups = np.concatenate(placed).reshape(-1, shape.num_kv_heads, group * shape.head_dim)
            turned = skew(groups.swapaxes(0, 1).reshape(shape.num_kv_heads, -1, shape.head_dim))
            found["basis"].append(turned.astype(np.float32))
            before = hidden
            advance(1)
    kept = shapes(shape, before.shape[1] if before is not None else 0, how.fit)
    return {name: np.stack(found[name]) for name in kept}


def fit(inputs: NDArray[Any], error: NDArray[Any], how: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """E [m, width] and b [m] that explain error [n, m] by inputs [n, width], in float64.

    They minimise the sum of squares of error - E x - b, plus that of E times n times `RIDGE` of the mean square of
    the inputs. With "mean", E is 0.
    """
    x, y = inputs.astype(np.float64), error.astype(np.float64)
    if how != "linear":
        return np.zeros((y.shape[1], x.shape[1])), y.mean(0)
    ridge = RIDGE * len(x) * np.square(x).mean()
    middle, rest = x.mean(0), y.mean(0)
    x, y = x - middle, y - rest
    gram = x.T @ x
    gram[np.diag_indices_from(gram)] += max(ridge, np.finfo(np.float64).tiny)
    found = np.linalg.solve(gram, x.T @ y).T
    return found, rest - found @ middle


def stretches(longest: int) -> list[int]:
    """1, 2, 4 and so on, up to `longest`: factors on the positions of a text. Without them, dimensions that rotate
    slowly would be judged by positions near the start alone."""
    return [2**i for i in range(max(1, longest).bit_length())]
