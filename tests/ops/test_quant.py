"""Values in the block formats of stored weights."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from dovetail.ops.dequant import q8_0
from dovetail.ops.stored import StoredTensor


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 3))
def test_bytes_are_within_half_a_step(seed: int, rows: int, blocks: int) -> None:
    x = torch.randn(rows, 32 * blocks, generator=torch.Generator().manual_seed(seed))
    x[0, :32] = 0
    back = StoredTensor("x", "Q8_0", tuple(x.shape), q8_0(x.numpy())).dequantize()
    step = x.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
    assert bool(((back - x).unflatten(1, (-1, 32)).abs() <= step * (0.5 + 127 * 2**-11) + 1e-7).all())
    assert not back[0, :32].any()
