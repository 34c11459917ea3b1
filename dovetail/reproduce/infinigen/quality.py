"""Needles at the setting of the throughput (InfiniGen, section 5)."""

from __future__ import annotations

from dovetail.reproduce import needles
from dovetail.reproduce.claim import Experiment
from dovetail.reproduce.infinigen.effort import Effort

PAPER = "section 5 (OPT and Llama-2, tasks of up to 2048 tokens): as good as everything at under 10 % of KV"
WHY = "The paper has no task that hangs on one place in a long context."


def experiment(effort: Effort) -> Experiment:
    return needles.experiment(effort.needles, needles.Subject(effort.use, PAPER, WHY, slow_tier=True))
