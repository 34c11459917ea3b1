"""Tender: activations decomposed by powers of two, so that integers alone carry a product to its end (2406.12930).

Channels of an activation differ in magnitude by more than 4 or 8 bits hold. Tender sorts them into groups whose
scales differ by powers of two, largest first. Between groups the integer sum is doubled ("implicit
requantization"), so a product needs one scale at its end:

    A_1 = P_1;  A_{g+1} = 2 A_g + P_{g+1};  y = A_G s_G s_w + b W      P_g: the integer product of group g

Everything is static. Rows are cut into chunks of 256 positions, which have their own scale and means. Order and
groups of channels are a layer's, because a batch mixes chunks, and the codes of a weight have one order. (The
paper groups channels for each chunk.) A chunk is found by a row's position in its sequence, so codes depend on
neither the batch nor later tokens.

How weights and `shared` are stored is in `ops.grids`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.core.errors import ConfigError, ModelError
from dovetail.ops.grids import Parts, codes, to_nibbles
from dovetail.ops.stored import StoredTensor

MOST_GROUPS = 20
QUAD = 4  # codes that the kernels multiply at a time; all groups but the last are whole quads

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Shared = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Grouping:
    """bits: of codes, 4 or 8. groups: G. chunk: positions that share scale and means. down: channels take the next
    smaller scale, which clips values to as little as a half, instead of the next larger one. It is chosen once for
    a model, by what it loses on a sample."""

    bits: int = 8
    groups: int = 8
    chunk: int = 256
    down: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ConfigError(f"tender has codes of 4 or 8 bits, not {self.bits}")
        if not 1 <= self.groups <= MOST_GROUPS:
            raise ConfigError(f"tender takes 1 to {MOST_GROUPS} groups, not {self.groups}")

    @property
    def largest(self) -> int:
        return (1 << self.bits - 1) - 1


class Statistics:
    """What calibration keeps of the rows that enter a layer: extremes of channels by chunk."""

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk
        self._chunks: list[_Chunk] = []

    def add(self, positions: NDArray[np.int64], x: Floats) -> None:
        """One sample: its rows [n, K] and their positions in it. ModelError for values that are not finite."""
        if not np.isfinite(x).all():
            raise ModelError(
                "calibration met an activation that is not finite; does the model compute in float16?"
            )
        for i in np.unique(positions // self.chunk):
            while len(self._chunks) <= i:
                self._chunks.append(_Chunk())
            self._chunks[i].add(x[positions // self.chunk == i].astype(np.float64))

    def extremes(self) -> tuple[Doubles, Doubles, Doubles]:
        """Lowest and highest values, and the centers, averaged over samples; each [chunks, K].

        Chunks that no sample fills are left out, unless there is no other: too few rows speak for them.
        """
        full = self._full()
        if not full or not full[0].samples:
            raise ConfigError("tender needs calibration text, and got none that starts at position 0")
        low, high = np.stack([c.low for c in full]), np.stack([c.high for c in full])
        return low, high, np.stack([c.centers / c.samples for c in full])

    def by_chunk(self) -> list[Statistics]:
        """Those of each chunk that counts, alone: as if every row were in it."""
        found = []
        for chunk in self._full():
            found.append(Statistics(self.chunk))
            found[-1]._chunks = [chunk]
        return found

    def _full(self) -> list[_Chunk]:
        return [c for c in self._chunks if c.rows == self.chunk] or self._chunks[:1]


class _Chunk:
    samples, rows = 0, 0  # rows: of the sample that has the most
    low: Doubles = np.empty(0)
    high: Doubles = np.empty(0)
    centers: Doubles = np.empty(0)

    def add(self, x: Doubles) -> None:
        low, high = x.min(0), x.max(0)
        center = (low + high) / 2
        if self.samples:
            low, high = np.minimum(low, self.low), np.maximum(high, self.high)
            center += self.centers
        self.low, self.high, self.centers = low, high, center
        self.samples, self.rows = self.samples + 1, max(self.rows, len(x))


def calibrate(
    samples: Iterable[tuple[NDArray[np.int64], Floats]], how: Grouping, bias: bool
) -> dict[str, NDArray[Any]]:
    """`shared` of the weights that the samples' rows enter. samples: positions [n] and rows [n, K] of each.

    bias: whether means are subtracted; they are where a norm's outputs enter (qkv, gate and up), not before o_proj
    and down_proj.
    """
    statistics = Statistics(how.chunk)
    for positions, x in samples:
        statistics.add(positions, x)
    return describe(statistics, how, bias)


def describe(statistics: Statistics, how: Grouping, bias: bool) -> dict[str, NDArray[Any]]:
    """`calibrate` of statistics that were taken already."""
    low, high, centers = statistics.extremes()
    means = centers.astype(np.float32).astype(np.float64) if bias else np.zeros_like(low)
    most = np.maximum(high - means, means - low)  # max |x - mean| [chunks, K]
    group = groups_of(most, how)
    scales = _scales(most, group, how)
    if how.down:
        group = np.minimum(group + 1, how.groups - 1)
    group = whole_quads(group, most / scales[:, None], how.groups)
    order = np.argsort(group, kind="stable").astype(np.int64)
    shared: dict[str, NDArray[Any]] = {
        "order": order,
        "sizes": np.bincount(group, minlength=how.groups).astype(np.int64),
        "scales": scales.astype(np.float32),
        "chunk": np.array([how.chunk], np.int64),
    }
    if bias:
        shared["means"] = means.astype(np.float32)
    return shared


def groups_of(most: Doubles, how: Grouping) -> NDArray[np.int64]:
    """The group of each channel, 0 with the largest scale, of largest magnitudes [chunks, K].

    Magnitudes are compared as multiples of their chunk's median, and the largest multiple over chunks counts. So
    scales proportional to a chunk's median would clip nothing. With one chunk these are the paper's groups.
    """
    typical = np.median(most, axis=1, keepdims=True)
    typical[typical == 0] = most.mean() or 1
    ratio = (most / typical).max(0)
    with np.errstate(divide="ignore"):
        below = np.floor(np.log2(ratio.max() / ratio)) if ratio.max() else np.zeros_like(ratio)
    return np.minimum(below, how.groups - 1).astype(np.int64)


def _scales(most: Doubles, group: NDArray[np.int64], how: Grouping) -> Doubles:
    """For each chunk the least scale of the last group with which no channel is clipped."""
    scales = (most / 2.0 ** (how.groups - 1 - group)).max(1) / how.largest
    return np.where(scales > 0, scales, 1)


def whole_quads(group: NDArray[np.int64], levels: Doubles, groups: int) -> NDArray[np.int64]:
    """The same groups, each but the last filled up to whole quads with channels of later groups.

    A channel that moves is rounded more coarsely. Its error is at most half the larger step, and at most its own
    value, because a quiet channel becomes 0. Those channels move whose error grows least. levels: largest
    magnitudes of channels [chunks, K], in steps of the last group.
    """
    energy = (levels.mean(0) / 4) ** 2  # if the largest of many values is four standard deviations
    noise = np.stack([np.minimum(energy, 4.0 ** (groups - 1 - g) / 12) for g in range(groups)])
    group = group.copy()
    for g in range(groups - 1):
        later = np.flatnonzero(group > g)
        growth = noise[g, later] - noise[group[later], later]
        group[later[np.argsort(growth, kind="stable")[: -int((group == g).sum()) % QUAD]]] = g
    return group


def quantize(weight: Floats, shared: Shared, bits: int) -> StoredTensor:
    """A weight [N, K] for rows that `shared` describes: rounded to nearest, one symmetric scale for each row."""
    largest = (1 << bits - 1) - 1
    if not np.isfinite(weight).all():
        raise ModelError("a weight holds values that are not finite")
    most = np.abs(weight).max(1)
    scale = np.where(most > 0, most / np.float32(largest), np.float32(1)).astype(np.float32)
    q = np.clip(np.rint(weight / scale[:, None]), -largest - 1, largest).astype(np.int8)[:, shared["order"]]
    parts: dict[str, NDArray[Any]] = {"scale": scale}
    if "means" in shared:
        parts["bias"] = (weight.astype(np.float64) @ shared["means"].T.astype(np.float64)).astype(np.float32)
    data = to_nibbles(q) if bits == 4 else q.view(np.uint8)
    return StoredTensor("", f"TENDER{bits}", weight.shape, data, parts, dict(shared), "tender")


def for_kernels(weight: Parts) -> dict[str, NDArray[Any]]:
    """What all rows of a weight have in common, by the names of `grids.SHARED`. ModelError if order or groups
    cannot be. Means are in the order of the codes, and padded to whole blocks of 32."""
    shared, bits = weight.shared, 4 if weight.format == "TENDER4" else 8
    if len(shared["sizes"]) > MOST_GROUPS:
        raise ModelError(f"a tender weight has {len(shared['sizes'])} groups, and {MOST_GROUPS} are the most")
    if not np.array_equal(np.sort(shared["order"]), np.arange(weight.shape[1])):
        raise ModelError(f"the order of a tender weight is no permutation of its {weight.shape[1]} columns")
    sizes = np.zeros(MOST_GROUPS, np.int64)
    sizes[: len(shared["sizes"])] = shared["sizes"]
    head = [bits, int(shared["chunk"][0]), len(shared["scales"]), len(shared["sizes"])]
    found = {"order": shared["order"], "scales": shared["scales"], "sizes": np.concatenate([head, sizes])}
    if "means" in shared:
        means = shared["means"][:, shared["order"]]
        found["means"] = np.pad(means, ((0, 0), (0, -means.shape[1] % 32)))
    return found


# ---- the reference


def shifts(shared: Shared) -> NDArray[np.int64]:
    """How often the integer sum is doubled after each code was added, until the end [K]: G - 1 - its group."""
    sizes = shared["sizes"]
    return np.repeat(np.arange(len(sizes))[::-1], sizes)


def chunks(positions: NDArray[np.int64], shared: Shared) -> NDArray[np.int64]:
    """The chunk of each position. What lies beyond the calibrated ones belongs to the last."""
    return np.minimum(positions // shared["chunk"][0], len(shared["scales"]) - 1)


def activate(x: Floats, positions: NDArray[np.int64], shared: Shared, bits: int) -> NDArray[np.int8]:
    """Codes [rows, K] of rows [rows, K], in `order`. All operations are of float32; ties go to the even code."""
    chunk = chunks(positions, shared)
    if "means" in shared:
        x = x - shared["means"][chunk]
    factor = np.ldexp((np.float32(1) / shared["scales"][chunk])[:, None], -shifts(shared).astype(np.int32))
    top = (1 << bits - 1) - 1
    q: NDArray[np.int8] = np.clip(np.rint(x[:, shared["order"]] * factor), -top - 1, top).astype(np.int8)
    return q


def running_sum(x: NDArray[np.int8], weight: NDArray[np.int8], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The integer product [rows, N] of codes [rows, K] and [N, K], doubled between groups, empty ones too."""
    total, start = np.zeros((len(x), len(weight)), np.int64), 0
    for size in sizes:
        end = start + int(size)
        total = 2 * total + x[:, start:end].astype(np.int64) @ weight[:, start:end].T.astype(np.int64)
        start = end
    return total


def product(x: Floats, positions: NDArray[np.int64], weight: Parts) -> Floats:
    """Rows [rows, K] times a TENDER weight [N, K]: float32 [rows, N]; NaN where a row has a value that is not
    finite."""
    shared, bits = weight.shared, 4 if weight.format == "TENDER4" else 8
    with np.errstate(invalid="ignore"):
        total = running_sum(activate(x, positions, shared, bits), codes(weight), shared["sizes"])
    chunk = chunks(positions, shared)
    scale = np.where(np.isfinite(x).all(1), shared["scales"][chunk], np.float32(np.nan))
    y: Floats = total.astype(np.float32) * weight.parts["scale"] * scale[:, None]
    return y + weight.parts["bias"].T[chunk] if "bias" in weight.parts else y


def highest_sum(weight: Parts) -> int:
    """A bound on the magnitude of every integer sum of a product with the weight, from the codes that it has.

    Sums and doublings of 32-bit integers are exact modulo 2^32. So a product is exact in 32 bits if its result
    lies below 2^31, whatever lies between.
    """
    q = np.abs(codes(weight).astype(np.int64)) << shifts(weight.shared)
    return int(q.sum(1).max()) << (3 if weight.format == "TENDER4" else 7)
