"""Keys as a product of low rank (ShadowKV, arXiv 2410.21465, section 4), and how keys are rebuilt from it.

The keys of all KV heads of a token, without their rotation, are one row of a matrix [tokens, KV heads * head_dim].
By Eckart and Young, its best approximation of rank r in the sum of squares is coefficients [tokens, r] times a
basis of r orthonormal rows: the eigenvectors of the Gram matrix keys^T keys with the largest eigenvalues. The sum
of the other eigenvalues is what is lost. This costs tokens * width^2 operations. A singular value decomposition
would cost tokens^2 and more memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.ops.rope import rotate

BLOCK = 8192  # rows of keys in float32 at a time


@dataclass(frozen=True)
class LowRank:
    """keys ~ coefficients [tokens, rank] @ basis [rank, width]."""

    coefficients: Tensor
    basis: Tensor

    @property
    def rank(self) -> int:
        return self.basis.shape[0]

    @property
    def bytes(self) -> int:
        return self.coefficients.nbytes + self.basis.nbytes

    def to(self, dtype: torch.dtype) -> LowRank:
        return LowRank(self.coefficients.to(dtype), self.basis.to(dtype))


def factorise(keys: Tensor, rank: int, energy: float = 0.0) -> LowRank:
    """The best approximation of keys [tokens, width] of at most `rank`, in float32 or float64.

    energy: a smaller rank is taken if it keeps this share of the keys' squares. 0 takes the whole `rank`.
    """
    wide = torch.promote_types(keys.dtype, torch.float32)
    gram = torch.zeros(keys.shape[1], keys.shape[1], dtype=wide, device=keys.device)
    for some in keys.split(BLOCK):
        gram += some.to(wide).T @ some.to(wide)
    values, vectors = (x.flip(-1) for x in _eigen(gram))  # the largest first
    rank = min(rank, keys.shape[1], max(1, keys.shape[0]))
    if energy > 0:
        kept = values.clamp_min(0).cumsum(0)
        rank = min(rank, int((kept < energy * kept[-1]).sum()) + 1)
    basis = vectors[:, :rank]
    return LowRank(torch.cat([some.to(wide) @ basis for some in keys.split(BLOCK)]), basis.T.contiguous())


def _eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors, computed on one thread. The many short parallel regions gain little, and on a
    busy machine each of them waits for a thread that is not running."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        values, vectors = torch.linalg.eigh(gram)
        return values, vectors
    finally:
        torch.set_num_threads(threads)


def rebuild(factors: LowRank, tokens: Tensor, head: slice, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotated keys [n, width of `head`] of `tokens` [n], for the columns of one KV head.

    angles: cos and sin of the tokens' positions, as `ops.rope.Rope.angles` gives them, in the type of the result.
    """
    wide = angles[0].dtype
    keys = factors.coefficients[tokens].to(wide) @ factors.basis[:, head].to(wide)
    return rotate(keys[:, None], angles)[:, 0]
