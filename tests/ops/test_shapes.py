"""A program whose layers differ in heads and head size, over KV of their own; and norms after a layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dovetail.ops import cpu
from dovetail.ops.norm import rms_norm
from dovetail.runtime.store import TiledStore

pytestmark = pytest.mark.skipif(not cpu.isas(), reason="the native kernels were not built")
SIZE, PAGES = 16, 6
SHAPES = [(4, 2, 16), (6, 3, 40), (2, 2, 128)]  # query heads, KV heads, head_dim


def stores(heads: int, dim: int, seed: int) -> tuple[TiledStore, TiledStore]:
    torch.manual_seed(seed)
    pair = TiledStore.pair((1, PAGES * SIZE, heads, dim), "float32", SIZE)
    for store in pair:
        store.write(0, torch.arange(PAGES * SIZE), torch.randn(PAGES * SIZE, heads, dim))
    return pair


def attend(shapes: list[tuple[int, int, int]], threads: int) -> list[np.ndarray]:
    """Attention of two sequences by one program with an operation for each shape."""
    program = cpu.native().Program(cpu.isas()[0], threads, True, True)
    slots, kept = [], []
    for query, heads, dim in shapes:
        k, v = stores(heads, dim, dim)
        kept.append((k, v))
        addresses = (k.memory()[0], v.memory()[0], 0, 0)
        number = program.shape(query, k.layout, k.kind, addresses, (PAGES, SIZE, heads, dim, len(k.data)))
        q, out = program.slot(query * cpu.padded(dim)), program.slot(query * dim)
        program.attend((q, out, 0, number, -1), 0, 0, [])
        slots.append((q, out, query * cpu.padded(dim), query * dim))
    tokens = list(range(PAGES * SIZE))
    program.add(30, 40, tokens, [], [0, 1, 2], 0, 1)
    program.add(44, 45, tokens, [], [3, 4, 5], 0, 1)
    program.plan()
    program.run(0, 0)
    for q, _, width, _ in slots:
        program.view(q, 11)[:, :width] = np.random.default_rng(width).standard_normal((11, width), np.float32)
    program.run(0, program.mark())
    return [program.view(out, 11)[:, :width].copy() for _, out, _, width in slots]


@pytest.mark.parametrize("threads", [1, 2])
def test_layers_of_several_shapes_give_what_each_gives_alone(threads: int) -> None:
    together = attend(SHAPES, threads)
    for shape, found in zip(SHAPES, together, strict=True):
        assert np.isfinite(found).all() and found.any()
        np.testing.assert_array_equal(found, attend([shape], threads)[0])


def test_a_shape_that_does_not_fit_its_kv_is_refused() -> None:
    program = cpu.native().Program(cpu.isas()[0], 1, True, True)
    with pytest.raises(ValueError, match="heads do not fit"):
        program.shape(3, "NHD", "float32", (0, 0, 0, 0), (1, 16, 2, 8, 0))
    program.shape(2, "NHD", "float32", (0, 0, 0, 0), (1, 16, 2, 8, 0))
    with pytest.raises(ValueError, match="one page size"):
        program.shape(2, "NHD", "float32", (0, 0, 0, 0), (1, 32, 2, 8, 0))


@pytest.mark.parametrize("isa", cpu.isas())
def test_norm_add_is_the_norm_and_a_sum(isa: str) -> None:
    program = cpu.native().Program(isa, 2, True, True)
    source, target = program.slot(40), program.slot(40)
    torch.manual_seed(0)
    x, y, weight = torch.randn(7, 40), torch.randn(7, 40), torch.randn(40)
    program.norm_add(source, target, weight.tolist(), 1e-6)
    program.set_rows(7)
    program.run(0, 0)
    view: Any = program.view
    view(source, 7)[:, :40], view(target, 7)[:, :40] = x.numpy(), y.numpy()
    program.run(0, 1)
    found = torch.from_numpy(view(target, 7)[:, :40].copy())
    torch.testing.assert_close(found, y + rms_norm(x, weight, 1e-6), rtol=1e-5, atol=1e-5)
