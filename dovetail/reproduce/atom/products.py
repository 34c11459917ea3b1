"""Products of 4-bit rows and weights with outliers in 8 bits, beside int8 and bf16; and bits of a weight."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from dovetail.bench.interleave import Interleaved
from dovetail.bench.kernels.attention import Kernels
from dovetail.bench.kernels.grids import random_grid
from dovetail.bench.rounds import Ratio
from dovetail.bench.verdict import decide_exact
from dovetail.ops.stored import StoredTensor
from dovetail.reproduce.atom.effort import Effort
from dovetail.reproduce.claim import Claim, Experiment
from dovetail.reproduce.products import Products

BITS = "bits of a weight"
MOST = 4.3  # of them, with groups of 128

_WHY = {
    True: "A row reads every weight once, so bytes decide. They are half of int8's; unpacking them costs a part "
    "of what that saves.",
    False: "A CPU has no 4-bit units: codes are widened to 8 bits and take the instructions of int8, and each "
    "group is scaled. So no arithmetic is saved, where the paper's GPU does twice as many 4-bit operations.",
}


def experiment(effort: Effort, kernels: Kernels) -> Experiment:
    return Experiment("products", (BITS, *map(_name, effort.shapes)), partial(measure, effort, kernels))


def _name(shape: tuple[int, int]) -> str:
    return f"mixed product, K = {shape[0]}, {shape[1]} rows"


def measure(effort: Effort, kernels: Kernels) -> Iterator[Claim]:
    yield _bits()
    for shape in effort.shapes:
        yield _speed(effort, kernels, shape)


def _bits() -> Claim:
    width, rows = 4096, 64
    weight = random_grid("ATOM", rows, width)
    # Two neighbouring rows share the scales of groups. Scales are 16 bits in the checkpoint and in kernels.
    scales = weight.parts["scale"].size // 2 + weight.parts["outlier_scale"].size
    bits = 8 * weight.data.nbytes / (rows * width), 16 * scales / (rows * width)
    return Claim(
        BITS,
        f"K = {width}, groups of 128, 128 outliers; counted",
        "4.19 bits at a width of 4096, counted from the published settings",
        f"{sum(bits):.2f} bits: {bits[0]:.3f} of codes and {bits[1]:.3f} of scales",
        "The layout is the same.",
        bar=decide_exact(f"at most {MOST}", sum(bits) <= MOST),
    )


def _speed(effort: Effort, kernels: Kernels, shape: tuple[int, int]) -> Claim:
    width, rows = shape
    x = np.random.default_rng(0).normal(0, 1, (rows, width)).astype(np.float32)
    sides = []
    for form, activation in (("BF16", "bf16"), ("I8", "int8-token"), ("ATOM", "atom")):
        weight = _plain(width) if form == "BF16" else random_grid(form, width, width)
        count = max(1, effort.cold // weight.data.nbytes) if rows == 1 else 2
        sides.append((Products([weight] * count, activation, kernels), count))
    for side, _ in sides:
        side.set(x, range(rows))
    timed = Interleaved([side.run for side, _ in sides], kernels.threads).until(effort.rounds)
    plain, int8, mixed = ([s / count for s in seconds] for seconds, (_, count) in zip(timed, sides, strict=True))
    ratio = Ratio.of(int8, mixed)
    return Claim(
        _name(shape),
        f"K = N = {width}, {rows} rows, groups of 128 and 128 outliers, {kernels.threads} threads; baseline: int8 "
        "with a scale for each channel and row",
        "773 TOPS at M = 4096 on an RTX 4090 (section 5), beyond what its 8-bit units can do",
        f"{ratio} times as fast as int8, {Ratio.of(plain, mixed)} times as fast as bf16",
        _WHY[rows == 1],
        ratio=ratio,
    )


def _plain(width: int) -> StoredTensor:
    values = np.random.default_rng(0).normal(0, 0.02, (width, width)).astype(np.float32)
    return StoredTensor.of("w", values, "bfloat16")
