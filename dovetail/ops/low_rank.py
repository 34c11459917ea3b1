"""Keys as a product of low rank (ShadowKV, arXiv 2410.21465, section 4), and how keys are rebuilt from it.

The keys of all KV heads of a token, without their rotation, are one row of a matrix [tokens, KV heads * head_dim].
By Eckart and Young, its best approximation of rank r in the sum of squares is coefficients [tokens, r] times a
basis of r orthonormal rows: the eigenvectors of the Gram matrix keys^T keys with the largest eigenvalues. The sum
of the other eigenvalues is what is lost. This costs tokens * width^2 operations. A singular value decomposition
would cost tokens^2 and more memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dovetail.ops.memory import as_tensor, rounded
from dovetail.ops.rope import rotate

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 8192  # rows of keys at a time


@dataclass(frozen=True)
class LowRank:
    """keys ~ coefficients [tokens, rank] @ basis [rank, width]. kind: of their values, one of
    `ops.memory.ELEMENTS`."""

    coefficients: NDArray[Any]
    basis: NDArray[Any]
    kind: str = "float32"

    @property
    def rank(self) -> int:
        return self.basis.shape[0]

    @property
    def bytes(self) -> int:
        return self.coefficients.nbytes + self.basis.nbytes

    def to(self, kind: str) -> LowRank:
        """The same as `kind`, from float32 or float64."""
        return LowRank(rounded(self.coefficients, kind), rounded(self.basis, kind), kind)


def factorise(keys: NDArray[Any], rank: int, energy: float = 0.0) -> LowRank:
    """The best approximation of keys [tokens, width] in float32 or float64, of at most `rank`, in their type.

    energy: a smaller rank is taken if it keeps this share of the keys' squares. 0 takes the whole `rank`.
    """
    blocks = [keys[at : at + BLOCK] for at in range(0, max(1, len(keys)), BLOCK)]
    gram = sum((some.T @ some for some in blocks), np.zeros([keys.shape[1]] * 2, keys.dtype))
    values, vectors = (x[..., ::-1] for x in np.linalg.eigh(gram))  # the largest first
    rank = min(rank, keys.shape[1], max(1, keys.shape[0]))
    if energy > 0:
        kept = values.clip(0).cumsum()
        rank = min(rank, int((kept < energy * kept[-1]).sum()) + 1)
    basis = np.ascontiguousarray(vectors[:, :rank])
    return LowRank(
        np.concatenate([some @ basis for some in blocks]), np.ascontiguousarray(basis.T), str(keys.dtype)
    )


def rebuild(factors: LowRank, tokens: Tensor, head: slice, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotated keys [n, width of `head`] of `tokens` [n], for the columns of one KV head.

    angles: cos and sin of the tokens' positions, as `ops.rope.Rope.angles` gives them, in the type of the result.
    """
    wide = angles[0].dtype
    coefficients, basis = (as_tensor(a, factors.kind).to(wide) for a in (factors.coefficients, factors.basis))
    found: Tensor = rotate((coefficients[tokens] @ basis[:, head])[:, None], angles)[:, 0]
    return found
