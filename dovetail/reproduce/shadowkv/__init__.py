"""ShadowKV (Sun et al., arXiv 2410.21465, ICML 2025): of a long prompt, the device keeps low-rank keys, landmarks
and a few pages; values come from slow memory.

1. KV on the device becomes six times smaller (abstract, section 5): `resident`, counted for the paper's model.
2. So more requests run together, and give three times the tokens (section 5): `throughput`, on a small model under
   one limit of device memory, with the slow tier behind an emulated link and on this machine's disk.
3. And nothing is lost (section 5): `throughput` too, needles at the setting of 2.
"""

from __future__ import annotations

from dovetail.reproduce.claim import Experiment
from dovetail.reproduce.limited import Effort
from dovetail.reproduce.runner import native_kernels
from dovetail.reproduce.shadowkv import resident, throughput

__all__ = ["EFFORTS", "Effort", "experiments"]

SETTING = "shadowkv:rank=32,budget=512,outliers=2,score=codes"
MEMORY = 320_000_000  # bytes: the plain engine fits one request, the technique six (in the paper 4 and 24)
EFFORTS = Effort.by_name(requests=6, use=SETTING, memory=MEMORY)


def experiments(effort: Effort) -> list[Experiment]:
    """What measures the claims. ConfigError without native kernels."""
    native_kernels("shadowkv")
    return [resident.experiment(), throughput.experiment(effort), throughput.needles_experiment(effort)]
