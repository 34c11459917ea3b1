"""How much of the reproduction is run."""

from __future__ import annotations

from dataclasses import dataclass

from dovetail.advise.workload import Workload, synthetic
from dovetail.reproduce import MODEL
from dovetail.reproduce.quantized import Text

ALONE, MANY = synthetic(128, 128, 1, "one stream"), synthetic(128, 128, 32, "32 streams")


@dataclass(frozen=True)
class Effort:
    """text: what is calibrated on; its `windows` of 512 tokens are measured. rounds: of timed prompts and steps,
    for each workload. group: of 4-bit weights."""

    text: Text
    rounds: int
    workloads: tuple[Workload, ...] = (ALONE, MANY)
    group: int = 64
    model: str = MODEL


EFFORTS = {
    "quick": Effort(Text(16, 512, 4, 512), 3),
    "default": Effort(Text(64, 512, 16, 512), 5),
    "full": Effort(Text(256, 1024, 64, 512), 9),
}
