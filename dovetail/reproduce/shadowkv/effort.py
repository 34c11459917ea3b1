"""How much of the reproduction is run."""

from __future__ import annotations

from dataclasses import dataclass

from dovetail.reproduce.limited import Limit
from dovetail.reproduce.needles import Needles

MODEL = "smollm2-135m"
MB = 1_000_000
SETTING = "shadowkv:rank=32,budget=512,chunk=4,outliers=0,score=codes"


@dataclass(frozen=True)
class Effort:
    """limit: of device memory, and the batch under it; needles: the grid; use: the technique's setting in both."""

    limit: Limit
    needles: Needles
    budget: int = 512
    use: str = SETTING


def _effort(rounds: int, steps: int, lengths: str, trials: int) -> Effort:
    limit = Limit(MODEL, 402 * MB, 7000, 6, rounds, steps)
    return Effort(limit, Needles(MODEL, lengths, "10,50,90", trials))


EFFORTS = {
    "quick": _effort(4, 6, "2048", 2),
    "default": _effort(9, 8, "2048,4096", 3),
    "full": _effort(9, 12, "1024,2048,4096,7424", 9),
}
