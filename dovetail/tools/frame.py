"""Exactly how a model writes calls: the text around names and arguments."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dovetail.tools.call import Call


@dataclass(frozen=True)
class Frame:
    """What stands around calls.

    opening, closing: before the first call and after the last. head, middle, tail: before a name, between it and
    the arguments, after them. between: between two calls.
    """

    head: str
    middle: str
    tail: str
    between: str = "\n"
    opening: str = ""
    closing: str = ""

    def written(self, calls: Iterable[Call]) -> str:
        texts = [f"{self.head}{call.name}{self.middle}{call.arguments}{self.tail}" for call in calls]
        return f"{self.opening}{self.between.join(texts)}{self.closing}"
