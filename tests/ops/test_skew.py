"""The skew, partial keys and the rule that counts pages: the definitions against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.core.seams import Geometry
from dovetail.ops.pages import pick
from dovetail.ops.skew import PartialKeys, counted, kept_columns, margins, skew
from dovetail.runtime.kv import KV, KVConfig

SEEDS = st.integers(0, 2**31)


def readable(eligible: torch.Tensor, heads: int, pages: int) -> torch.Tensor:
    return (torch.arange(pages) < eligible[:, None, None]).expand(-1, heads, -1)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turn(q: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(skew(q.numpy()).copy())


@settings(deadline=None)
@given(SEEDS, st.integers(1, 3), st.integers(1, 40), st.integers(1, 16))
def test_the_turn_is_orthogonal_and_leaves_products_alone(seed: int, heads: int, n: int, d: int) -> None:
    """Also for fewer queries than dimensions."""
    q, k = random(seed, heads, n, d), random(seed + 1, heads, 7, d)
    a = turn(q)
    torch.testing.assert_close(a.mT @ a, torch.eye(d, dtype=torch.float64).expand(heads, d, d))
    torch.testing.assert_close((q @ a) @ (k @ a).mT, q @ k.mT)


@settings(deadline=None)
@given(SEEDS, st.integers(1, 20), st.integers(1, 8))
def test_its_columns_are_the_singular_vectors_largest_first(seed: int, n: int, d: int) -> None:
    q = random(seed, 1, n, d) * torch.linspace(1, 5, d).double()
    lengths = (q @ turn(q)).norm(dim=1)[0]
    wanted = torch.zeros(d, dtype=torch.float64)
    values = torch.linalg.svdvals(q[0])
    wanted[: len(values)] = values
    torch.testing.assert_close(lengths, wanted, atol=1e-6, rtol=1e-6)  # roots of eigenvalues near zero
    for kept in range(d + 1):  # no other columns carry more: Eckart and Young
        rest = q[0] - q[0] @ turn(q)[0, :, :kept] @ turn(q)[0, :, :kept].T
        torch.testing.assert_close(rest.square().sum(), wanted[kept:].square().sum())


@settings(deadline=None)
@given(SEEDS, st.integers(1, 6), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
def test_margins_by_brute_force(seed: int, pages: int, size: int, heads: int, group: int) -> None:
    q, keys = random(seed, 2, heads, group, 4), random(seed + 1, 2, pages, heads, size, 4)
    keys[1, 0, 0, 0] = float("nan")
    eligible = torch.tensor([pages, max(1, pages - 1)])
    found = margins(q, keys, readable(eligible, heads, pages))
    for r in range(2):
        for h in range(heads):
            wanted = [-math.inf] * pages
            for g in range(group):
                scores = [
                    [float(q[r, h, g] @ keys[r, p, h, t]) for t in range(size)] for p in range(int(eligible[r]))
                ]
                best = [max((s for s in page if s == s), default=-math.inf) for page in scores]
                if max(best) > -math.inf:
                    for p, b in enumerate(best):
                        wanted[p] = max(wanted[p], b - max(best))
            torch.testing.assert_close(found[r, h], torch.tensor(wanted, dtype=torch.float64))


@settings(deadline=None)
@given(SEEDS, st.integers(1, 12), st.integers(1, 4))
def test_counts_grow_with_alpha_and_choices_are_nested(seed: int, pages: int, heads: int) -> None:
    margin = -random(seed, 1, heads, pages).abs() * 3
    margin[0, :, 0] = 0
    eligible, before = torch.tensor([pages]), [set[int]()] * heads
    for alpha in (1e-9, 0.5, 1.0, 2.0, 4.0, math.inf):
        count = counted(margin, alpha)
        each = (margin[0] > -alpha).sum(-1).float()
        assert int(count) == max(1, math.ceil(each.mean()))
        chosen = [set(row.tolist()) - {-1} for row in pick(margin, eligible, count)[0]]
        assert all(small <= large for small, large in zip(before, chosen, strict=True))
        before = chosen
    assert [len(c) for c in before] == [pages] * heads


def test_a_head_without_a_number_reads_one_page() -> None:
    assert counted(torch.full((2, 3, 5), -math.inf), math.inf).tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["float64", "float32", "bf16", "fp8", "int8", "int4"])
def test_partial_keys_of_all_columns_score_as_keys_do(kind: str) -> None:
    kv = KV(Geometry(3, 4, 2, 8, 10), KVConfig(6, 4, kind), "cpu")
    for layer in range(3):
        for store in (kv.k, kv.v):
            store.write(layer, torch.arange(24), random(layer, 24, 2, 8).float().to(torch.float64))
    basis = np.stack([skew(random(9 + i, 2, 30, 8).numpy()) for i in range(3)])
    keys = PartialKeys(kv, basis, first=1)
    keys.seal(np.array([4, 1]))
    q, pages = random(3, 2, 4, 8), torch.tensor([[1, 4], [4, 1]])
    for layer in (1, 2):
        found = keys.margins(layer, q, pages, readable(torch.tensor([2, 2]), 2, 2))
        products = torch.einsum(
            "rhgd,rpthd->rhgpt", q.unflatten(1, (2, 2)), kv.keys(layer, pages).double()
        ) / math.sqrt(8)
        best = products.amax(-1)
        loose = 0.05 if kind == "bf16" else 1e-5
        torch.testing.assert_close(
            found.double(), (best - best.amax(-1, keepdim=True)).amax(2), atol=loose, rtol=0
        )
    assert not keys.data[:6].any()  # layer 0 is left out


@pytest.mark.parametrize(("fraction", "kept"), [(1.0, 64), (0.3, 19), (0.5, 32), (0.001, 1)])
def test_a_fraction_keeps_at_least_one_column(fraction: float, kept: int) -> None:
    assert kept_columns(64, fraction) == kept
