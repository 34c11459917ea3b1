"""Tender (Lee et al., arXiv 2406.12930, ISCA 2024): activations in groups whose scales are powers of two apart.

1. Perplexity with 8 and 4 bits for weights and activations (table 2): `models`, on a real model with the integer
   kernels that serve it. Channels grouped for each chunk, as in the paper, beside the kernels' one grouping for a
   layer: `chunks`, by rounding float rows.
2. Implicit requantization, which the paper builds an accelerator for (section 4): `products`. Here it is a
   doubling of integer sums in a CPU's registers, beside explicit requantization with the same groups.
3. What makes it exact: `products` too.

The accelerator's speed and energy are claims about hardware. They are left out here.
"""

from __future__ import annotations

from dovetail.reproduce.claim import Experiment
from dovetail.reproduce.runner import native_kernels
from dovetail.reproduce.tender import chunks, models, products
from dovetail.reproduce.tender.effort import EFFORTS, Effort

__all__ = ["EFFORTS", "Effort", "experiments"]


def experiments(effort: Effort) -> list[Experiment]:
    """What measures the claims. ConfigError without native kernels."""
    kernels = native_kernels("tender")
    return [products.experiment(effort, kernels), models.experiment(effort), chunks.experiment(effort)]
