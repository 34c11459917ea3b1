"""How much of the reproduction is run."""

from __future__ import annotations

from dataclasses import dataclass

from dovetail.reproduce import offloading


@dataclass(frozen=True)
class Effort(offloading.Effort):
    """context, rows: tokens of text, and of those after them whose guesses are judged."""

    context: int = 4096
    rows: int = 64


EFFORTS = Effort.by_name(requests=4, use="infinigen:budget=512")
