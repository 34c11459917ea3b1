"""Keys as a product of low rank: the best one there is, and pages rebuilt from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.core.model import RopeConfig
from dovetail.ops import cpu, low_rank
from dovetail.ops.low_rank import factorise, rebuild
from dovetail.ops.rope import Rope, rotate, unrotate
from dovetail.runtime.codes import CODES, CodedTiles
from dovetail.runtime.store import TiledStore

SEEDS = st.integers(0, 2**31)
YARN = RopeConfig(
    theta=1e4,
    kind="yarn",
    parameters={"factor": 4.0, "original_max_position_embeddings": 64.0},
)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@settings(deadline=None)
@given(SEEDS, st.integers(1, 40), st.integers(1, 12), st.integers(1, 12))
def test_no_product_of_that_rank_is_closer(seed: int, tokens: int, width: int, rank: int) -> None:
    """Eckart and Young: what is lost is the squares of the singular values left out."""
    keys = random(seed, tokens, width).numpy()
    found = factorise(keys, rank)
    assert found.rank == min(rank, width, tokens)
    lost = np.square(keys - found.coefficients @ found.basis).sum()
    values = np.linalg.svd(keys, compute_uv=False)
    assert lost == pytest.approx(np.square(values[rank:]).sum(), rel=1e-9, abs=1e-11)
    np.testing.assert_allclose(found.basis @ found.basis.T, np.eye(found.rank), atol=1e-12)


@settings(deadline=None)
@given(SEEDS, st.integers(1, 40), st.integers(1, 12), st.integers(0, 3))
def test_the_rank_of_the_keys_is_enough(seed: int, tokens: int, width: int, more: int) -> None:
    true = min(3, tokens, width)
    keys = (random(seed, tokens, true) @ random(seed + 1, true, width)).numpy()
    found = factorise(keys, true + more)
    np.testing.assert_allclose(found.coefficients @ found.basis, keys, atol=1e-7)


@settings(deadline=None)
@given(SEEDS, st.floats(0.01, 0.999), st.integers(1, 12))
def test_energy_takes_the_smallest_rank_that_keeps_its_share(seed: int, energy: float, rank: int) -> None:
    keys = random(seed, 30, 12) * torch.logspace(0, -3, 12).double()
    kept = torch.linalg.svdvals(keys).square().cumsum(0)
    enough = int((kept < energy * kept[-1]).sum()) + 1
    assert factorise(keys.numpy(), rank, energy).rank == min(rank, enough)


def test_blocks_of_keys_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = random(0, 50, 8).numpy()
    whole = factorise(keys, 3)
    monkeypatch.setattr(low_rank, "BLOCK", 7)
    parts = factorise(keys, 3)
    np.testing.assert_allclose(parts.coefficients @ parts.basis, whole.coefficients @ whole.basis)


@pytest.mark.parametrize("rope", [RopeConfig(theta=1e4), YARN], ids=["plain", "yarn"])
def test_unrotating_undoes_a_rotation_and_its_factor(rope: RopeConfig) -> None:
    rotation = Rope(rope, 8)
    assert (rotation.temper != 1) == (rope is YARN)
    x, angles = random(0, 100, 3, 8), rotation.angles(torch.arange(100) * 37, torch.float64)
    torch.testing.assert_close(unrotate(rotate(x, angles), angles), x)
    arrays = rotation.angles(np.arange(100) * 37, np.float64)
    np.testing.assert_allclose(rotate(x.numpy(), arrays), rotate(x, angles), rtol=1e-12)
    np.testing.assert_allclose(unrotate(x.numpy(), arrays), unrotate(x, angles), rtol=1e-12)


@settings(deadline=None)
@given(SEEDS, st.lists(st.integers(0, 39), max_size=20), st.integers(0, 2))
def test_keys_are_rebuilt_at_their_positions(seed: int, tokens: list[int], head: int) -> None:
    keys, rope = random(seed, 40, 3, 8), Rope(YARN, 8)
    rotated = rotate(keys, rope.angles(torch.arange(40), torch.float64))
    plain = unrotate(rotated, rope.angles(torch.arange(40), torch.float64)).flatten(1)
    at = torch.tensor(tokens, dtype=torch.int64)
    angles = rope.angles(at, torch.float64)
    found = rebuild(factorise(plain.numpy(), 24), at, slice(8 * head, 8 * head + 8), angles)
    torch.testing.assert_close(found, rotated[at, head])


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("rope", [RopeConfig(theta=5e5), YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("dim", [40, 64])
def test_native_kernels_rotate_as_models_do_however_far(isa: str, rope: RopeConfig, dim: int) -> None:
    """Angles are put together from two tables, and models round position times frequency to float32."""
    size, pages, rank = 32, 4000, 3
    shown = [0, 1, 63, 3999]
    factors = low_rank.LowRank(
        random(0, pages * size, rank + 1).float().numpy(), random(1, rank + 1, 2 * dim).float().numpy()
    )
    rotation = Rope(rope, dim)
    other = Rope(RopeConfig(theta=100.0), dim)
    rotations = [(r.freqs.tolist(), r.temper) for r in (other, rotation)]
    keys = cpu.native().LowRankKeys("float32", (2, dim, size), rotations, [1])
    keys.add(list(range(pages)), [(factors.coefficients.ctypes.data, factors.basis.ctypes.data, rank + 1)])
    kept, _ = TiledStore.pair((1, size, 1, dim), "float32", size)
    for page in shown:
        tokens = page * size + torch.arange(size)
        keys.rebuild(isa, (0, page, 1), kept.data.data_ptr())
        expected = rebuild(factors, tokens, slice(dim, 2 * dim), rotation.angles(tokens, torch.float32))
        found = kept.read(0, torch.arange(size))[:, 0]
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("dim", [24, 64])
def test_rebuilt_keys_are_stored_as_codes_where_keys_are(isa: str, kind: str, dim: int) -> None:
    size, rank, rotation = 32, 6, Rope(YARN, dim)
    factors = low_rank.LowRank(
        random(0, 2 * size, rank).float().numpy(), random(1, rank, 2 * dim).float().numpy()
    ).to("bfloat16")
    keys = cpu.native().LowRankKeys(kind, (2, dim, size), [(rotation.freqs.tolist(), rotation.temper)], [0])
    keys.add([4, 2], [(factors.coefficients.ctypes.data, factors.basis.ctypes.data, rank)])
    kept, other = CodedTiles.pair((1, size, 1, dim), kind, size)
    keys.rebuild(isa, (0, 2, 1), kept.memory()[0])
    tokens = size + torch.arange(size)  # alias 2 is the prompt's second page
    expected = rebuild(factors, tokens, slice(dim, 2 * dim), rotation.angles(tokens, torch.float32))
    found = kept.read(0, torch.arange(size))[:, 0]
    step = {"fp8": 2**-4 * expected.abs(), "int8": expected.abs().amax(-1, keepdim=True) / 254,
            "int4": (expected.amax(-1) - expected.amin(-1))[:, None] / 30}[kind]  # fmt: skip
    assert ((found - expected).abs() <= 1.05 * step + 2**-7 * expected.abs() + 1e-3).all()
    assert (found - kept.rounded(expected)).abs().mean() < 0.5 * step.mean()
    assert not other.array.any()
