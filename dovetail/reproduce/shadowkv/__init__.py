"""ShadowKV (Sun et al., arXiv 2410.21465, ICML 2025): of a long prompt, the device keeps low-rank keys, landmarks
and a few pages; values come from slow memory.

1. KV on the device becomes six times smaller (abstract, section 5): `resident`, counted for their model's shape.
2. So more requests run together, and bring three times the tokens (section 5): `throughput`, on a small model
   under one limit of device memory, with the slow tier behind an emulated link and on this machine's disk.
3. And nothing is lost (section 5): `quality`, at the setting of 2.
"""

from __future__ import annotations

from dovetail.core.errors import ConfigError
from dovetail.ops import cpu
from dovetail.reproduce.claim import Experiment
from dovetail.reproduce.shadowkv import quality, resident, throughput
from dovetail.reproduce.shadowkv.effort import EFFORTS, Effort

__all__ = ["EFFORTS", "Effort", "experiments"]


def experiments(effort: Effort) -> list[Experiment]:
    """What measures the claims. ConfigError without native kernels."""
    if not cpu.isas():
        raise ConfigError("reproducing shadowkv needs the native kernels, which were not built: `pip install .`")
    return [resident.experiment(), throughput.experiment(effort), quality.experiment(effort)]
