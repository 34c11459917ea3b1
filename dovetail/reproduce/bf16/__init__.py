"""Give Me BF16 or Give Me Death? (Kurtic et al., arXiv 2411.02355, ACL 2025): fp8, int8 and 4-bit weights.

1. How much of the original each format keeps (tables 1 to 3): `formats`, by perplexity.
2. Which format is fastest for one stream and for many (section 5): `formats`, as `dovetail advise` measures it.

Both are of the same checkpoints, made by the paper's recipes, on the kernels that serve them.
"""

from __future__ import annotations

from dovetail.reproduce.bf16 import formats
from dovetail.reproduce.bf16.effort import EFFORTS, Effort
from dovetail.reproduce.claim import Experiment
from dovetail.reproduce.runner import native_kernels

__all__ = ["EFFORTS", "Effort", "experiments"]


def experiments(effort: Effort) -> list[Experiment]:
    """What measures the claims. ConfigError without native kernels."""
    native_kernels("bf16")
    return [formats.experiment(effort)]
