"""How much is run of a system whose KV lies in slow memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from dovetail.reproduce import MODEL
from dovetail.reproduce.limited import Limit
from dovetail.reproduce.needles import Needles

MEMORY, CONTEXT = 402_000_000, 7000  # bytes, tokens of a prompt
AMOUNTS = {  # rounds and their steps, lengths of needles and trials
    "quick": (4, 6, "2048", 2),
    "default": (9, 8, "2048,4096", 3),
    "full": (9, 12, "1024,2048,4096,7424", 9),
}


@dataclass(frozen=True)
class Effort:
    """limit: of device memory, and the batch under it; needles: the grid; use: the technique in all of it."""

    limit: Limit
    needles: Needles
    use: str

    @classmethod
    def by_name(cls, requests: int, use: str, memory: int = MEMORY) -> dict[str, Self]:
        """`requests`: of the batch; `memory`: bytes of the device."""
        return {
            name: cls(
                Limit(MODEL, memory, CONTEXT, requests, rounds, steps),
                Needles(MODEL, lengths, "10,50,90", trials),
                use,
            )
            for name, (rounds, steps, lengths, trials) in AMOUNTS.items()
        }
