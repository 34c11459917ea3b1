"""Atom (Zhao et al., arXiv 2310.19102, MLSys 2024): 4-bit weights, activations and KV, with 8 bits for outliers.

1. Perplexity, and what each step of the method brings (section 5): `quality`, on a real model with the integer
   kernels that serve it.
2. Bits of a weight, and the speed of mixed products (section 5): `products`.
3. Throughput in a fixed memory, where smaller KV means larger batches (section 5): `batches`.
"""

from __future__ import annotations

from dovetail.reproduce.atom import batches, products, quality
from dovetail.reproduce.atom.effort import EFFORTS, Effort
from dovetail.reproduce.claim import Experiment
from dovetail.reproduce.runner import native_kernels

__all__ = ["EFFORTS", "Effort", "experiments"]


def experiments(effort: Effort) -> list[Experiment]:
    """What measures the claims. ConfigError without native kernels."""
    kernels = native_kernels("atom")
    return [products.experiment(effort, kernels), quality.experiment(effort), batches.experiment(effort)]
