"""KV as codes in tiles: what is written, and attention over what the codes stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dovetail.ops import cpu
from dovetail.runtime.codes import CODES, CodedTiles, CodeStore

pytestmark = pytest.mark.skipif(not cpu.isas(), reason="the native kernels were not built")
ISAS = (*cpu.isas(), *cpu.emulated())
SIZE, PAGES, TOKENS = 32, 12, 300
HEADS = [(3, 3, 16), (6, 2, 40), (2, 1, 64), (7, 1, 128), (4, 2, 24)]  # query heads, KV heads, head_dim


class Step:
    """One sequence of TOKENS tokens, whose K and V a program writes and then reads. `pages` are out of order."""

    def __init__(self, isa: str, kind: str, heads: tuple[int, int, int], threads: int = 1) -> None:
        query, kv, dim = heads
        self.heads = heads
        self.k, self.v = CodedTiles.pair((1, PAGES * SIZE, kv, dim), kind, SIZE)
        self.program = program = cpu.native().Program(isa, threads, True, True)
        addresses = (self.k.memory()[0], self.v.memory()[0], 0, 0)
        program.shape(query, "tiled", kind, addresses, (PAGES, SIZE, kv, dim, PAGES))
        self.source, self.out = program.slot((query + 2 * kv) * dim), program.slot(query * dim)
        self.q = program.slot(query * cpu.padded(dim))
        program.rope((self.source, -1, self.q), 0, 0, dim**-0.5, [], [], 0.0)
        program.attend((self.q, self.out, 0, 0, -1), 0, 0, [])
        self.pages = np.random.default_rng(1).permutation(PAGES).tolist()

    def run(self, x: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Write and read for tokens [first, TOKENS) of x: attention [rows, query heads, head_dim]."""
        self._plan(first)
        rows, (query, _, dim) = TOKENS - first, self.heads
        self.program.view(self.source, rows)[:, : x[0].numel()] = x[first:].flatten(1).numpy()
        self.program.run(0, self.program.mark())
        out = self.program.view(self.out, rows)[:, : query * dim].copy()
        return torch.from_numpy(out).unflatten(1, (query, dim))

    def _plan(self, first: int) -> None:
        self.program.clear()
        self.program.add(first, TOKENS, [0] * TOKENS, [], self.pages, 0, 1)
        self.program.plan()
        self.program.run(0, 0)

    @property
    def slots(self) -> torch.Tensor:
        at = torch.arange(TOKENS)
        return torch.tensor(self.pages)[at // SIZE] * SIZE + at % SIZE


def values(heads: tuple[int, int, int], seed: int = 0) -> torch.Tensor:
    query, kv, dim = heads
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, query + 2 * kv, dim, generator=random)
    return x * torch.rand(TOKENS, query + 2 * kv, 1, generator=random).exp2() + 0.3


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_written_codes_are_the_reference_s(isa: str, kind: str, heads: tuple[int, int, int]) -> None:
    step, x = Step(isa, kind, heads), values(heads)
    x[7] *= 1e-42  # below the smallest scale
    x[8] = 0
    step.run(x)
    for store, at in ((step.k, heads[0]), (step.v, heads[0] + heads[1])):
        rows = CodeStore((1, PAGES * SIZE, *heads[1:]), kind, "cpu")
        rows.write(0, step.slots, x[:, at : at + heads[1]])
        assert torch.equal(store.read(0, step.slots), rows.read(0, step.slots))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attention_is_that_over_what_the_codes_stand_for(isa: str, kind: str, heads: tuple[int, int, int]) -> None:
    """Scales are applied in float32. What is rounded to bfloat16 is what bf16 KV rounds: queries and weights."""
    step, x = Step(isa, kind, heads), values(heads)
    got = step.run(x)
    query, kv, dim = heads
    q = (x[:, :query] * dim**-0.5).bfloat16().double()
    k, v = (s.read(0, step.slots).double().repeat_interleave(query // kv, 1) for s in (step.k, step.v))
    weights = torch.einsum("qhd,khd->hqk", q, k)
    weights.masked_fill_(torch.ones(TOKENS, TOKENS).triu(1).bool(), -torch.inf)
    want = torch.einsum("hqk,khd->qhd", weights.softmax(-1), v)
    assert (got - want).abs().max() < 2**-8 * v.abs().max()
    assert (got - want).abs().mean() < 2**-10 * v.abs().mean()
    for first in (TOKENS - 1, TOKENS - 5, 140):  # as decode and as chunks of a prompt
        assert torch.equal(step.run(x, first), got[first:]), first


@pytest.mark.parametrize("kind", CODES)
def test_threads_change_no_bit(kind: str) -> None:
    heads, found = (6, 2, 64), []
    for threads in (1, 2):
        step = Step(ISAS[0], kind, heads, threads=threads)
        found.append(step.run(values(heads)))
    assert torch.equal(*found)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3.4e38])
@pytest.mark.parametrize("part", ["k", "v"])
def test_a_token_that_is_not_finite_is_seen_by_its_readers_only(
    isa: str, kind: str, bad: float, part: str
) -> None:
    heads = (2, 1, 24)
    step, x, clean = Step(isa, kind, heads), values(heads), Step(isa, kind, heads)
    want = clean.run(x)
    x[200, 2 if part == "k" else 3, 5] = bad
    found = step.run(x)
    assert torch.equal(found[:200], want[:200])
    assert found[200:].isnan().all()
    assert step.k.read(0, step.slots)[200].isnan().all() and not step.v.read(0, step.slots)[200].any()


def test_codes_take_the_bytes_that_they_say() -> None:
    dim: Any = 64
    sizes = {kind: CodedTiles.token_bytes(1, dim, kind) for kind in CODES}
    assert sizes == {"fp8": dim + 4, "int8": dim + 4, "int4": dim // 2 + 8}
    for kind, size in sizes.items():
        k, _ = CodedTiles.pair((3, 64, 2, dim), kind, 32)
        assert k.blobs.nbytes == 2 * 3 * 64 * 2 * size
