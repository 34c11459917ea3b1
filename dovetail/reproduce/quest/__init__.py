"""Quest (Tang et al., arXiv 2406.10774, ICML 2024): generated tokens read the pages whose keys may matter most.

1. Self-attention is faster because it reads less, with the estimate counted (abstract and section 4.3):
`attention`,
   on random keys that are not in the caches.
2. Decoding as a whole is faster too (section 4.3): `decode`, the whole engine on a real model.
3. And what matters is found (section 4.2): `decode` too, needles at its setting.

Everything is run, nothing simulated. The paper's figures are of a GPU and of models with as many KV heads as query
heads, so both sides are ratios to their own dense attention.
"""

from __future__ import annotations

from dovetail.reproduce.claim import Experiment
from dovetail.reproduce.quest import attention, decode
from dovetail.reproduce.quest.effort import EFFORTS, Effort
from dovetail.reproduce.runner import native_kernels

__all__ = ["EFFORTS", "Effort", "experiments"]


def experiments(effort: Effort) -> list[Experiment]:
    """What measures the claims. ConfigError without native kernels."""
    kernels = native_kernels("quest")
    return [
        attention.experiment(effort, kernels),
        decode.experiment(effort, kernels),
        decode.needles_experiment(effort),
    ]
