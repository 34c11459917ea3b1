"""InfiniGen (Lee et al., arXiv 2406.19707, OSDI 2024): speculative fetching of KV from slow memory.

1. The inputs of neighbouring layers are alike, and what a layer would choose is guessed from the one before
   (section 4): `guesses`, on a real model.
2. So little is fetched, ahead of its use, and decoding is faster than with all KV fetched (section 5):
   `throughput`, under one limit of device memory, with the slow tier behind an emulated link and on this disk.
3. And nothing is lost (section 5): `throughput` too, needles at the setting of 2.
"""

from __future__ import annotations

from dovetail.reproduce.claim import Experiment
from dovetail.reproduce.infinigen import guesses, throughput
from dovetail.reproduce.infinigen.guesses import EFFORTS, Effort
from dovetail.reproduce.runner import native_kernels

__all__ = ["EFFORTS", "Effort", "experiments"]


def experiments(effort: Effort) -> list[Experiment]:
    """What measures the claims. ConfigError without native kernels."""
    native_kernels("infinigen")
    return [guesses.experiment(effort), throughput.experiment(effort), throughput.needles_experiment(effort)]
