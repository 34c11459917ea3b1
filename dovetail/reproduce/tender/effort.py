"""How much of the reproduction is run."""

from __future__ import annotations

from dataclasses import dataclass

from dovetail.reproduce import MODEL
from dovetail.reproduce.quantized import Text


@dataclass(frozen=True)
class Effort:
    """text: what is calibrated and measured on. down: whether scales that are rounded down are tried too.

    rounds: of timed products of `shapes` (K = N, rows). cold: bytes of weights that a timed run reads."""

    text: Text
    down: bool
    rounds: int
    shapes: tuple[tuple[int, int], ...] = ((576, 32), (4096, 32), (4096, 512))
    cold: int = 64 << 20
    model: str = MODEL


EFFORTS = {
    "quick": Effort(Text(4, 1024, 1, 1024), False, 9, ((576, 32), (4096, 32))),
    "default": Effort(Text(32, 2048, 4, 2048), True, 15),
    "full": Effort(Text(128, 2048, 12, 2048), True, 31),
}
