"""SmartSpec (Liu et al., arXiv 2406.14066): speculation only as far as it raises goodput.

The paper serves five models on GPUs and compares latencies from an idle server to a full one (section 5). Here
the controller that serves is replayed on step times that were measured on a CPU, with acceptances that are drawn.
`sweep` has the loads, beside no guesses and fixed lengths. `limits` has an oracle, useless drafters, and trees.
"""

from __future__ import annotations

from dovetail.reproduce.claim import Experiment
from dovetail.reproduce.smartspec import limits, sweep
from dovetail.reproduce.smartspec.sweep import EFFORTS, Effort

__all__ = ["EFFORTS", "Effort", "experiments"]


def experiments(effort: Effort) -> list[Experiment]:
    """What measures the claims."""
    return [sweep.experiment(effort), limits.experiment(effort)]
