"""Packed weights of a model take as many bytes as their format has bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dovetail.bench.kernels.grids import GRIDS, random_grid
from dovetail.ops import cpu, tender
from dovetail.ops.stored import StoredTensor
from dovetail.ops.tender import Grouping

pytestmark = pytest.mark.skipif(not cpu.isas(), reason="the native kernels were not built")

# Of a block of SmolLM2-135M, [N, K]: q, k, v, o, gate, up, down.
SHAPES = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
WIDE = (4096, 4096)
BITS = {"I8": 8.03, "F8": 8.03, "I4": 4.25, "ATOM": 4.54, "TENDER8": 8.12, "TENDER4": 4.12}


def weight(form: str, n: int, k: int) -> StoredTensor:
    if form in GRIDS:
        return random_grid(form, n, k)
    rng, bits = np.random.default_rng(0), int(form[-1])
    text = [(np.arange(512), rng.normal(0, 1, (512, k)).astype(np.float32))]
    shared = tender.calibrate(text, Grouping(bits, 8, 256), True)
    return replace(tender.quantize(rng.normal(0, 1, (n, k)).astype(np.float32), shared, bits), name="w")


def counted(stored: StoredTensor) -> float:
    """Bits of codes, scales of 16 bits, biases of 32. Two rows of ATOM share the scales of their groups."""
    sizes = {"bias": 32.0, "scale": 8.0 if stored.format == "ATOM" else 16.0}
    return 8 * stored.data.nbytes + sum(sizes.get(name, 16.0) * p.size for name, p in stored.parts.items())


@pytest.mark.parametrize("form", BITS)
def test_a_block_takes_the_bits_of_its_format(form: str) -> None:
    """Within 5 %, with what rows need to be rounded: orders, means, sizes of groups."""
    weights = [weight(form, n, k) for n, k in SHAPES]
    bits = sum(map(counted, weights))
    assert bits / sum(n * k for n, k in SHAPES) == pytest.approx(BITS[form], abs=0.01)
    assert bits <= 8 * sum(cpu.pack(w, "float32", 2).bytes for w in weights) <= 1.05 * bits
    wide = weight(form, *WIDE)
    assert 8 * cpu.pack(wide, "float32", 2).bytes <= 1.01 * counted(wide)
