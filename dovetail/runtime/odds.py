"""The odds of tokens against the likeliest: e^((logit - most) / temperature).

Odds are defined operation by operation in float32, so torch and the native kernels get the same bits. They are
rounded to multiples of a power of two so large that sums over the vocabulary are exact in float64, in any order.
The rounding leaves out less than 2^-53 of the likeliest token's odds, times the square of the vocabulary: 3e-7 for
49152 tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.host.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

_COEFFICIENTS = (0.0013814561, 0.008368735, 0.04166839, 0.16666521, 0.49999994, 1.0, 1.0)


def odds(logits: Tensor, temperatures: Tensor) -> Tensor:
    """float64 odds of logits [rows, vocabulary], whose largest is finite. temperatures: float64 [rows], above
    0."""
    below = (logits - logits.amax(-1, keepdim=True)).float()
    inverse = (1 / temperatures).clamp(max=2.0**100).float()[:, None]
    out = _exponential((below * inverse).clamp(min=-80))
    grain = 2.0 ** ((logits.shape[-1] - 1).bit_length() - 30)  # 2^23 times the step, which is 2^-53 for one token
    return torch.where(out < grain, (out + grain) - grain, out).double()


def _exponential(z: Tensor) -> Tensor:
    """e^z for float32 z in [-80, 0], within 1e-7 relative, and 1 for 0. ln 2 is in two parts (Cody and Waite)."""
    n = torch.round(z * 1.44269504)
    r = (z - n * 0.693359375) + n * 2.12194440e-4
    p = torch.full_like(r, _COEFFICIENTS[0])
    for c in _COEFFICIENTS[1:]:
        p = p * r + c
    return p * ((n.int() + 127) << 23).view(torch.float32)
