"""Needles at the setting of decoding (Quest, section 4.2)."""

from __future__ import annotations

from dataclasses import replace

from dovetail.reproduce import needles
from dovetail.reproduce.claim import Experiment
from dovetail.reproduce.quest.effort import Effort

PAPER = (
    "section 4.2 (passkeys at 10K, LongChat-7B): 65, 99, 99, 99 and 100 % at 32, 64, 128, 256 and 512 tokens, "
    "other methods at most 8 %"
)
WHY = (
    "The bound takes the best of each dimension from different tokens, and is far above what any token has; "
    "codes tell tokens apart."
)


def experiment(effort: Effort) -> Experiment:
    beside = {"the paper's bound": replace(effort, score="bound").use}
    return needles.experiment(effort.needles, needles.Subject(effort.use, PAPER, WHY, beside=beside))
