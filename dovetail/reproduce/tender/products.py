"""Single products: that their integers are exact, and what scaling groups costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.bench.interleave import Interleaved
from dovetail.bench.kernels.attention import Kernels
from dovetail.bench.rounds import Ratio
from dovetail.bench.verdict import decide_exact
from dovetail.ops import tender
from dovetail.ops.grids import codes
from dovetail.ops.stored import StoredTensor
from dovetail.ops.tender import Grouping, Shared
from dovetail.reproduce.claim import Claim, Experiment
from dovetail.reproduce.products import Products
from dovetail.reproduce.tender.effort import Effort

EXACT = "one integer sum"
GROUPS, CHUNK = 8, 256

_PAPER = "between groups the accumulator is shifted by one bit, which takes one cycle"
_FEW = (
    "A CPU converts and scales sixteen sums at a time, once for each group. So explicit requantization costs "
    "{groups} conversions and multiplications beside the {dots} dot products of a sum, and registers for float "
    "sums. The paper's accelerator has a few floating-point units beside thousands of integer ones."
)


def experiment(effort: Effort, kernels: Kernels) -> Experiment:
    return Experiment("products", (EXACT, *map(_name, effort.shapes)), partial(measure, effort, kernels))


def _name(shape: tuple[int, int]) -> str:
    return f"implicit requantization, K = {shape[0]}, {shape[1]} rows"


def measure(effort: Effort, kernels: Kernels) -> Iterator[Claim]:
    yield _exact(kernels)
    for shape in effort.shapes:
        yield _speed(effort, kernels, shape)


def _rows(rng: np.random.Generator, rows: int, width: int) -> NDArray[np.float32]:
    """Channels of which a few are a hundred times as large as most."""
    spread = np.exp(np.abs(rng.normal(0, 1, width)) ** 2 / 3)
    return (rng.normal(0, 1, (rows, width)) * spread).astype(np.float32)


def _shared(rng: np.random.Generator, width: int) -> dict[str, NDArray[Any]]:
    text = [(np.arange(2 * CHUNK), _rows(rng, 2 * CHUNK, width)) for _ in range(2)]
    return tender.calibrate(text, Grouping(8, GROUPS, CHUNK), True)


def _weight(rng: np.random.Generator, shared: Shared, rows: int) -> StoredTensor:
    values = rng.normal(0, 1, (rows, len(shared["order"]))).astype(np.float32)
    return replace(tender.quantize(values, shared, 8), name="w")


def _exact(kernels: Kernels) -> Claim:
    """The kernel's result, from which its integer follows, against three ways to compute it."""
    rng, width, rows = np.random.default_rng(0), 1536, 64
    shared = _shared(rng, width)
    weight = _weight(rng, shared, 512)
    products = Products([weight], "tender", kernels)
    x, positions = _rows(rng, rows, width), np.arange(CHUNK - rows // 2, CHUNK + rows // 2)
    products.set(x, positions.tolist())
    products.run()
    q, w = tender.activate(x, positions, shared, 8), codes(weight).astype(np.int64)
    running = tender.running_sum(q, codes(weight), shared["sizes"])
    wide = (q.astype(np.int64) << tender.shifts(shared)) @ w.T
    parts, start, explicit = shared["sizes"].tolist(), 0, np.zeros_like(wide)
    for g, size in enumerate(parts, 1):
        group = slice(start, start := start + size)
        explicit += (q[:, group].astype(np.int64) @ w[:, group].T) << (len(parts) - g)
    same = np.array_equal(running, wide) and np.array_equal(running, explicit)
    native = np.array_equal(products.results(rows), tender.product(x, positions, weight))
    bound = tender.highest_sum(weight)
    decision = decide_exact("all of them are equal", same and native)
    return Claim(
        EXACT,
        f"{rows} rows of two chunks, K = {width}, 512 columns, {GROUPS} groups of {parts} channels",
        "A_1 = P_1, A_(g+1) = 2 A_g + P_(g+1) has the sum of 2^(G - g) P_g",
        f"running sum, explicit sum and one product of shifted codes are {'equal' if same else 'DIFFERENT'}, and "
        f"the kernel's results have {'their' if native else 'OTHER'} bits; no sum exceeds 2^{np.log2(bound):.1f}",
        "Sums and doublings are exact modulo 2^32. A weight whose sums might reach 2^31 is summed in 64 bits.",
        bar=decision,
    )


def _speed(effort: Effort, kernels: Kernels, shape: tuple[int, int]) -> Claim:
    (width, rows), rng = shape, np.random.default_rng(1)
    shared = _shared(rng, width)
    weights = [_weight(rng, shared, width) for _ in range(-(-effort.cold // width**2))]
    plain = [
        StoredTensor(w.name, "I8", w.shape, w.data, {"scale": w.parts["scale"][:, None]}, {}, "int8-token")
        for w in weights
    ]
    sides = [
        Products(plain, "int8-token", kernels),
        Products(weights, "tender-explicit", kernels),
        Products(weights, "tender", kernels),
    ]
    x = _rows(rng, rows, width)
    for side in sides:
        side.set(x, range(rows))
    timed = Interleaved([side.run for side in sides], kernels.threads)
    int8, explicit, implicit = timed.until(effort.rounds)
    ratio = Ratio.of(explicit, implicit)
    return Claim(
        _name(shape),
        f"K = N = {width}, {rows} rows, INT8, {GROUPS} groups of {shared['sizes'].tolist()} channels, "
        f"{len(weights)} weights in turn, {kernels.threads} threads; baseline: explicit requantization with the "
        "same groups",
        _PAPER,
        f"{ratio} times as fast as explicit; {Ratio.of(int8, implicit)} times as fast as plain int8 (explicit: "
        f"{Ratio.of(int8, explicit)})",
        _FEW.format(groups=GROUPS, dots=width // 4),
        ratio=ratio,
    )
