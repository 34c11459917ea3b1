"""Requests and machines at the edge of what the native kernels are asked for."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from dovetail.core.seams import Variant
from dovetail.ops import cpu
from dovetail.ops.attention.paged import PagedAttention, Shape
from dovetail.ops.stored import StoredTensor
from dovetail.ops.template import minimum

pytestmark = pytest.mark.skipif(cpu.native() is None, reason="the native library is not built")


def test_a_request_without_rows_is_nothing() -> None:
    attention = PagedAttention(Shape(6, 2, 24, 4))
    attention.plan([0, 0, 1], [0, 1, 2], [0, 1], [4, 4])
    k = torch.randn(2, 4, 2, 24)
    assert torch.isfinite(attention.run(torch.randn(1, 6, 24), k, k)).all()
    attention.plan([0, 0], [0, 1], [0], [4])
    assert attention.stats()["items"] == 0


def test_rows_beyond_their_list_share_only_what_is_listed() -> None:
    """A shard of the keys: rows may stand later than its end."""
    torch.manual_seed(0)
    pages, k, q = list(range(8)), torch.randn(8, 16, 1, 16), torch.randn(3, 2, 16)
    outs = []
    for cascade in (False, True):
        attention = PagedAttention(Shape(2, 1, 16, 16), cascade=cascade)
        attention.plan([0, 1, 2, 3], [0, 8, 16, 24], pages * 3, [16] * 3, starts=[1000, 2000, 127])
        outs.append(attention.run(q, k, k))
    assert torch.equal(*outs)


@dataclass(frozen=True)
class Looked(Variant):
    """Indexes a table by position, so that a position that is none would read outside it."""

    bias: tuple[float, ...] = (0.5, 0.25, 0.1, 0.0)

    def score(self, score, q_pos, k_pos, head):  # type: ignore[no-untyped-def]
        return score + self.bias[minimum(q_pos + k_pos, 3)]


def test_a_variant_sees_positions_only() -> None:
    attention = PagedAttention(Shape(4, 2, 16, 16), variant=Looked())
    k = torch.randn(8, 16, 2, 16)
    lists, positions = [[0, 3, 4], [2, 5, 6]], [[0, 48, 64], [32, 80, 96]]
    attention.plan([0, 1], [0, 3], lists, [16], positions=positions, starts=[100])
    assert torch.isfinite(attention.run(torch.randn(1, 4, 16), k, k)).all()


def test_a_broken_value_is_seen_by_the_rows_that_read_it_only() -> None:
    attention = PagedAttention(Shape(1, 1, 16, 16))
    attention.plan([0, 2], [0, 1], [0], [2])
    v = torch.randn(1, 16, 1, 16)
    v[0, 1] = torch.nan
    broken = attention.run(torch.randn(2, 1, 16), torch.randn(1, 16, 1, 16), v).isnan().flatten(1).any(1)
    assert broken.tolist() == [False, True]


def test_windows_read_the_same_from_any_layout() -> None:
    """Chunks before the window are skipped: what is gathered must still be the right ones."""
    from dovetail.core.seams import SlidingWindow

    torch.manual_seed(1)
    k, v, q = torch.randn(64, 8, 2, 16), torch.randn(64, 8, 2, 16), torch.randn(3, 4, 16)
    attention = PagedAttention(Shape(4, 2, 16, 8), variant=SlidingWindow(20))
    attention.plan([0, 3], [0, 64], list(range(64)), [8])
    got = attention.run(q, k, v)
    keys, values = k.flatten(0, 1).repeat_interleave(2, 1), v.flatten(0, 1).repeat_interleave(2, 1)
    for i in range(3):
        at = 509 + i
        seen = slice(at - 19, at + 1)
        weights = torch.softmax(torch.einsum("hd,khd->hk", q[i], keys[seen]) / 4, -1)
        torch.testing.assert_close(got[i], torch.einsum("hk,khd->hd", weights, values[seen]), rtol=1e-5, atol=1e-5)


def test_how_weights_are_read_changes_no_bit() -> None:
    torch.manual_seed(0)
    weight = cpu.pack(StoredTensor.of("w", torch.randn(4096, 1024).numpy()), "float32", 2)
    outs = []
    for tuned in (False, True):
        program = cpu.native().Program(cpu.isas()[0], 2, False, False)
        source, target = program.slot(1024), program.slot(4096)
        program.linear(
            source, target, [weight], "exact", norm=[], eps=0.0, bias=[], add=True, gate="", sampled=False
        )
        if tuned:
            program.tune()
            assert program.num_rows() == 0
        program.set_rows(3)
        program.run(0, 0)
        program.view(target, 3)[:] = 0
        program.view(source, 3)[:, :1024] = torch.linspace(-1, 1, 3 * 1024).view(3, 1024).numpy()
        program.run(0, 1)
        outs.append(program.view(target, 3)[:, :4096].copy())
    assert (outs[0] == outs[1]).all() and outs[0].any()
