"""Tender (Lee et al., arXiv 2406.12930, ISCA 2024): activations in groups whose scales are powers of two apart.

1. Perplexity with 8 and 4 bits for weights and activations (table 2): `models`, on a real model with the integer
   kernels that serve it.
2. Implicit requantization, which the paper builds an accelerator for (section 4): `products`. Here it is a
   doubling of integer sums in a CPU's registers, beside explicit requantization with the same groups.
3. What makes it exact: `products` too.

The accelerator's speed and energy are claims about hardware. They are left out here.
"""

from __future__ import annotations

from dovetail.reproduce.claim import Experiment
from dovetail.reproduce.runner import native_kernels
from dovetail.reproduce.tender import models, products
from dovetail.reproduce.tender.effort import EFFORTS, Effort

__all__ = ["EFFORTS", "Effort", "experiments"]


def experiments(effort: Effort) -> list[Experiment]:
    """What measures the claims. ConfigError without native kernels."""
    return [products.experiment(effort, native_kernels("tender")), models.experiment(effort)]
