"""Needles at the setting of the throughput (ShadowKV, section 5)."""

from __future__ import annotations

from dovetail.reproduce import needles
from dovetail.reproduce.claim import Experiment
from dovetail.reproduce.offloading import Effort

PAPER = "section 5 (RULER at 128K, Llama-3-8B-1M): 86.88 where everything read gives 86.68"
WHY = (
    "Rank 32 is a sixth of this model's 3 KV heads of 64, as 160 is of 8 heads of 128 in the paper. Pages are "
    "chosen by codes, because landmarks lose needles here, and one page of a head has exact keys."
)


def experiment(effort: Effort) -> Experiment:
    return needles.experiment(effort.needles, needles.Subject(effort.use, PAPER, WHY, slow_tier=True))
