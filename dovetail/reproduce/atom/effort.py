"""How much of the reproduction is run."""

from __future__ import annotations

from dataclasses import dataclass

from dovetail.reproduce import MODEL
from dovetail.reproduce.quantized import Text


@dataclass(frozen=True)
class Effort:
    """text: what is calibrated and measured on. group: columns that share a scale; as many are outliers.

    shapes: (K = N, rows) of timed products; cold: bytes of weights that a timed run reads. context: tokens of each
    request that decodes in a fixed memory; its `answer` must last while other prompts are read. rounds of both,
    and `steps` of decoding in one.
    """

    text: Text
    context: int
    rounds: int
    steps: int
    group: int = 64
    shapes: tuple[tuple[int, int], ...] = ((4096, 1), (4096, 32), (4096, 512))
    cold: int = 64 << 20
    model: str = MODEL
    answer: int = 400


EFFORTS = {
    "quick": Effort(Text(8, 512, 1, 1024), 1024, 7, 4),
    "default": Effort(Text(32, 512, 4, 2048), 1024, 9, 8),
    "full": Effort(Text(128, 2048, 12, 2048), 2048, 15, 8),
}
